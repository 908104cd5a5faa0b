"""For your own pytest files: does one step at these rates do what theory says, and does a measured run obey a theorem?

    from hybridtheory.testing import check_bound, check_descent

    def test_rates(model, batches):
        check = check_descent(model, batches, lr_base=1e-5, lr_peft=1e-2)
        assert check.holds, check

A `Check` carries what was measured, what was predicted or bounded, the hypotheses tested, and `holds`: True, False, or None where the
evidence decides nothing (``note`` says why; ``assert check.holds`` fails then too, ``assert check.holds is not False`` does not).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hybridtheory.blocks import Block, partition
from hybridtheory.descent import one_step
from hybridtheory.errors import UserError
from hybridtheory.oracle import Batch, MeanLoss, Oracle
from hybridtheory.theory.checks import Check, Hypothesis, at_most
from hybridtheory.theory.descent import compare
from hybridtheory.theory.held import evidence, hold


def check_descent(
    model: nn.Module,
    batches: Sequence[Batch],
    lr_base: float | None = None,
    lr_peft: float | None = None,
    *,
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None = None,
    is_peft: Callable[[str], bool] | None = None,
    prediction: str = "fitted",
    tolerance: float = 0.15,
    directions: int = 400,
    mu: float = 1e-3,
    seed: int = 0,
) -> Check:
    """One hybrid step lowers the loss, on average over its Gaussian direction, by what theory predicts.

    Args:
        model, batches: measured on all batches, in evaluation mode; weights, gradients, flags and modes are as found afterwards.
        lr_base, lr_peft: rates of the zeroth-order step on the base and of the gradient step on PEFT; None leaves a block where it is.
        loss_fn: ``loss_fn(model, batch)`` -> mean loss over the batch's rows. None: ``model(**batch).loss``, as transformers has it.
        is_peft: of a parameter's name. None: trainable parameters are PEFT where others are frozen; where none is, all are base.
        prediction: "fitted" (finite-scale curve through other directions) or "quadratic" (Identity Q with infinitesimal curvature,
            which holds for steps well below the best one).
        tolerance: largest |measured/predicted - 1| that passes.    directions: the most that are spent on the mean.
        mu: step of the difference whose disagreement with the derivative is tested ("kinks").
    Statement: holds when measured and predicted agree within the tolerance, both are below 0, and the standard errors carry it.
        False also for a step that raises the loss, clearly (two standard errors).
    Raises UserError for rates that are not positive numbers, no data, a loss that is not finite, or a rate without its block.
    """
    if prediction not in ("fitted", "quadratic"):
        raise UserError(f"prediction is 'fitted' or 'quadratic', not {prediction!r}")
    if lr_base is None and lr_peft is None:
        raise UserError("check_descent needs lr_base, lr_peft or both, got neither")
    for name, rate in (("lr_base", lr_base), ("lr_peft", lr_peft)):
        if rate is not None and not 0 < rate < float("inf"):
            raise UserError(
                f"{name} must be a positive finite number, got {rate}: a rate of a block that stays where it is is None"
            )
    loss = loss_fn or (lambda m, b: m(**b).loss)
    groups: dict[str, Block] = {b.group: b for b in partition(model, "group", is_peft or _trainable(model))}
    for group, rate in (("base", lr_base), ("peft", lr_peft)):
        if rate is not None and group not in groups:
            raise UserError(
                f"lr_{group} is given and the model has no {group} weights: pass is_peft, or leave the rate out"
            )
    modes = [(m, m.training) for m in model.modules()]
    before = [(p, p.grad) for p in model.parameters()]
    model.eval()
    try:
        oracle = Oracle(model, MeanLoss(loss), batches, list(groups.values()))
        _, changes = one_step(
            oracle, groups.get("base"), groups.get("peft"), lr_base or 0.0, lr_peft or 0.0, (1.0,), seed=seed, mu=mu,
            precision=tolerance / 5, most=directions, curved=16,
        )  # fmt: skip
    finally:
        for module, mode in modes:
            module.training = mode
        for p, grad in before:
            p.grad = grad
    found = changes[-1]  # both, where both move
    predicted = found.fitted if prediction == "fitted" else found.quadratic
    down: Hypothesis = at_most(
        "the mean change is below 0 (less two standard errors)", found.measured.value - 2 * found.measured.stderr, 0.0
    )
    words = "the finite-scale curve of other directions" if prediction == "fitted" else "Identity Q"
    check = compare(
        f"one step of {found.what} lowers the loss by what {words} says", found.measured, predicted, tolerance,
        (down, *found.hypotheses), found.broken if prediction == "quadratic" else "",
    )  # fmt: skip
    if not down.holds:
        return replace(check, holds=False, note=f"the step raises the loss: {check.note}")
    if found.measured.value + 2 * found.measured.stderr >= 0 and check.holds:
        return replace(check, holds=None, note=f"a change this near 0 is not resolved: {check.note}")
    return check


def check_bound(records: str | Path | Iterable[Any], theorem: str) -> Check:
    """The averaged squared gradient of a measured run is below a theorem's bound.

    Args: records: the folder (or records.jsonl) of a probe-convergence run, or its records; theorem: "A0", "A", "C'" or "D".
    Statement: ``bound`` and ``measured`` are sums weighted as the theorem says, ``slack`` is bound/measured. holds is None where a
        hypothesis of the theorem does not hold on the run; the note names it. Of the claims that C' makes the worst is returned.
    Raises UserError for records without a run, and for an unknown theorem.
    """
    constants: Mapping[str, Any] | None = None
    runs: list[Mapping[str, Any]] = []
    for kind, fields in _lines(records):
        if kind == "constants":
            constants = fields
        elif kind == "trajectory":
            runs.append(fields)
    if constants is None:
        raise UserError("the records hold no constants (no line of kind 'constants'): let probe-convergence finish")
    found = hold(evidence(constants, runs), theorem)
    # A violated claim first, then an undecided one, then the one with the least slack.
    return min(found, key=lambda c: ({False: 0, None: 1, True: 2}[c.holds], c.slack))


def _trainable(model: nn.Module) -> Callable[[str], bool]:
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    frozen = any(not p.requires_grad and p.is_floating_point() for p in model.parameters())
    return lambda name: frozen and name in wanted


def _lines(records: str | Path | Iterable[Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(kind, fields) of every record: lines of a file, mappings with "kind", or dataclasses (their kind is their class's name)."""
    if isinstance(records, str | Path):
        path = Path(records)
        path = path / "records.jsonl" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"there is no run at {records}: give the folder that probe-convergence wrote")
        # A last line that was cut short ends the file without a newline.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        records = [json.loads(line) for line in lines]
    for r in records:
        if isinstance(r, Mapping):
            yield str(r.get("kind", "")), r
        elif is_dataclass(r) and not isinstance(r, type):
            yield type(r).__name__.lower(), asdict(r) if type(r).__name__ in ("Constants", "Trajectory") else {}
