"""Update rules with memory, on one tensor at a time and on state held by tensor name (so that it can sit beside a float32 copy of
low-precision weights, and a second adapter that is no parameter of the model)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


@torch.no_grad()
def momentum_(w: Tensor, g: Tensor, state: State, lr: float, beta: float) -> None:
    """m <- β m + g, w <- w - lr m (the effective rate is lr/(1 - β))."""
    if "m" not in state:
        state["m"] = torch.zeros_like(g)
    m = state["m"]
    m.mul_(beta).add_(g)
    w.add_(m, alpha=-lr)


@torch.no_grad()
def adam_(
    w: Tensor, g: Tensor, state: State, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> None:
    """Adam (Kingma & Ba 2015) with bias correction; with decoupled decay by the caller it is AdamW."""
    if "t" not in state:
        state.update(m=torch.zeros_like(g), v=torch.zeros_like(g), t=0)
    m, v = state["m"], state["v"]
    t = state["t"] = state["t"] + 1
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    root = (v / (1 - betas[1] ** t)).sqrt_().add_(eps)
    w.addcdiv_(m, root, value=-lr / (1 - betas[0] ** t))
