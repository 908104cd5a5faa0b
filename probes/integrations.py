"""For people who have a `transformers.Trainer`: train with a closure-driven method, or watch the smoothness of an ordinary run.

    optimizer = build("hybrid", model, base, peft, lr_base=1e-6, lr_peft=1e-3)
    HybridTrainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[KeepBase()]).train()

    trainer = Trainer(model, args, train_dataset=data)          # ordinary fine-tuning, whatever its optimizer
    trainer.add_callback(SmoothnessCallback(batches, every=100, log=trainer.log))

Handed to a plain Trainer, a method of ours says in one sentence that it drives its own evaluations (`ZeroOrder.step`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hybridtheory.errors import UserError
from hybridtheory.optimizers import ZeroOrder
from hybridtheory.smoothness import fit_envelope
from probes import rates
from probes.adapters import is_peft
from probes.given import evaluating, given
from probes.point import Settings, measure
from probes.records import Point
from probes.setup import Probe


class HybridTrainer(transformers.Trainer):
    """A Trainer whose `training_step` lets the optimizer drive its own evaluations; all else is transformers' own.

    Gradient accumulation, schedulers, logging and evaluation work as usual. Gradient clipping finds no gradient: a zeroth-order step
    has none, and the first-order one is applied within the step. The Trainer's checkpoints of a PEFT model hold the adapter alone: add
    `KeepBase` where base weights move.

    dropout   False: the model is in evaluation mode during a step, as the methods' papers have it. True: what the model has, the same
              on every evaluation of a step.
    """

    dropout = False

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One minibatch: accumulated, or with those before it the optimizer's step. Returns its loss for the Trainer's log."""
        optimizer = self._driven()
        model.train(self.dropout)
        batch = self._prepare_inputs(inputs)

        def closure(backward: bool = False) -> Tensor:
            # Without num_items_in_batch this is the minibatch's own mean, and the optimizer averages over minibatches.
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, batch)
            if backward:
                loss.backward()
            return loss

        if self.accelerator.sync_gradients:
            loss = optimizer.step(closure)
            _skip_next_step(optimizer)
        else:
            loss = optimizer.accumulate(closure)
        return loss.to(self.args.device) / self.current_gradient_accumulation_steps

    def _driven(self) -> ZeroOrder:
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # what accelerate has wrapped
        if not isinstance(optimizer, ZeroOrder):
            raise UserError(
                f"HybridTrainer is for the optimizers of hybridtheory, and this is {type(optimizer).__name__}: pass "
                "optimizers=(build(METHOD, ...), None), or use a plain Trainer"
            )
        if self.args.fp16 or self.args.n_gpu > 1:
            raise UserError(
                "HybridTrainer runs one process and one device without fp16 loss scaling: use bf16 or float32"
            )
        return optimizer


def _skip_next_step(optimizer: ZeroOrder) -> None:
    """The Trainer calls ``step()`` without a closure after every `training_step`: that call, once, does nothing.

    Set on the instance, as torch's schedulers do with theirs, so that it holds through accelerate's wrapper.
    """
    own = optimizer.__dict__.get("step")

    def done(closure: Any = None) -> None:
        if own is None:
            del optimizer.__dict__["step"]
        else:
            optimizer.__dict__["step"] = own

    optimizer.__dict__["step"] = done


class KeepBase(transformers.TrainerCallback):
    """Base weights of a PEFT model beside the Trainer's checkpoints, which leave them out; they are put back when a run resumes."""

    NAME = "moved_base.safetensors"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder, weights = self._folder(args, state), self._base(kwargs["model"])
        partial = folder / f".partial-{self.NAME}"
        save_file({n: p.detach().cpu().contiguous() for n, p in weights.items()}, partial)
        partial.replace(folder / self.NAME)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            return
        file = self._folder(args, state) / self.NAME
        if not file.exists():
            raise UserError(f"{file} is missing: without the moved base weights the run cannot go on where it stopped")
        kept = load_file(file)
        with torch.no_grad():
            for name, p in self._base(kwargs["model"]).items():
                p.copy_(kept[name])

    @staticmethod
    def _folder(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"

    @staticmethod
    def _base(model: nn.Module) -> dict[str, nn.Parameter]:
        return {n: p for n, p in model.named_parameters() if not is_peft(n)}


class SmoothnessCallback(transformers.TrainerCallback):
    """Measures smoothness on fixed batches every ``every`` steps of an ordinary fine-tuning, and changes nothing in it.

    batches   mappings of tensors on the model's device, with labels, or anything that ``loss_fn(model, batch)`` -> mean loss takes.
    log       gets each finding as a dict, e.g. ``trainer.log``; ``history`` keeps them all, ``points`` their evidence.
    settings  of `probes.point.Settings`; the defaults here are cheap: about 100 gradients of the batches a measurement.

    Logged, for each block: L (an upper bound of the largest eigenvalue, with stated probability), the gradient's norm and the trace;
    from the third measurement on the envelope L <= L0 + L1 |grad f| over what has been measured so far (identified or not: early ones
    are not); and the recommended rates of the base (zeroth-order) and PEFT, with their ratio, where the model has both.
    """

    def __init__(
        self,
        batches: Sequence[Any],
        every: int = 100,
        log: Callable[[dict[str, float]], None] | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        **settings: Any,
    ) -> None:
        if every < 1:
            raise UserError(f"every is a number of steps, at least 1, not {every}")
        self.batches, self.every, self.log, self.loss_fn = list(batches), every, log, loss_fn
        cheap = {"max_steps": 15, "max_vectors": 12, "directions": 6}
        self.settings = Settings(**{**cheap, **settings})
        self.points: list[Point] = []
        self.history: list[dict[str, float]] = []
        self.notes: list[str] = []  # measurements that could not be made, and why

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._measure(kwargs["model"], state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._measure(kwargs["model"], state)

    def _measure(self, model: nn.Module, state: Any) -> None:
        s, flags = self.settings, [(p, p.requires_grad) for p in model.parameters()]
        try:
            with evaluating(model), torch.enable_grad():
                probe = Probe.of(given(model, self.batches, self.loss_fn), s)
                step, index = int(state.global_step), len(self.points)
                self.points.append(measure(probe.oracle, probe.groups, probe.groups, s, probe.rows, index, step))
        except UserError as error:  # a measurement that fails must not end somebody's training
            self.notes.append(f"step {state.global_step}: {error}")
            return
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
        found = self._found({b.group: b.numel for b in probe.groups})
        self.history.append({"step": float(step), **found})
        if self.log is not None:
            self.log(dict(found))

    def _found(self, sizes: Mapping[str, int]) -> dict[str, float]:
        s, point = self.settings, self.points[-1]
        found: dict[str, float] = {"smoothness/grad_norm": point.grad_norm}
        for name, block in point.blocks.items():
            found[f"smoothness/{name}/L"] = rates.upper_end(block)
            if block.trace is not None:
                found[f"smoothness/{name}/trace"] = block.trace.value
            found |= self._line(name)
        advice = rates.recommendation(self.points, dict(sizes), s.q, s.batch_size, s.steps, s.mu)
        for name, rate in (("eta_base", advice.base), ("eta_peft", advice.peft), ("ratio", advice.ratio)):
            if rate is not None and rate.value is not None:
                found[f"smoothness/{name}"] = rate.value
        return {k: v for k, v in found.items() if math.isfinite(v)}

    def _line(self, name: str) -> dict[str, float]:
        """The envelope of one block's largest curvature over the gradient norm, once there are three points to draw it through."""
        blocks = [(p.grad_norm, p.blocks[name]) for p in self.points]
        seen = [(u, max(abs(b.lam_max.value), abs(b.lam_min.value))) for u, b in blocks if b.lam_max and b.lam_min]
        try:
            fit = fit_envelope([u for u, _ in seen], [L for _, L in seen])
        except UserError:  # too few points, or all at one gradient norm
            return {}
        line = {"L0": fit.L0, "L1": fit.L1, "identified": float(fit.identified)}
        return {f"smoothness/{name}/{k}": v for k, v in line.items()}
