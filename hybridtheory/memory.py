"""How many bytes this process (or its device) holds and may still take."""

from __future__ import annotations

import ctypes
import os
from functools import cache

import psutil
import torch

GIVEN_BACK = 1 << 26  # bytes that are worth the walk through the heap
# An estimate of a peak is promised to lie within this share of the peak, or within so many bytes of it where that is more.
SHARE, BYTES = 0.2, 100 << 20
_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # mallopt's names for them


def used(device: torch.device) -> int:
    """Bytes held now: allocated tensors on CUDA; on the CPU the resident set less what the allocator keeps for the next call."""
    if device.type == "cuda":
        return resident(device)
    held, heap = psutil.Process().memory_info(), _heap()
    if heap is None:
        return int(held.rss)
    # What is kept free leaves the resident set when it is given back, and stays in glibc's count of it: of two numbers that can
    # only be too small, the larger.
    return int(max(held.rss - heap.fordblks, min(heap.uordblks + heap.hblkhd + held.shared, held.rss)))


def resident(device: torch.device) -> int:
    """Bytes that the system says are held now: allocated tensors on CUDA, the resident set on the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def allocated(device: torch.device) -> int:
    """Bytes that were asked for and not freed: what two readings differ by is exact, also where freed blocks are kept."""
    heap = None if device.type == "cuda" else _heap()
    return resident(device) if heap is None else int(heap.uordblks + heap.hblkhd)


def keep_freed() -> None:
    """Let glibc's allocator keep freed blocks, in huge pages, instead of handing each back to the system: what is as large as a
    gradient is otherwise mapped, zeroed page by page and unmapped at every use (a product on SmolLM2-135M: 9.7 s, and 6.2 s with
    this). For programs that own their process, before torch allocates. What is kept counts in the resident set: `make_room` hands it
    back where a limit comes near. Elsewhere than on glibc it does nothing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def give_back(worth: int = GIVEN_BACK) -> None:
    """Hand freed blocks back to the system after all, where they are more than ``worth`` bytes: where a phase ends whose blocks the
    next one will not fill."""
    libc, heap = _glibc(), _heap()
    if libc is not None and heap is not None and heap.fordblks > worth:
        libc.malloc_trim(0)


def within(estimated: int, measured: int) -> bool:
    """Whether the promise was kept."""
    return abs(estimated - measured) <= max(SHARE * measured, BYTES)


def most(estimated: int) -> int:
    """The largest peak of which the estimate keeps the promise."""
    return max(int(estimated / (1 - SHARE)), estimated + BYTES)


def watched(estimated: int) -> int:
    """The level above which freed blocks are handed back: halfway to the most, since one call may still take more."""
    return (estimated + most(estimated)) // 2


def make_room(wanted: int, device: torch.device, limit: int | None) -> bool:
    """Hand freed blocks back before a call that takes ``wanted`` bytes, where the resident set would pass ``limit`` with them: a
    block that is free may still not be where, or as large as, the next one is wanted. False where it would pass it even so."""
    if limit is None or device.type == "cuda" or resident(device) + wanted <= limit:
        return True
    give_back()
    return resident(device) + wanted <= limit


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallinfo2.restype = _Mallinfo2  # glibc 2.33
    except (OSError, AttributeError):
        return None
    return libc


def _heap() -> _Mallinfo2 | None:
    """glibc's own account: bytes allocated (``uordblks`` of the heap, ``hblkhd`` mapped) and free in the heap (``fordblks``)."""
    libc = _glibc()
    return None if libc is None else libc.mallinfo2()


def free(device: torch.device, limit: int | None = None) -> int:
    """Bytes that may still be taken: nine tenths of what the machine has available, or what is left under ``limit``."""
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    available = available * 9 // 10
    return max(available if limit is None else min(available, limit - used(device)), 0)


def exhausted(error: BaseException) -> bool:
    """Whether an exception says that memory ran out (on the CPU torch's allocator and oneDNN raise plain RuntimeErrors)."""
    text = str(error)
    said = ("can't allocate memory", "not enough memory", "could not create a primitive", "could not create a memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(s in text for s in said)
    )
