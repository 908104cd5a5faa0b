"""Independent pieces of work side by side, for operations that use one core however many threads torch has: drawing random numbers.

The pool's threads run torch with one thread each, so pieces do not compete inside, and a piece that asks for the pool runs by itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

WORTH = 1 << 17  # numbers drawn (1 ms) below which handing work over is not worth it

_pool: tuple[int, ThreadPoolExecutor] | None = None  # with how many threads it has
_lock = threading.Lock()


def _threads(n: int) -> ThreadPoolExecutor:
    """n threads; made again when torch's number changes, and after a fork, which threads do not survive."""
    global _pool
    with _lock:
        if _pool is None or _pool[0] != n:
            started = threading.Barrier(n + 1)

            def alone() -> None:
                torch.get_num_threads()  # a thread's first question sets its number: only then can it be another
                torch.set_num_threads(1)
                started.wait()

            pool = ThreadPoolExecutor(n, "hybridtheory", alone)
            for _ in range(n):
                pool.submit(lambda: None)
            started.wait()
            _pool = n, pool
            # The number is each thread's own, but torch also hands the last one that was set to threads that start later.
            torch.set_num_threads(n)
        return _pool[1]


def _forget() -> None:
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def each(work: Callable[[T], object], items: Iterable[T], size: int, device: torch.device) -> None:
    """work(item) for every item, in any order: in turn, or on as many threads as torch has where ``size`` numbers are worth it.

    Only for work whose result does not depend on the order. On a device other than the CPU it is in turn.
    """
    n = torch.get_num_threads()
    if n == 1 or size <= WORTH or device.type != "cpu":
        for item in items:
            work(item)
        return
    shared, gradients = iter(list(items)), torch.is_grad_enabled()

    def run() -> None:
        with torch.set_grad_enabled(gradients):  # a thread's own setting
            for item in shared:  # each is handed to one thread: a list's iterator is atomic
                work(item)

    pool = _threads(n)
    for done in [pool.submit(run) for _ in range(n)]:
        done.result()
