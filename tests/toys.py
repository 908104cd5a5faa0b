"""Small models and functions whose answers are known, shared by the tests."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from hybridtheory.blocks import Block, partition
from hybridtheory.oracle import Oracle, microbatches

VOCABULARY = 20


class NextToken:
    """Cross-entropy of the next token, summed; batches are {"x": ids}, negative ids are padding."""

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return model(input_ids=batch["x"].clamp(min=0), attention_mask=(batch["x"] >= 0).long()).logits[:, :-1]

    def loss(self, z: Tensor, batch: Any) -> Tensor:
        targets = batch["x"][:, 1:].flatten()
        return nn.functional.cross_entropy(z.flatten(0, 1), targets.clamp(min=-100), reduction="sum", ignore_index=-1)

    def weight(self, batch: Any) -> float:
        return float((batch["x"][:, 1:] >= 0).sum())


class Classify:
    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return model(input_ids=batch["x"].clamp(min=0), attention_mask=(batch["x"] >= 0).long()).logits

    def loss(self, z: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(z, batch["x"][:, 0].clamp(min=0) % 2, reduction="sum")

    def weight(self, batch: Any) -> float:
        return float(len(batch["x"]))


def language_model(
    kind: str = "gpt2", dtype: torch.dtype = torch.float64, layers: int = 2, width: int = 16
) -> nn.Module:
    small: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            model: Any = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=2, n_positions=16, **small))
        elif kind == "llama":
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
            model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=16, **sizes, **small))
        elif kind == "opt":
            sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
            # A smooth activation: the Hessian of a ReLU network is another subject (tests/test_preflight.py).
            more = {"word_embed_proj_dim": 16, "max_position_embeddings": 16, "activation_function": "gelu"}
            model = OPTForCausalLM(OPTConfig(**sizes, **more, **small))
        else:
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
            model = BertForSequenceClassification(
                BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, num_labels=2, pad_token_id=None, **sizes)
            )
    return model.to(dtype).eval()


def with_lora(model: nn.Module, rank: int = 2) -> nn.Module:
    """LoRA whose B is not zero, so that no block of the Hessian vanishes."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wrapped: Any = get_peft_model(model, LoraConfig(r=rank, target_modules=["c_attn"], fan_in_fan_out=True))  # type: ignore[arg-type]
        dtype = next(model.parameters()).dtype
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.data = torch.randn_like(p).mul_(0.1).to(dtype)
    return wrapped.eval()


def is_lora(name: str) -> bool:
    return "lora_" in name


def tokens(rows: int = 5, length: int = 8, ragged: bool = False) -> dict[str, Tensor]:
    x = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    if ragged:
        for i in range(rows):
            x[i, length - i % 4 :] = -1
    return {"x": x}


def language_oracle(
    by: str = "group",
    rows: int | None = None,
    ragged: bool = False,
    dtype: torch.dtype = torch.float64,
    layers: int = 2,
    width: int = 16,
    **options: Any,
) -> tuple[Oracle, list[Block]]:
    """A tiny GPT-2 with LoRA; ``rows``: rows of a micro-batch."""
    model = with_lora(language_model("gpt2", dtype, layers, width))
    blocks = partition(model, by, is_lora)
    batch = tokens(ragged=ragged)
    return Oracle(model, NextToken(), microbatches(batch, rows or 5), blocks, **options), blocks


class Quadratic(nn.Module):
    """f = 1/2 w'Hw - b'w over w = (x, y)."""

    def __init__(self, H: Tensor, split: int, b: Tensor | None = None) -> None:
        super().__init__()
        n = H.shape[0]
        start = torch.ones(n, dtype=H.dtype)
        self.x = nn.Parameter(start[:split].clone())
        self.y = nn.Parameter(start[split:].clone())
        self.register_buffer("H", H)
        self.register_buffer("b", torch.zeros(n, dtype=H.dtype) if b is None else b)

    def forward(self) -> Tensor:
        w = torch.cat([self.x, self.y])
        return 0.5 * w @ self.H @ w - self.b @ w


class Whole:
    """An Objective for modules that return the loss; the batch only says how often it counts."""

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return model()

    def loss(self, z: Tensor, batch: Any) -> Tensor:
        return z * len(batch)

    def weight(self, batch: Any) -> float:
        return float(len(batch))


def quadratic_oracle(H: Tensor, split: int) -> tuple[Oracle, list[Block]]:
    model = Quadratic(H, split)
    blocks = partition(model, "group", peft=lambda n: n == "y")
    return Oracle(model, Whole(), [torch.zeros(1)], blocks), blocks


def spectrum_matrix(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64))
    return q @ torch.diag(values.double()) @ q.T
