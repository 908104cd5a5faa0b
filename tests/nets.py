"""Small float64 models for the estimators' and optimizers' contracts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hybridtheory.blocks import Block, partition


class Tied(nn.Module):
    """Next-token model with what real ones have: a tied embedding, a norm, a low-rank adapter on a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.norm, self.layer = nn.LayerNorm(6), nn.Linear(6, 6)
        self.lora_A, self.lora_B = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        h = self.norm(x)
        return self.head(x + torch.tanh(self.layer(h) + self.lora_B(self.lora_A(h))))


def tied(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Block, Block, Callable[..., Tensor]]:
    """model, base block, PEFT block, closure."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net, ids = Tied().to(dtype), torch.randint(0, 11, (6, 8))
    base, peft = partition(net, peft=lambda name: "lora" in name)

    def closure(backward: bool = False) -> Tensor:
        z = net(ids)
        wide = torch.promote_types(dtype, torch.float32)
        loss = nn.functional.cross_entropy(z[:, :-1].reshape(-1, 11).to(wide), ids[:, 1:].reshape(-1))
        if backward:
            loss.backward()
        return loss.detach() if torch.is_grad_enabled() else loss  # a forward derivative must stay on it

    return net, base, peft, closure


class Quadratic(nn.Module):
    """½ Σ hᵢ wᵢ² over a base matrix x and an adapter vector y, plus a coupling x₀ᵀy."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(-1, 1.5, 12, dtype=torch.float64).view(4, 3))
        self.lora_y = nn.Parameter(torch.linspace(0.5, 1, 3, dtype=torch.float64))

    def forward(self) -> Tensor:
        h = torch.linspace(0.5, 2, 12, dtype=torch.float64).view(4, 3)
        return 0.5 * (h * self.x**2).sum() + 0.5 * (self.lora_y**2).sum() + 0.1 * self.x[0] @ self.lora_y


def quadratic() -> tuple[nn.Module, Block, Block, Callable[..., Tensor]]:
    net = Quadratic()
    base, peft = partition(net, peft=lambda name: "lora" in name)

    def closure(backward: bool = False) -> Tensor:
        loss = net()
        if backward:
            loss.backward()
        return loss.detach() if torch.is_grad_enabled() else loss  # a forward derivative must stay on it

    return net, base, peft, closure
