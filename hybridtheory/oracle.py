"""Oracle: all that may be asked of f at the current parameters; it counts what it was asked.

    f(w) = sum_b loss_b(w) / sum_b weight_b        over micro-batches b

``loss_b`` is a sum over tokens (or rows) and ``weight_b`` counts them, so ragged micro-batches are weighted by tokens and cutting the
rows differently changes nothing beyond rounding. The exact engine is double backward with the gradient's graph built once and reused
for every further product; autograd prunes what the requested block does not need. Everything runs under the math attention kernel
(the fused one has no second derivative) and in the mode the model is in; the parameters' ``requires_grad`` flags are left as found.

Never ``grad(jvp)``: forward AD through layer_norm followed by reverse is silently wrong in torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from hybridtheory import memory, shards
from hybridtheory.blocks import Block, split
from hybridtheory.errors import UserError
from hybridtheory.ranks import ALONE, Ranks
from hybridtheory.vectors import Tensors, add_, zeros

Batch = Any
Blocks = Block | Sequence[Block] | None
T = TypeVar("T")
ENGINES = ("exact", "difference", "forward")
# (tangents, their slots, tensors wanted, whether another product follows) -> H v on those
Product = Callable[[Tensors, list[int], list[Tensor], bool], Tensors]

# Vectors as large as the blocks that a product holds at once: the sum so far, the part of one micro-batch, what autograd adds up, and
# the one that Lanczos keeps from the step before.
VECTORS = 4


class Objective(Protocol):
    """What f is. ``forward`` is kept apart from ``loss`` so that the Gauss-Newton matrix can be had too."""

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Outputs (logits at the positions that count), any shape."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Sum of the loss over the batch's tokens or rows, a scalar, reduced in float32 or better."""

    def weight(self, batch: Batch) -> float:
        """How many tokens or rows that sum runs over."""


class MeanLoss:
    """A plain ``loss_fn(model, batch) -> mean loss`` as an Objective; a batch weighs its rows."""

    def __init__(self, loss_fn: Callable[[nn.Module, Batch], Tensor]) -> None:
        self.loss_fn = loss_fn

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss_fn(model, batch)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs * rows_in(batch)

    def weight(self, batch: Batch) -> float:
        return rows_in(batch)


def rows_in(batch: Batch) -> int:
    """Rows of a batch: the leading dimension of its first tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next((rows_in(v) for v in values if isinstance(v, Tensor)), 1)


def microbatches(batch: Batch, rows: int) -> list[Batch]:
    """Cut a tensor, tuple or mapping of tensors along its first dimension into pieces of at most ``rows`` rows."""
    n = rows_in(batch)

    def cut(value: Any, start: int) -> Any:
        if isinstance(value, Tensor):
            return value[start : start + rows] if value.dim() and value.shape[0] == n else value
        if isinstance(value, Mapping):
            return {k: cut(v, start) for k, v in value.items()}
        return tuple(cut(v, start) for v in value) if isinstance(value, (tuple, list)) else value

    return [cut(batch, start) for start in range(0, n, rows)]


class Oracle:
    """Value, gradient and Hessian (or Gauss-Newton) products of f for the given blocks, at whatever the parameters are now."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        batches: Sequence[Batch],
        blocks: Sequence[Block],
        curvature: str = "hessian",
        memory_limit: int | None = None,
        engine: str = "exact",
        ranks: Ranks = ALONE,
    ) -> None:
        """``engine``: "exact" (double backward), "difference" (of gradients; `difference`) or "forward" (values only).

        ``ranks``: the processes that share the micro-batches, of which every one is given all; sums are the whole objective's.
        """
        if engine not in ENGINES:
            raise UserError(f"an oracle's engine is one of {', '.join(ENGINES)}, not {engine!r}")
        if engine != "exact" and curvature != "hessian":
            raise UserError(f"--curvature {curvature} needs second derivatives: choose --engine exact")
        self.engine = engine
        if not batches:
            raise UserError("there is no data to measure on: the list of batches is empty")
        if curvature not in ("hessian", "ggn"):
            raise UserError(f"curvature is 'hessian' or 'ggn', not {curvature!r}")
        self.sharded = shards.any_sharded(t for b in blocks for t in b.tensors)
        if self.sharded and ranks.size > 1:
            raise UserError(
                "processes that share a sharded model compute every micro-batch together and cannot share them out: leave ranks out"
            )
        if len(batches) < ranks.size:
            raise UserError(
                f"{len(batches)} micro-batches cannot be shared by {ranks.size} processes: lower --micro-batch or start fewer"
            )
        self.ranks = ranks
        self.model, self.objective, self.batches, self.blocks = model, objective, list(batches), list(blocks)
        self.curvature = curvature
        self.memory_limit = memory_limit
        self.watched: int | None = None  # a resident set above which freed blocks are handed back to the system
        self.weights = [float(objective.weight(b)) for b in self.batches]
        self.total_weight = sum(self.weights)
        if not self.total_weight > 0:
            raise UserError(
                "no token of the data counts towards the loss: every target is masked; check labels and max length"
            )
        self.calls: Counter[str] = Counter()

    @property
    def device(self) -> torch.device:
        return self.blocks[0].tensors[0].device

    def kernel(self) -> AbstractContextManager[None]:
        """The attention kernel that has a second derivative, around whatever computes: a checkpointed layer computes again in backward."""
        return sdpa_kernel(SDPBackend.MATH) if self.engine == "exact" else nullcontext()

    def loss(self, batch: Batch) -> Tensor:
        """Sum of the loss over one micro-batch, with its graph."""
        with self.kernel():
            return self.objective.loss(self.objective.forward(self.model, batch), batch)

    @torch.no_grad()
    def value(self, rows: Sequence[int] | None = None) -> float:
        """f, or its part over the micro-batches ``rows``; accumulated in float64."""
        picked = list(range(len(self.batches)) if rows is None else rows)
        weight = sum(self.weights[i] for i in picked)
        total = 0.0
        for loss, _ in self._each(self._own(picked), lambda batch: float(self.loss(batch).double())):
            total += loss
        (total,) = self.ranks.sum(total)
        self.calls["value"] += 1
        return total / weight

    @torch.no_grad()
    def parts(self) -> list[float]:
        """What each micro-batch adds to f, of all processes; one evaluation."""
        every = self._own(range(len(self.batches)))
        own = [[loss / self.total_weight] for loss, _ in self._each(every, lambda b: float(self.loss(b).double()))]
        self.calls["value"] += 1
        return [part for (part,) in self.ranks.join(own, len(self.batches))]

    def _own(self, picked: Sequence[int]) -> list[int]:
        return [i for i in picked if self.ranks.mine(i)]

    def gradient(self, *blocks: Block, rows: Sequence[int] | None = None) -> list[Tensors]:
        """One list of tensors per block, accumulated exactly over the micro-batches (or over those in ``rows``)."""
        total: list[Tensors] = []
        for _, _, part in self.gradients(*blocks, rows=rows):
            total = [add_(t, p) for t, p in zip(total, part, strict=True)] if total else part
            del part
        if not total:  # none of ``rows`` is computed here
            total = [zeros(b.tensors) for b in blocks or self.blocks]
        return [self.ranks.add_(t) for t in total]

    def gradients(
        self, *blocks: Block, rows: Sequence[int] | None = None
    ) -> Iterator[tuple[float, float, list[Tensors]]]:
        """Per micro-batch of this process: its weight's share s_b, its mean loss, and s_b times its gradient per block (over all
        processes they sum to the gradient).
        """
        if self.engine == "forward":
            raise UserError("a gradient was asked for, and --engine forward takes none: choose --engine difference")
        blocks = blocks or tuple(self.blocks)
        tensors = [t for b in blocks for t in b.tensors]
        picked = list(range(len(self.batches)) if rows is None else rows)
        weight = sum(self.weights[i] for i in picked)

        def one(batch: Batch) -> tuple[float, Tensors]:
            loss = self.loss(batch)
            with self.kernel():
                return float(loss.detach()), self.differentiate(loss / weight, tensors)

        with _requires_grad(self.model, tensors):
            for (loss, flat), own in self._each(self._own(picked), one):
                parts = [split(flat, blocks)]
                flat.clear()
                yield own / weight, loss / own, parts.pop()  # held by the caller alone while the next one is made
        self.calls["gradient"] += 1

    def differentiate(self, loss: Tensor, tensors: Sequence[Tensor]) -> Tensors:
        """d loss / d tensors. The engine ``difference`` goes by ``backward`` (``.grad`` is as found after it), which is all that
        sharded and reentrantly checkpointed modules know."""
        if self.engine == "exact":
            self._refuse_sharded()
            return list(torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True))
        before = [t.grad for t in tensors]
        try:
            for t in tensors:
                t.grad = None
            loss.backward()
            return [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
        finally:
            for t, grad in zip(tensors, before, strict=True):
                t.grad = grad

    def _refuse_sharded(self) -> None:
        if self.sharded:
            raise UserError(
                "the model is sharded, and what gathers its weights has no second derivative: choose --engine difference (or forward)"
            )

    def _each(self, picked: list[int], call: Callable[[Batch], T]) -> Iterator[tuple[T, float]]:
        """(call(batch), its weight) for the micro-batches ``picked``; one that does not fit in memory is halved, for good."""
        queue = list(picked)
        while queue:
            i = queue[0]
            try:
                result = call(self.batches[i])
            except (RuntimeError, MemoryError) as error:
                self.halve(i, error)
                queue = [i, *(j + 1 if j >= i else j for j in queue)]
                continue
            queue.pop(0)
            yield result, self.weights[i]

    def halve(self, i: int, error: BaseException) -> None:
        """Cut micro-batch i in two where it stands: less memory, the same sums. Re-raises what is not for want of memory."""
        if not memory.exhausted(error):
            raise error
        if self.ranks.size > 1 or self.sharded:
            raise UserError(
                f"out of memory on rank {self.ranks.rank}: processes that share an objective cannot halve a micro-batch alone; "
                f"give a smaller --micro-batch (the numbers stay the same)"
            ) from error
        rows = rows_in(self.batches[i])
        if rows < 2:
            raise UserError(
                "out of memory with a micro-batch of a single row: shorten it (--max-length), or measure fewer weights (--peft, --blocks)"
            ) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        halves = microbatches(self.batches[i], (rows + 1) // 2)
        self.batches[i : i + 1] = halves
        self.weights[i : i + 1] = [float(self.objective.weight(b)) for b in halves]
        self.calls["halved"] += 1

    def give_back(self) -> None:
        """Hand freed blocks back above the level that is watched; no more where that does not help, since each one costs its pages anew."""
        if not memory.make_room(0, self.device, self.watched):
            self.watched = None

    @contextmanager
    def moved(self, blocks: Block | Sequence[Block], direction: Tensors, by: float) -> Iterator[None]:
        """The blocks' parameters are w + by * direction inside and bit for bit w after; costs one copy of the blocks."""
        tensors = [t for b in _listed(blocks) for t in b.tensors]
        kept = [shards.kept(t) for t in tensors]
        try:
            for t, u in zip(tensors, direction, strict=True):
                shards.put(t, torch.add(t.detach(), u.to(t.dtype), alpha=by))
            yield
        finally:
            for t, data in zip(tensors, kept, strict=True):
                shards.put(t, data)

    @contextmanager
    def products(self, *blocks: Block) -> Iterator[Products]:
        """The Hessian between ``blocks`` (default: all) as a map v -> H v; the graphs of the gradient live inside the context."""
        blocks = blocks or tuple(self.blocks)
        if self.engine == "forward":
            raise UserError(
                "a Hessian product was asked for, and --engine forward takes none: choose --engine difference"
            )
        from hybridtheory.difference import Differences, widened

        exact = self.engine == "exact"
        if exact:
            self._refuse_sharded()
        with (
            nullcontext() if exact else widened(self.model),
            self.kernel(),
            _requires_grad(self.model, [t for b in blocks for t in b.tensors]),
        ):
            products = Products(self, blocks) if exact else Differences(self, blocks)
            try:
                yield products
            finally:
                products.close()


class Products:
    """v -> H v. As many graphs of micro-batches as fit in memory are kept, the others rebuilt each time: the numbers are the same.

    One graph serves every pair of blocks: a product names the blocks its tangent lives on (``inp``) and those it is wanted on
    (``out``), and autograd visits only what connects the two.
    """

    def __init__(self, oracle: Oracle, blocks: Sequence[Block]) -> None:
        self.oracle, self.blocks = oracle, list(blocks)
        self._tensors = [t for b in self.blocks for t in b.tensors]
        self._slot = {id(t): i for i, t in enumerate(self._tensors)}
        self._kept: dict[int, Product] = {}
        self._keep = True  # until a graph would leave too little room
        self._vector = sum(t.numel() * t.element_size() for t in self._tensors)
        self.graph_bytes: dict[int, int] = {}  # micro-batch -> what its graph holds, of those that were built

    def __call__(self, v: Tensors, inp: Blocks = None, out: Blocks = None) -> Tensors:
        """H[out, inp] v: tensors aligned with ``out``'s (``out`` defaults to ``inp``, ``inp`` to all blocks of the context)."""
        return self.many([v], inp, out)[0]

    def many(self, vectors: Sequence[Tensors], inp: Blocks = None, out: Blocks = None) -> list[Tensors]:
        """Several products: micro-batches outside, vectors inside, so that each graph is built at most once."""
        totals: list[Tensors] = [[] for _ in vectors]
        for _, hvs in self.each(vectors, inp, out):
            totals = [add_(t, hv) if t else hv for t, hv in zip(totals, hvs, strict=True)]
            del hvs
        return [self.oracle.ranks.add_(t) for t in totals]

    def each(
        self, vectors: Sequence[Tensors], inp: Blocks = None, out: Blocks = None
    ) -> Iterator[tuple[int, list[Tensors]]]:
        """Per micro-batch of this process: its number, and s_b H_b v for every vector (over all processes they sum to H v).

        Who lets go of them before asking for the next micro-batch's holds them once, not twice.
        """
        inputs = _listed(inp) or self.blocks
        outputs = _listed(out) or inputs
        rows = [self._slot[id(t)] for b in inputs for t in b.tensors]
        wanted = [t for b in outputs for t in b.tensors]
        i = 0
        while i < len(self.oracle.batches):
            if not self.oracle.ranks.mine(i):
                i += 1
                continue
            memory.make_room(VECTORS * self._vector, self.oracle.device, self.oracle.memory_limit)
            try:
                product = self._product(i)
                # A graph that nobody will ask again is given up piece by piece on the way back through it.
                last = None if i in self._kept else len(vectors) - 1
                results = []
                for k, v in enumerate(vectors):
                    self.oracle.give_back()
                    results.append(product(v, rows, wanted, k != last))
            except (RuntimeError, MemoryError) as error:
                self._kept.clear()  # other micro-batches' graphs may be what is in the way; from now on none is kept
                self._keep = False
                self.oracle.halve(i, error)
                continue
            del product
            handed = [results]
            del results
            yield i, handed.pop()  # not held here while the next ones are made
            i += 1
        self.oracle.calls["product"] += len(vectors)
        self.oracle.calls[f"product:{'+'.join(sorted({b.group for b in inputs}))}"] += len(vectors)

    def close(self) -> None:
        self._kept.clear()
        memory.give_back()

    def _product(self, i: int) -> Product:
        if i in self._kept:
            return self._kept[i]
        before, allocated = memory.used(self.oracle.device), memory.allocated(self.oracle.device)
        build = _hessian if self.oracle.curvature == "hessian" else _gauss_newton
        product = build(self.oracle, self.oracle.batches[i], self._tensors)
        self.oracle.calls["graph"] += 1
        self.graph_bytes[i] = max(memory.allocated(self.oracle.device) - allocated, 0)
        if self._keep:
            # Room for what a product holds beside the graphs, for the next graph, kept or not, and for what going back through it
            # takes: half of the graph on SmolLM2 and 420 tokens, at most as much. (What building this one took beyond the graph is
            # free again.)
            room = VECTORS * self._vector
            if i + 1 < len(self.oracle.batches):
                room += 2 * max(memory.used(self.oracle.device) - before, 0)
            self._keep = memory.free(self.oracle.device, self.oracle.memory_limit) >= room
        if self._keep:
            self._kept[i] = product
        return product


def _hessian(oracle: Oracle, batch: Batch, tensors: list[Tensor]) -> Product:
    grads = torch.autograd.grad(oracle.loss(batch) / oracle.total_weight, tensors, create_graph=True, allow_unused=True)
    # Only the places in the graph are kept, not the gradients that stand there: they are as large as the model, once a micro-batch.
    # A tensor whose gradient is constant (or absent) has no graph to go back through: its rows of H are zero.
    edges = [get_gradient_edge(g) if g is not None and g.requires_grad else None for g in grads]
    dtypes = [None if g is None else g.dtype for g in grads]
    del grads

    def product(v: Tensors, rows: list[int], wanted: list[Tensor], again: bool) -> Tensors:
        live = [(e, x.to(dtypes[r])) for r, x in zip(rows, v, strict=True) if (e := edges[r]) is not None]
        return _pullback([e for e, _ in live], wanted, [x for _, x in live], again)

    return product


def _gauss_newton(oracle: Oracle, batch: Batch, tensors: list[Tensor]) -> Product:
    """J' (d2 loss / d outputs2) J: the Hessian without the outputs' own curvature; positive semi-definite for convex losses."""
    with sdpa_kernel(SDPBackend.MATH):
        z = oracle.objective.forward(oracle.model, batch)
    leaf = z.detach().requires_grad_()
    dz = torch.autograd.grad(oracle.objective.loss(leaf, batch) / oracle.total_weight, leaf, create_graph=True)[0]
    # J v is the derivative of u -> (J' u)'v, and that map is linear, so any u will do: reverse mode only.
    u = torch.zeros_like(z, requires_grad=True)
    jtu = torch.autograd.grad(z, tensors, u, create_graph=True, allow_unused=True)

    def product(v: Tensors, rows: list[int], wanted: list[Tensor], again: bool) -> Tensors:
        live = [(jtu[r], x) for r, x in zip(rows, v, strict=True) if jtu[r] is not None and jtu[r].requires_grad]
        jv = _pullback([j for j, _ in live], [u], [x.to(j.dtype) for j, x in live])
        return _pullback([z], wanted, _pullback([dz], [leaf], jv), again)

    return product


def _pullback(
    outputs: Sequence[Tensor] | Sequence[GradientEdge],
    inputs: list[Tensor],
    tangents: Sequence[Tensor],
    again: bool = True,
) -> Tensors:
    """sum_i tangent_i' d output_i / d inputs; the graph is kept for another one where ``again`` says so."""
    if not outputs:
        return zeros(inputs)
    found = torch.autograd.grad(
        outputs, inputs, tangents, retain_graph=again, allow_unused=True, materialize_grads=True
    )
    return list(found)


def _listed(blocks: Blocks) -> list[Block]:
    return [] if blocks is None else [blocks] if isinstance(blocks, Block) else list(blocks)


@contextmanager
def _requires_grad(model: nn.Module, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Exactly ``tensors`` require gradients inside: autograd then stores and visits nothing else."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    wanted = {id(t) for t in tensors}
    try:
        for p, _ in before:
            if p.is_floating_point():
                p.requires_grad_(id(p) in wanted)
        with torch.enable_grad():
            yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)
