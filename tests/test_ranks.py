"""Processes that share an objective give the numbers of one, hold the same bits, and stop in one sentence when they do not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hybridtheory import ranks as shared
from hybridtheory.curvature import coupling, spectrum, traces
from hybridtheory.errors import UserError
from hybridtheory.optimizers import build
from hybridtheory.oracle import Oracle, microbatches
from hybridtheory.ranks import ALONE, Ranks, checksum
from hybridtheory.training import closure_of, train
from probes import rundir
from probes.jsonl import stable
from probes.point import GradientPass
from probes.records import Epoch, Step
from probes.report import Report
from tests.processes import together
from tests.toys import NextToken, is_lora, language_model, tokens, with_lora

ROWS, LENGTH = 6, 8


def oracle_of(ranks: Ranks) -> tuple[Oracle, list[Any]]:
    from hybridtheory.blocks import partition

    model = with_lora(language_model("gpt2", torch.float64, 1, 8))
    blocks = partition(model, peft=is_lora)
    return Oracle(model, NextToken(), microbatches(tokens(ROWS, LENGTH, ragged=True), 1), blocks, ranks=ranks), blocks


def measured(ranks: Ranks) -> dict[str, Any]:
    oracle, (base, peft) = oracle_of(ranks)
    before = ranks.sent
    found: dict[str, Any] = {"value": oracle.value(), "part": oracle.value([0, 3])}
    found["sent by two values"] = ranks.sent - before
    before = ranks.sent
    found["gradient"] = [t.numpy() for g in oracle.gradient() for t in g]
    found["sent by a gradient"] = ranks.sent - before
    with oracle.products() as hess:
        run = spectrum(hess, base, 0, tol=1e-6)
        found["ends"] = (run.lam_max.value, run.lam_min.value)
        found["trace"] = traces(hess, [base], 0, max_vectors=8)["base"].trace.value
        found["forms"] = traces(hess, [peft], 0, max_vectors=8)["peft"].forms
        found["coupling"] = coupling(hess, [base], [peft], 0).value
        v = [torch.ones_like(t) for t in peft.tensors]
        before = ranks.sent
        hess(v, peft, base)
        found["sent by a product"] = ranks.sent - before
        before = ranks.sent
        products = spectrum(hess, peft, 0, max_steps=3, min_steps=1, basis=False).lam_max.n
        found["sent by products with their forms"] = (ranks.sent - before) / (products or 1)
    before = ranks.sent
    GradientPass.take(oracle, [base, peft], ROWS)
    found["sent by a gradient and its noise"] = ranks.sent - before
    found["numbers"] = [sum(t.numel() for t in b.tensors) for b in (base, peft)]
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_numbers_are_those_of_one_process(size: int, tmp_path: Path) -> None:
    alone = measured(ALONE)
    for found in together(size, tmp_path / "run", measured):
        for name in ("value", "part", "trace", "coupling", "ends"):
            assert found[name] == pytest.approx(alone[name], rel=1e-8), name
        scale = abs(alone["ends"][1])
        np.testing.assert_allclose(found["forms"], alone["forms"], atol=1e-8 * scale)
        for mine, theirs in zip(alone["gradient"], found["gradient"], strict=True):
            np.testing.assert_allclose(theirs, mine, atol=1e-12)
        # docs/scaling.md: what is asked for, once, whatever the number of processes
        assert found["sent by a gradient"] == 8 * sum(alone["numbers"])
        assert found["sent by a product"] == 8 * alone["numbers"][0]
        each = 8 * -(-ROWS // size)  # a number of every micro-batch, from each process
        assert found["sent by two values"] == 2 * 8
        assert found["sent by products with their forms"] == 8 * alone["numbers"][1] + each
        assert found["sent by a gradient and its noise"] == 8 * sum(alone["numbers"]) + (2 + 2) * each


def trained(ranks: Ranks, method: str) -> dict[str, Any]:
    oracle, (base, peft) = oracle_of(ALONE)
    model = oracle.model
    rows = [tokens(ROWS, LENGTH, ragged=True)["x"][i] for i in range(ROWS)]
    optimizer = build(method, model, base, peft, lr_base=1e-3, lr_peft=1e-2, seed=1)
    losses: list[float] = []

    class Sink:
        def epoch(self, epoch: int, order: list[int]) -> None: ...

        def step(self, step: int, loss: float, info: dict[str, Any]) -> None:
            losses.append(loss)

    before = ranks.sent
    train(
        optimizer,
        NextToken(),
        rows,
        lambda part: {"x": torch.stack(part)},
        Sink(),
        steps=5,
        batch=4,
        seed=0,
        ranks=ranks,
    )
    return {
        "losses": losses,
        "checksum": checksum(list(model.parameters())),
        "sent": ranks.sent - before,
        "peft": peft.numel,
    }


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("method", ["mezo", "hybrid"])
def test_training_is_that_of_one_process_and_every_rank_holds_the_same_bits(
    size: int, method: str, tmp_path: Path
) -> None:
    alone = trained(ALONE, method)
    ranks = together(size, tmp_path / "run", trained, method)
    assert len({r["checksum"] for r in ranks}) == 1
    for found in ranks:
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-9)
    if method == "mezo":
        # two scalars of 8 bytes a step, and 16 bytes of checksums: nothing that grows with the model
        assert ranks[0]["sent"] == 5 * (2 * 8 + 16)
    else:
        # f(w) with the adapter's gradient, f(w + mu u), and 16 bytes of checksums; the first step also asks whether the former
        # has the bits of a plain forward pass, and where it has not every step takes one more
        step = 2 * 8 + 8 * ranks[0]["peft"] + 16
        assert ranks[0]["sent"] in (5 * step + 8, 5 * (step + 8))


def diverging(ranks: Ranks) -> str:
    weights = [torch.ones(3)]
    ranks.agree("step 0", checksum(weights))
    if ranks.rank == 1:
        weights[0][1] += 1e-7
    with pytest.raises(UserError, match="step 1: rank 1 holds other weights"):
        ranks.agree("step 1", checksum(weights))
    return "told"


def lonely(ranks: Ranks) -> str:
    if ranks.rank == 1:
        return "left"
    with pytest.raises(UserError, match="waited for another rank in vain"):
        ranks.sum(1.0)
    return "told"


def test_ranks_that_differ_or_are_gone_are_told_in_one_sentence(tmp_path: Path) -> None:
    assert together(2, tmp_path / "differ", diverging) == ["told", "told"]
    assert together(2, tmp_path / "gone", lonely) == ["told", "left"]


def test_more_processes_than_micro_batches_are_refused() -> None:
    model = language_model("gpt2", layers=1, width=8)
    with pytest.raises(UserError, match="1 micro-batches cannot be shared by 2 processes"):
        Oracle(model, NextToken(), [tokens()], [], ranks=Ranks(0, 2))


def test_a_checksum_sees_one_bit_and_the_order() -> None:
    a, b = torch.randn(5, dtype=torch.float64), torch.randn(7).bfloat16()
    first = checksum([a, b])
    other = a.clone()
    other.view(torch.int64)[2] ^= 1
    assert checksum([a.clone(), b.clone()]) == first != checksum([other, b])
    assert checksum([torch.ones(2), torch.zeros(2)]) != checksum([torch.zeros(2), torch.ones(2)])


def test_one_process_exchanges_nothing() -> None:
    oracle, _ = oracle_of(ALONE)
    oracle.value()
    closure = closure_of(oracle.model, NextToken(), oracle.batches)
    assert float(closure().detach()) == pytest.approx(oracle.value(), rel=1e-12)
    assert ALONE.sent == 0 and ALONE.sum(1.0, 2.0) == (1.0, 2.0) and ALONE.join([[1.0]], 1) == [[1.0]]


def launched(size: int, folder: Path, command: str, *arguments: str) -> str:
    """A command of ours under torchrun; what it said."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--no-python"]
    own = [str(Path(sys.executable).with_name(command)), *arguments, "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    found = subprocess.run([*(run if size > 1 else []), *own], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.slow
def test_the_probe_under_torchrun_measures_what_it_measures_alone(tmp_path: Path, gpt2: Path, films: Path) -> None:
    wanted = [
        "--points",
        "1",
        "--secants",
        "3",
        "--run-steps",
        "3",
        "--directions",
        "4",
        "--rows",
        "6",
        "--dtype",
        "float64",
    ]
    told = launched(2, tmp_path / "two", "probe-smoothness", str(gpt2), "--data", str(films), *wanted)
    launched(1, tmp_path / "one", "probe-smoothness", str(gpt2), "--data", str(films), *wanted)
    assert told.count("loading model and data") == 1, "one process speaks"
    one, two = (Report.load(tmp_path / name) for name in ("one", "two"))
    assert (one.header.processes, two.header.processes) == (1, 2)
    here, there = one.points[0], two.points[0]
    assert there.loss == pytest.approx(here.loss, rel=1e-5) and there.grad_norm == pytest.approx(
        here.grad_norm, rel=1e-5
    )
    for name, block in here.blocks.items():
        top, other = block.lam_max, there.blocks[name].lam_max
        assert top is not None and other is not None and other.value == pytest.approx(top.value, rel=1e-3)
    assert here.coupling is not None and there.coupling is not None
    assert there.coupling.value == pytest.approx(here.coupling.value, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mezo", "hybrid"])
def test_training_under_torchrun_is_training(tmp_path: Path, gpt2: Path, films: Path, method: str) -> None:
    wanted = [
        "--method",
        method,
        "--steps",
        "6",
        "--batch",
        "4",
        "--lr-base",
        "1e-4",
        "--eval-every",
        "0",
        "--eval-rows",
        "4",
    ]
    wanted += ["--lr-peft", "1e-2"] if method == "hybrid" else []
    launched(2, tmp_path / "two", "hybrid-train", str(gpt2), "--task", str(films), "--tensorboard", *wanted)
    assert len(list((tmp_path / "two/tensorboard").iterdir())) == 1, "one process writes"
    launched(1, tmp_path / "one", "hybrid-train", str(gpt2), "--task", str(films), *wanted)
    losses = [[r.loss for r in rundir.load(tmp_path / name) if isinstance(r, Step)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 6


def budgeted(ranks: Ranks, model: str, data: str, clock: float, pressed: int | None) -> list[Any]:
    """Steps made and what was said, of a run whose second process has a clock that is ``clock`` times as fast and is asked to stop
    after ``pressed`` steps."""
    from probes import train as training
    from probes.tasks import load_task
    from probes.train_settings import TrainSettings

    shared._joined = ranks
    other = ranks.rank == 1
    if other:
        real = time.perf_counter
        training.time = SimpleNamespace(perf_counter=lambda: clock * real())
    task = load_task(model, data, rows=6, rank=2)
    seconds = None if pressed else 0.5
    settings = TrainSettings(
        method="mezo", lr_base=1e-4, steps=None if seconds else 20, seconds=seconds, batch=4, eval_rows=2, final_rows=2
    )
    made: list[Step] = []

    def emit(record: Any) -> None:
        made.extend([record] if isinstance(record, Step) else [])

    try:
        outcome = training.run(task, settings, emit, stop=lambda: other and len(made) == pressed).status
    except KeyboardInterrupt:
        outcome = "interrupted"
    return [len(made), outcome]


@pytest.mark.slow
def test_processes_end_a_run_at_the_same_step(tmp_path: Path, gpt2: Path, films: Path) -> None:
    """The first one's clock is the budget's; Ctrl-C may reach any of them."""
    first, second = together(2, tmp_path / "seconds", budgeted, str(gpt2), str(films), 1e6, None)
    assert first == second and first[0] > 1 and first[1] == "budget"
    assert together(2, tmp_path / "asked", budgeted, str(gpt2), str(films), 1.0, 3) == [[3, "interrupted"]] * 2


def late(ranks: Ranks, model: str, data: str, folder: str, method: str) -> tuple[str, int]:
    """A run whose second process looks at its folder long after the first one."""
    from probes import checkpoints
    from probes import train as training
    from probes.tasks import load_task
    from probes.train_settings import TrainSettings

    shared._joined = ranks
    looks = checkpoints.latest
    checkpoints.latest = lambda path: (time.sleep(2.0 * ranks.rank), looks(path))[1]
    task = load_task(model, data, rows=6, rank=2)
    settings = TrainSettings(method=method, lr_base=1e-4, lr_peft=1e-2, steps=3, batch=4, eval_rows=2, final_rows=2)
    outcome = training.run(task, settings, lambda record: None, Path(folder))
    return outcome.status, outcome.step


def test_a_late_process_does_not_go_on_from_what_the_first_one_just_wrote(
    tmp_path: Path, gpt2: Path, films: Path
) -> None:
    found = together(2, tmp_path / "met", late, str(gpt2), str(films), str(tmp_path / "run"), "hybrid")
    assert found == [("finished", 3)] * 2


def named(ranks: Ranks, root: str) -> str:
    from rich.console import Console

    from probes.command import choose_folder, opened

    shared._joined = ranks
    os.environ["WORLD_SIZE"] = str(ranks.size)
    os.chdir(root)
    time.sleep(0.5 * ranks.rank)
    with ExitStack() as stack:
        run = opened(Console(quiet=True), stack, choose_folder("smoothness", None, None, None, False), False)
        run.append(Epoch(0, []))  # the first thing measured makes the folder
        return str(run.path)


def test_a_late_process_chooses_the_folder_of_the_first(tmp_path: Path) -> None:
    assert set(together(2, tmp_path / "met", named, str(tmp_path))) == {"runs/smoothness-embedded-sentiment"}


def started(folder: Path, *arguments: str, timeout: int = 30) -> list[subprocess.Popen[str]]:
    """hybrid-train in two processes, as a launcher on two machines would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    own = [
        str(Path(sys.executable).with_name("hybrid-train")),
        *arguments,
        "--out",
        str(folder),
        "--timeout",
        str(timeout),
    ]
    return [
        subprocess.Popen(own, env={**os.environ, **meeting, **quiet, "RANK": str(r)}, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]


def wait_for_step(folder: Path, step: int, run: list[subprocess.Popen[str]]) -> None:
    made = 0
    while made < step:
        assert all(p.poll() is None for p in run), [p.communicate()[1] for p in run]
        time.sleep(0.01)
        if (folder / rundir.RECORDS).exists():
            made = (folder / rundir.RECORDS).read_bytes().count(b'"kind": "step"')


def finish(run: list[subprocess.Popen[str]]) -> None:
    told = [p.communicate()[1] for p in run]
    assert [p.returncode for p in run] == [0, 0], "\n".join(told)


def trained_by(folder: Path) -> list[str]:
    return [json.dumps([type(r).__name__, stable(r)]) for r in rundir.load(folder)]


@pytest.mark.slow
def test_ctrl_c_and_a_rank_that_hangs_end_in_a_sentence_on_every_rank_and_resume_goes_on(
    tmp_path: Path, gpt2: Path, films: Path
) -> None:
    wanted = [
        str(gpt2),
        "--task",
        str(films),
        "--method",
        "hybrid",
        "--steps",
        "400",
        "--batch",
        "4",
        "--eval-every",
        "0",
    ]
    wanted += ["--eval-rows", "4", "--checkpoint-every", "10", "--lr-base", "1e-4", "--lr-peft", "1e-2"]
    whole = started(tmp_path / "whole", *wanted)
    finish(whole)

    folder = tmp_path / "cut"
    run = started(folder, *wanted)
    wait_for_step(folder, 25, run)
    run[1].send_signal(signal.SIGINT)  # of one of them: both stop after the same step
    for p in run:
        told = p.communicate()[1]
        assert p.returncode == 130 and "interrupted" in told and "to go on: hybrid-train" in told, told

    run = started(folder, *wanted, "--resume", timeout=3)
    wait_for_step(folder, 100, run)
    run[1].send_signal(signal.SIGSTOP)
    told = run[0].communicate()[1]
    assert run[0].returncode == 2 and "rank 0 waited for another rank in vain" in told and "--timeout" in told, told
    run[1].send_signal(signal.SIGCONT)
    told = run[1].communicate()[1]
    assert run[1].returncode == 2 and "rank 1 waited for another rank in vain" in told, told

    run = started(folder, *wanted, "--resume")
    finish(run)
    assert trained_by(folder) == trained_by(tmp_path / "whole")
