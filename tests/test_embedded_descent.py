"""Part of the contract of every method: on the embedded model and task its mean loss over eight seeds falls by five standard errors.

Through hybrid-train's own path: minibatches of 8 of 16 rows, evaluation of all 16 before and after. Rates and steps are this table's; a
method that is not in it is missed by the test below it. Low-rank laws redraw their subspace every 4 steps: at the papers' windows (50,
1000) one subspace, and its luck, lasts a whole short run (LOZO: 4.1 standard errors after 40 steps).
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from hybridtheory.optimizers import METHODS
from probes.records import Evaluation, Record
from probes.tasks import Task, load_task
from probes.train import run
from probes.train_settings import TrainSettings

SEEDS = 8
ZO, ADAPTER = 1.5e-4, 0.1  # a zeroth-order rate near half of what probe-smoothness recommends; SGD on LoRA
TABLE: dict[str, dict[str, Any]] = {
    "hybrid": {"lr_base": ZO, "lr_peft": ADAPTER},
    "hybrid-two-sided": {"lr_base": ZO, "lr_peft": ADAPTER},
    "hybrid-adamw": {"steps": 6, "lr_base": ZO, "lr_peft": 1e-3},
    "hybrid-sequential": {"lr_base": ZO, "lr_peft": ADAPTER},
    "hybrid-subzero": {"steps": 24, "lr_base": ZO, "law": "subzero:rank=8,refresh=4", "lr_peft": ADAPTER},
    "hybrid-lozo": {"steps": 24, "lr_base": 1e-4, "law": "lozo:rank=4,refresh=4", "lr_peft": ADAPTER},
    "bilevel": {
        "steps": 6,
        "lr_base": 2e-4,
        "lr_peft": 1e-3,
        "options": {"penalty": 1.0, "inner_lr": 1e-3, "inner_steps": 2},
    },
    "sgd": {"steps": 6, "lr_base": 1e-3},
    "adamw": {"steps": 6, "lr_base": 3e-5},
    "galore": {"steps": 6, "lr_base": 3e-5, "options": {"rank": 8}},
    "peft-sgd": {"steps": 6, "lr_peft": ADAPTER},
    "peft-adamw": {"steps": 6, "lr_peft": 1e-3},
    "lora-plus": {"steps": 6, "lr_peft": 2e-4},
    "mezo": {"lr_base": ZO},
    "mezo-peft": {"lr_peft": 3e-2},
    "subzero": {"steps": 24, "lr_base": ZO, "law": "subzero:rank=8,refresh=4"},
    "subzero-peft": {"steps": 24, "lr_peft": 1e-2},
    "s-mezo": {"steps": 60, "lr_base": 3e-4},
    "lozo": {"steps": 24, "lr_base": 1e-4, "law": "lozo:rank=4,refresh=4"},
    "tezo": {"lr_base": 1e-4},
    "s-rgf": {"steps": 24, "lr_base": 5e-5, "law": "srgf:k=4"},
    "forward-gradient": {"lr_base": ZO},
    "zo-sign": {"lr_base": 3e-4},
    "zo-momentum": {"lr_base": 3e-5},
    "zo-adam": {"lr_base": 2e-4},
    "zo-conservative": {"lr_base": ZO},
    "hizoo": {"lr_base": ZO},
    "zo-adamu": {"steps": 20, "lr_base": 5e-5},
}


@pytest.fixture(scope="module")
def embedded() -> Task:
    return load_task(rows=16, seed=0)


def drops(task: Task, method: str, seeds: int = SEEDS) -> torch.Tensor:
    """Loss before less loss after, of each seed; the weights are put back."""
    before = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    found = []
    for seed in range(seeds):
        settings = TrainSettings(
            **{
                "method": method,
                "steps": 14,
                "batch": 8,
                "seed": seed,
                "eval_every": 0,
                "eval_data": "train",
                **TABLE[method],
            }
        )
        records: list[Record] = []
        outcome = run(task, settings, records.append)
        assert outcome.status == "finished", outcome
        first, last = (r.loss for r in records if isinstance(r, Evaluation))
        found.append(first - last)
        with torch.no_grad():
            for n, p in task.model.named_parameters():
                p.copy_(before[n])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if m != "galore" or find_spec("galore_torch")])
def test_the_mean_loss_over_eight_seeds_falls_by_five_standard_errors(method: str, embedded: Task) -> None:
    x = drops(embedded, method)
    assert x.mean() > 5 * x.std() / math.sqrt(SEEDS), x


def test_every_method_has_a_row() -> None:
    assert set(TABLE) == set(METHODS)
