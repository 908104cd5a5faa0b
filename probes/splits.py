"""Which rows are measured and which are kept for testing: seeded choices over a source's splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from hybridtheory.errors import UserError
from probes.columns import Source
from probes.encoding import Encoder, Row
from probes.prompts import Example

HELD_OUT = 0.2  # share of a source without splits that is kept for testing


def shuffled(source: Source, seed: int) -> Sequence[Any]:
    """The training records in the seeded order in which they are measured."""
    if source.running or len(source.splits) == 1:
        return split_records(source, seed)["train"]
    records = source.splits["train"]
    return _Picked(records, order(len(records), seed))


def encode(
    source: Source, records: Sequence[Any], encoder: Encoder, rows: int | None, seed: int
) -> tuple[list[Row], list[Any]]:
    """The first ``rows`` rows that can be tokenised, and the records they came from; every label is checked."""
    if source.running:
        found = [row for r in records for row in encoder.running(r["text"])]
        if not found:
            raise UserError(f"the data {source.name} is too short: it has fewer than 2 tokens")
        found = found[: _cut(len(found))]
        return [found[i] for i in order(len(found), seed)[:rows]], list(records)
    found, used = [], []
    for record in records:
        if rows is not None and len(found) == rows:
            break
        row = encoder(checked(source, record))
        if row is not None:
            found.append(row)
            used.append(record)
    if not found:
        raise UserError(f"the data {source.name} is empty: none of its {len(records)} rows has 2 tokens or more")
    return found, used


def checked(source: Source, record: Any) -> Example:
    """The record as an example whose label is one of its options."""
    try:
        example = source.render(record)
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"a row of {source.name} cannot be read ({error!r}): its columns are {', '.join(record)}"
        ) from None
    if example.options and not 0 <= example.label < len(example.options):
        raise UserError(
            f"a row of {source.name} has the label {example.label}, outside 0 to {len(example.options) - 1} "
            f"({', '.join(o.strip() for o in example.options)}): drop unlabelled rows or pass the label words"
        )
    return example


class Splits(Mapping[str, list[Row]]):
    """All rows by split, tokenised when first asked for: training wants them, a measurement of 16 rows does not."""

    def __init__(self, source: Source, encoder: Encoder, seed: int) -> None:
        self._source, self.encoder, self._seed = source, encoder, seed
        self._records = split_records(source, seed)
        self._done: dict[str, list[Row]] = {}

    def __getitem__(self, name: str) -> list[Row]:
        if name not in self._done:
            records = self._records[name]
            if self._source.running:
                rows = [row for r in self._records["train"] for row in self.encoder.running(r["text"])]
                cut = _cut(len(rows))
                self._done |= {"train": rows[:cut], "test": rows[cut:]}
            else:
                self._done[name] = encode(self._source, records, self.encoder, None, self._seed)[0]
        return self._done[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def split_records(source: Source, seed: int) -> dict[str, Sequence[Any]]:
    """The source's splits; one without a held-out part gives up its last fifth after a seeded shuffle."""
    splits = dict(source.splits)
    if source.running:
        return splits | {"test": []}  # cut after tokenisation
    if len(splits) > 1:
        return splits
    ((_, records),) = splits.items()
    picked = order(len(records), seed)
    cut = _cut(len(picked))
    return {"train": _Picked(records, picked[:cut]), "test": _Picked(records, picked[cut:])}


def _cut(n: int) -> int:
    return max(1, round((1 - HELD_OUT) * n))


def order(n: int, seed: int) -> list[int]:
    """A permutation of range(n), a pure function of the seed."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


class _Picked(Sequence[Any]):
    """A reordered view of records, which may be memory-mapped."""

    def __init__(self, records: Sequence[Any], picked: Sequence[int]) -> None:
        self._records, self._picked = records, picked

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self._records[j] for j in self._picked[i]]
        return self._records[self._picked[i]]

    def __len__(self) -> int:
        return len(self._picked)
