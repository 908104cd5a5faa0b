"""What a zeroth-order step costs: time and extra memory of one step, as a ratio to two inference forwards of the same batch.

    python benchmarks/step_speed.py                # make bench
    python benchmarks/step_speed.py --repeats 5    # a shorter look

The model is OPT-like (4 layers, hidden 256, vocabulary 2,048, 3.7 M parameters, random weights), in float32 on one thread. The methods take
turns within every repeat and a ratio is the median over repeats of ratios within one repeat; times are CPU seconds of the process (on a
shared machine the wall clock measures the neighbours). "plain MeZO" is the published loop, written for this benchmark: perturb in place
from a seed, evaluate, perturb twice back, evaluate, restore, update. Extra memory is the peak of everything allocated during a step, less
that of the two forwards, from the profiler's record of allocations, in units of the model's own size.

The last table is about hybrid steps on the same model with LoRA (r = 8, query and value): base by a one-sided zeroth-order step that
reuses the first-order forward, adapter by SGD; ratio to a first-order LoRA step plus one forward. Ends with an error if a target is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from statistics import median

os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler announces every start and stop otherwise
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from hybridtheory.blocks import Block, partition
from hybridtheory.estimators import LOZO, Gaussian, Rademacher, SubZero
from hybridtheory.optimizers import Hybrid, MeZO

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


HYBRID_TARGETS = {"Gaussian": 1.30, "Rademacher": 1.12, "SubZero r=8": 1.12}


def hybrid_runs(rows: int, length: int) -> dict[str, Callable[[int], object]]:
    """name -> one step; "floor" is a first-order LoRA step and one forward."""
    from peft import LoraConfig, get_peft_model

    net = get_peft_model(model(), LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).eval()
    base, peft = partition(net, peft=lambda name: "lora" in name)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    sgd = torch.optim.SGD(peft.tensors, lr=1e-9)

    def f(backward: bool = False) -> Tensor:
        logits = net(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        if backward:
            loss.backward()
        return loss.detach()

    def floor(step: int) -> None:
        with torch.enable_grad():
            f(backward=True)
        sgd.step()
        sgd.zero_grad()
        f()

    steps: dict[str, Callable[[int], object]] = {"floor": floor}
    for name in HYBRID_TARGETS:
        groups = [{"block": base, "law": METHODS[name]["law"], "lr": 1e-12}, {"block": peft, "kind": "fo", "lr": 1e-9}]
        optimizer = Hybrid(groups, net)
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


def problem(batch: str) -> dict[str, Callable[[int], object]]:
    net = model()
    ids = torch.randint(0, VOCABULARY, BATCHES[batch], generator=torch.Generator().manual_seed(1))

    def f() -> Tensor:
        logits = net(ids).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

    return runs(net, partition(net)[0], f)


def measure(
    steps: dict[str, Callable[[int], object]], repeats: int
) -> tuple[dict[str, float], dict[str, float], float]:
    """Ratios of time, extra memory in MiB, and the floor in milliseconds."""
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
        peaks = {name: peak_bytes(lambda work=work: work(0)) for name, work in steps.items()}
    ratios = {n: median(t / base for t, base in zip(seconds[n], seconds["floor"])) for n in steps if n != "floor"}
    return ratios, {n: (peaks[n] - peaks["floor"]) / 2**20 for n in ratios}, 1e3 * median(seconds["floor"])


def precision() -> list[str]:
    """One step at lr 1e-6 in low precision: cosine between the update that the weights received and the direction that was evaluated."""
    missed = []
    print(f"\n{'low precision':22}{'cosine of update and evaluated direction':>42}{'weights that moved':>20}")
    for dtype in (torch.bfloat16, torch.float16):
        for master in (True, False):
            net = model().to(dtype)
            block = partition(net)[0]
            ids = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))

            def f(net: nn.Module = net, ids: Tensor = ids) -> Tensor:
                logits = net(ids).logits[:, :-1].flatten(0, 1).float()
                return nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

            optimizer = MeZO(block, net, lr=1e-6, master=master, in_place_low_precision=not master)
            low = {n: p.detach().clone() for n, p in block.parameters.items()}
            held = optimizer.named_state["master"] if master else block.parameters
            before = {n: held[n].detach().float().clone() for n in low}
            with torch.no_grad():
                optimizer.step(f)
            inner = square_a = square_b = moved = 0.0
            for n, p in low.items():
                u = Gaussian().fill(optimizer.measured[0].keys[0], n, p)
                up, down = (torch.add(p, u, alpha=a, out=torch.empty_like(p)).double() for a in (1e-3, -1e-3))
                update = (held[n].detach().float() - before[n]).double()
                inner += float((update * (down - up)).sum())
                square_a, square_b = (
                    square_a + float(update.square().sum()),
                    square_b + float((down - up).square().sum()),
                )
                moved += float((update != 0).sum())
            sign = 1.0 if optimizer.measured[0].slopes[0] > 0 else -1.0
            cosine = sign * inner / max(square_a * square_b, 1e-300) ** 0.5
            name = str(dtype).removeprefix("torch.") + (", float32 master" if master else ", in place")
            print(f"{name:26}{cosine:38.4f}{moved / block.numel:20.1%}")
            missed += [f"{name}: cosine {cosine:.4f} < 0.999"] if master and cosine < 0.999 else []
    return missed


def table(title: str, steps: dict[str, Callable[[int], object]], targets: dict[str, float], repeats: int) -> list[str]:
    """Measure, print, and say which targets were missed."""
    ratios, memory, floor = measure(steps, repeats)
    print(f"\n{title}: {floor:.1f} ms; ratios to it, medians of {repeats} interleaved repeats")
    print(f"{'':16}{'ratio':>8}{'target':>9}{'extra MiB':>12}")
    missed = []
    for name, ratio in ratios.items():
        target = targets.get(name)
        late = target is not None and ratio > target
        missed += [f"{name} ({title}): {ratio:.3f} > {target:.2f}"] if late else []
        print(
            f"{name:16}{ratio:8.2f}{'' if target is None else f'{target:.2f}':>9}{memory[name]:12.1f}{'   MISSED' if late else ''}"
        )
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    missed = []
    for batch, targets in TARGETS.items():
        missed += table(f"two forwards of {batch} tokens", problem(batch), targets, options.repeats)
    missed += table("LoRA step + one forward of 8 x 64 tokens", hybrid_runs(8, 64), HYBRID_TARGETS, options.repeats)
    missed += precision()
    if missed:
        print("\nmissed: " + "; ".join(missed), file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
