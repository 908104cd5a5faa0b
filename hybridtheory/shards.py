"""Sharded weights (torch's fully_shard): what one process holds of a tensor, and sums over all of them. The only file that knows.

Each process computes every micro-batch, since a forward pass gathers every weight from all of them; the gradient that comes back is
sharded again. Vectors in parameter space are sharded like the parameters, and inner products are the only thing that is exchanged beside
what torch exchanges. A direction is drawn whole, tensor by tensor, and each process keeps its part: it is the one of the unsharded model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hybridtheory.errors import UserError

T = TypeVar("T", float, Tensor)


def is_sharded(t: Tensor) -> bool:
    return hasattr(t, "device_mesh")  # a DTensor, whose module takes a while to import


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    return any(is_sharded(t) for t in tensors)


def local(t: Any) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    return t.to_local() if is_sharded(t) else t  # type: ignore[no-any-return]


def whole(t: Any) -> Tensor:
    """All of a tensor: a copy, gathered from all processes, where it is sharded."""
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[no-any-return]


def part(full: Tensor, like: Any) -> Tensor:
    """``full`` sharded like ``like``: this process's part of what every process has drawn alike."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    found = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    return of_parts(found.to_local().clone(), like)  # a view would keep all of it alive


def of_parts(own: Tensor, like: Any) -> Tensor:
    """The tensor that is sharded like ``like`` and whose part in this process is ``own``."""
    if not is_sharded(like):
        return own
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def total(value: T, like: Sequence[Any]) -> T:
    """The sum over the processes where ``like`` is sharded over them; otherwise the value."""
    if not any_sharded(like):
        return value
    group = next(t for t in like if is_sharded(t)).device_mesh.get_group()
    if isinstance(value, Tensor):
        dist.all_reduce(value, group=group)
        return value
    found = torch.tensor(value, dtype=torch.float64, device=local(like[0]).device)
    dist.all_reduce(found, group=group)
    return float(found)


def kept(t: Tensor) -> Tensor:
    """What `put` needs to undo itself."""
    return t.detach().clone() if is_sharded(t) else t.data


@torch.no_grad()
def put(t: Tensor, value: Tensor) -> None:
    """Give a parameter other numbers: another memory, or where it is sharded the same, since its module does not see a new one."""
    if is_sharded(t):
        t.copy_(value)
    else:
        t.data = value


@contextmanager
def rewritten(t: Tensor) -> Iterator[Tensor]:
    """All of a parameter, to be changed in place; of a sharded one each process then keeps its part."""
    full = whole(t.detach())
    yield full
    if is_sharded(t):
        local(t.detach()).copy_(local(part(full, t)))


def settle(model: nn.Module) -> None:
    """Parameters are sharded outside of every forward pass, the root's too: changes to them would otherwise not be seen by the next.

    UserError for what is not served: some of the tensors alone, several dimensions of a mesh, tensors cut other than in rows.
    """
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "set_reshard_after_forward")]
    for module in modules:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()
    found = list(model.parameters())
    cut: list[Any] = [p for p in found if is_sharded(p)]
    if cut and len(cut) < len(found):
        raise UserError(
            f"{len(cut)} of the model's {len(found)} tensors are sharded and the others are not: call fully_shard on the whole model, "
            f"after its adapter is attached"
        )
    if any(p.device_mesh.ndim != 1 or not all(x.is_shard(0) for x in p.placements) for p in cut):
        raise UserError(
            "the model is sharded in another way than by fully_shard over one group of processes, which alone is served: "
            "use a mesh of one dimension, without tensor parallelism"
        )
