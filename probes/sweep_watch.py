"""Workers of this machine that hang: each leaves a sign of life at its forward passes, and one that leaves none is ended.

A worker that is ended is a worker that died, and is told as one. Forward passes are what every part of a run is made of, steps and
evaluations alike; how long loading takes is not known, and is not watched.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

OFTEN = 0.25  # seconds between two signs of life, at least


@contextmanager
def living(model: nn.Module, sign: str | None) -> Iterator[None]:
    """In the worker: the file ``sign`` holds its process and is touched while the model computes. None: nobody watches."""
    if sign is None:
        yield
        return
    path, last = Path(sign), time.monotonic()
    path.write_text(str(os.getpid()))

    def touch(module: nn.Module, arguments: object) -> None:
        nonlocal last
        if time.monotonic() - last >= OFTEN:
            last = time.monotonic()
            path.touch()

    handle = model.register_forward_pre_hook(touch)
    try:
        yield
    finally:
        handle.remove()
        path.unlink(missing_ok=True)


@dataclass
class Watch:
    """In the sweep: ends workers that leave no sign of life; ``hung``: the cells that they ran."""

    hung: set[str] = field(default_factory=set)
    _folder: str = ""
    _seen: dict[str, tuple[int, int]] = field(default_factory=dict)  # by cell: its last sign, and looks since

    def sign(self, cell: str) -> str | None:
        """Where the worker of a cell leaves its signs."""
        return f"{self._folder}/{cell}" if self._folder else None

    def look(self, timeout: float) -> None:
        """Once at the sign of every worker; those that looked the same for ``timeout`` seconds of looks are ended."""
        for path in Path(self._folder).iterdir():
            with suppress(OSError, ValueError):  # it has just ended, or has not yet said who it is
                self._look(path, timeout)

    def _look(self, path: Path, timeout: float) -> None:
        # Looks are counted and not seconds: a machine that slept, or a sweep that was stopped, finds its workers well.
        touched = path.stat().st_mtime_ns
        before, looks = self._seen.get(path.name, (touched, 0))
        self._seen[path.name] = touched, looks + 1 if touched == before else 0
        if looks * OFTEN > timeout:
            worker = int(path.read_text())
            self.hung.add(path.name)
            path.unlink()
            os.kill(worker, signal.SIGKILL)

    @contextmanager
    def watching(self, timeout: float) -> Iterator[None]:
        """``timeout``: seconds without a sign of life."""
        over = threading.Event()
        self._seen.clear()

        def watch() -> None:
            while not over.wait(OFTEN):
                self.look(timeout)

        with tempfile.TemporaryDirectory(prefix="hybrid-sweep-", ignore_cleanup_errors=True) as self._folder:
            thread = threading.Thread(target=watch, daemon=True)
            thread.start()
            try:
                yield
            finally:
                over.set()
                thread.join()
                self._folder = ""
