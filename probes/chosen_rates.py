"""Learning rates of a training run: given, or read from a trainer.toml, with what must be said about them."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridtheory.errors import UserError
from hybridtheory.optimizers import METHODS

# A trainer.toml holds rates of plain steps: zeroth-order SGD with Gaussian directions on the base, SGD on PEFT. AdamW's rate, or that
# of a first-order step on the base, is another quantity; a low-rank law's rate is not lower than the Gaussian one.
_PLAIN = ("hybrid", "hybrid-two-sided", "hybrid-sequential")
MEASURED_BASE = (
    *_PLAIN,
    "hybrid-adamw",
    "mezo",
    "zo-conservative",
    "subzero",
    "lozo",
    "tezo",
    "s-rgf",
    "s-mezo",
    "hybrid-subzero",
    "hybrid-lozo",
)
MEASURED_PEFT = (*_PLAIN, "hybrid-subzero", "hybrid-lozo", "peft-sgd")
OTHER_LAW = ("subzero", "lozo", "tezo", "s-rgf", "s-mezo", "hybrid-subzero", "hybrid-lozo")
MEASURED = {"base": MEASURED_BASE, "peft": MEASURED_PEFT}


@dataclass
class Rates:
    """base and peft: None where the method does not move that block. notes: warnings for the user."""

    base: float | None = None
    peft: float | None = None
    notes: list[str] = field(default_factory=list)


TABLES = (
    "rates",
    "bound_by",
    "intervals",
    "limits",
    "settings",
    "source",
)  # of a trainer.toml; see `probes.trainer_toml`


def read(path: Path, option: str = "--lr") -> dict[str, Any]:
    """A trainer.toml, or that of a run folder; UserError, naming ``option``, for what is not one."""
    file = path / "trainer.toml" if path.is_dir() else path
    whole = "give the trainer.toml of a finished probe-smoothness run"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{option}: {file} cannot be read ({error.strerror or error}): {whole}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {file} is not a trainer.toml ({error}): {whole}") from None
    for name, part in table.items():
        if name not in TABLES:
            raise UserError(f"{option}: {file} holds {name!r:.60}, which a trainer.toml does not: {whole}")
        if not isinstance(part, dict):
            raise UserError(f"{option}: {name} in {file} is a table, not {part!r:.60}: {whole}")
    for name in ("rates", "limits"):
        for key, value in table.get(name, {}).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UserError(f"{option}: {key} must be a positive number in {file}, not {value!r:.60}")
    assumed = table.get("settings", {})
    for key, least in (("mu", 0.0), ("q", 1), ("batch_size", 1), ("steps", 1)):
        value = assumed.get(key, least or 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not max(least, 1e-300) <= value < math.inf:
            raise UserError(f"{option}: {key} must be a positive number in {file}, not {value!r:.60}")
    return table


def moved(method: str) -> tuple[str, ...]:
    """The groups that a method moves."""
    if method not in METHODS:
        raise UserError(f"there is no method {method!r}: choose from {', '.join(METHODS)}")
    blocks = METHODS[method].blocks
    return ("base", "peft") if blocks == "both" else (blocks,)


def needs_measuring(method: str, given: Mapping[str, float | None]) -> bool:
    """Whether a probe has anything to say: some rate of this method is neither given nor of a kind that is not measured."""
    wanted = [g for g in moved(method) if given.get(g) is None]
    for group in wanted:
        _refuse_unmeasured(method, group)
    return bool(wanted)


def choose(
    method: str, given: Mapping[str, float | None], toml: Mapping[str, Any] | None, now: Mapping[str, Any]
) -> Rates:
    """What is given wins; the rest comes from ``toml``. ``now``: model_sha256, data_sha256, mu, q, law and batch_size of this run."""
    chosen = Rates()
    table = toml or {}
    for group in moved(method):
        rate = given.get(group)
        if rate is not None and not 0 <= rate < math.inf:
            raise UserError(f"--lr-{group} is a number of at least 0, not {rate}")
        if rate is None:
            if toml is None:
                raise UserError(
                    f"{method} needs a learning rate for the {group} weights: pass --lr-{group}, or --lr auto or a trainer.toml"
                )
            _refuse_unmeasured(method, group)
            rate = table.get("rates", {}).get(f"eta_{group}")
            if rate is None:
                raise UserError(
                    f"the trainer.toml holds no rate for the {group} weights (a comment in it says why): pass --lr-{group}"
                )
            chosen.notes += _differences(method, group, table, now)
        limit = table.get("limits", {}).get(f"eta_{group}")
        if limit is not None and rate > limit and method in MEASURED[group]:
            chosen.notes.append(
                f"--lr-{group} {rate:.3g} is above the stability limit {limit:.3g} that was measured: expect the loss to diverge"
            )
        setattr(chosen, group, float(rate))
    return chosen


def _refuse_unmeasured(method: str, group: str) -> None:
    if method not in MEASURED[group]:
        raise UserError(
            f"probes measure rates of SGD steps (zeroth-order on the base, first-order on PEFT), and the {group} weights move "
            f"otherwise under {method}: pass --lr-{group}"
        )


def _differences(method: str, group: str, toml: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What the measured rates assume and this run does otherwise."""
    notes = []
    source, assumed = toml.get("source", {}), toml.get("settings", {})
    if source.get("model_sha256") not in (None, now["model_sha256"]):
        notes.append(f"the {group} rate was measured on another model ({source.get('model')})")
    if source.get("data") not in (None, now["data"]):
        notes.append(f"the {group} rate was measured on other data ({source.get('data')})")
    law = METHODS[method].kind != "fo" and group == "base" and (method in OTHER_LAW or now["law"] != "gaussian")
    if law:
        notes.append("the base rate was measured for Gaussian directions and is used with others")
    for name in ("mu", "q") if group == "base" else ():
        if name in assumed and assumed[name] != now[name]:
            notes.append(
                f"the base rate was measured at {name} = {assumed[name]:g} and is used at {name} = {now[name]:g}"
            )
    if assumed.get("batch_size", now["batch_size"]) > now["batch_size"]:
        notes.append(
            f"the {group} rate was measured for batches of {assumed['batch_size']} rows and is used with {now['batch_size']}"
        )
    return notes
