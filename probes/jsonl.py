"""Frozen dataclasses to JSON lines and back, strictly.

The type hints are the schema: a field that is missing, unknown or of another type is refused by name. Two rules make
the round trip exact: floats that are not finite are strings ("nan", "inf", "-inf"), and finite floats are written
with all their digits (Python's repr). In a field of type Any (options, info) such strings stay strings, because
nothing says that a number was meant.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any

from hybridtheory.errors import UserError
from probes.records import KIND_OF, KINDS, SCHEMA, Header, Record

NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def plain(value: Any, skip_volatile: bool = False) -> Any:
    """Dataclasses, numpy scalars and arrays, tuples -> what JSON has. Floats that are not finite become strings."""
    if is_dataclass(value) and not isinstance(value, type):
        kept = [f for f in fields(value) if not (skip_volatile and f.metadata.get("volatile"))]
        return {f.name: plain(getattr(value, f.name), skip_volatile) for f in kept}
    if isinstance(value, Mapping):
        return {str(k): plain(v, skip_volatile) for k, v in value.items()}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v, skip_volatile) for v in value]
    if hasattr(value, "tolist"):  # numpy arrays and scalars, 0-d tensors: without importing any of them
        return plain(value.tolist(), skip_volatile)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON: {value!r:.80}")


def encode(record: Record) -> str:
    """One record -> one line (no newline), {"kind": ..., fields}. A record that could not be read back raises here,
    not at reading.
    """
    line = json.dumps({"kind": KIND_OF[type(record)], **plain(record)}, allow_nan=False, ensure_ascii=False)
    decode(line)
    return line


def decode(line: str) -> Record:
    """One line -> one record; ValueError says what is wrong with it."""
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(value, dict) or "kind" not in value:
        raise ValueError("not a record: an object with a field 'kind' is needed")
    kind = value.pop("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known kinds: {', '.join(KINDS)}")
    if kind == "header" and value.get("schema") != SCHEMA:
        raise ValueError(f"schema {value.get('schema')!r}, but this version reads schema {SCHEMA}")
    record: Record = _build(KINDS[kind], value, kind)
    return record


def stable(record: Record) -> dict[str, Any]:
    """The record without its volatile fields (time, host, argv, commit): equal for two runs of the same measurement."""
    out: dict[str, Any] = plain(record, skip_volatile=True)
    return out


def differences(old: Header, new: Header) -> list[str]:
    """Names of the settings in which two headers differ, volatile fields aside: what forbids resuming one run with
    the other's command.
    """
    a, b = stable(old), stable(new)
    out = []
    for name in a:
        if isinstance(a[name], dict) and isinstance(b[name], dict):
            keys = {**a[name], **b[name]}
            out += [
                f"{name}.{k}: {a[name].get(k)!r:.60} then, {b[name].get(k)!r:.60} now"
                for k in keys
                if a[name].get(k) != b[name].get(k)
            ]
        elif a[name] != b[name]:
            out.append(f"{name}: {a[name]!r:.60} then, {b[name]!r:.60} now")
    return out


def _refuse_constant(name: str) -> float:
    raise ValueError(f"bare {name} is not JSON; a number that is not finite is written as a string")


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _build(cls: type[Any], value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: an object was expected, {value!r:.60} came")
    known = {f.name: f for f in fields(cls)}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; known fields: {', '.join(known)}")
    required = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in value]
    if missing:
        raise ValueError(f"{where}: field {missing[0]!r} is missing")
    hints = _hints(typing.cast(Any, cls))
    return cls(**{name: _cast(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _cast(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` says, or ValueError naming the field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):  # only X | None occurs
        return None if value is None else _cast(next(a for a in args if a is not type(None)), value, where)
    if origin is typing.Literal:
        if isinstance(value, str | int | float | bool) and value in args:
            return value
        raise ValueError(f"{where}: one of {', '.join(map(repr, args))} was expected, {value!r:.60} came")
    if is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin is list and isinstance(value, list):
        return [_cast(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is tuple and args[-1] is ... and isinstance(value, list):
        return tuple(_cast(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is tuple and isinstance(value, list) and len(value) == len(args):
        return tuple(_cast(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(args, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: _cast(args[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str) and value in NONFINITE:
        return NONFINITE[value]
    if hint in (int, str, bool) and type(value) is hint:
        return value
    name = getattr(origin or hint, "__name__", str(hint))
    raise ValueError(f"{where}: {name} was expected, {value!r:.60} came")


def read_lines(text: str, name: str) -> tuple[list[Record], int]:
    """Records of a file's text, and the number of characters that complete lines take.

    A last line without its newline was cut short by whatever ended the run: it is left out (the caller sees that the
    text is longer than the count). Everything else that does not parse is a UserError that names the file and the
    line.
    """
    complete = text.rfind("\n") + 1
    records: list[Record] = []
    lines = text[:complete].split("\n")[:-1]  # splitlines would cut at U+2028 inside a string
    for number, line in enumerate(lines, start=1):
        try:
            records.append(decode(line))
        except ValueError as error:
            raise UserError(f"{name}, line {number}: {error}") from None
    if records and not isinstance(records[0], Header):
        kind = KIND_OF[type(records[0])]
        raise UserError(f"{name}, line 1: a file of records starts with its header, this one with {kind!r}")
    return records, complete
