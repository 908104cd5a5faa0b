"""A run folder: the records of one run, appended as they are measured, and the report that was made of them.

The folder appears with the first measurement, so a run that fails before it leaves nothing behind. Each line is
flushed to the disk before the next measurement starts; a whole file (report, figure) is written beside its place and
renamed, so that it is never seen half written.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from hybridtheory.errors import UserError
from probes.jsonl import decode, differences, encode, read_lines, stable
from probes.records import (
    Captured,
    End,
    Epoch,
    Estimator,
    Evaluation,
    Header,
    Point,
    Record,
    Secant,
    Step,
    StepMemory,
    StepTime,
    SweepTask,
)

try:
    import fcntl
except ImportError:  # no such lock on Windows: two commands on one folder are then not caught
    fcntl = None  # type: ignore[assignment]

RECORDS = "records.jsonl"
MEASUREMENTS = (Point, Secant, Estimator, Epoch, Step, Evaluation, StepMemory, StepTime, SweepTask, Captured)


def _candidates(probe: str, model: str, data: str, root: Path) -> Iterator[Path]:
    """root/PROBE-MODEL-DATA, then -2, -3, ...: short, sortable, without the time of day."""
    parts = (probe, Path(model).name, Path(data).name)
    stem = "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.") or "x" for part in parts)
    return (root / (stem if i == 1 else f"{stem}-{i}") for i in range(1, 10_000))


def default_folder(probe: str, model: str, data: str, root: Path = Path("runs")) -> Path:
    """The first name for a new run that is not taken."""
    return next(path for path in _candidates(probe, model, data, root) if not path.exists())


def latest_folder(probe: str, model: str, data: str, root: Path = Path("runs")) -> Path | None:
    """The last of the names that are taken: what --resume goes on with."""
    taken = list(itertools.takewhile(Path.exists, _candidates(probe, model, data, root)))
    return taken[-1] if taken else None


def check_free(folder: Path) -> None:
    """UserError when `folder` cannot take a new run; called before any work."""
    if (folder / RECORDS).exists():
        raise UserError(f"{folder} already holds a run: add --resume to continue it, or give another --out")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder as --out")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run: give an empty or new folder as --out")
    parent = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    try:  # asking by doing: permission bits say yes to root on file systems that say no
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be created in {parent} ({error.strerror or error}): give another --out"
        ) from None


def load(folder: Path | str) -> list[Record]:
    """The records of a run folder (or of a .jsonl file), a cut-off last line left out."""
    path = Path(folder) / RECORDS if Path(folder).is_dir() else Path(folder)
    if not path.exists():
        raise UserError(f"{folder} holds no run: there is no {RECORDS} in it")
    records = _read(path)
    if not records:
        raise UserError(f"{path} holds no complete record")
    return records


def _read(path: Path) -> list[Record]:
    return read_lines(path.read_bytes().decode("utf-8", errors="replace"), str(path))[0]


def finished(records: Iterable[Record]) -> bool:
    """Whether the run's last End says so."""
    ends = [r for r in records if isinstance(r, End)]
    return bool(ends) and ends[-1].reason == "finished"


def whole(folder: Path | str) -> bool:
    """Whether a folder holds a finished run: False where there is none, and where no line of it is complete yet. UserError: a complete
    line that cannot be read.
    """
    path = Path(folder) / RECORDS
    return path.is_file() and finished(_read(path))


def _said(record: Record) -> str:
    """What a record says, as it would be read back: 16 in a field of floats is 16.0 in the file."""
    return type(record).__name__ + json.dumps(stable(decode(encode(record))), sort_keys=True)


class RunFolder:
    """Appends records to FOLDER/records.jsonl; the folder is made at the first Point or Secant.

    resume=True keeps what is there (`.done`), cuts a last line that was not finished (`.dropped` says so) and appends;
    the header that comes then must describe the same measurement. writes=False reads and writes nothing: another process does.
    """

    def __init__(self, folder: Path | str, resume: bool = False, writes: bool = True) -> None:
        self.path = Path(folder)
        self.done: list[Record] = []
        self.dropped = ""
        self.started = False
        self._done_said: set[str] = set()
        self._pending: list[Record] = []
        self._file: IO[bytes] | None = None
        self._writes = writes  # of several processes the first one owns the folder
        if resume:
            self._reopen()
        elif self._writes:
            check_free(self.path)

    def append(self, record: Record) -> bool:
        """Write `record` to the disk before returning, once there is a measurement to keep.

        False where a resumed run says again what already stands in the file, time and place aside: the file of an
        interrupted and resumed run is then that of an uninterrupted one.
        """
        if self.started and isinstance(record, Header):
            self._check_same(record)
        if self.done and _said(record) in self._done_said:
            return False
        self._pending.append(record)
        if self.started or isinstance(record, MEASUREMENTS):
            self._flush()
        return True

    def write(self, name: str, save: Callable[[Path], None]) -> Path:
        """Let `save(path)` write a whole file, then rename it to FOLDER/name: readers see the old file or the new
        one.
        """
        target = self.path / name
        if not target.resolve().is_relative_to(self.path.resolve()):
            raise UserError(f"{name!r} lies outside the run folder {self.path}: nothing was written")
        if not self._writes:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".partial-{target.name}")
        try:
            save(partial)
            os.replace(partial, target)
        except OSError as error:
            raise UserError(f"{target} could not be written: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)
        return target

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _reopen(self) -> None:
        path = self.path / RECORDS
        if not path.exists():
            raise UserError(f"--resume: {self.path} holds no run (no {RECORDS} in it)")
        if self._writes:
            self._file = self._open(path)
        raw = path.read_bytes()
        # A line that was cut may end inside a character: cut at the last newline first, in bytes.
        complete = raw[: raw.rfind(b"\n") + 1]
        if len(raw) > len(complete):
            lost = len(raw) - len(complete)
            self.dropped = f"the last line of {path} was cut short ({lost} bytes) and is measured again"
            if self._file is not None:
                self._file.truncate(len(complete))
        self.done, _ = read_lines(complete.decode("utf-8"), str(path))
        if self.done and isinstance(self.done[-1], End) and self.done[-1].reason != "finished":
            # The run did not end there after all.
            if self._file is not None:
                self._file.truncate(complete[:-1].rfind(b"\n") + 1)
            self.done.pop()
        self.started = bool(self.done)
        self._done_said = {_said(record) for record in self.done}

    def _open(self, path: Path) -> IO[bytes]:
        file = open(path, "ab", buffering=0)  # noqa: SIM115 - it stays open as long as the run
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                message = f"{path} is being written by another process: wait for it, or give another --out"
                raise UserError(message) from None
        return file

    def _check_same(self, header: Header) -> None:
        old = next(r for r in self.done if isinstance(r, Header))
        changed = differences(old, header)
        if changed:
            listed = "; ".join(changed[:3])
            raise UserError(f"--resume: {self.path} is a run with other settings ({listed}): repeat its command")

    def _flush(self) -> None:
        if not self._writes:
            self._pending.clear()
            self.started = True
            return
        lines = "".join(encode(record) + "\n" for record in self._pending)
        try:
            if self._file is None:
                self.path.mkdir(parents=True, exist_ok=True)
                self._file = self._open(self.path / RECORDS)
            size = self._file.seek(0, os.SEEK_END)
            try:
                self._file.write(lines.encode("utf-8"))
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(size)  # a full disk must not leave half a line in front of the next one
                raise
        except OSError as error:
            raise UserError(f"{self.path / RECORDS} could not be written: {error.strerror or error}") from error
        self._pending.clear()
        self.started = True
