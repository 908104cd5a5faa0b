"""Records of a training run as TensorBoard curves, through torch's own SummaryWriter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybridtheory.errors import UserError
from probes.records import Evaluation, Record, Step

CURVES = ("loss", "accuracy", "calibrated_accuracy", "auc", "f1", "calibrated_f1", "floor")


class Board:
    """Writes to ``folder``; after a resume the curves go on from step ``start``, and what was written beyond it is hidden."""

    def __init__(self, folder: Path, start: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "--tensorboard needs the package tensorboard: pip install tensorboard, or leave the option out (the records hold the same)"
            ) from None
        self.writer: Any = SummaryWriter(str(folder), purge_step=start or None)

    def add(self, record: Record) -> None:
        if isinstance(record, Step):
            self.writer.add_scalar("train/loss", record.loss, record.step)
            for name, rate in record.lr.items():
                self.writer.add_scalar(f"lr/{name}", rate, record.step)
            for name, value in record.extra.items():
                self.writer.add_scalar(f"train/{name}", value, record.step)
            if record.slopes:
                size = (sum(s * s for s in record.slopes) / len(record.slopes)) ** 0.5
                self.writer.add_scalar("train/slope", size, record.step)
            self.writer.add_scalar("cost/equivalents", record.forwards + 2 * record.backwards, record.step)
        elif isinstance(record, Evaluation):
            for name in CURVES:
                if (value := getattr(record, name)) is not None:
                    self.writer.add_scalar(f"{record.split}/{name}", value, record.step)

    def close(self) -> None:
        self.writer.close()
