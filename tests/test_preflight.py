"""Planted defects are found in the order in which one explains the next; sound models pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from hybridtheory.blocks import partition
from hybridtheory.oracle import MeanLoss, Oracle
from hybridtheory.preflight import Verdict, preflight
from tests.toys import NextToken, language_model, language_oracle, tokens


class _WrongFirst(torch.autograd.Function):
    """x -> x², with a first derivative that is 1 % too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * 2.02 * x


class _WrongSecond(torch.autograd.Function):
    """x -> x², with a right first derivative that autograd believes to be constant in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * 2 * x.detach()


class Net(nn.Module):
    def __init__(self, activation: Any, width: int = 24) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, width), nn.Linear(width, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)))


def verdict(model: nn.Module, loss: Any = None) -> Verdict:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1), dtype=next(model.parameters()).dtype)
    objective = MeanLoss(loss or (lambda m, b: (m(b) - b.sum(1, keepdim=True)).square().mean()))
    return preflight(Oracle(model, objective, [x], partition(model)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sound_models_pass(dtype: torch.dtype) -> None:
    oracle, _ = language_oracle(dtype=dtype)
    found = preflight(oracle)
    assert found.verdict == "ok" and len(found.findings) == 7
    assert verdict(Net(torch.tanh).to(dtype)).verdict == "ok"


def test_wrong_first_derivative() -> None:
    found = verdict(Net(_WrongFirst.apply))
    assert found.verdict == "refused" and found.findings[-1].name.startswith("v'g")
    assert "not the gradient of the loss" in found.note


def test_wrong_second_derivative() -> None:
    found = verdict(Net(_WrongSecond.apply))
    assert found.verdict == "refused" and found.findings[-1].name.startswith(("v'Hv", "u'Hv"))


def test_padding_index_that_occurs_unmasked() -> None:
    """torch's embedding drops the gradient of its padding row: what autograd returns is not the gradient of the loss."""
    model: Any = language_model("llama", torch.float32)
    model.model.embed_tokens.padding_idx = int(tokens()["x"][0, 0])
    oracle = Oracle(model, NextToken(), [tokens()], partition(model))
    found = preflight(oracle)
    assert found.verdict == "refused" and found.findings[-1].name.startswith("v'g")
    model.model.embed_tokens.padding_idx = None
    assert preflight(oracle).verdict == "ok"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("activation", "expected"), [("relu", "kinked"), ("gelu", "ok")])
def test_relu_is_kinked_not_refused(activation: str, expected: str, dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 64,
            "ffn_dim": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 64,
        }
        config = OPTConfig(
            **sizes, max_position_embeddings=40, activation_function=activation, vocab_size=50, pad_token_id=None
        )
        model = OPTForCausalLM(config).to(dtype).eval()
    x = torch.randint(0, 50, (8, 32), generator=torch.Generator().manual_seed(0))
    found = preflight(Oracle(model, NextToken(), [{"x": x}], partition(model)))
    assert found.verdict == expected, found.findings[-1]
    assert ("ReLU" in found.note) == (expected == "kinked")


def test_loss_that_changes_between_two_calls() -> None:
    found = verdict(Net(nn.Dropout(0.5)))
    assert found.verdict == "refused" and "two evaluations of the loss differ" in found.note


def test_loss_that_is_not_finite() -> None:
    found = verdict(Net(torch.tanh), lambda m, b: m(b).mean() * float("nan"))
    assert found.verdict == "refused" and "nan" in found.note
