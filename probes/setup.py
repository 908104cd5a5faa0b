"""What every probe starts from: a task cut into blocks with an oracle on its rows, and the header of its records."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from hybridtheory.blocks import Block, partition
from hybridtheory.engines import CHOICES, Engine, choose
from hybridtheory.errors import UserError
from hybridtheory.oracle import Oracle
from hybridtheory.ranks import ALONE, joined
from hybridtheory.shards import is_sharded
from probes.given import Given
from probes.records import BlockInfo, DataInfo, Header, ModelInfo, PeftInfo
from probes.tasks import Task


class Common(Protocol):
    """Settings that every probe has."""

    @property
    def blocks(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def micro_batch(self) -> int | None: ...
    @property
    def curvature(self) -> str: ...
    @property
    def max_memory(self) -> int | None: ...


S = TypeVar("S", bound=Common)

EXACT = Engine("exact", "")


@dataclass
class Probe(Generic[S]):
    """A task with its blocks and oracle: what every part of the run works on."""

    task: Task | Given
    settings: S
    groups: list[Block]
    blocks: list[Block]
    oracle: Oracle
    rows: int
    engine: Engine = EXACT

    @classmethod
    def of(cls, task: Task | Given, settings: S) -> Probe[S]:
        groups = partition(task.model, "group", task.is_peft, task.base, task.peft_info)
        finer = partition(task.model, settings.blocks, task.is_peft, task.base, task.peft_info)
        rows = len(task.rows)
        # Four micro-batches at least: the noise and the jackknife over rows are read off their differences.
        size = settings.micro_batch or -(-rows // 4)
        asked = str(getattr(settings, "engine", "exact"))  # probes that train only have no choice
        if asked not in CHOICES:
            raise UserError(f"--engine is one of {', '.join(CHOICES)}, not {asked!r}")

        first = groups[0].tensors[0]
        shared = ALONE if is_sharded(first) else joined(first.device)

        def oracle(engine: str) -> Oracle:
            limit, rows_at_a_time = settings.max_memory, task.batches(size)
            return Oracle(task.model, task.objective, rows_at_a_time, groups, settings.curvature, limit, engine, shared)

        engine = choose(oracle("exact")) if asked == "auto" else Engine(asked, "asked for")
        return cls(task, settings, groups, finer, oracle(engine.name), rows, engine)

    @property
    def all_blocks(self) -> list[Block]:
        """Groups first, then the finer blocks that are not themselves groups."""
        names = {g.name for g in self.groups}
        return [*self.groups, *(b for b in self.blocks if b.name not in names)]


def header(probe: Probe[Any], name: str, origin: dict[str, Any]) -> Header:
    """The first record of the probe called ``name``."""
    task, info = probe.task, dict(probe.task.info)
    parameters = sum(b.numel for b in probe.groups)
    wrapped: Any = task.model
    inner = (
        wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    )  # not peft's wrapper: the architecture
    dtype = str(probe.groups[0].tensors[0].dtype).removeprefix("torch.")
    peft = None
    if task.peft_info:
        p = task.peft_info
        named = {k: p.get(k) for k in ("type", "rank", "alpha", "scale", "init")}
        peft = PeftInfo(
            type=str(named["type"]), rank=named["rank"], alpha=named["alpha"], scale=named["scale"], init=str(named["init"] or ""),
            info={k: v for k, v in p.items() if k not in named},
        )  # fmt: skip
    return Header(
        probe=name,
        seed=probe.settings.seed,
        model=ModelInfo(
            name=str(info.pop("model")), sha256=str(info.pop("model_sha256")), parameters=parameters,
            architecture=type(inner).__name__, dtype=dtype,
        ),
        data=DataInfo(
            name=str(info.pop("data")), sha256=str(info.pop("data_sha256")), rows=probe.rows, tokens=probe.oracle.total_weight,
            truncated=int(info.pop("truncated", 0)), loss=str(info.pop("loss", "")), info=info,
        ),
        blocks=[BlockInfo(b.name, b.group, b.numel, {"tied": b.tied, **b.info} if b.tied else b.info) for b in probe.all_blocks],
        peft=peft,
        options=_options(probe),
        threads=torch.get_num_threads(),
        processes=probe.oracle.ranks.size,
        **origin,
    )  # fmt: skip


def _options(probe: Probe[Any]) -> dict[str, Any]:
    """The settings as they were used: the engine by its name, with the reason."""
    options = asdict(probe.settings)
    if "engine" in options:
        options |= {"engine": probe.engine.name, "engine_reason": probe.engine.reason}
    return options
