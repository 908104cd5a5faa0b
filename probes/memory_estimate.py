"""Peak memory of a smoothness run before it starts: a sum of named terms for each of its phases, of which the fullest counts.

    process   the resident set before the work, freed blocks given back: interpreter, libraries, weights, data
    vectors   as large as a block or as all of them: counted in the code of each phase
    basis     the vectors that Lanczos keeps
    graphs    of the micro-batches' gradients: those that are kept, and the largest of the others
    product   what one product (or gradient) takes beside these: the part of one micro-batch and the way back to it
    float32 weights  of a 16-bit model while differences are taken
    freed     blocks that the allocator keeps and cannot fill again: what the resident set had beyond the other terms after the trial's
              products. Above half of what the promise leaves they are handed back (`Oracle.give_back`)

Bytes of graphs and of activations are measured: the allocator's own count (`memory.allocated`) after a micro-batch's graph was built,
less before it. The way back through a graph holds cotangents of the activations, as many bytes as these (sampled while products ran: 0.8 to
1.1 of them on GPT-2s of width 128 and 512, 60 to 500 tokens), and two copies of a tensor to which several operations contribute (a tied
embedding).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hybridtheory import memory
from hybridtheory.blocks import Block
from hybridtheory.difference import requires_grad
from hybridtheory.lanczos import BASIS_ELEMENTS, least_steps
from hybridtheory.oracle import VECTORS, Oracle
from hybridtheory.traces import together
from hybridtheory.vectors import DOT_BYTES
from probes.point import BOUND

if TYPE_CHECKING:
    from probes.point import Settings

# Of iterations that stop by a rule, on the embedded model: products of the coupling with tangents on the adapter, steps of the margin.
PAIRS, MARGIN = 7, 9
QUOTIENT = 3  # vectors of a difference: the weights that it puts back, and the gradients at both ends


@dataclass(frozen=True)
class Trial:
    """What the micro-batches took, in bytes.

    process      held before: interpreter, libraries, weights, data
    free         that could be taken before
    activations  largest of a micro-batch's forward pass, kept for its backward
    graphs       of the micro-batches' gradients; none for engines that build none
    resident     held after a product on each group, freed blocks included
    """

    process: int
    free: int
    activations: int
    graphs: Sequence[int] = ()
    resident: int = 0


@dataclass(frozen=True)
class Phase:
    """The fullest moment of a part of the run, in bytes."""

    name: str
    vectors: int
    product: int
    basis: int = 0
    graphs: int = 0

    @property
    def terms(self) -> dict[str, int]:
        return {"vectors": self.vectors, "basis": self.basis, "graphs": self.graphs, "product": self.product}

    def total(self) -> int:
        return sum(self.terms.values())


@dataclass(frozen=True)
class Peak:
    """Bytes at the fullest moment, and what holds them."""

    bytes: int
    terms: str


def expected(
    oracle: Oracle, groups: Sequence[Block], finer: Sequence[Block], s: Settings, trial: Trial, keep: bool = True
) -> Peak:
    """``finer``: the blocks inside the groups, where they are cut. ``keep`` False: as if no graph were kept."""
    if oracle.engine == "forward":
        found = list(values_only(oracle, groups, trial))
    else:
        found = list(phases(oracle, groups, finer, s, trial, kept_graphs(groups, trial) if keep else 0))
    fullest = max(found, key=Phase.total)
    terms = {"process": trial.process, "float32 weights": widened(oracle), **fullest.terms}
    counted = trial.process + widened(oracle) + found[0].total()  # the first phase is the trial's
    freed = max(trial.resident - counted, 0)
    if s.max_memory is not None:  # near a limit they are handed back before each product
        freed = min(freed, max(s.max_memory - sum(terms.values()), 0))
    terms["freed"] = freed
    listed = ", ".join(f"{name} {b / 2**20:.0f}" for name, b in terms.items() if b >= 2**19)
    return Peak(sum(terms.values()), f"{fullest.name}: {listed} MiB")


def phases(
    oracle: Oracle, groups: Sequence[Block], finer: Sequence[Block], s: Settings, trial: Trial, kept: int
) -> Iterator[Phase]:
    """The parts of a point, and the secants."""
    exact = oracle.engine == "exact"
    sizes = {g.name: size(g, oracle) for g in groups}
    whole, largest = sum(sizes.values()), max(sizes.values())
    tensor = max(t.numel() * _element(t, oracle) for g in groups for t in g.tensors)
    dots = min(16 * max(t.numel() for g in groups for t in g.tensors), DOT_BYTES)
    summed = len(oracle.batches) > 1  # the part of a single micro-batch is the sum
    held, others = sum(trial.graphs[:kept]), trial.graphs[kept:]

    def making(own: int, several: bool = False) -> dict[str, int]:
        """A product on a block: a graph that is kept beside the cotangents; or one that is not, with the gradients at its ends while it is
        built, and given up piece by piece on the way back, unless ``several`` vectors go through it."""
        found = [(held, (1 if exact else QUOTIENT) * own + max(trial.activations + 2 * tensor, dots))]
        if others:
            back = 2 * tensor + (trial.activations if several else 0)
            found.append((held + max(others), max(own + back, whole)))
        graphs, product = max(found, key=sum)
        return {"graphs": graphs, "product": product}

    adapters = sum(sizes[g.name] for g in groups if g.group == "peft")  # their gradients are needed again
    # With the first product graphs are built, each with the gradients at its end, beside those of the point.
    first = making(largest)
    yield Phase("first product", whole + summed * largest, **{**first, "product": max(first["product"], whole * exact)})
    for g in groups:
        own, rows = sizes[g.name], basis(g.numel, s)
        # This vector, the last one, and the sum of the product.
        yield Phase(f"ends of {g.name}", adapters + (2 + summed) * own, basis=rows * own, **making(own))
        chunk = min(together(own), s.max_vectors)
        # Each vector with its sum, and the products of one micro-batch, the last of them under way.
        vectors = (2 + summed) * chunk - 1
        if exact:
            rows = rows if len([b for b in finer if b.group == g.group]) < 2 else 0
            vectors += rows > 0  # a start for another run
        else:
            rows = 2  # the two ends
            vectors += 2  # the vector that the step was chosen along; the sum over several steps
        yield Phase(f"trace of {g.name}", adapters + vectors * own, basis=rows * own, **making(own, chunk > 1))
    if len(groups) == 2:
        base, peft = (sizes[g.name] for g in groups)
        yield Phase(
            "coupling", adapters + (1 + summed) * base + peft, basis=min(PAIRS, s.max_steps) * peft, **making(base)
        )
        if s.margin:
            rows = min(MARGIN, s.max_steps) if basis(sum(g.numel for g in groups), s) else 0
            yield Phase("joint margin", adapters + (2 + summed) * whole, basis=rows * whole, **making(whole))
    # Weights and gradient here and at the last place; a block's moved weights, its new gradient's sum and part.
    yield Phase(
        "secants",
        2 * min(s.secants, 2) * whole + (1 + summed) * largest,
        product=largest + max(trial.activations + 2 * tensor, dots),
    )


def values_only(oracle: Oracle, groups: Sequence[Block], trial: Trial) -> Iterator[Phase]:
    """``--engine forward``: a vector and the weights moved along it, one tensor of the step under way."""
    largest = max(size(g, oracle) for g in groups)
    tensor = max(t.numel() * _element(t, oracle) for g in groups for t in g.tensors)
    yield Phase("second differences", 2 * largest + tensor, product=trial.activations)


def basis(numel: int, s: Settings) -> int:
    """Vectors that Lanczos keeps of a group of that many weights: as many as its bounds need, where it keeps any."""
    most = min(s.max_steps, numel)
    return min(least_steps(numel, s.failure, BOUND), most) if numel * most <= BASIS_ELEMENTS else 0


def kept_graphs(groups: Sequence[Block], trial: Trial) -> int:
    """How many micro-batches' graphs a point will keep: what `Products` decides while its first product builds them, beside the
    gradients."""
    whole, largest = sum(map(size, groups)), max(map(size, groups))
    free = trial.free - whole
    for i, graph in enumerate(trial.graphs):
        free -= graph + largest * (i == 1)  # from the second on beside the sum so far
        if free < VECTORS * whole + (2 * graph if i + 1 < len(trial.graphs) else 0):
            return i
    return len(trial.graphs)


def begun(oracle: Oracle) -> Trial:
    """A trial of the oracle's micro-batches, without their graphs."""
    batches = [b for i, b in enumerate(oracle.batches) if oracle.ranks.mine(i)]
    forward = activations(oracle, max(batches, key=elements))
    memory.give_back(worth=0)
    return Trial(memory.resident(oracle.device), memory.free(oracle.device, oracle.memory_limit), forward)


def activations(oracle: Oracle, batch: Any) -> int:
    """Bytes that a micro-batch's forward pass keeps for its backward; without one: the logits and their logarithms, in float32."""
    if oracle.engine == "forward":
        with torch.no_grad(), oracle.kernel():
            z = oracle.objective.forward(oracle.model, batch)
        wide = 4 * z.numel() if z.element_size() < 4 else 0
        return 2 * z.numel() * max(z.element_size(), 4) + wide // 2
    with requires_grad(oracle.model, [t for b in oracle.blocks for t in b.tensors]):
        before = memory.allocated(oracle.device)
        loss = oracle.loss(batch)
        found = memory.allocated(oracle.device) - before
    del loss
    return max(found, 0)


def elements(batch: Any) -> int:
    """Numbers in a micro-batch, padding included."""
    if isinstance(batch, Mapping):
        return sum(map(elements, batch.values()))
    if isinstance(batch, (tuple, list)):
        return sum(map(elements, batch))
    return int(batch.numel()) if isinstance(batch, torch.Tensor) else 0


def widened(oracle: Oracle) -> int:
    """Bytes of the float32 copy of 16-bit weights, beside which the weights stay."""
    if oracle.engine == "exact":
        return 0
    tensors = (*oracle.model.parameters(), *oracle.model.buffers())
    return sum(4 * t.numel() for t in tensors if t.dtype in (torch.bfloat16, torch.float16))


def size(block: Block, oracle: Oracle | None = None) -> int:
    """Bytes of a vector on it."""
    return sum(t.numel() * _element(t, oracle) for t in block.tensors)


def _element(t: torch.Tensor, oracle: Oracle | None) -> int:
    """Differences are taken in float32 at least."""
    return t.element_size() if oracle is None or oracle.engine == "exact" else max(t.element_size(), 4)
