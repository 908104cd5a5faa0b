"""Block: a named set of parameters that share one smoothness constant and one learning rate; partition cuts a model into them.

The blocks of a partition are disjoint and cover every floating-point parameter that takes part in the model, frozen or not (a PEFT
library freezes the base, yet the base is what zeroth-order steps move). A tied weight is one parameter: it belongs to the block of the
first name it is registered under, its other names are kept in ``Block.tied``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hybridtheory.errors import UserError
from hybridtheory.shards import settle

KINDS = ("attention", "mlp", "norm", "embedding", "head", "other")

# peft keeps the frozen original of every module in ``modules_to_save``; with the adapter active it takes no part in the loss.
_DEAD = re.compile(r"(^|\.)original_module(\.|$)")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NORM = re.compile(r"norm|(^|[._])ln(_|\d|\.|$)", re.IGNORECASE)
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|score|classifier|classification_head|pre_classifier|cls|head|pooler|vocab_\w+)(\.|$)"
)
_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe|shared)(\.|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """Parameters (by name, in the model's order) under one name; ``group`` is "base" or "peft".

    tied    a parameter's name -> the other names that it is registered under
    info    what is known of an adapter: rank, alpha, scale, initialisation
    numel   d, the number of scalars
    """

    name: str
    group: str
    parameters: dict[str, nn.Parameter]
    tied: dict[str, list[str]] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.parameters)

    @property
    def tensors(self) -> list[Tensor]:
        return list(self.parameters.values())

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    def __repr__(self) -> str:
        return f"Block({self.name!r}, group={self.group!r}, d={self.numel:,}, tensors={len(self.parameters)})"


def partition(
    model: nn.Module,
    by: str = "group",
    peft: Callable[[str], bool] = lambda name: False,
    base: bool = True,
    info: dict[str, Any] | None = None,
) -> list[Block]:
    """Cut ``model`` into disjoint, covering blocks.

    by     "group" (base, peft), "layer", "module" (layer x attention/mlp/norm/embedding/head), or a regular expression: what its
           first group (or the whole match) captures in a parameter's name is the block's name, and names without a match are
           gathered in "rest".
    peft   says of a parameter's name whether it belongs to the PEFT group.
    base   False leaves the base out (its weights are quantised, say).
    info   is kept with every PEFT block (rank, alpha, scale, initialisation: curvature of an adapter means little without them).
    Raises UserError for a model without such a parameter, and for a regular expression that is none or matches no name.
    """
    names = _aliases(model)
    check_places(model)
    label = _labeller(model, by)
    found: dict[tuple[str, str], Block] = {}
    for aliases, parameter in names:
        if not parameter.is_floating_point():
            continue
        alive = [n for n in aliases if not _DEAD.search(n)]
        if not alive:
            continue
        # One alias in the adapter makes the weight the adapter's: it is what first-order steps move.
        group = "peft" if any(peft(n) for n in alive) else "base"
        if group == "base" and not base:
            continue
        first = alive[0]
        tag = label(first)
        name = group if tag == "" else f"{group}.{tag}"
        block = found.setdefault((group, name), Block(name, group, {}, {}, dict(info or {}) if group == "peft" else {}))
        block.parameters[first] = parameter
        if len(alive) > 1:
            block.tied[first] = alive[1:]
    if not found:
        raise UserError(
            "the model has no block to measure: none of its parameters is a floating-point tensor that takes part in the loss; "
            "pass an unquantised model or attach an adapter (--peft lora)"
        )
    if {name.partition(".")[2] for _, name in found} == {"rest"}:
        some = next(iter(found.values())).names[0]
        raise UserError(
            f"--blocks {by!r} matches no parameter's name (they look like {some!r}): use group, layer or module"
        )
    return sorted(found.values(), key=lambda b: b.group)  # stable: base before peft, each in the model's order


def split(tensors: Sequence[Tensor], blocks: Iterable[Block]) -> list[list[Tensor]]:
    """Cut one list of tensors, aligned with all the blocks' parameters one after the other, into one list per block."""
    parts, at = [], 0
    for block in blocks:
        parts.append(list(tensors[at : at + len(block.parameters)]))
        at += len(block.parameters)
    return parts


def _aliases(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Every distinct parameter with all the names it is registered under, in the model's order."""
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(found.values())


def check_places(model: nn.Module) -> None:
    """UserError for weights that cannot be moved where they are: offloaded ones come and go inside each forward pass."""
    remedy = (
        'load it whole on one device (no device_map, or {"": device}; 16-bit weights take half the room), or shard it over '
        "processes with torch's fully_shard"
    )
    settle(model)
    every = dict(model.named_parameters())
    away = [name for name, p in every.items() if p.device.type == "meta"]
    if away:
        raise UserError(
            f"{len(away)} of the model's {len(every)} tensors are not in memory ({away[0]!r} is the first): device_map has offloaded "
            f"them, and weights that come and go inside a forward pass can be neither perturbed nor differentiated: {remedy}"
        )
    places = sorted({str(p.device) for p in every.values()})
    if len(places) > 1:
        raise UserError(
            f"the model's weights lie on several devices ({', '.join(places)}), and one is served: {remedy}"
        )


def _labeller(model: nn.Module, by: str) -> Callable[[str], str]:
    if by == "group":
        return lambda name: ""
    if by in ("layer", "module"):
        owners = {}
        for path, module in model.named_modules():
            for own, _ in module.named_parameters(recurse=False):
                owners[f"{path}.{own}" if path else own] = module
        # T5 and BART number their encoder and their decoder from zero alike; elsewhere the stack's name says nothing.
        parts = {part for name in owners for part in name.split(".")}
        stacks = {"encoder", "decoder"} if {"encoder", "decoder"} <= parts else set()
        return lambda name: _layer_label(name, owners.get(name), stacks, with_kind=by == "module")
    try:
        with warnings.catch_warnings():  # about patterns that a later Python may read otherwise
            warnings.simplefilter("ignore", FutureWarning)
            pattern = re.compile(by)
    except re.error as error:
        raise UserError(
            f"--blocks takes group, layer, module or a regular expression, and {by!r} is not one: {error}"
        ) from None

    def match(name: str) -> str:
        hit = pattern.search(name)
        if hit is None:
            return "rest"
        return (hit.group(1) if pattern.groups else hit.group(0)) or "rest"

    return match


def _layer_label(name: str, owner: nn.Module | None, stacks: set[str], with_kind: bool) -> str:
    """ "layer.07" or "layer.07.mlp" inside a numbered stack; the kind alone ("embedding", "norm", "head") outside."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    kind = _kind(parts, index, owner)
    if index is None:
        return kind
    stack = next((part + "." for part in parts[:index] if part in stacks), "")
    label = f"{stack}layer.{int(parts[index]):02d}"
    return f"{label}.{kind}" if with_kind else label


def _kind(parts: list[str], index: int | None, owner: nn.Module | None) -> str:
    inside = ".".join(parts[(index + 1 if index is not None else 0) :])
    is_norm = owner is not None and "norm" in type(owner).__name__.lower()
    if is_norm or _NORM.search(inside):
        return "norm"
    if index is not None:
        return "attention" if _ATTENTION.search(inside) else "mlp"
    if isinstance(owner, nn.Embedding) or _EMBEDDING.search(inside):
        return "embedding"
    return "head" if _HEAD.search(inside) else "other"
