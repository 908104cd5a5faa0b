"""The description of a sweep: a TOML file, checked by name and turned into tasks and lines."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from hybridtheory.errors import UserError
from probes.chosen_rates import MEASURED, moved
from probes.chosen_rates import read as trainer_toml
from probes.records_sweep import Ends
from probes.sweep_grid import Grid
from probes.sweep_study import Line, Source, Study
from probes.train_settings import TrainSettings

AXES = ("base", "peft", "scale", "ratio", "fixed")
ENDS: tuple[str, ...] = get_args(Ends)
LOADING = (
    "peft", "rank", "alpha", "targets", "virtual_tokens", "init", "loss", "rows", "max_length", "head", "labels", "template",
    "text_column", "label_column", "device", "dtype", "revision", "trust_remote_code", "allow_pickle",
)  # fmt: skip
# Settings of `probes.train_settings.TrainSettings` that a description may set; the rest belongs to the cells.
TRAIN = (
    "batch", "mu", "q", "law", "options", "weight_decay", "schedule", "sampling", "accumulate", "micro_batch", "objective", "dropout",
    "master", "eval_every", "eval_rows", "eval_data", "final_rows", "lower_share",
)  # fmt: skip
TRAIN_DEFAULTS: dict[str, Any] = {"eval_every": 0, "eval_rows": 64, "eval_data": "train"}
METHOD = (*TRAIN, "axes", "lr", "lr_base", "lr_peft", "base", "peft")
GRID = ("base", "peft", "points", "factor", "refine", "extensions", "boundary")
SHARED = (*ENDS, "seeds", "methods", "axes", "grid", "train", "method", "seed")
CENTRES = {"base": 1e-4, "peft": 1e-2, "scale": 1.0, "ratio": 1.0}


def read(path: Path | None, changes: Sequence[str] = ()) -> Study:
    """The study that a TOML file describes (None: the small one on the embedded task), with ``changes`` KEY=VALUE on top."""
    path = Path(__file__).with_name("data") / "sweep.toml" if path is None else path
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): give a TOML file, see docs/sweeps.md"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a TOML file ({error})") from None
    for change in changes:
        _set(table, change)
    return study(table, path.parent)


def study(table: Mapping[str, Any], folder: Path = Path()) -> Study:
    """A study from the tables of its description; paths of trainer.toml files are relative to ``folder``."""
    _known("the description", table, (*SHARED, *ENDS, "task", "threads", "checkpoint", "target"))
    tasks = _whole("task", table.get("task", [{}]))
    if not tasks:
        raise UserError("a sweep needs a [[task]]")
    sources, lines = [], []
    for own in tasks:
        _known("a [[task]]", own, ("name", "model", "data", "reseed", *SHARED, *LOADING))
        shared = _merged({k: v for k, v in table.items() if k in SHARED}, {k: v for k, v in own.items() if k in SHARED})
        source = _source(own, shared)
        sources.append(source)
        lines += _lines(source, shared, folder)
    names = [s.name for s in sources]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"two tasks have the name {twice[0]!r}: give each [[task]] its own name")
    checkpoint = table.get("checkpoint")
    threads = table.get("threads", 1)
    if not (_natural(threads) and (checkpoint is None or _natural(checkpoint))):
        raise UserError(f"threads and checkpoint are whole numbers of at least 1, not {threads!r} and {checkpoint!r}")
    target = table.get("target", 0.5)
    if not (isinstance(target, int | float) and 0 < target < 1):
        raise UserError(f"target is a share of the best decrease between 0 and 1, not {target!r}")
    return Study(tuple(sources), tuple(lines), threads, checkpoint, float(target))


def _source(own: Mapping[str, Any], shared: Mapping[str, Any]) -> Source:
    loading = {"rows": 64, **{k: own[k] for k in LOADING if k in own}}
    model, data = own.get("model"), own.get("data")
    default = "-".join(
        str(x) for x in (Path(model or "embedded").name, Path(data or "sentiment").stem, loading.get("peft", "lora"))
    )
    seed, name = shared.get("seed", 0), own.get("name", default)
    if not (isinstance(seed, int) and seed >= 0 and isinstance(name, str) and name):
        raise UserError(f"a task has a name and a seed of at least 0, not {name!r} and {seed!r}")
    return Source(name, model, data, seed, bool(own.get("reseed", False)), loading)


def _lines(source: Source, shared: Mapping[str, Any], folder: Path) -> list[Line]:
    seeds = _seeds(shared.get("seeds", 3))
    horizons = _horizons(shared)
    train = {**TRAIN_DEFAULTS, **_table("train", shared.get("train", {}), TRAIN)}
    grids = _table("grid", shared.get("grid", {}), GRID)
    listed = shared.get("methods", ["hybrid"])
    if not (isinstance(listed, list) and listed and all(isinstance(m, str) for m in listed)):
        raise UserError(f"methods is a list of names, not {listed!r}")
    unlisted = sorted(set(_table("method", shared.get("method", {}), None)) - set(listed))
    if unlisted:
        raise UserError(f"[method.{unlisted[0]}] is of no method of this sweep: add it to methods, or leave it out")
    found = []
    for method in listed:
        groups = moved(method)
        plain = all(method in MEASURED[g] for g in groups)
        own = _table(f"method.{method}", shared.get("method", {}).get(method, {}), METHOD)
        settings = {**train, **{k: v for k, v in own.items() if k in TRAIN}}
        if settings["eval_data"] == "train":
            settings.setdefault("final_rows", settings["eval_rows"])
        rates = _rates(own, folder)
        axes = own.get("axes", shared.get("axes"))
        default = ["fixed"] if rates else list(groups) if len(groups) == 1 else ["base", "peft", "scale", "ratio"]
        for axis in _axes(method, groups, default if axes is None else axes, strict=axes is not None and "axes" in own):
            missing = [g for g in groups if g not in rates]
            if axis == "fixed" and missing:
                raise UserError(
                    f"the axis fixed of {method} needs a rate: give lr_{missing[0]} or lr in [method.{method}]"
                )
            centre = own.get(axis, grids.get(axis, CENTRES.get(axis, 1.0)))
            grid = (
                None if axis == "fixed" else Grid(float(centre), **{k: v for k, v in grids.items() if k not in CENTRES})
            )
            for horizon, amount in horizons:
                line = Line(
                    source.name,
                    method,
                    axis,
                    horizon,
                    amount,
                    seeds,
                    groups,
                    plain,
                    settings,
                    grid,
                    rates if axis == "fixed" else {},
                )
                settings_of(line, 1.0, 1.0, seeds[0])  # refuses what is wrong before anything is loaded
                found.append(line)
    return found


def settings_of(line: Line, lr_base: float | None, lr_peft: float | None, seed: int) -> TrainSettings:
    """The trainer's settings for one cell."""
    amount = line.amount if line.horizon == "seconds" else int(line.amount)
    try:
        return TrainSettings(
            method=line.method, seed=seed, lr_base=lr_base if "base" in line.groups else None,
            lr_peft=lr_peft if "peft" in line.groups else None, **{"steps": None, line.horizon: amount, **line.train},
        )  # fmt: skip
    except TypeError as error:
        raise UserError(f"[train] or [method.{line.method}] holds a value of the wrong type ({error})") from None


# ---- the parts ----


def _axes(method: str, groups: Sequence[str], axes: Any, strict: bool) -> list[str]:
    if not (isinstance(axes, list) and axes and all(a in AXES for a in axes)):
        raise UserError(f"axes is a list of {', '.join(AXES)}, not {axes!r}")
    if len(groups) == 2:
        for axis, before in (("scale", ("base", "peft")), ("ratio", ("base", "peft", "scale"))):
            lacking = [b for b in before if b not in axes]
            if axis in axes and lacking:
                raise UserError(f"the axis {axis} goes around the optimum of the axis {lacking[0]}: add it to axes")
        return [a for a in AXES if a in axes]
    possible = [a for a in axes if a in (*groups, "fixed")]
    if (strict and len(possible) < len(axes)) or not possible:
        raise UserError(f"{method} moves the {groups[0]} weights alone: its axes are {groups[0]} and fixed")
    return possible


def _rates(own: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Given rates by group, from numbers or from a trainer.toml."""
    found: dict[str, float] = {}
    if "lr" in own:
        table = trainer_toml(folder / str(own["lr"])).get("rates", {})
        found = {g: float(table[f"eta_{g}"]) for g in ("base", "peft") if f"eta_{g}" in table}
    found |= {g: own[f"lr_{g}"] for g in ("base", "peft") if f"lr_{g}" in own}
    for group, rate in found.items():
        if not (isinstance(rate, int | float) and 0 <= rate < math.inf):
            raise UserError(f"lr_{group} is a number of at least 0, not {rate!r}")
    return found


def _seeds(value: Any) -> tuple[int, ...]:
    listed = list(range(value)) if _natural(value) else value
    if not (
        isinstance(listed, list)
        and listed
        and all(isinstance(s, int) and s >= 0 for s in listed)
        and len(set(listed)) == len(listed)
    ):
        raise UserError(f"seeds is how many, or a list of different whole numbers, not {value!r}")
    return tuple(listed)


def _horizons(shared: Mapping[str, Any]) -> list[tuple[str, float]]:
    given = [e for e in ENDS if e in shared] or ["steps"]
    if len(given) > 1:
        raise UserError(
            f"a sweep compares at one equal budget: give one of {', '.join(ENDS)}, not {' and '.join(given)}"
        )
    value = shared.get(given[0], 100)
    amounts = value if isinstance(value, list) else [value]
    if not amounts or not all(
        _natural(a) or (given[0] == "seconds" and isinstance(a, float) and 0 < a < math.inf) for a in amounts
    ):
        raise UserError(f"{given[0]} is a number of at least 1 or a list of them, not {value!r}")
    return [(given[0], float(a)) for a in amounts]


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _table(name: str, value: Any, known: Sequence[str] | None) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"[{name}] is a table, not {value!r}")
    if known is not None:
        _known(f"[{name}]", value, known)
    return dict(value)


def _whole(name: str, value: Any) -> list[Mapping[str, Any]]:
    if not (isinstance(value, list) and all(isinstance(v, Mapping) for v in value)):
        raise UserError(f"[[{name}]] is a list of tables: write it with two brackets")
    return value


def _known(where: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise UserError(f"{where} has no {unknown[0]!r}: choose from {', '.join(dict.fromkeys(known))}")


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A task's own tables over the shared ones; its own end replaces the shared one."""
    if any(e in own for e in ENDS):
        shared = {k: v for k, v in shared.items() if k not in ENDS}
    both = {k for k in shared if k in own and isinstance(shared[k], Mapping) and isinstance(own[k], Mapping)}
    return {**shared, **own, **{k: _merged(shared[k], own[k]) for k in both}}


def _set(table: dict[str, Any], change: str) -> None:
    """KEY=VALUE with a dotted key and a value as in TOML; bare words are strings."""
    key, sign, text = change.partition("=")
    names = key.strip().split(".")
    if not (sign and all(names)):
        raise UserError(f"--set is KEY=VALUE, for example --set train.batch=8, not {change!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {key}: {name} is no table here")
    table[names[-1]] = value
