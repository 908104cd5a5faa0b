"""Memory and time of the methods, as formulas over layer sizes.

Memory counts elements per layer l: x_l base weights, y_l adapter weights, a_l activations kept for the backward pass. Formulas
are reconstructed from ZO-Bench's table and the hybrid paper's rebuttal (from memory; their cell formulas are not at hand), so
they are checked by measurement, not assumed. Prompt, prefix and LoRA tuning all keep base activations, so the hybrid method
needs the memory of its first-order PEFT twin and not that of inference; its phases follow one another: a maximum, not a sum.
Time counts forward passes (a backward pass costs `backward` of them, 2 by custom).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import count, nonnegative, positive


@dataclass(frozen=True)
class Layers:
    """Element counts per layer, all of one length: base weights, adapter weights, activations kept for backward."""

    base: Sequence[float]
    peft: Sequence[float]
    activations: Sequence[float]

    def __post_init__(self) -> None:
        if not self.base or not len(self.base) == len(self.peft) == len(self.activations):
            sizes = (len(self.base), len(self.peft), len(self.activations))
            raise UserError(f"the layer lists must have one length >= 1, got {sizes}")
        for name, values in (("base", self.base), ("peft", self.peft), ("activations", self.activations)):
            for i, v in enumerate(values):
                nonnegative("Layers", **{f"{name}_{i}": v})


def first_order_memory(layers: Layers) -> float:
    """|x| + Σ_l max(a_l, x_l): gradient descent on all weights; a layer's gradient replaces its activations."""
    return sum(layers.base) + sum(max(a, x) for a, x in zip(layers.activations, layers.base))


def zeroth_order_memory(layers: Layers, replayed: bool = True) -> float:
    """|x| + max_l x_l with directions replayed from a seed layer by layer; 2|x| where the direction is stored."""
    return sum(layers.base) + (max(layers.base) if replayed else sum(layers.base))


def peft_memory(layers: Layers) -> float:
    """|x| + |y| + Σ_l max(a_l, y_l): first-order training of the adapters; a_l includes the base's activations."""
    return sum(layers.base) + sum(layers.peft) + sum(max(a, y) for a, y in zip(layers.activations, layers.peft))


def hybrid_memory(layers: Layers) -> float:
    """|x| + |y| + max(Σ_l max(a_l, y_l), max_l x_l): backpropagation for y, then a replayed direction for x."""
    back = sum(max(a, y) for a, y in zip(layers.activations, layers.peft))
    return sum(layers.base) + sum(layers.peft) + max(back, max(layers.base))


# Copies of the trained block that an optimizer keeps besides the weights themselves.
STATE_COPIES = {"sgd": 0, "momentum": 1, "adam": 2, "zo-sgd": 0, "zo-momentum": 1, "zo-adam": 2, "hizoo": 1}


def optimizer_state(method: str, trained: float) -> float:
    """Elements of optimizer state for `trained` parameters: 0 for SGD and ZO-SGD, 1 momentum and HiZOO's diagonal, 2 Adam."""
    nonnegative("optimizer_state", trained=trained)
    if method not in STATE_COPIES:
        raise UserError(f"optimizer_state knows {', '.join(STATE_COPIES)}, got {method!r}")
    return STATE_COPIES[method] * trained


def low_rank_state(shapes: Sequence[tuple[int, int]], rank: int, factors: str) -> float:
    """Elements that a low-rank law keeps between steps: SubZero Σ r(m+n), LOZO Σ rn (V only), TeZO Σ r(m+n)."""
    count("low_rank_state", rank=rank)
    if factors not in ("subzero", "lozo", "tezo"):
        raise UserError(f"low_rank_state knows subzero, lozo and tezo, got {factors!r}")
    return float(sum(rank * (n if factors == "lozo" else m + n) for m, n in shapes))


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes of one step; `time` in units of a forward pass."""

    forward: float
    backward: float

    def time(self, backward: float = 2.0) -> float:
        """Forward-equivalents when one backward pass costs `backward` forward passes."""
        positive("Passes.time", backward=backward)
        return self.forward + backward * self.backward


def passes(method: str, q: int = 1, one_sided: bool = False, joint: bool = True, inner_steps: int = 10) -> Passes:
    """Passes of one step on one batch.

    Args: method: "fo" (all weights or PEFT), "zo", "hybrid", "forward-gradient", "bilevel", "zo-conservative" (ZO-SGD-Cons, q = 1),
          "hizoo".
          q queries; one_sided: forward differences, q queries sharing f(w); joint: the hybrid updates both blocks from one point,
          so that a one-sided difference reuses the backward pass's own forward; sequential updates cannot.
    Statement: zo 2q, one-sided q + 1; fo 1 + a backward; hybrid their sum, less 1 forward where f(w) is reused; conservative 2 + 3
               (w, w - ηĝ, w + ηĝ on the same batch); HiZOO 3; forward gradient q passes, each with its derivative beside it; bilevel
               K inner gradients, one of each level for p, the value at s, and Φ (three losses) at q + 1 points.

    Examples:
        >>> passes("zo"), passes("hybrid", one_sided=True)
        (Passes(forward=2, backward=0), Passes(forward=2, backward=1))
        >>> passes("hybrid", one_sided=True).time(backward=2.0)
        4.0
    """
    count("passes", q=q, inner_steps=inner_steps)
    zo = q + 1 if one_sided else 2 * q
    if method == "fo":
        return Passes(1, 1)
    if method == "zo":
        return Passes(zo, 0)
    if method == "hybrid":
        return Passes(zo + 1 - (1 if one_sided and joint else 0), 1)
    if method == "forward-gradient":
        return Passes(q, 0)
    if method == "bilevel":
        return Passes(inner_steps + 3 + 3 * (q + 1), inner_steps + 2)
    if method in ("zo-conservative", "hizoo") and q == 1:
        return Passes(5 if method == "zo-conservative" else 3, 0)
    raise UserError(
        "passes knows fo, zo, hybrid, forward-gradient, bilevel, and with q = 1 zo-conservative and hizoo, got "
        f"{method!r} with q = {q}"
    )


def gigabytes(elements: float, bytes_each: float) -> float:
    """Elements of one width in GB (10⁹ bytes)."""
    nonnegative("gigabytes", elements=elements)
    positive("gigabytes", bytes_each=bytes_each)
    return elements * bytes_each / 1e9
