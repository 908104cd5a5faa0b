"""What theory says of one law on one block, by the names under which `probes.estimators` measures; absent: none is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.special import gammaln

from hybridtheory.estimators import SRGF, Law, Rademacher, RandomMask
from hybridtheory.estimators.lowrank import LowRank
from hybridtheory.theory import moments
from hybridtheory.theory.moments_covariance import (
    Spectrum,
    composed_second_moment,
    covariance_cosine_squared,
    covariance_mean,
    covariance_second_moment,
    random_mask_second_moment,
)
from hybridtheory.theory.moments_subspace import averaged, srgf_second_moment
from probes.subspaces import FULL, keeps

Prediction = tuple[float, str]


@dataclass(frozen=True)
class Given:
    """What the closed forms of one block need: its size, ‖g‖², and by tensor its size, energy, excess and spectrum."""

    d: int
    gg: float
    sizes: Mapping[str, int]
    energies: Mapping[str, float]
    excess: Mapping[str, float | None]
    spectra: Mapping[str, Spectrum | None]

    @property
    def spectrum(self) -> Spectrum | None:
        """Of the block's Σ; None where a tensor's is not known."""
        parts = [s for s in self.spectra.values() if s is not None]
        return Spectrum.joined(parts) if parts and len(parts) == len(self.spectra) else None


@dataclass(frozen=True)
class Predicted:
    """``values`` by name; Beta laws of cos² with g and with P'g, and whether the second is exact; mean_sq = ‖E ĝ‖²/‖g‖²."""

    values: dict[str, Prediction]
    beta: tuple[float, float] | None = None
    beta_projected: tuple[float, float] | None = None
    exact: bool = True
    mean_sq: float | None = None


def predict(law: Law, mode: str, q: int, given: Given) -> Predicted:
    """``mode``: a name of `moments.LAWS` for directions without structure, "" for the others."""
    if mode:
        return _plain(mode, q, given)
    if isinstance(law, RandomMask) and not keeps(law):
        p = law.keep
        second = averaged(random_mask_second_moment(given.d, p), p * p, q)
        found = _moments(second, "p(p(d−1)+3)", p, "E ĝ = p∇f", p * p)
        found["captured"] = (p, "p")
        if q == 1:
            some = 1.0 if p == 1 else -math.expm1(given.d * math.log1p(-p))  # an empty mask has no direction
            found["cosine_sq"] = (some / given.d, "1/d, whatever p")
        return Predicted(found, mean_sq=p * p)
    if isinstance(law, LowRank) and not keeps(law):
        return _fresh(q, given)
    if isinstance(law, SRGF):
        return Predicted(
            _moments(averaged(srgf_second_moment(given.d, law.k), 1.0, q), "(d+2)(k+2)/k", 1.0, "unbiased", 1.0),
            mean_sq=1.0,
        )
    spectrum = given.spectrum
    return Predicted({}) if spectrum is None else _covariance(q, given, spectrum)


def mode_of(law: Law) -> str:
    """The name in `moments.LAWS` of a law without structure, "" for the others."""
    return type(law).__name__.lower() if isinstance(law, (*FULL, Rademacher)) else ""


def _moments(second: float, formula: str, along: float, mean: str, mean_sq: float) -> dict[str, Prediction]:
    return {
        "second_moment": (second, formula),
        "variance": (second - mean_sq, f"{formula} − ‖E ĝ‖²"),
        "mse": (second - 2 * along + 1, f"{formula} − 2⟨E ĝ, g⟩ + 1"),
        "along": (
            0.0 if abs(along - 1) < 1e-12 else along - 1,
            mean,
        ),  # a mask that keeps all of g has rounding alone left
    }


def _plain(mode: str, q: int, given: Given) -> Predicted:
    d = given.d
    formula = {"gaussian": "(d+q+1)/q", "orthonormal": "d/q"}.get(mode, "(d+q−1)/q")
    found = _moments(moments.second_moment(mode, d, q), formula, 1.0, "unbiased", 1.0)
    square, mean = moments.cosine_squared(mode, d, q), moments.cosine(mode, d, q)
    beta = moments.cosine_beta(mode, d, q)
    if square is not None:
        found["cosine_sq"] = (square, "q/d" if mode == "orthonormal" else "q/(q+d−1)" if q > 1 else "1/d")
    if mean is not None:
        found["cosine"] = (mean, "mean of the Beta law" + (f" B({beta[0]:g}, {beta[1]:g})" if beta else ""))
    if mode == "orthonormal":
        found["captured"] = (q / d, "q/d")
    return Predicted(found, beta, mean_sq=1.0)


def _fresh(q: int, given: Given) -> Predicted:
    """Low-rank directions whose factors are all new: unbiased, independent tensor by tensor."""
    names = [n for n in given.sizes if given.excess[n] is not None]
    if len(names) < len(given.sizes):
        return Predicted({})
    excess = [float(given.excess[n] or 0.0) for n in names]
    single = composed_second_moment(given.d, given.gg, excess, [given.energies[n] for n in names]) / given.gg
    found = _moments(averaged(single, 1.0, q), "d + Σ xₗ‖Gₗ‖²/‖g‖²", 1.0, "unbiased over the subspaces", 1.0)
    if q == 1:
        found["cosine_sq"] = (1 / given.d, "1/d" if len(names) == 1 else "1/d, exact for one matrix")
    shares = {n: s.dimension / given.sizes[n] for n, s in given.spectra.items() if s is not None}
    if len(shares) == len(given.sizes):
        captured = sum(shares[n] * given.energies[n] for n in shares) / given.gg
        found["captured"] = (captured, "Σ (kₗ/dₗ)‖Gₗ‖²/‖g‖², k/d in each tensor")
    return Predicted(found, mean_sq=1.0)


def _covariance(q: int, given: Given, s: Spectrum) -> Predicted:
    """Given the subspace (mask, scaling) that the law keeps: u ~ N(0, Σ)."""
    gg, k = given.gg, s.dimension
    along, square = (x / gg for x in covariance_mean(s))
    found = _moments(covariance_second_moment(s, q) / gg, "(g′Σg tr Σ + (q+1) g′Σ²g)/q", along, "g′Σg/‖g‖² − 1", square)
    found["captured"] = (s.captured / gg, "‖P′g‖²/‖g‖², computed; a random subspace: k/d")
    if q > 1 and not s.isotropic:
        return Predicted(found, mean_sq=square)
    rho = s.captured / gg
    if s.isotropic:
        inside = q / (q + k - 1)
        alpha, beta = q / 2, (k - 1) / 2
        found["cosine_sq_projected"] = (inside, "q/(q+k−1)" if q > 1 else "1/k")
        found["cosine_sq"] = (rho * inside, "that times ‖P′g‖²/‖g‖²")
        if k > 1:
            mean = math.exp(gammaln(alpha + 0.5) + gammaln(alpha + beta) - gammaln(alpha) - gammaln(alpha + beta + 0.5))
            found["cosine_projected"] = (mean, "mean of the Beta law in k dimensions")
            found["cosine"] = (mean * math.sqrt(rho), "that times ‖P′g‖/‖g‖")
        return Predicted(found, None, (alpha, beta) if k > 1 else None, True, square)
    inside = covariance_cosine_squared(s, s.captured)
    found["cosine_sq_projected"] = (inside, f"∫ over Σ's spectrum; 1/k = {1 / k:.3g} were it isotropic")
    found["cosine_sq"] = (rho * inside, "that times ‖P′g‖²/‖g‖²")
    effective = 1 / inside
    return Predicted(found, None, (0.5, (effective - 1) / 2) if effective > 1 else None, False, square)
