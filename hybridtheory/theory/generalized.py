"""First-order steps under (L0, L1)-smoothness, ‖H‖ <= L0 + L1‖g‖: the step shrinks where the gradient is large.

All are for one block with exact gradients; `g_norm` is the norm of the full gradient, whose smoothness the constants
describe.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import nonnegative
from hybridtheory.theory.step_sizes import Step

# ν = e^{-ν}: the constant of Gorbunov et al. (the omega constant).
OMEGA = float(brentq(lambda v: v - math.exp(-v), 0.5, 0.6, xtol=1e-15))


def zhang_step(L0: float, L1: float, g_norm: float) -> Step:
    """min{1/(10 L0), 1/(10 L1 ‖g‖)}: clipped gradient descent under (L0, L1)-smoothness (Zhang et al. 2020, Thm 3;
    from memory).
    """
    _l0l1("zhang_step", L0, L1, g_norm)
    value = 1 / (10 * max(L0, L1 * g_norm))
    return Step(value, "Zhang et al. 2020, clipped GD", "min{1/(10 L0), 1/(10 L1 |g|)}", "L0, L1 and |g|")


def vankov_step(L0: float, L1: float, g_norm: float, kind: str = "optimal") -> Step:
    """Steps of Vankov et al. 2024 (arXiv 2410.10800; formulas from memory, re-derived) for first-order (L0, L1)-smooth
    descent.

    Statement: f(y) <= f(x) + <g, y-x> + (L0 + L1‖g‖) φ(L1‖y-x‖)/L1², φ(t) = e^t - t - 1; "optimal" minimises it:
               η = ln(1 + L1‖g‖/(L0 + L1‖g‖))/(L1‖g‖); "simple" is 1/(L0 + 1.5 L1‖g‖); "clip" is min{1/(2 L0), 1/(3
               L1‖g‖)}.
    """
    _l0l1("vankov_step", L0, L1, g_norm)
    u = L1 * g_norm
    if kind == "optimal":
        # The limit u -> 0 is 1/L0; log1p keeps the digits on the way there.
        value = math.log1p(u / (L0 + u)) / u if u > 0 else 1 / L0
        return Step(value, "Vankov et al. 2024, optimal", "ln(1 + L1|g|/(L0+L1|g|))/(L1|g|)", "L0, L1 and |g|")
    if kind == "simple":
        return Step(1 / (L0 + 1.5 * u), "Vankov et al. 2024, simple", "1/(L0 + 1.5 L1 |g|)", "L0, L1 and |g|")
    if kind == "clip":
        return Step(1 / max(2 * L0, 3 * u), "Vankov et al. 2024, clip", "min{1/(2 L0), 1/(3 L1 |g|)}", "L0, L1 and |g|")
    raise UserError(f"vankov_step knows the kinds optimal, simple and clip, got {kind!r}")


def vankov_decrease(L0: float, L1: float, g_norm: float) -> float:
    """‖g‖²/(2 L0 + 3 L1‖g‖): the decrease that the optimal Vankov step guarantees (re-derived, (1+t)ln(1+t) - t >=
    t²/(2+t)).
    """
    _l0l1("vankov_decrease", L0, L1, g_norm)
    return g_norm**2 / (2 * L0 + 3 * L1 * g_norm)


def gorbunov_step(L0: float, L1: float, g_norm: float) -> Step:
    """(ν/2)/(L0 + L1‖g‖), ν = e^{-ν} = 0.567: (L0, L1)-GD of Gorbunov et al. 2024 (arXiv 2409.14989; from memory,
    convex f).
    """
    _l0l1("gorbunov_step", L0, L1, g_norm)
    value = 0.5 * OMEGA / (L0 + L1 * g_norm)
    return Step(
        value,
        "Gorbunov et al. 2024, (L0,L1)-GD",
        "(nu/2)/(L0 + L1 |g|), nu = 0.567",
        "L0, L1 and |g|",
        note="stated for convex f",
    )


def _l0l1(where: str, L0: float, L1: float, g_norm: float) -> None:
    nonnegative(where, L0=L0, L1=L1, g_norm=g_norm)
    if L0 == 0 and L1 * g_norm == 0:
        raise UserError(f"{where} needs L0 + L1 |g| > 0, got L0 = {L0:.4g}, L1 = {L1:.4g}, |g| = {g_norm:.4g}")
