"""MODEL and --data -> model, loss and batches: the one door to transformers, peft and datasets.

    task = load_task("gpt2", "sst2", peft="lora", rows=16)
    blocks = partition(task.model, "group", peft=task.is_peft, base=task.base, info=task.peft_info)
    oracle = Oracle(task.model, task.objective, task.batches(4), blocks)

`load_task` finds the model (`probes.models`), attaches the adapter (`probes.adapters`), reads the data
(`probes.sources`, `probes.prompts`), tokenises it (`probes.encoding`) and chooses the loss (`probes.objectives`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridtheory.errors import UserError
from probes import adapters
from probes.encoding import Encoder, Row, collate
from probes.models import Loaded, kind_of, load_model, prepare
from probes.objectives import ClassLoss, LabelLoss, TokenLoss
from probes.sources import Source, load_source
from probes.splits import Splits, checked, encode, shuffled
from probes.trial import length, try_out

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_LENGTH = 256  # default tokens a row: SST-2 and its like need 60; longer passages are cut, with a count


@dataclass
class Task:
    """A model with a loss and rows to measure it on.

    model      in evaluation mode, dropout off; ``is_peft(name)`` tells the adapter's parameters; ``base`` is False
               where the base cannot be measured.
    objective  forward, loss (a sum), weight: what `hybridtheory.oracle` asks for.
    rows       the chosen training rows, tokenised; ``splits`` holds all of them by split ("train", "dev", "test"),
               tokenised when first asked for.
    peft_info  type, rank, alpha, scale, init, targets of the adapter; {} without one.
    info       what a report has to say about model and data.
    padding_exact  whether a row's loss is the same beside a longer one; where it is not, batches hold one row.
    notes      sentences for the user.
    """

    model: nn.Module
    objective: TokenLoss | ClassLoss
    rows: list[Row]
    tokenizer: Any
    is_peft: Callable[[str], bool]
    peft_info: dict[str, Any]
    info: dict[str, Any]
    splits: Mapping[str, list[Row]]
    kind: str
    base: bool = True
    padding_exact: bool = True
    notes: list[str] = field(default_factory=list)

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows -> one batch on the model's device."""
        return collate(rows, self.tokenizer.pad_token_id, isinstance(self.objective, LabelLoss), _device(self.model))

    def batches(self, size: int, rows: Sequence[Row] | None = None) -> list[dict[str, Tensor]]:
        """``rows`` (default: the task's) in micro-batches of at most ``size``."""
        rows = self.rows if rows is None else rows
        size = size if self.padding_exact else 1
        return [self.collate(rows[i : i + size]) for i in range(0, len(rows), size)]

    @torch.no_grad()
    def scores(self, rows: Sequence[Row] | None = None, size: int = 16) -> tuple[Tensor, Tensor]:
        """Each option's log-likelihood [N, K] (a classifier's logits) and the right option [N], on the CPU in float64.

        Their argmax is the prediction; differences of the columns rank rows for an AUC. Raises UserError for plain
        text.
        """
        rows = self.rows if rows is None else rows
        if self.info["labels"] is None:
            raise UserError(f"the data {self.info['data']} has no labels to score: pass a labelled task")
        scorer = self.objective if isinstance(self.objective, ClassLoss) else LabelLoss(select=self.objective.select)
        size = size if self.padding_exact else 1
        found = []
        for i in range(0, len(rows), size):
            batch = collate(rows[i : i + size], self.tokenizer.pad_token_id, True, _device(self.model))
            found.append(scorer.scores(scorer.forward(self.model, batch), batch).double().cpu())
        return torch.cat(found), torch.tensor([r["label"] for r in rows])


def load_task(
    model: str | Path | nn.Module | None = None,
    data: str | Path | None = None,
    *,
    peft: str = "lora",
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] | str | None = None,
    virtual_tokens: int = 8,
    init: bool | str = True,
    loss: str = "vocabulary",
    rows: int | None = 64,
    max_length: int | None = None,
    head: str = "auto",
    labels: Sequence[str] | None = None,
    template: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    tokenizer: Any = None,
    cache: str | Path | None = None,
) -> Task:
    """Load ``model`` with an adapter and ``data`` as a task; without arguments the embedded model on the embedded
    sentiment task.

    model        see `probes.models.load_model`; or a transformers model object (a `PeftModel` is recognised), then
                 with its ``tokenizer``.
    data         see `probes.sources.load_source`; None: "sentiment".
    peft ... init  see `probes.adapters.attach`.
    loss         "vocabulary" (cross-entropy over the whole vocabulary) or "labels" (among the label words); labelled
                 language-model tasks only.
    rows         how many rows are measured, drawn without replacement by ``seed``; None: all.
    max_length   tokens a row may have, at most the model's context.
    Raises UserError, with the remedy, for everything that can be wrong with the input.
    """
    if loss not in ("vocabulary", "labels"):
        raise UserError(f"--loss is vocabulary or labels, not {loss!r}")
    if rows is not None and rows < 1:
        raise UserError(f"at least one row is needed to measure on, and --rows is {rows}")
    wide = _dtype(dtype)
    place = _device_of(device)
    source = load_source(
        "sentiment" if data is None else data,
        labels=labels,
        template=template,
        text_column=text_column,
        label_column=label_column,
    )
    records = shuffled(source, seed)
    options = checked(source, records[0]).options
    if isinstance(model, nn.Module):
        loaded = _given(model, tokenizer, head)
    else:
        loaded = load_model(
            model,
            labelled=len(options) > 1,
            num_labels=len(options) or None,
            head=head,
            dtype=wide,
            seed=seed,
            revision=revision,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            cache=Path(cache) if cache else None,
        )
    objective = _objective(loaded, loss, source, options)
    wrapped, peft_info = adapters.attach(
        loaded, peft, rank=rank, alpha=alpha, targets=targets, virtual_tokens=virtual_tokens, init=init, seed=seed
    )
    if loaded.quantised is None:
        wrapped.to(place)
    elif not peft_info:
        raise UserError(
            f"the base is quantised ({loaded.quantised}): its weights have no gradient, so only an adapter's curvature "
            f"can be measured; choose --peft lora, or load the unquantised model"
        )
    room = _room(loaded, int(peft_info.get("virtual_tokens", 0)), max_length)
    encoder = Encoder(loaded.tokenizer, loaded.kind, room, seed, _decoder_start(loaded))
    encoded, used = encode(source, records, encoder, rows, seed)
    info = _info(loaded, source, objective, options) | _measured(encoder, encoded, used, len(options))
    info["rows_available"] = None if source.running else len(records)
    task = Task(
        model=wrapped,
        objective=objective,
        rows=encoded,
        tokenizer=loaded.tokenizer,
        is_peft=adapters.is_peft,
        peft_info=peft_info,
        info=info,
        splits=Splits(source, encoder, seed),
        kind=loaded.kind,
        base=loaded.quantised is None,
        notes=_notes(loaded, info),
    )
    try_out(task, peft)
    return task


def _given(model: nn.Module, tokenizer: Any, head: str) -> Loaded:
    if tokenizer is None:
        raise UserError("a model object needs its tokenizer: load_task(model, data, tokenizer=...)")
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    name = type(inner).__name__
    if head == "auto":
        head = kind_of(inner.config, name)
    return prepare(model, tokenizer, head, name)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"--dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    return DTYPES[dtype]


def _device_of(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"the device {device} cannot be used here ({str(error).splitlines()[0]}): try --device cpu"
        ) from None
    return place


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _room(loaded: Loaded, virtual: int, max_length: int | None) -> int:
    """Tokens a row may have: what was asked, at most the context less the virtual tokens."""
    wanted = MAX_LENGTH if max_length is None else max_length
    room = wanted if loaded.context is None else min(wanted, loaded.context - virtual)
    if room < 2:
        raise UserError(
            f"the context is too short: {loaded.context} positions less {virtual} virtual tokens, and "
            f"--max-length {wanted}, "
            f"leave {room} tokens a row where 2 are needed"
        )
    return room


def _decoder_start(loaded: Loaded) -> int | None:
    start = getattr(getattr(loaded.model, "config", None), "decoder_start_token_id", None)
    if start is None and loaded.kind == "seq2seq":
        start = loaded.tokenizer.bos_token_id
    return loaded.tokenizer.pad_token_id if start is None else start


def _objective(loaded: Loaded, loss: str, source: Source, options: Sequence[str]) -> TokenLoss | ClassLoss:
    if loaded.kind == "classification":
        if len(options) < 2:
            raise UserError(
                f"a classifier needs labelled data, and {source.name} is plain text: pass a labelled task or --head masked"
            )
        return ClassLoss()
    if loss == "labels":
        if len(options) < 2:
            raise UserError(
                f"--loss labels needs label words to choose from, and {source.name} has none: use --loss vocabulary"
            )
        return LabelLoss()
    return TokenLoss(per_row=len(options) > 1)


def _info(loaded: Loaded, source: Source, objective: TokenLoss | ClassLoss, options: Sequence[str]) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "model_sha256": loaded.sha256,
        "kind": loaded.kind,
        "context": loaded.context,
        "padding_idx_cleared": loaded.cleared_padding,
        "quantised": loaded.quantised,
        "base_curvature": loaded.quantised is None,
        "data": source.name,
        "loss": objective.name,
        "loss_mean_over": "rows" if objective.per_row else "tokens",
        "labels": [o.strip() for o in source.labels or options] if len(options) > 1 else None,
    }


def _measured(encoder: Encoder, rows: Sequence[Row], records: Sequence[Any], options: int) -> dict[str, Any]:
    """What is known about the rows that are measured; the hash is of the raw records, whatever tokenizer reads them."""
    text = json.dumps([dict(r) for r in records], sort_keys=True, default=str)
    majority = max(Counter(r["label"] for r in rows).values())
    return {
        "data_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "rows": len(rows),
        "tokens": sum(length(r) for r in rows),
        "max_length": encoder.max_length,
        "truncated": encoder.counts["truncated"],
        "skipped": encoder.counts["skipped"],
        "floor": majority / len(rows) if options > 1 else None,
    }


def _notes(loaded: Loaded, info: dict[str, Any]) -> list[str]:
    notes = list(loaded.notes)
    if loaded.cleared_padding:
        notes.append(f"padding_idx cleared for the measurement in {', '.join(loaded.cleared_padding)}")
    if loaded.quantised is not None:
        notes.append(
            f"the base is quantised ({loaded.quantised}): base curvature is refused, the adapter's alone is measured"
        )
    if info["truncated"]:
        notes.append(
            f"{info['truncated']} of {info['rows']} rows were longer than {info['max_length']} tokens and were cut"
        )
    if info["skipped"]:
        notes.append(f"{info['skipped']} rows of fewer than 2 tokens were left out")
    return notes
