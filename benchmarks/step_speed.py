"""What a zeroth-order step costs: time and extra memory of one step, as a ratio to two inference forwards of the same batch.

    python benchmarks/step_speed.py                # make bench
    python benchmarks/step_speed.py --repeats 5    # a shorter look

The model is OPT-like (4 layers, hidden 256, vocabulary 2,048, 3.7 M parameters, random weights), in float32 on one thread. The methods take
turns within every repeat and a ratio is the median over repeats of ratios within one repeat; times are CPU seconds of the process (on a
shared machine the wall clock measures the neighbours). "plain MeZO" is the published loop, written for this benchmark: perturb in place
from a seed, evaluate, perturb twice back, evaluate, restore, update. Extra memory is the peak of everything allocated during a step, less
that of the two forwards, from the profiler's record of allocations, in units of the model's own size. Ends with an error if a
target is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from hybridtheory.blocks import Block, partition
from hybridtheory.estimators import LOZO, Gaussian, Rademacher, SubZero
from hybridtheory.optimizers import MeZO

VOCABULARY = 2048
BATCHES = {"8 x 64": (8, 64), "1 x 16": (1, 16)}
METHODS = {
    "Gaussian, kept": {"law": Gaussian(), "keep": True},
    "Gaussian": {"law": Gaussian()},
    "Rademacher": {"law": Rademacher()},
    "SubZero r=8": {"law": SubZero(rank=8)},
    "LOZO r=2": {"law": LOZO(rank=2)},
}
# Most allowed, as a ratio to two forwards.
TARGETS = {
    "8 x 64": {"Gaussian, kept": 1.25, "Gaussian": 1.55, "Rademacher": 1.15, "SubZero r=8": 1.15},
    "1 x 16": {"Gaussian, kept": 3.5, "Gaussian": 6.0, "Rademacher": 2.2, "SubZero r=8": 2.0},
}


def model() -> nn.Module:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        word_embed_proj_dim=256,
        num_hidden_layers=4,
        ffn_dim=1024,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return OPTForCausalLM(config).eval()


def plain_mezo(
    parameters: list[nn.Parameter], f: Callable[[], Tensor], seed: int, lr: float = 1e-9, mu: float = 1e-3
) -> None:
    """Algorithm 1 of arXiv 2305.17333 as published code has it: four draws of every tensor, in place."""

    def perturb(scale: float) -> None:
        torch.manual_seed(seed)
        for p in parameters:
            z = torch.normal(mean=0.0, std=1.0, size=p.shape)
            p.data = p.data + scale * mu * z

    perturb(1)
    plus = float(f())
    perturb(-2)
    minus = float(f())
    perturb(1)
    slope = (plus - minus) / (2 * mu)
    torch.manual_seed(seed)
    for p in parameters:
        z = torch.normal(mean=0.0, std=1.0, size=p.shape)
        p.data = p.data - lr * slope * z


def runs(net: nn.Module, block: Block, f: Callable[[], Tensor]) -> dict[str, Callable[[int], object]]:
    """name -> one step, given its number; "floor" is the two forwards."""

    def floor(step: int) -> None:
        f()
        f()

    # learning rate zero in effect: 1e-12 keeps the arithmetic and the model
    ours = {
        name: MeZO([{"block": block, "law": o["law"]}], net, lr=1e-12, keep=o.get("keep", False))
        for name, o in METHODS.items()
    }
    steps: dict[str, Callable[[int], object]] = {
        "floor": floor,
        "plain MeZO": lambda step: plain_mezo(block.tensors, f, step, lr=1e-12),
    }
    for name, optimizer in ours.items():
        steps[name] = lambda step, optimizer=optimizer: optimizer.step(f)
    return steps


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes allocated at once by ``work``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    level = highest = 0
    for event in sorted(
        (e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def measure(batch: str, repeats: int) -> tuple[dict[str, float], dict[str, float], float]:
    """Ratios of time, extra memory in models, and the floor in milliseconds."""
    net = model()
    block = partition(net)[0]
    ids = torch.randint(0, VOCABULARY, BATCHES[batch], generator=torch.Generator().manual_seed(1))

    def f() -> Tensor:
        logits = net(ids).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

    steps = runs(net, block, f)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with torch.no_grad():
        for step in range(2):
            for work in steps.values():
                work(step)
        for step in range(2, repeats + 2):
            names = list(steps)
            names = (
                names[step % len(names) :] + names[: step % len(names)]
            )  # no method always runs after the same neighbour
            for name in names:
                start = time.process_time()
                steps[name](step)
                seconds[name].append(time.process_time() - start)
        extra = {name: peak_bytes(lambda work=work: work(0)) for name, work in steps.items()}
    size = 4 * block.numel
    ratios = {n: median(t / base for t, base in zip(seconds[n], seconds["floor"])) for n in steps if n != "floor"}
    return ratios, {n: (extra[n] - extra["floor"]) / size for n in ratios}, 1e3 * median(seconds["floor"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    missed = []
    for batch, targets in TARGETS.items():
        ratios, memory, floor = measure(batch, options.repeats)
        print(
            f"\nbatch {batch}: two forwards take {floor:.1f} ms; ratios are medians of {options.repeats} interleaved repeats"
        )
        print(f"{'':16}{'time / floor':>14}{'target':>9}{'extra memory':>15}")
        for name, ratio in ratios.items():
            target = targets.get(name)
            late = target is not None and ratio > target
            missed += [f"{name} at {batch}: {ratio:.2f} > {target:.2f}"] if late else []
            print(
                f"{name:16}{ratio:14.2f}{'' if target is None else f'{target:.2f}':>9}{memory[name]:12.2f} x{'   MISSED' if late else ''}"
            )
    if missed:
        print("\nmissed: " + "; ".join(missed), file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
