"""How many bytes this process (or its device) holds and may still take."""

from __future__ import annotations

import psutil
import torch


def used(device: torch.device) -> int:
    """Bytes held now: allocated tensors on CUDA, resident set size on the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def free(device: torch.device, limit: int | None = None) -> int:
    """Bytes that may still be taken: nine tenths of what the machine has available, or what is left under ``limit``."""
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    available = available * 9 // 10
    return max(available if limit is None else min(available, limit - used(device)), 0)


def exhausted(error: BaseException) -> bool:
    """Whether an exception says that memory ran out (torch's CPU allocator raises a plain RuntimeError)."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
    )
