"""What the formulas of `hybridtheory.theory.cost` say about a method on a model: passes of a step, elements held at its peak.

The formulas ask for elements per layer. A layer here is a module that owns parameters or saves something for the backward pass, and
what it saves is counted while a forward pass runs, through autograd's own hooks: no rule of thumb for any architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hybridtheory.blocks import Block
from hybridtheory.estimators.law import Law
from hybridtheory.estimators.lowrank import LowRank
from hybridtheory.optimizers import METHODS
from hybridtheory.theory import cost

# Copies of the block that the rule keeps; a method that is not named keeps none.
BASE_STATE = {
    "adamw": "adam",
    "zo-momentum": "zo-momentum",
    "zo-adam": "zo-adam",
    "hizoo": "hizoo",
    "zo-adamu": "zo-momentum",
}
PEFT_STATE = {"hybrid-adamw": "adam", "peft-adamw": "adam", "lora-plus": "adam"}


def passes(method: str, q: int = 1, inner_steps: int = 10) -> cost.Passes:
    """Forward and backward passes of one step of a method in `METHODS`."""
    kind, options = METHODS[method].kind, dict(METHODS[method].options)
    if method in ("bilevel", "hizoo", "zo-conservative", "forward-gradient"):
        return cost.passes(method, q, inner_steps=inner_steps)
    return cost.passes(
        kind, q, one_sided=options.get("difference", "forward") == "forward" and kind == "hybrid",
        joint=options.get("order") != "sequential",
    )  # fmt: skip


def memory(method: str, law: Law | None, layers: cost.Layers, blocks: Sequence[Block]) -> float | None:
    """Elements held at the peak of a step: weights, state, and the largest phase. None: the paper's table has no row for the method."""
    if method == "galore":
        return None
    chosen, x, y = METHODS[method], sum(layers.base), sum(layers.peft)
    if chosen.kind == "hybrid":
        held = cost.hybrid_memory(layers)
    elif chosen.kind == "fo" and chosen.blocks == "peft":
        held = cost.peft_memory(layers)
    elif chosen.kind == "fo":
        held = cost.first_order_memory(layers) + y
    elif chosen.blocks == "peft":
        held = cost.zeroth_order_memory(cost.Layers(layers.peft, layers.base, layers.activations)) + x
    else:
        held = cost.zeroth_order_memory(layers) + y
    state = cost.optimizer_state(BASE_STATE.get(method, "sgd"), x) + cost.optimizer_state(
        PEFT_STATE.get(method, "sgd"), y
    )
    if method == "bilevel":  # Adam on θ, p and s, and s itself
        state = cost.optimizer_state("adam", x + 2 * y) + y
    if isinstance(law, LowRank):
        shapes = [(t.shape[0], t.shape[1]) for b in blocks for t in b.tensors if t.dim() == 2]
        state += cost.low_rank_state(shapes, law.rank, type(law).__name__.lower())
    return held + state


@contextmanager
def only(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Within, these parameters ask for a gradient and no others."""
    wanted = {id(p) for p in parameters}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(id(p) in wanted)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def layers(
    model: nn.Module, is_peft: Callable[[str], bool], trained: Sequence[Tensor], forward: Callable[[], Tensor]
) -> cost.Layers:
    """Per module: base and adapter weights (tied ones once), and elements that ``forward``, which returns a loss with a graph,
    saves for the gradient of ``trained``. Elements are of the model's own width; what is saved twice counts once.
    """
    modules = list(model.modules())
    place = {m: i for i, m in enumerate(modules)}
    base, peft = [0.0] * len(modules), [0.0] * len(modules)
    owned: set[int] = set()
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) not in owned:
                owned.add(id(p))
                (peft if is_peft(f"{path}.{name}") else base)[place[module]] += p.numel()
    saved = [0.0] * len(modules)
    if trained:
        width = next(model.parameters()).element_size()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        running: list[int] = [0]
        seen: set[int] = set()

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            # a Parameter's own transpose, and what was saved before, cost nothing
            if storage.data_ptr() not in weights and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                saved[running[-1]] += storage.nbytes() / width
            return t

        def enter(module: nn.Module, inputs: Any) -> None:
            running.append(place[module])

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            running.pop()

        hooks: list[Any] = []
        for module in modules:
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            with only(model, trained), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                loss = forward()  # its graph keeps every storage alive until all are counted
            del loss
        finally:
            for hook in hooks:
                hook.remove()
    return cost.Layers(base, peft, saved)
