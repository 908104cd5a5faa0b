"""Every method under the name that a command line uses: base and PEFT blocks in, optimizer out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators import LOZO, SRGF, Law, MagnitudeMask, SubZero, TeZO
from hybridtheory.optimizers.adam import Adam
from hybridtheory.optimizers.adamu import AdaMU
from hybridtheory.optimizers.base import ZeroOrder, refuse_unknown
from hybridtheory.optimizers.bilevel import BilevelZOFO
from hybridtheory.optimizers.conservative import Conservative
from hybridtheory.optimizers.first_order import galore, lora_plus
from hybridtheory.optimizers.groups import ZO_DEFAULTS
from hybridtheory.optimizers.hizoo import HiZOO
from hybridtheory.optimizers.hybrid import Hybrid
from hybridtheory.optimizers.mezo import MeZO
from hybridtheory.optimizers.momentum import Momentum
from hybridtheory.optimizers.sign import Sign


@dataclass(frozen=True)
class Method:
    """blocks   which blocks it moves: "base", "peft" or "both"
    kind     "zo", "fo" or "hybrid"
    """

    optimizer: type[ZeroOrder]
    kind: str
    blocks: str
    law: Callable[[list[Block]], Law] | None = None
    options: tuple[tuple[str, Any], ...] = ()


METHODS: dict[str, Method] = {
    "hybrid": Method(Hybrid, "hybrid", "both"),
    "hybrid-two-sided": Method(Hybrid, "hybrid", "both", None, (("difference", "central"),)),
    "hybrid-adamw": Method(Hybrid, "hybrid", "both", None, (("rule", "adamw"),)),
    "hybrid-sequential": Method(Hybrid, "hybrid", "both", None, (("order", "sequential"),)),
    "hybrid-subzero": Method(Hybrid, "hybrid", "both", lambda blocks: SubZero()),
    "hybrid-lozo": Method(Hybrid, "hybrid", "both", lambda blocks: LOZO()),
    "bilevel": Method(BilevelZOFO, "hybrid", "both"),
    "sgd": Method(Hybrid, "fo", "base"),
    "adamw": Method(Hybrid, "fo", "base", None, (("rule", "adamw"),)),
    "peft-sgd": Method(Hybrid, "fo", "peft"),
    "peft-adamw": Method(Hybrid, "fo", "peft", None, (("rule", "adamw"),)),
    "lora-plus": Method(Hybrid, "fo", "peft", None, (("rule", "adamw"),)),
    "galore": Method(Hybrid, "fo", "base", None, (("rule", "galore"),)),
    "mezo": Method(MeZO, "zo", "base"),
    "mezo-peft": Method(MeZO, "zo", "peft"),
    "subzero": Method(MeZO, "zo", "base", lambda blocks: SubZero()),
    "subzero-peft": Method(MeZO, "zo", "peft", lambda blocks: SubZero()),
    "s-mezo": Method(MeZO, "zo", "base", lambda blocks: MagnitudeMask.of(blocks[0])),
    "lozo": Method(MeZO, "zo", "base", lambda blocks: LOZO()),
    "tezo": Method(MeZO, "zo", "base", lambda blocks: TeZO()),
    "s-rgf": Method(MeZO, "zo", "base", lambda blocks: SRGF()),
    "forward-gradient": Method(MeZO, "zo", "base", None, (("difference", "exact"),)),
    "zo-sign": Method(Sign, "zo", "base"),
    "zo-momentum": Method(Momentum, "zo", "base"),
    "zo-adam": Method(Adam, "zo", "base"),
    "zo-conservative": Method(Conservative, "zo", "base"),
    "hizoo": Method(HiZOO, "zo", "base"),
    "zo-adamu": Method(AdaMU, "zo", "base"),
}


# Arguments of the functions that cut a block into groups, and their defaults.
_GROUPING: dict[str, dict[str, Any]] = {"lora-plus": {"ratio": 16.0}, "galore": {"rank": 128}}
OWN_DIRECTIONS = (HiZOO, AdaMU)


def options_of(name: str) -> set[str]:
    """The options that `build` takes for a method, beside blocks, rates, seed and law."""
    method = METHODS[name]
    settings = {*ZO_DEFAULTS} if method.kind == "fo" else set()
    return method.optimizer.options() - {"kind", "lr", "law"} - settings | {*_GROUPING.get(name, {})}


def build(
    name: str,
    model: nn.Module,
    base: Block | None,
    peft: Block | None,
    *,
    lr_base: float | None = None,
    lr_peft: float | None = None,
    seed: int = 0,
    law: Law | None = None,
    **options: Any,
) -> ZeroOrder:
    """The method ``name`` on these blocks. ``law`` replaces the method's own; the other options are `options_of` it.

    Raises UserError for an unknown method or option, a missing block, rate or required option.
    """
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}: choose from {', '.join(METHODS)}")
    method = METHODS[name]
    refuse_unknown(name, options, options_of(name))
    arguments = inspect.signature(method.optimizer).parameters.values()
    missing = [p.name for p in arguments if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in options]
    if missing:
        raise UserError(
            f"{name} needs a value for its {'options' if len(missing) > 1 else 'option'} {', '.join(missing)}"
        )
    if law is not None and (method.kind == "fo" or method.optimizer in OWN_DIRECTIONS):
        raise UserError(f"{name} has no choice of directions: leave the law out")
    grouping = {n: options.pop(n, default) for n, default in _GROUPING.get(name, {}).items()}
    parts = {"base": ("base", base, lr_base), "peft": ("PEFT", peft, lr_peft)}
    wanted = list(parts.values()) if method.blocks == "both" else [parts[method.blocks]]
    groups: list[dict[str, Any]] = []
    for label, block, lr in wanted:
        if block is None:
            remedy = "attach an adapter (--peft lora)" if label == "PEFT" else "check --blocks"
            raise UserError(f"{name} needs a {label} block and the model has none: {remedy}")
        if lr is None:
            raise UserError(f"{name} needs a learning rate for the {label} block: pass --lr-{label.lower()}")
        kind = {"zo": "zo", "fo": "fo", "hybrid": "zo" if label == "base" else "fo"}[method.kind]
        if name == "lora-plus":
            groups += lora_plus(block, lr, **grouping)
            continue
        if name == "galore":
            groups += galore(block, lr, **grouping)
            continue
        groups.append({"block": block, "kind": kind, "lr": lr})
        chosen = law or (method.law([block]) if method.law else None)
        if kind == "zo" and chosen is not None:
            groups[-1]["law"] = chosen
    return method.optimizer(groups, model, seed, **{**dict(method.options), **options})
