"""Processes that share one objective (torchrun, accelerate launch): each works on its own micro-batches, and sums meet.

Every rank holds all micro-batches' inputs (token ids are small) and all weights of the model; micro-batch i is computed by rank i mod size.
What is exchanged are sums: of gradients and products (as large as what was asked for) and of scalars. All ranks get the same bits back,
so whatever is decided from a number is decided alike everywhere.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hybridtheory.errors import UserError
from hybridtheory.vectors import Tensors


class Ranks:
    """``rank`` of ``size`` processes; ``sent``: bytes that this process handed to the network so far, as payload."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.sent = 0

    @property
    def writes(self) -> bool:
        """Whether this process owns the files and the screen: the first one does."""
        return self.rank == 0

    def meet(self) -> None:
        """Nobody goes on before everybody is here."""
        self.sum(0.0)

    def first(self, *values: float) -> tuple[float, ...]:
        """The first process's numbers, for what each would decide by its own clock, files or rounding; one message."""
        return self.sum(*(v if self.writes else 0.0 for v in values))

    def mine(self, i: int) -> bool:
        """Whether micro-batch i is computed here."""
        return i % self.size == self.rank

    def add_(self, tensors: Tensors) -> Tensors:
        """Sums over the ranks, in place."""
        if self.size > 1:
            for i, t in enumerate(tensors):
                if not t.is_contiguous():
                    tensors[i] = t = t.contiguous()
                self._reduce(t)
        return tensors

    def sum(self, *values: float) -> tuple[float, ...]:
        """Sums over the ranks, in float64; one message whatever their number."""
        if self.size == 1:
            return values
        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        self._reduce(found)
        return tuple(found.tolist())

    def join(self, rows: Sequence[Sequence[float]], count: int) -> list[list[float]]:
        """Rows of numbers about one's own micro-batches (at least one), put together for all ``count`` of them, in their order."""
        if self.size == 1:
            return [list(r) for r in rows]
        own = torch.zeros(-(-count // self.size), len(rows[0]), dtype=torch.float64, device=self.device)
        own[: len(rows)] = torch.tensor([list(r) for r in rows], dtype=torch.float64)
        every = [torch.empty_like(own) for _ in range(self.size)]
        self._call(dist.all_gather, every, own)
        self.sent += own.numel() * own.element_size()
        return [every[i % self.size][i // self.size].tolist() for i in range(count)]

    def agree(self, what: str, *numbers: int) -> None:
        """UserError where the ranks hold different whole numbers (checksums of weights, bits of slopes)."""
        if self.size == 1:
            return
        own = torch.tensor(
            [n - (1 << 64) if n >= 1 << 63 else n for n in numbers], dtype=torch.int64, device=self.device
        )
        every = [torch.empty_like(own) for _ in range(self.size)]
        self._call(dist.all_gather, every, own)
        self.sent += own.numel() * own.element_size()
        other = [r for r, theirs in enumerate(every) if not torch.equal(theirs, every[0])]
        if other:
            raise UserError(
                f"{what}: rank {other[0]} holds other weights or slopes than rank 0, so the run is no longer one run: start again from the "
                f"last checkpoint, with the same versions and thread counts on every rank"
            )

    def _reduce(self, tensor: Tensor) -> None:
        self._call(dist.all_reduce, tensor)
        self.sent += tensor.numel() * tensor.element_size()

    def _call(self, what: Any, *arguments: Any, **options: Any) -> None:
        try:
            what(*arguments, **options)
        except RuntimeError as error:  # dist's own errors are RuntimeErrors: a peer that died, or one that hangs
            raise UserError(
                f"rank {self.rank} waited for another rank in vain ({str(error).splitlines()[0][:120]}): one died or hangs; "
                f"start again with --resume (and a longer --timeout, where one only needs more time than that)"
            ) from error

    def closure(self, own: Callable[..., Tensor | None], model: nn.Module) -> Callable[..., Tensor]:
        """closure(backward=False) of the whole objective from the part ``own`` that is computed here (None: nothing is): one scalar is
        exchanged for a value, and the gradient of what requires one after a backward pass, added to what ``.grad`` held.
        """

        def whole(backward: bool = False) -> Tensor:
            if not backward:
                part = own()
                return torch.tensor(self.sum(0.0 if part is None else float(part))[0], dtype=torch.float64)
            moving = [p for p in model.parameters() if p.requires_grad]
            held = [p.grad for p in moving]
            for p in moving:
                p.grad = None
            part = own(backward=True)
            for p, before in zip(moving, held, strict=True):
                (p.grad,) = self.add_([torch.zeros_like(p) if p.grad is None else p.grad])
                if before is not None:
                    p.grad = before.add_(p.grad)
            return torch.tensor(self.sum(0.0 if part is None else float(part))[0], dtype=torch.float64)

        return whole


ALONE = Ranks()


_joined = ALONE


def join(timeout: float) -> Ranks:
    """Meet the processes that a launcher started (RANK and WORLD_SIZE say so); a single process without one. Commands do this; a library
    call inside somebody else's distributed program does not, and stays alone. UserError where they cannot meet.

    ``timeout``: seconds that each of them waits for the others, here and at every exchange.
    """
    global _joined
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and _joined.size == 1:
        try:
            if not dist.is_initialized():
                # gloo for tensors on the CPU, NCCL for those on CUDA
                dist.init_process_group(timeout=timedelta(seconds=timeout))
                atexit.register(dist.destroy_process_group)  # its threads must end before the interpreter does
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"WORLD_SIZE = {size} says that there are several processes, and they cannot meet ({str(error).splitlines()[0][:120]}): "
                f"start them with torchrun or accelerate launch, or unset WORLD_SIZE"
            ) from None
        _joined = Ranks(dist.get_rank(), size)
    return _joined


def joined(device: torch.device | str = "cpu") -> Ranks:
    """The processes that this one has met with `join`, exchanging scalars on ``device``."""
    if _joined.size > 1:
        _joined.device = torch.device(device)
    return _joined


def checksum(tensors: Sequence[Tensor]) -> int:
    """64 bits of the tensors' bits, the same on every rank that holds the same bits."""
    total = 0
    for i, t in enumerate(tensors):
        bits = t.detach().contiguous().reshape(-1)
        words = bits.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[bits.element_size()])
        total += (2 * i + 1) * int(words.sum(dtype=torch.int64))
    return total % (1 << 64)
