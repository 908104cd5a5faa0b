"""Param groups that carry blocks: completed from their defaults, and gathered into units that one direction perturbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators.gaussian import Gaussian
from hybridtheory.estimators.law import Law, merged
from hybridtheory.estimators.perturb import Perturbation

DEFAULTS: dict[str, Any] = {"kind": "zo", "lr": None, "weight_decay": 0.0}
ZO_DEFAULTS: dict[str, Any] = {"law": Gaussian(), "mu": 1e-3, "q": 1, "difference": "central"}


@dataclass
class Unit:
    """Zeroth-order groups that are perturbed together."""

    plan: Perturbation
    indices: list[int]  # of the param groups


def complete(group: Block | Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A param group with everything that it leaves open filled in; UserError where an entry is missing or cannot be."""
    given: dict[str, Any] = {"block": group} if isinstance(group, Block) else dict(group)
    block = given.get("block")
    if not isinstance(block, Block):
        raise UserError("every param group needs its block: {'block': Block, 'kind': 'zo' or 'fo', 'lr': ...}")
    kind = given.get("kind", defaults["kind"])
    if kind not in ("zo", "fo"):
        raise UserError(f"kind must be 'zo' or 'fo', got {kind!r} for block {block.name!r}")
    full = {**(ZO_DEFAULTS if kind == "zo" else {}), **defaults, **given, "params": block.tensors}
    if full["lr"] is None or not full["lr"] >= 0:
        raise UserError(f"block {block.name!r} needs a learning rate >= 0, got {full['lr']}")
    if kind == "zo" and not full["q"] >= 1:
        raise UserError(f"block {block.name!r} needs q >= 1 queries, got {full['q']}")
    if kind == "zo" and not isinstance(full["law"], Law):
        raise UserError(
            f"the law of block {block.name!r} must be a direction law such as Gaussian(), got {full['law']!r}"
        )
    return full


def units(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> list[Unit]:
    """The zeroth-order groups, those of equal law, mu, q and difference together."""
    found: list[tuple[Any, list[int]]] = []
    for i, group in enumerate(groups):
        if group["kind"] != "zo":
            continue
        settings = (group["law"], group["mu"], group["q"], group["difference"])
        for other, indices in found:
            if other == settings:
                indices.append(i)
                break
        else:
            found.append((settings, [i]))
    return [Unit(Perturbation(model, merged([groups[i]["block"] for i in ix])), ix) for _, ix in found]
