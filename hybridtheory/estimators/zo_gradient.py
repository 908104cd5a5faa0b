"""ZOGradient: a zeroth-order gradient kept as seeds and slopes, replayed into parameters, never stored.

ĝ = (1/q) Σₖ ρₖ uₖ,   ρₖ = (f(w + μuₖ) - f(w - μuₖ)) / 2μ   central
                      ρₖ = (f(w + μuₖ) - f(w)) / μ          forward (one-sided; f(w) is often known already)
                      ρₖ = ⟨∇f(w), uₖ⟩                       exact (forward-mode derivative)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators.law import SMALL, Kept, Law
from hybridtheory.estimators.perturb import Perturbation
from hybridtheory.estimators.streams import Key
from hybridtheory.shards import any_sharded, local, part, rewritten, whole
from hybridtheory.shards import total as shared
from hybridtheory.threads import each
from hybridtheory.vectors import Tensors

DIFFERENCES = ("central", "forward", "exact")
# bits, the hidden one included
_SIGNIFICAND = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


class NonFiniteLoss(UserError):
    """A loss was infinite or not a number on one side of a difference. Parameters are as they were."""


@dataclass(frozen=True)
class ZOGradient:
    """Replay it before the weights change: masks are functions of the weights' values (`add_to_` itself takes care of
    that).

    realised   None, or the mu of the evaluation: the direction that is replayed is then the one that the weights'
               dtype let through, (fl(w + μu) - fl(w - μu)) / 2μ, where fl rounds to the dtype the model computes in.
    """

    law: Law  # bound to the block and the keys
    keys: tuple[Key, ...]
    slopes: tuple[float, ...]
    block: Block
    # (plus, minus) for central, (plus, at w) for forward, (at w, at w) for exact
    losses: tuple[tuple[float, float], ...] = ()
    evaluations: int = 0  # forward passes that this evaluation made
    realised: float | None = None
    base: float | None = None  # f(w) where it was known

    def direction(self, name: str, like: Tensor, weights: Sequence[float]) -> Tensor | None:
        """Σₖ weightₖ uₖ of one tensor, None where every uₖ is zero."""
        live = [(k, a) for k, a in zip(self.keys, weights, strict=True) if self.law.touches(k, name)]
        if not live:
            return None
        if self.realised is None:
            return self.law.combine([k for k, _ in live], name, like, [a for _, a in live])
        total = torch.zeros_like(like, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)
        for key, weight in live:
            total.add_(_realised(self.law, key, name, like, self.realised), alpha=weight)
        return total

    @torch.no_grad()
    def add_to_(self, alpha: float | Mapping[str, float], into: Mapping[str, Tensor] | None = None) -> None:
        """into += alpha ĝ, tensor by tensor; ``into`` defaults to the parameters themselves. alpha may differ by
        tensor (by name).

        At most one tensor of the block's largest size is allocated at a time by each of torch's threads.
        """
        q = len(self.keys)

        def add(item: tuple[str, Tensor]) -> None:
            name, held = item
            a = alpha[name] if isinstance(alpha, Mapping) else alpha
            written = held if into is None else into[name]
            with rewritten(written) as target:
                add_whole(name, target if written is held else whole(held), target, a)

        def add_whole(name: str, parameter: Tensor, target: Tensor, a: float) -> None:
            if q == 1 and self.realised is None and target is parameter:
                if self.law.touches(self.keys[0], name):
                    self.law.shift(self.keys[0], name, target, a * self.slopes[0], out=target)
                return
            u = self.direction(name, parameter, [a * s / q for s in self.slopes])
            if u is not None:
                target.add_(u)

        if any_sharded(self.block.tensors):  # processes gather in the same order
            for item in self.block.parameters.items():
                add(item)
        else:
            each(add, self.block.parameters.items(), self.block.numel, self.block.tensors[0].device)

    @torch.no_grad()
    def dense(self) -> Tensors:
        """ĝ itself, aligned with the block's tensors: for probes."""
        out = []
        for name, parameter in self.block.parameters.items():
            u = self.direction(name, whole(parameter), [s / len(self.keys) for s in self.slopes])
            dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            out.append(torch.zeros_like(parameter, dtype=dtype) if u is None else part(u, parameter))
        return out


def _realised(law: Law, key: Key, name: str, w: Tensor, mu: float) -> Tensor:
    plus, minus = law.shift(key, name, w.detach(), mu), law.shift(key, name, w.detach(), -mu)
    return (plus.float() - minus.float()).div_(2 * mu)


def evaluate(
    f: Callable[[], Tensor | float],
    plan: Perturbation,
    law: Law,
    keys: Key | Sequence[Key],
    mu: float = 1e-3,
    difference: str = "central",
    at_w: float | None = None,
    keep: bool = False,
    realised: bool = False,
) -> ZOGradient:
    """The zeroth-order gradient of f over ``plan``'s block, one slope for each key.

    f         evaluates the loss at the model's current parameters; it is called without gradients, always on the same
              data.
    at_w      f(w), where it is known: a forward difference then costs one evaluation a key.
    keep      draw each direction once and hold it (one block of float32 a key) instead of drawing it for each use.
    realised  replay what the weights' dtype let through, see ZOGradient.
    Raises UserError for a mu that the weights' dtype absorbs and NonFiniteLoss for a loss that is not finite.
    """
    keys = (keys,) if isinstance(keys, Key) else tuple(keys)
    if difference not in DIFFERENCES:
        raise UserError(f"difference must be one of {', '.join(DIFFERENCES)}, got {difference!r}")
    if difference != "exact":
        check_mu(plan, mu)
    with torch.no_grad():
        bound = Kept(law, None if keep else SMALL).bind(plan.block, keys)
        slopes, losses, count, base = [], [], 0, at_w
        for key in keys:
            if difference == "exact":
                base, slope = plan.derivative(f, bound, key)  # type: ignore[arg-type]
                losses.append((_finite(base, "at w", key, 0.0), base))
                slopes.append(_finite(slope, "in the derivative", key, 0.0))
                count += 1
                continue
            if difference == "forward":
                if base is None:
                    base, count = float(f()), count + 1
                other, span = _finite(base, "at w", key, 0.0), mu
            plus = _finite(float(plan.value(f, bound, key, mu)), "at w + mu u", key, mu)
            count += 1
            if difference == "central":
                other, span = _finite(float(plan.value(f, bound, key, -mu)), "at w - mu u", key, mu), 2 * mu
                count += 1
            slopes.append((plus - other) / span)
            losses.append((plus, other))
    return ZOGradient(bound, keys, tuple(slopes), plan.block, tuple(losses), count, mu if realised else None, base)


def _finite(value: float, where: str, key: Key, mu: float) -> float:
    if not math.isfinite(value):
        raise NonFiniteLoss(
            f"the loss is {value} {where} (mu = {mu:g}, seed {key.seed}, step {key.step}, query {key.query}); "
            f"the parameters are unchanged: "
            "lower mu or the learning rate, or look at this batch"
        )
    return value


def absorbed_fraction(block: Block, mu: float) -> float:
    """The share of the block's entries on which w + mu u = w after rounding, u ~ N(0, 1): mean of erf(half an ulp of
    w / (mu √2)).

    Rounded to the parameters' own dtype; tensors above 65,536 entries are sampled evenly.
    """
    absorbed, total = 0.0, 0.0
    for p in block.tensors:
        w = local(p.detach()).reshape(-1)
        if not w.numel():
            continue  # a process without a row of it
        sample = w[:: max(1, w.numel() // 65_536)].double().abs()
        exponent = torch.frexp(sample)[1] - 1  # 2^e <= |w| < 2^(e+1)
        half_ulp = torch.exp2((exponent - _SIGNIFICAND[p.dtype]).double())
        share = torch.where(sample > 0, torch.erf(half_ulp / (mu * math.sqrt(2))), 0.0).mean()
        absorbed += float(share) * w.numel()
        total += w.numel()
    return shared(absorbed, block.tensors) / shared(total, block.tensors)


def check_mu(plan: Perturbation, mu: float, limit: float = 0.5) -> None:
    """UserError unless mu is positive and at most half of the block's entries swallow it (looked at once a plan and
    mu).
    """
    if not (mu > 0 and math.isfinite(mu)):
        raise UserError(
            f"mu must be positive and finite, got {mu:g}: it is the size of the perturbation in a loss "
            f"difference (1e-3 is usual)"
        )
    if mu not in plan.accepted:
        share = absorbed_fraction(plan.block, mu)
        if share > limit:
            dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in plan.block.tensors}))
            raise UserError(
                f"mu = {mu:g} is absorbed: {share:.0%} of the entries of block {plan.block.name!r} do not "
                f"change when mu u is added to them "
                f"in {dtypes}: raise mu, or hold the weights in float32"
            )
        plan.accepted.add(mu)


@torch.no_grad()
def inner(law: Law, key: Key, block: Block, vector: Sequence[Tensor]) -> float:
    """⟨u, vector⟩ in float64, one tensor at a time: with the gradient known this is the exact slope. ``law`` must be
    bound.
    """
    total = 0.0
    for (name, parameter), v in zip(block.parameters.items(), vector, strict=True):
        if law.touches(key, name):
            u = local(part(law.fill(key, name, whole(parameter)), parameter)).reshape(-1)
            total += float(torch.dot(u.double(), local(v).reshape(-1).double()))
    return shared(total, block.tensors)
