"""A function in several processes of this machine that have met."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing as mp

from hybridtheory.ranks import Ranks


def start(rank: int, size: int, work: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    try:
        torch.save(work(Ranks(rank, size), *arguments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def together(size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(ranks, ...)`` returns in each of ``size`` processes."""
    folder.mkdir()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(start, (size, work, str(folder), arguments), nprocs=size)
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(size)]
