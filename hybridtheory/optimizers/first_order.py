"""First-order groups inside a `ZeroOrder` optimizer: torch's own SGD or AdamW, on the very groups and state of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError


def _galore() -> Callable[..., torch.optim.Optimizer]:
    try:
        from galore_torch import GaLoreAdamW  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            f"the method galore uses the package galore-torch and its bitsandbytes: pip install galore-torch ({error})"
        ) from error
    return partial(GaLoreAdamW, no_deprecation_warning=True)


RULES: dict[str, Callable[[], Callable[..., torch.optim.Optimizer]]] = {
    "sgd": lambda: torch.optim.SGD,
    "adamw": lambda: torch.optim.AdamW,
    "galore": _galore,
}
_GALORE = ("rank", "update_proj_gap", "scale", "proj_type")


class FirstOrder:
    """``owner``'s "fo" groups and its state are the rule's own, so schedulers, ``state_dict`` and resuming see one optimizer.

    rule     a name of `RULES`; ``options`` go to torch's own optimizer. Raises UserError for another name.
    """

    def __init__(self, owner: torch.optim.Optimizer, rule: str, options: Mapping[str, Any]) -> None:
        if rule not in RULES:
            raise UserError(f"the first-order rule must be one of {', '.join(RULES)}, got {rule!r}")
        self.owner = owner
        groups = [g for g in owner.param_groups if g["kind"] == "fo"]
        passed = ("params", "lr", "weight_decay", *_GALORE)
        self.inner = RULES[rule]()([{k: g[k] for k in passed if k in g} for g in groups], **options)
        for group, own in zip(groups, self.inner.param_groups, strict=True):
            for name, value in own.items():
                group.setdefault(name, value)
        self.link()

    def link(self) -> None:
        """Loading a state puts new groups and a new state into the owner: take those."""
        self.inner.param_groups = [g for g in self.owner.param_groups if g["kind"] == "fo"]
        self.inner.state = self.owner.state

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [p for g in self.owner.param_groups if g["kind"] == "fo" for p in g["params"]]

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def update(self, minibatches: int = 1) -> None:
        """Apply the mean over the minibatches whose gradients were added up in ``.grad``, and drop it."""
        self.link()
        if minibatches > 1:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], minibatches)
        self.inner.step()
        self.clear()


def lora_plus(block: Block, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """LoRA+ (Hayou et al. 2024, arXiv 2402.12354): first-order groups in which LoRA's B matrices learn ``ratio`` times as fast as A.

    Raises UserError for a block without B matrices.
    """
    b = {n: p for n, p in block.parameters.items() if "lora_B" in n or "lora_embedding_B" in n}
    a = {n: p for n, p in block.parameters.items() if n not in b}
    if not b:
        raise UserError(
            f"LoRA+ gives LoRA's B matrices their own rate, and block {block.name!r} has none: use --peft lora"
        )
    return [
        {"block": Block(f"{block.name}.A", block.group, a, {}, block.info), "kind": "fo", "lr": lr},
        {"block": Block(f"{block.name}.B", block.group, b, {}, block.info), "kind": "fo", "lr": lr * ratio},
    ]


def galore(
    block: Block, lr: float, rank: int = 128, update_proj_gap: int = 200, scale: float = 0.25
) -> list[dict[str, Any]]:
    """GaLore (Zhao et al. 2024, arXiv 2403.03507): groups in which the gradients of matrices are projected to ``rank``, the rest not.

    The rule itself is the authors' package, as a baseline. Raises UserError where no matrix is larger than ``rank``.
    """
    matrices = {n: p for n, p in block.parameters.items() if p.dim() == 2 and min(p.shape) > rank}
    rest = {n: p for n, p in block.parameters.items() if n not in matrices}
    if not matrices:
        raise UserError(
            f"GaLore projects matrices to rank {rank}, and block {block.name!r} has none that is larger: lower the rank"
        )
    projection = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": "std"}
    groups = [{"block": Block(f"{block.name}.matrices", block.group, matrices), "kind": "fo", "lr": lr, **projection}]
    return groups + (
        [{"block": Block(f"{block.name}.rest", block.group, rest), "kind": "fo", "lr": lr}] if rest else []
    )
