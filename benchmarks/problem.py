"""What the benchmark measures on: a 6-layer GPT-2 (d = 256, byte-level), briefly trained, at three points of its training run.

The text is the language reference that every CPython ships (`pydoc_data.topics`), so the problem needs no download and is the same wherever
the same Python and torch are. The converged answers come from a Lanczos iteration of its own (full reorthogonalisation in float64,
products in float32), which shares no code with any of the tools compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

CACHE = Path(__file__).resolve().parent.parent / "runs" / "bench"
ROWS, LENGTH, LAYERS, WIDTH = 4, 64, 6, 256
STEPS = (200, 205, 210)  # training steps at which the three points lie


class Logits(nn.Module):
    """The model as the public tools want it: token ids (rows, length) in, logits (rows * length, vocabulary) out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits.flatten(0, 1)


@dataclass
class Problem:
    net: Logits
    ids: Tensor  # (ROWS, LENGTH)
    targets: Tensor  # (ROWS * LENGTH,): the next byte
    states: list[dict[str, Tensor]]
    losses: list[float]

    def go(self, point: int) -> None:
        self.net.load_state_dict(self.states[point])

    def layer(self, index: int) -> list[nn.Parameter]:
        return list(self.net.model.transformer.h[index].parameters())

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The same rows in ``count`` batches of equal size."""
        return list(zip(self.ids.chunk(count), self.targets.chunk(count)))


def text_rows(rows: int, generator: torch.Generator) -> Tensor:
    """(rows, LENGTH + 1) bytes from random places of the text."""
    from pydoc_data import topics

    data = np.frombuffer("\n".join(topics.topics.values()).encode(), np.uint8)
    starts = torch.randint(0, len(data) - LENGTH - 1, (rows,), generator=generator)
    return torch.stack([torch.from_numpy(data[s : s + LENGTH + 1].astype(np.int64)) for s in starts.tolist()])


def problem() -> Problem:
    """Trained once (about a minute) and kept under runs/bench; eager attention, no dropout, one thread."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    net = Logits(GPT2LMHeadModel(config)).eval()
    generator = torch.Generator().manual_seed(1)
    held = text_rows(ROWS, generator)
    ids, targets = held[:, :-1].clone(), held[:, 1:].flatten()
    kept = CACHE / "problem.pt"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save(train(net, generator, ids, targets), kept)
    states, losses = torch.load(kept)
    result = Problem(net, ids, targets, states, losses)
    result.go(0)
    return result


def train(
    net: Logits, generator: torch.Generator, ids: Tensor, targets: Tensor
) -> tuple[list[dict[str, Tensor]], list[float]]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
    states, losses = [], []
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            states.append({k: v.clone() for k, v in net.state_dict().items()})
            with torch.no_grad():
                losses.append(float(nn.functional.cross_entropy(net(ids), targets)))
        rows = text_rows(8, generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(rows[:, :-1]), rows[:, 1:].flatten()).backward()
        optimizer.step()
        warmup.step()
    return states, losses


@dataclass(frozen=True)
class Truth:
    """Converged answers for one block at one point."""

    lam_max: float
    lam_min: float
    trace: float
    trace_stderr: float
    sample_sd: float  # of one Rademacher sample z'Hz: what plain Hutchinson has to average away

    @property
    def modulus(self) -> float:
        """|λ|max."""
        return abs(self.dominant)

    @property
    def dominant(self) -> float:
        return max(self.lam_max, self.lam_min, key=abs)

    @property
    def other(self) -> float:
        """The end that is not dominant."""
        return min(self.lam_max, self.lam_min, key=abs)

    def vectors(self, relative_error: float) -> int:
        """Rademacher vectors for a standard error of ``relative_error`` times the trace."""
        return max(2, int(np.ceil((self.sample_sd / (relative_error * abs(self.trace))) ** 2)))


def truth(p: Problem, point: int, pairs: int = 40) -> list[Truth]:
    """One per layer; computed once and kept, layer by layer."""
    kept = CACHE / f"truth-{point}.pt"
    found = torch.load(kept) if kept.exists() else []
    p.go(point)
    for i in range(len(found), LAYERS):
        found.append(vars(reference(p, p.layer(i), pairs, seed=100 * point + i)))
        torch.save(found, kept)
    return [Truth(**t) for t in found]


def reference(p: Problem, parameters: list[nn.Parameter], pairs: int, seed: int) -> Truth:
    """Both ends by Lanczos; the trace from ``pairs`` pairs of sign vectors, in which every other matrix changes its sign."""
    product = hessian_product(p, parameters)
    generator = torch.Generator().manual_seed(seed)
    d = sum(t.numel() for t in parameters)
    low, high = ends(product, d, generator)
    flip = torch.cat([torch.full((t.numel(),), 1.0) for t in parameters])
    place = matrices = 0
    for t in parameters:
        matrices += t.dim() > 1
        if t.dim() > 1 and matrices % 2 == 0:
            flip[place : place + t.numel()] = -1.0
        place += t.numel()
    forms = np.empty((pairs, 2))
    for i in range(pairs):
        z = torch.randint(0, 2, (d,), generator=generator).float() * 2 - 1
        for j, x in enumerate((z, z * flip)):
            forms[i, j] = float(x.double() @ product(x).double())
    means = forms.mean(axis=1)
    plain = float(np.sqrt(forms.var(axis=0, ddof=1).mean()))  # each column alone is plain Hutchinson
    return Truth(high, low, float(means.mean()), float(means.std(ddof=1) / pairs**0.5), plain)


def hessian_product(p: Problem, parameters: list[nn.Parameter]) -> Callable[[Tensor], Tensor]:
    loss = nn.functional.cross_entropy(p.net(p.ids), p.targets)
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    sizes = [t.numel() for t in parameters]

    def product(v: Tensor) -> Tensor:
        parts = [x.view_as(t) for x, t in zip(v.float().split(sizes), parameters)]
        found: Any = torch.autograd.grad(grads, parameters, parts, retain_graph=True)
        return torch.cat([t.reshape(-1) for t in found])

    return product


def ends(
    product: Callable[[Tensor], Tensor], d: int, generator: torch.Generator, most: int = 150
) -> tuple[float, float]:
    """λ_min and λ_max by Lanczos until both residuals are below 1e-3 of their values (the eigenvalues' errors are far smaller)."""
    low = high = 0.0
    for low, high, worst, _ in sweep(product, torch.randn(d, generator=generator).double(), most):
        if worst < 1e-3:
            return low, high
    raise SystemExit(
        f"the reference eigenvalues did not converge in {most} products: residual {worst:.1e} of the value"
    )


def sweep(
    product: Callable[[Tensor], Tensor], start: Tensor, most: int
) -> Iterator[tuple[float, float, float, np.ndarray]]:
    """After each product: both Ritz values, the larger relative residual, the tridiagonal matrix so far."""
    basis = torch.empty(most + 1, len(start), dtype=torch.float64)
    basis[0] = start / start.norm()
    tridiagonal = np.zeros((most, most))
    for k in range(most):
        w = product(basis[k]).double()
        tridiagonal[k, k] = float(w @ basis[k])
        for _ in range(2):
            w -= basis[: k + 1].T @ (basis[: k + 1] @ w)
        beta = float(w.norm())
        values, vectors = np.linalg.eigh(tridiagonal[: k + 1, : k + 1])
        residuals = beta * np.abs(vectors[-1])
        worst = max(residuals[0] / abs(values[0]), residuals[-1] / abs(values[-1]))
        yield float(values[0]), float(values[-1]), float(worst), tridiagonal[: k + 1, : k + 1].copy()
        basis[k + 1] = w / beta
        if k + 1 < most:
            tridiagonal[k, k + 1] = tridiagonal[k + 1, k] = beta


if __name__ == "__main__":
    torch.set_num_threads(1)
    p = problem()
    for point in range(len(STEPS)):
        print(f"point {point} (step {STEPS[point]}, loss {p.losses[point]:.3f})")
        for i, t in enumerate(truth(p, point)):
            trace = f"tr {t.trace:.4g} ± {t.trace_stderr:.2g} ({t.vectors(0.1)} vectors for 10 %)"
            print(f"  layer {i}: λ_max {t.lam_max:.4g}, λ_min {t.lam_min:.4g}, {trace}")
