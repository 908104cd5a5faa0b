"""The edge of stability of zeroth-order SGD: the step at which the second moment of the iterates stops contracting.

For a quadratic and Gaussian directions the diagonal of E[ww'] in the eigenbasis of H obeys a linear recursion whose
coordinates are coupled only through S = Σ λ_j² E w_j², so the critical step is the root of one scalar equation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import at_least, at_most, count, finite, inside, positive
from hybridtheory.theory.step_sizes import Step, check_momentum

# A Ritz value this far below zero, relative to the largest, is rounding and not negative curvature.
INDEFINITE = 1e-6


@dataclass(frozen=True)
class Bracket:
    """The edge of stability: `lower` <= critical step <= `upper`, and the critical step itself where a spectrum gave
    it.
    """

    lower: Step
    upper: Step
    critical: Step | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def stability_bracket(
    trace: float,
    lambda_max: float,
    lambda_min: float = 0.0,
    q: int = 1,
    momentum: float = 0.0,
    trace_sq: float | None = None,
) -> Bracket:
    """2q(1-β)/(tr H + c λ_max) <= η* <= 2q(1-β)/tr H, c = 1 + q(1-β)/(1+β): where E f of ZO-SGD starts to diverge.

    Assumptions: quadratic f with H >= 0, Gaussian two-point directions, full batch. With an indefinite H pass tr(H_+)
                 and lambda_min = 0: the bracket of H_+ >= H.
    Statement:   below the lower end E f stays bounded, above the upper end it diverges. With tr(H²) given the upper end
                 tightens to 2q(1-β)/(tr H + c tr(H²)/tr H).
    Reference:   arXiv 2604.14669 for q = 1 (there c = 2/(1+β)); general q and the tighter upper end ours, from the same
                 second-moment recursion (and Cauchy-Schwarz).
    """
    positive("stability_bracket", trace=trace, lambda_max=lambda_max)
    finite("stability_bracket", lambda_min=lambda_min)
    count("stability_bracket", q=q)
    check_momentum("stability_bracket", momentum)
    hypotheses = [
        at_least("lambda_min >= 0", lambda_min, -INDEFINITE * lambda_max),
        at_most("lambda_max <= tr H", lambda_max, trace * (1 + 1e-9)),
    ]
    if trace_sq is not None:
        positive("stability_bracket", trace_sq=trace_sq)
        hypotheses.append(at_most("tr(H^2) <= lambda_max tr H", trace_sq, lambda_max * trace * (1 + 1e-9)))
    tested = inside(
        "the edge-of-stability bracket",
        hypotheses,
        "it is stated for H >= 0; pass tr(H_+) and lambda_min = 0 to bracket the positive part",
    )
    drift = 2 * q * (1 - momentum)
    inner = 1 + q * (1 - momentum) / (1 + momentum)
    low, high = "ZO edge of stability, lower end", "ZO edge of stability, upper end"
    lower = drift / (trace + inner * lambda_max)
    formula = "2q(1-b)/(tr H + c lambda_max), c = 1 + q(1-b)/(1+b)"
    if trace_sq is None:
        upper = Step(drift / trace, high, "2q(1-b)/tr H", "trace", hypotheses=tested)
    else:
        value = drift / (trace + inner * trace_sq / trace)
        upper = Step(value, high, "2q(1-b)/(tr H + c tr(H^2)/tr H)", "trace and tr(H^2)", hypotheses=tested)
    return Bracket(Step(lower, low, formula, "trace and lambda_max", hypotheses=tested), upper)


def stability_root(nodes: Sequence[float], weights: Sequence[float], q: int = 1, momentum: float = 0.0) -> Bracket:
    """The critical step itself: the root of Σ ηλ_i/(2q - c ηλ_i) = 1 in η/(1-β), inside its bracket (c as there).

    Args:
        nodes: eigenvalues, or the nodes of a quadrature of the spectral density.
        weights: how many eigenvalues each node stands for (they sum to d).
    Assumptions, reference: as `stability_bracket`; q = 1, β = 0 reads Σ ηλ_i/(2(1-ηλ_i)) = 1. Nodes below
                 -1e-6 max(nodes) are refused (drop them to treat H_+).
    """
    lam, count_of = np.asarray(nodes, float), np.asarray(weights, float)
    usable = lam.shape == count_of.shape and lam.ndim == 1 and lam.size > 0
    if not (usable and np.isfinite(lam).all() and np.isfinite(count_of).all()):
        raise UserError(
            f"stability_root needs finite nodes and weights of one length, got {lam.shape} and {count_of.shape}"
        )
    if (count_of < 0).any():
        raise UserError(f"stability_root needs weights >= 0, got {count_of.min():.6g}")
    squares = float(lam**2 @ count_of)
    bracket = stability_bracket(float(lam @ count_of), float(lam.max()), float(lam.min()), q, momentum, squares)
    lam = np.maximum(lam, 0.0)
    inner = 1 + q * (1 - momentum) / (1 + momentum)

    def excess(eta: float) -> float:
        return float(np.sum(count_of * eta * lam / (2 * q - inner * eta * lam))) - 1.0

    # Σ grows from -1 at 0 to infinity at the pole, so the root lies left of the pole. Not bracketed by the bracket:
    # with fractional weights (a quadrature) λ_max may stand for less than one eigenvalue.
    pole = 2 * q / (inner * lam.max())
    root = brentq(excess, 0.0, pole * (1 - 1e-12), xtol=1e-300, rtol=1e-13)
    critical = Step(
        root * (1 - momentum),
        "ZO edge of stability, root",
        "(1-b) times the root of sum eta lam/(2q - c eta lam) = 1",
        "the spectral density",
        hypotheses=bracket.lower.hypotheses,
    )
    return Bracket(bracket.lower, bracket.upper, critical)
