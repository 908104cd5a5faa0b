"""From inner products to an `Estimator` record: moments, cosines and bias of independent estimates, beside their closed forms."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from hybridtheory.blocks import Block
from hybridtheory.estimators import Law, MagnitudeMask, Orthonormal, Sphere
from probes import closed_forms
from probes.closed_forms import Given as Facts
from probes.closed_forms import Predicted, mode_of
from probes.draws import CAPTURED, COLUMNS, HG, TESTS, G, R
from probes.laws import Member
from probes.records import Estimator
from probes.records_estimators import Compared, Cosines
from probes.subspaces import keeps, projects

BINS = 40


@dataclass(frozen=True)
class Estimates:
    """n independent estimates: ‖ĝ‖² (n,), ⟨ĝ, ·⟩ (n, COLUMNS), energy of the span of their queries (n,), and ⟨ĝᵢ, ĝⱼ⟩ of pairs of
    single-query estimates, one mean a batch."""

    norm_sq: np.ndarray
    dots: np.ndarray
    span: np.ndarray | None
    pairs: np.ndarray | None


def estimates(member: Member, law: Law, sums: tuple[np.ndarray, np.ndarray], d: int) -> Estimates:
    dots, gram = sums
    q = member.q
    batches, size, _ = dots.shape
    pairs = None
    if isinstance(law, Sphere):
        factor = np.sqrt(d / np.diagonal(gram, axis1=1, axis2=2))
        dots = np.concatenate([dots[..., :CAPTURED] * factor[..., None], dots[..., CAPTURED:]], axis=2)
        gram = gram * factor[:, :, None] * factor[:, None, :]
    if size > 1 and not isinstance(law, Orthonormal):
        c = dots[..., G]
        products = c[:, :, None] * c[:, None, :] * gram
        pairs = (products.sum((1, 2)) - np.trace(products, axis1=1, axis2=2)) / (size * (size - 1))
    groups = size // q
    dots = dots.reshape(batches * groups, q, COLUMNS)
    own = np.stack([gram[:, i * q : (i + 1) * q, i * q : (i + 1) * q] for i in range(groups)], 1).reshape(-1, q, q)
    span = None
    if isinstance(law, Orthonormal):
        # Z = V R with Z'Z = R'R: the same set of orthonormal directions that the law itself mixes from its Gaussian draws.
        root = np.linalg.cholesky(own)
        mixed = math.sqrt(d) * np.linalg.solve(root, dots[..., :CAPTURED])
        dots = np.concatenate([mixed, dots[..., CAPTURED:]], axis=2)
        own = np.broadcast_to(d * np.eye(q), own.shape)
        span = (dots[..., G] ** 2).sum(1) / d
    c = dots[..., G]
    norm_sq = np.einsum("ni,nij,nj->n", c, own, c) / q**2
    combined = np.einsum("nq,nqk->nk", c, dots) / q
    combined[:, CAPTURED] = dots[..., CAPTURED].mean(1)
    return Estimates(norm_sq, combined, span, pairs)


def record(
    m: Member, law: Law, block: Block, facts: Facts, inner: dict[str, float], e: Estimates, precision: float, spread: float | None = None
) -> Estimator:  # fmt: skip
    gg, d, n = facts.gg, facts.d, len(e.norm_sq)
    said = closed_forms.predict(law, mode_of(law), m.q, facts)
    along = e.dots[:, G] / gg
    second, notes = e.norm_sq / gg, []
    mean_sq, mean_sq_error = said.mean_sq, 0.0
    if e.pairs is not None and len(e.pairs) > 1:
        mean_sq, mean_sq_error = _mean(e.pairs / gg)
    elif mean_sq is not None:
        notes.append("the variance takes ‖E ĝ‖² from the closed form: no two independent directions are held at once")
    found: dict[str, Compared] = {}

    def put(name: str, values: np.ndarray) -> None:
        found[name] = _compared(values, said, name)

    put("second_moment", second)
    if spread is not None:
        # The sample's own spread misses the rare large entries that make it; the exact one is known.
        exact = math.sqrt(spread / n) * d
        found["second_moment"] = replace(found["second_moment"], stderr=exact)
        notes.append(
            f"heavy-tailed (‖ĝ‖² varies by {math.sqrt(max(spread, 0.0)):.3g} times its mean): errors are exact, not the sample's"
        )
    if mean_sq is not None:
        value, error = found["second_moment"].value, found["second_moment"].stderr or 0.0
        found["variance"] = Compared(value - mean_sq, math.hypot(error, mean_sq_error), *_said(said, "variance"))
    put("mse", second - 2 * along + 1)
    if spread is not None:
        found["mse"] = replace(found["mse"], stderr=exact)
    cosine = _cosine(e.dots[:, G], e.norm_sq, gg)
    put("cosine", cosine)
    put("cosine_sq", cosine**2)
    if spread is not None:  # cos² = gⱼ²/‖g‖² is ‖ĝ‖²/d of the same draw
        found["cosine_sq"] = replace(found["cosine_sq"], stderr=exact / d**2)
    cosines = [_histogram("gradient", cosine, said.beta, True)]
    whole = facts.spectrum
    if projects(law):
        if keeps(law) or isinstance(law, MagnitudeMask):
            captured = np.full(n, whole.captured if whole is not None else math.nan)
            found["captured"] = Compared(float(captured[0] / gg), 0.0, *_said(said, "captured"))
        else:
            captured = e.dots[:, CAPTURED]
            put("captured", captured / gg)
        inside = _cosine(e.dots[:, G], e.norm_sq, captured)
        put("cosine_projected", inside)
        put("cosine_sq_projected", inside**2)
        cosines.append(_histogram("projection", inside, said.beta_projected, said.exact))
    if e.span is not None:
        put("captured", e.span / gg)
    size = whole.dimension if projects(law) and whole is not None else float(m.q) if e.span is not None else None
    reached = (found["second_moment"].stderr or 0.0) <= 1.1 * precision * found["second_moment"].value
    return Estimator(
        law=m.label, block=block.name, group=block.group, d=d, q=m.q, n=n, grad_norm=math.sqrt(gg), quantities=found,
        bias=_bias(e, inner, d, said, mean_sq, mean_sq_error), floor=math.sqrt(max(float(np.mean(second)) - 1, 0.0) / n),
        precision=precision, reached=reached, subspace=size,
        kept=keeps(law) or isinstance(law, MagnitudeMask), cosines=cosines, note="; ".join(notes),
    )  # fmt: skip


def _bias(
    e: Estimates, inner: dict[str, float], d: int, said: Predicted, mean_sq: float | None, mean_sq_error: float
) -> dict[str, Compared]:  # fmt: skip
    """⟨E ĝ - g, v⟩/‖g‖ along unit vectors, and ‖E ĝ - g‖²/‖g‖² from independent pairs."""
    gg = inner["gg"]
    size = math.sqrt(gg)
    unbiased = said.values.get("along", (math.nan, ""))[0] == 0.0
    found = {"g": _compared(e.dots[:, G] / gg - 1, said, "along")}
    others = {
        "Hg": (HG, inner["HH"], inner["gH"]),
        **{f"r{j}": (R + j, float(d), inner[f"r{j}"]) for j in range(TESTS)},
    }
    for name, (column, square, exact) in others.items():
        if square > 0:
            value, error = _mean((e.dots[:, column] - exact) / (math.sqrt(square) * size))
            found[name] = Compared(value, error, 0.0 if unbiased else None, "unbiased" if unbiased else "")
    if mean_sq is not None and mean_sq_error > 0:
        along, error = _mean(e.dots[:, G] / gg)
        predicted = (
            said.mean_sq - 1 - 2 * said.values["along"][0]
            if said.mean_sq is not None and "along" in said.values
            else None
        )
        if predicted is not None and abs(predicted) < 1e-12:  # rounding of an unbiased law
            predicted = 0.0
        found["norm_sq"] = Compared(
            mean_sq - 2 * along + 1, math.hypot(mean_sq_error, 2 * error), predicted, "‖E ĝ − g‖²/‖g‖²"
        )
    return found


def _mean(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _said(said: Predicted, name: str) -> tuple[float | None, str]:
    return said.values.get(name, (None, ""))


def _compared(values: np.ndarray, said: Predicted, name: str) -> Compared:
    return Compared(*_mean(values), *_said(said, name))


def _cosine(along: np.ndarray, norm_sq: np.ndarray, target_sq: float | np.ndarray) -> np.ndarray:
    """0 where the estimate is the zero vector (a coordinate in which g has no part)."""
    size = np.sqrt(norm_sq * target_sq)
    out: np.ndarray = np.divide(along, size, out=np.zeros_like(along), where=size > 0)
    return out


def _histogram(target: Any, cosine: np.ndarray, beta: tuple[float, float] | None, exact: bool) -> Cosines:
    top = float(cosine.max()) or 1.0
    counts, edges = np.histogram(cosine, bins=BINS, range=(min(float(cosine.min()), 0.999 * top), top))
    p = None
    if beta is not None and exact:
        p = float(stats.kstest(cosine**2, stats.beta(*beta).cdf).pvalue)
    alpha, second = beta or (None, None)
    return Cosines(target, edges.tolist(), counts.tolist(), alpha, second, exact, p)
