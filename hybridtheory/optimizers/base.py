"""What every method shares: param groups that carry blocks, evaluations that are counted, a state that resumes bit for bit.

A method here is a ``torch.optim.Optimizer`` whose ``step(closure)`` drives its own evaluations:

    closure()               loss of the current minibatch at the current parameters, no gradient
    closure(backward=True)  the same, with its gradient added to ``.grad``; only methods with a first-order group ask for it

A closure is called several times a step and must return the same number for the same parameters; the random state that dropout
sees is set to a function of (seed, step) around each call and the caller's own is put back.

Param groups: ``block`` (a Block, which also gives ``params``), ``kind`` "zo" or "fo", ``lr``, ``weight_decay`` (decoupled, on
tensors with two or more dimensions), and for "zo" ``law``, ``mu``, ``q``, ``difference``. Groups with equal law, mu, q and
difference are perturbed together, by one direction. Block and law are code, not state: ``state_dict`` leaves them out and checks them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators.streams import Key, generator
from hybridtheory.estimators.zo_gradient import ZOGradient, evaluate
from hybridtheory.optimizers.checkpoint import check, pack, unpack
from hybridtheory.optimizers.groups import DEFAULTS, ZO_DEFAULTS, Unit, complete, units
from hybridtheory.shards import any_sharded

Closure = Callable[..., Tensor]


class ZeroOrder(torch.optim.Optimizer):
    """Base of all methods: `_measure` makes a step's evaluations, `_update` applies them; a method overrides one or both.

    groups   mappings as described above; a bare Block means one "zo" group of it.
    model    the module whose forward the closure calls.
    master   True keeps a float32 copy of bf16 and fp16 weights and applies updates there (4 bytes a weight); the direction that is
             replayed is then the one that the low precision let through. Without it such weights are refused: at usual learning
             rates nine updates in ten are lost to rounding. ``in_place_low_precision=True`` does it nevertheless.
    keep     hold each direction while it is in use: one float32 copy of the block buys two draws of three.
    Raises UserError for an unknown option, a group without its block, a rate below 0, and low precision without ``master``.
    """

    accumulates = True
    sharded = False  # does it serve models that fully_shard has cut?
    inner_steps = 0  # of a bilevel method: minibatches of the lower level that a step takes

    def __init__(
        self,
        groups: Block | Sequence[Block | Mapping[str, Any]],
        model: nn.Module,
        seed: int = 0,
        *,
        lr: float | None = None,
        master: bool = False,
        in_place_low_precision: bool = False,
        keep: bool = False,
        **defaults: Any,
    ) -> None:
        refuse_unknown(type(self).__name__, defaults, self.options())
        listed = [groups] if isinstance(groups, Block) else list(groups)
        full = [complete(g, {**DEFAULTS, "lr": lr, **defaults}) for g in listed]
        if not self.sharded and any_sharded(p for g in full for p in g["params"]):
            raise UserError(f"{type(self).__name__} does not serve sharded models: choose MeZO or a hybrid method")
        super().__init__(full, {})
        self.model, self.seed, self.master, self.keep = model, seed, master, keep
        self._cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        Key(seed)  # refuses a seed out of range now
        low = [p for g in self._zo_groups for p in g["params"] if p.dtype in (torch.bfloat16, torch.float16)]
        if low and not (master or in_place_low_precision):
            raise UserError(
                f"{len(low)} tensors of the zeroth-order block are {str(low[0].dtype).removeprefix('torch.')}: "
                f"updates of the usual "
                "size are lost to rounding there; pass master=True (--master fp32), or "
                "in_place_low_precision=True to do it all the same"
            )
        self._realised = bool(low) and master
        self.units = units(self.param_groups, model)
        self._pending: list[list[ZOGradient]] = []  # of each accumulated minibatch, one a unit
        self.losses: list[float] = []
        self.minibatches = 1  # that the step being applied averages over
        self.measured: list[ZOGradient] = []  # of the last step, one a unit
        run = self.named_state["run"] = {}
        run.update({"step": 0, "forwards": 0, "backwards": 0})
        if master:
            self.named_state["master"] = {
                n: p.detach().float().clone()
                for u in self.units
                for n, p in u.plan.block.parameters.items()
                if p.dtype != torch.float32
            }

    @classmethod
    def options(cls) -> set[str]:
        """The keyword arguments that this class takes, what they set in its groups included."""
        classes = [c for c in cls.__mro__ if issubclass(c, ZeroOrder)]
        parameters = [p for c in classes for p in inspect.signature(c).parameters.values()]
        return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} | {*DEFAULTS, *ZO_DEFAULTS}

    @property
    def named_state(self) -> dict[Any, Any]:
        """State that belongs to no single parameter, or is held by tensor name: torch leaves its dtypes alone when a state is loaded."""
        return cast(dict[Any, Any], self.state)

    @property
    def run(self) -> dict[str, Any]:
        """Counters of the run (step, forwards, backwards) and what a method adds to them."""
        return cast(dict[str, Any], self.named_state["run"])

    # ---- groups ----

    @property
    def _zo_groups(self) -> list[dict[str, Any]]:
        return [g for g in self.param_groups if g["kind"] == "zo"]

    @property
    def _fo_groups(self) -> list[dict[str, Any]]:
        return [g for g in self.param_groups if g["kind"] == "fo"]

    # ---- evaluations ----

    @property
    def steps(self) -> int:
        """Steps made since the start of the run."""
        return int(self.run["step"])

    @property
    def counts(self) -> dict[str, int]:
        """Forward and backward passes that were asked of the closure since the start of the run."""
        return {k: self.run[k] for k in ("forwards", "backwards")}

    def cost(self) -> dict[str, int]:
        """Forward and backward passes of one step. What the first one takes more, to find out what this model allows, is not counted."""
        forwards = 0
        for unit in self.units:
            group = self.param_groups[unit.indices[0]]
            forwards += group["q"] * (2 if group["difference"] == "central" else 1)
        at_w = any(self.param_groups[u.indices[0]]["difference"] == "forward" for u in self.units)
        return {"forwards": forwards + at_w, "backwards": 0}

    @contextmanager
    def _same_noise(self) -> Iterator[None]:
        """The closure's own randomness (dropout) is a function of (seed, step): equal on both sides of a difference,
        and in a resumed run."""
        key, purpose = Key(self.seed, self.steps), "closure's own randomness"
        with torch.random.fork_rng(devices=self._cuda):
            torch.random.set_rng_state(generator(key, purpose).get_state())
            for device in self._cuda:
                torch.cuda.set_rng_state(generator(key, purpose, device=f"cuda:{device}").get_state(), device)
            yield

    def _loss(self, closure: Closure) -> Tensor:
        self.run["forwards"] += 1
        with torch.no_grad(), self._same_noise():
            return closure()

    def _gradient(self, closure: Closure) -> float:
        """f(w) with the first-order groups' gradients in ``.grad``. Nothing else gets one, whatever its ``requires_grad`` says."""
        own = {p for g in self._fo_groups for p in g["params"]}
        flags = [(p, p.requires_grad) for p in self.model.parameters() if p.requires_grad != (p in own)]
        for p, flag in flags:
            p.requires_grad_(not flag)
        try:
            with torch.enable_grad(), self._same_noise():
                loss = closure(backward=True)
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
        self.run["forwards"] += 1
        self.run["backwards"] += 1
        return float(loss.detach())

    def _evaluate(self, closure: Closure, unit: Unit, at_w: float | None = None, **options: Any) -> ZOGradient:
        """The zeroth-order gradient of one unit at the current parameters."""
        group = self.param_groups[unit.indices[0]]
        first = sum(len(z.keys) for pending in self._pending for z in pending)
        first += self.units.index(unit) << 16  # units and accumulated minibatches draw different directions
        keys = [Key(self.seed, self.steps, first + k) for k in range(group["q"])]
        settings = {
            "law": group["law"], "mu": group["mu"], "difference": group["difference"], "keep": self.keep, "realised": self._realised,
            **options,
        }  # fmt: skip
        before, calls = self.run["forwards"], 0

        def f() -> Tensor:
            nonlocal calls
            calls += 1
            return self._loss(closure)

        zo = evaluate(f, unit.plan, keys=keys, at_w=at_w, **settings)
        # An evaluation that only found out which weights the model reads elsewhere is no cost of the method, and a resumed run repeats it.
        self.run["forwards"] = before + (self.run["forwards"] - before) * zo.evaluations // calls
        return zo

    # ---- updates ----

    def _targets(self, unit: Unit) -> dict[str, Tensor]:
        """Where updates of a unit's tensors are written: the float32 copy where there is one."""
        master = self.named_state.get("master", {}) if self.master else {}
        return {n: master.get(n, p) for n, p in unit.plan.block.parameters.items()}

    def _per_tensor(self, unit: Unit, setting: str) -> dict[str, float]:
        return {
            n: float(self.param_groups[i][setting])
            for i in unit.indices
            for n in self.param_groups[i]["block"].parameters
        }

    @torch.no_grad()
    def _descend(self, unit: Unit, zo: ZOGradient, factor: float = 1.0) -> None:
        """w <- (1 - lr wd) w - factor lr ĝ, each tensor with its group's lr."""
        lr, targets = self._per_tensor(unit, "lr"), self._targets(unit)
        kept = self._decay(unit)
        # ĝ first, decay after, so that a mask of the weights' values is still the one that was evaluated
        zo.add_to_({n: -factor * lr[n] / kept.get(n, 1.0) for n in lr}, into=targets if self.master else None)
        for n, k in kept.items():
            targets[n].mul_(k)
        self._publish(unit)

    def _decay(self, unit: Unit) -> dict[str, float]:
        """What weight decay leaves of each tensor in one step; norms and biases (one dimension) are not decayed."""
        lr, wd = self._per_tensor(unit, "lr"), self._per_tensor(unit, "weight_decay")
        return {n: 1 - lr[n] * wd[n] for n, p in unit.plan.block.parameters.items() if wd[n] and p.dim() > 1}

    @torch.no_grad()
    def _publish(self, unit: Unit) -> None:
        """Round the float32 copies into the model's weights."""
        if self.master:
            for n, copy in self.named_state["master"].items():
                if n in unit.plan.block.parameters:
                    unit.plan.block.parameters[n].copy_(copy)

    # ---- the step ----

    def _measure(self, closure: Closure) -> tuple[float, list[ZOGradient]]:
        """Evaluate the current minibatch: its loss, and one zeroth-order gradient a unit. Moves nothing."""
        zos: list[ZOGradient] = []
        known: float | None = None
        for unit in self.units:
            zos.append(self._evaluate(closure, unit, at_w=known))
            known = zos[-1].base
        return _loss_of(zos), zos

    def _update(self, zos: list[ZOGradient]) -> None:
        """Apply what was measured."""
        for unit, zo in zip(self.units, zos, strict=True):
            self._descend(unit, zo)

    def accumulate(self, closure: Closure) -> Tensor:
        """Evaluate one minibatch without moving; the next `step` applies the mean over all accumulated minibatches and its own.

        Zeroth-order gradients are kept as seeds and slopes. Directions differ from minibatch to minibatch. Returns its loss; UserError
        from methods that move between their evaluations.
        """
        if not self.accumulates:
            raise UserError(
                f"{type(self).__name__} moves between its evaluations and cannot accumulate minibatches: let the "
                f"closure loop over them"
            )
        loss, zos = self._measure(closure)
        self._pending.append(zos)
        self.losses.append(loss)
        return torch.tensor(loss)

    def step(self, closure: Any = None, lower: Sequence[Closure] | None = None) -> Tensor:  # type: ignore[override]
        """One step; returns the loss where the step started (for central differences the mean over the two sides).

        lower   minibatches of the lower level, for bilevel methods only.
        Raises UserError without a closure, and `NonFiniteLoss` where a loss is not finite.
        """
        if lower:
            raise UserError(f"{type(self).__name__} has no lower level: call step(closure)")
        if closure is None:
            raise UserError(
                f"{type(self).__name__} drives its own evaluations: call step(closure), where closure() returns the loss of the "
                "current minibatch and closure(backward=True) also calls backward() on it; with transformers, "
                "probes.integrations.HybridTrainer in place of Trainer does so"
            )
        loss, zos = self._measure(closure)
        if self._pending:
            each = [*self._pending, zos]
            zos = [_mean([zs[i] for zs in each], self.param_groups[u.indices[0]]) for i, u in enumerate(self.units)]
        self.minibatches, self.losses, self._pending = len(self.losses) + 1, [], []
        self._update(zos)
        self.measured = zos
        self.run["step"] += 1
        return torch.tensor(loss)

    def report(self) -> dict[str, Any]:
        """Numbers about the last step worth keeping: learning rates, slopes, evaluations so far."""
        return {
            "lr": [g["lr"] for g in self.param_groups],
            "slopes": [s for zo in self.measured for s in zo.slopes],
            **self.counts,
        }

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """torch's own, blocks and laws by name; UserError while accumulated minibatches are not applied."""
        if self._pending:
            raise UserError(
                f"{len(self._pending)} minibatches are accumulated but not applied: call step before saving the optimizer"
            )
        return pack(
            super().state_dict(), self.param_groups, {**self.run, "method": type(self).__name__, "seed": self.seed}
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """UserError, with nothing loaded, for a checkpoint of another method, model or law."""
        check(state_dict, self.param_groups, type(self).__name__)
        code = [dict(g) for g in self.param_groups]
        super().load_state_dict(state_dict)
        unpack(self.param_groups, code)
        self.run.pop("method")
        self.seed = self.run.pop("seed")


def refuse_unknown(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """UserError for an option that is not ``known``: a misspelt one must not be a silent default."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UserError(f"{name} has no option {unknown[0]!r}: choose from {', '.join(sorted(known))}")


def _loss_of(zos: Sequence[ZOGradient]) -> float:
    """f(w) where it was evaluated, else the mean over both sides of the differences, which is f(w) + O(mu^2)."""
    for zo in zos:
        if zo.base is not None:
            return zo.base
    pairs = [pair for zo in zos for pair in zo.losses]
    return sum(a + b for a, b in pairs) / (2 * len(pairs))


def _mean(zos: Sequence[ZOGradient], group: Mapping[str, Any]) -> ZOGradient:
    """The mean of several minibatches' gradients as one: seeds and slopes side by side."""
    keys = tuple(k for z in zos for k in z.keys)
    last = zos[-1]
    return replace(
        last,
        law=group["law"].bind(last.block, keys),
        keys=keys,
        slopes=tuple(s for z in zos for s in z.slopes),
        losses=tuple(x for z in zos for x in z.losses),
        evaluations=sum(z.evaluations for z in zos),
    )
