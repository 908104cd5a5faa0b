"""How a record of an unknown data set reads as an `Example`, by the names of its columns.

Plain text; prompt + completion; text (or a pair of texts) + label, asked with a template and answered by label words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybridtheory.errors import UserError
from probes.prompts import Example, Prompt, Record

TEXT = ("text", "sentence", "content", "review", "document")
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "passage"), ("text", "text_pair"))
LABEL = ("label", "labels", "class", "target")


@dataclass(frozen=True)
class Source:
    """Raw records by split, and the reader.

    splits   "train", and "dev"/"test" where the source has them; sequences of dicts (a list or a memory-mapped data
             set).
    render   record -> Example.
    labels   the label words in the order of the label's index; () for plain text.
    running  True for a text file: one long text, cut into rows of the context's length instead of truncated.
    """

    name: str
    splits: dict[str, Sequence[Record]]
    render: Callable[[Record], Example]
    labels: tuple[str, ...] = ()
    running: bool = False


def plain(column: str) -> Callable[[Record], Example]:
    """Records that are texts and nothing else."""

    def render(r: Record) -> Example:
        text = _text(r, column)
        return Example((Prompt("", text, ""),), text=(text,))

    return render


def _text(record: Record, column: str) -> str:
    if record.get(column) is None:
        raise UserError(f"a row of the data has nothing in its column {column!r}: drop it or fill it in")
    return str(record[column])


def read_columns(
    name: str,
    splits: dict[str, Sequence[Record]],
    names: dict[str, list[str]],
    labels: Sequence[str] | None,
    template: str | None,
    text_column: str | None,
    label_column: str | None,
) -> Source:
    """Plain text, prompt + completion, or text (or a pair of texts) + label, by the names of the columns."""
    columns = list(next(v for v in splits.values() if len(v))[0])
    for wanted in (text_column, label_column):
        if wanted and wanted not in columns:
            raise UserError(f"{name} has no column {wanted!r}: its columns are {', '.join(columns)}")
    if not text_column and {"prompt", "completion"} <= set(columns):
        return Source(name, splits, _completion)
    pair = next((p for p in PAIRS if set(p) <= set(columns)), None) if text_column is None else None
    texts = (text_column,) if text_column else pair or tuple(c for c in TEXT if c in columns)[:1]
    if not texts:
        raise UserError(
            f"{name} has no text column: its columns are {', '.join(columns)}; name one of them {TEXT[0]!r} or "
            f"say which with text_column"
        )
    label = label_column or next((c for c in LABEL if c in columns), None)
    if label is None:
        if labels:
            raise UserError(f"labels were given and {name} has no label column: its columns are {', '.join(columns)}")
        return Source(name, splits, plain(texts[0]))
    words, index = _label_words(name, splits, label, names.get(label), labels)
    before, after = _cut_template(template)
    options = tuple(" " + w for w in words)

    def render(r: Record) -> Example:
        parts = tuple(_text(r, c) for c in texts)
        tail = "".join("\n" + p for p in parts[1:])
        return Example((Prompt(before, parts[0], tail + after),), options, index(r.get(label)), parts)

    return Source(name, splits, render, words)


def _completion(r: Record) -> Example:
    prompt, completion = _text(r, "prompt"), _text(r, "completion")
    gap = "" if prompt[-1:].isspace() or completion[:1].isspace() else " "
    return Example((Prompt("", prompt, ""),), (gap + completion,))


def _cut_template(template: str | None) -> tuple[str, str]:
    template = "{text}\nLabel:" if template is None else template
    if template.count("{text}") != 1:
        raise UserError(
            f"the template needs {{text}} exactly once, and {template!r} has it {template.count('{text}')} times"
        )
    before, after = template.split("{text}")
    return before, after.rstrip(" ")


def _label_words(
    name: str, splits: dict[str, Sequence[Record]], column: str, names: list[str] | None, given: Sequence[str] | None
) -> tuple[tuple[str, ...], Callable[[Any], int]]:
    values: set[Any] = set()
    for records in splits.values():
        values |= set(records.unique(column)) if hasattr(records, "unique") else {r.get(column) for r in records}
    if None in values or "" in values:
        raise UserError(f"{name} has rows without a label in column {column!r}: drop them")
    numbers = all(_whole(v) for v in values)
    if not numbers and any(isinstance(v, float) for v in values):
        raise UserError(f"the column {column!r} of {name} holds fractions: classes are whole numbers or words")
    if numbers:
        known = given or names or [str(i) for i in range(max((int(v) for v in values), default=0) + 1)]
    else:
        known = given or sorted(str(v) for v in values)
    words = tuple(str(w).strip() for w in known)
    if len(words) < 2:
        only = words[0] if words else "none"
        raise UserError(f"the column {column!r} of {name} holds one label only ({only}): two are needed")

    def index(value: Any) -> int:
        if numbers:
            return int(value)
        word = str(value).strip()
        if word not in words:
            raise UserError(f"the label {word!r} in column {column!r} of {name} is outside the set {', '.join(words)}")
        return words.index(word)

    return words, index


def _whole(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lstrip("-").isdigit()
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
