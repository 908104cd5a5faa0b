"""Every method under the name that a command line uses: base and PEFT blocks in, optimizer out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators import LOZO, SRGF, Law, MagnitudeMask, SubZero, TeZO
from hybridtheory.optimizers.adam import Adam
from hybridtheory.optimizers.adamu import AdaMU
from hybridtheory.optimizers.base import ZeroOrder
from hybridtheory.optimizers.bilevel import BilevelZOFO
from hybridtheory.optimizers.conservative import Conservative
from hybridtheory.optimizers.first_order import galore, lora_plus
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

    optimizer: Callable[..., ZeroOrder]
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


def build(
    name: str,
    model: nn.Module,
    base: Block | None,
    peft: Block | None,
    *,
    lr_base: float | None = None,
    lr_peft: float | None = None,
    seed: int = 0,
    ratio: float = 16.0,
    rank: int = 128,
    law: Law | None = None,
    **options: Any,
) -> ZeroOrder:
    """The method ``name`` on these blocks. ``law`` replaces the method's own; ``ratio`` is LoRA+'s and ``rank``
    GaLore's; other options go to the optimizer."""
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}: choose from {', '.join(METHODS)}")
    method = METHODS[name]
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
            groups += lora_plus(block, lr, ratio)
            continue
        if name == "galore":
            groups += galore(block, lr, rank)
            continue
        groups.append({"block": block, "kind": kind, "lr": lr})
        chosen = law or (method.law([block]) if method.law else None)
        if kind == "zo" and chosen is not None and method.optimizer not in (HiZOO, AdaMU):
            groups[-1]["law"] = chosen
    return method.optimizer(groups, model, seed, **{**dict(method.options), **options})
