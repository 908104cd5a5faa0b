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
from probes.splits import Splits, chosen, encode, split_records

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
    notes: list[str] = field(default_factory=list)

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows -> one batch on the model's device."""
        return collate(rows, self.tokenizer.pad_token_id, isinstance(self.objective, LabelLoss), _device(self.model))

    def batches(self, size: int, rows: Sequence[Row] | None = None) -> list[dict[str, Tensor]]:
        """``rows`` (default: the task's) in micro-batches of at most ``size``."""
        rows = self.rows if rows is None else rows
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
        revision=None,
        trust_remote_code=trust_remote_code,
    )
    records = chosen(source, rows, seed)
    first = source.render(records[0])
    classes = len(source.labels) or len(first.options) or None
    if isinstance(model, nn.Module):
        loaded = _given(model, tokenizer, head)
    else:
        loaded = load_model(
            model,
            labelled=len(first.options) > 1,
            num_labels=classes,
            head=head,
            dtype=wide,
            seed=seed,
            revision=revision,
            trust_remote_code=trust_remote_code,
            cache=Path(cache) if cache else None,
        )
    if loaded.kind == "classification" and len(first.options) < 2:
        raise UserError(
            f"a classifier needs labelled data, and {source.name} is plain text: pass a labelled task or --head masked"
        )
    wrapped, peft_info = adapters.attach(
        loaded, peft, rank=rank, alpha=alpha, targets=targets, virtual_tokens=virtual_tokens, init=init, seed=seed
    )
    base = loaded.quantised is None
    if not base and not peft_info:
        raise UserError(
            f"the base is quantised ({loaded.quantised}): its weights have no gradient, so only an adapter's "
            f"curvature can be measured; "
            f"choose --peft lora, or load the unquantised model"
        )
    if base:
        wrapped.to(place)
    room = _room(loaded, adapters.virtual_tokens(peft_info), max_length)
    start = getattr(getattr(loaded.model, "config", None), "decoder_start_token_id", None)
    if loaded.kind == "seq2seq" and start is None:
        start = (
            loaded.tokenizer.bos_token_id
            if loaded.tokenizer.bos_token_id is not None
            else loaded.tokenizer.pad_token_id
        )
    encoder = Encoder(loaded.tokenizer, loaded.kind, room, seed, start)
    encoded = encode(source, records, encoder, rows, seed)
    objective = _objective(loaded.kind, loss, source, first.options)
    notes = list(loaded.notes)
    if loaded.cleared_padding:
        notes.append(f"padding_idx cleared for the measurement in {', '.join(loaded.cleared_padding)}")
    if not base:
        notes.append(
            f"the base is quantised ({loaded.quantised}): base curvature is refused, the adapter's alone is measured"
        )
    if encoder.counts["truncated"]:
        notes.append(
            f"{encoder.counts['truncated']} of {len(encoded)} rows were longer than {room} tokens and were cut"
        )
    task = Task(
        wrapped,
        objective,
        encoded,
        loaded.tokenizer,
        adapters.is_peft,
        peft_info,
        _info(loaded, source, records, encoded, encoder, objective, first.options, base, seed),
        Splits(source, encoder, seed),
        loaded.kind,
        base,
        notes,
    )
    _check_forward(task, peft)
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


def _objective(kind: str, loss: str, source: Source, options: Sequence[str]) -> TokenLoss | ClassLoss:
    if kind == "classification":
        return ClassLoss()
    if loss == "labels":
        if len(options) < 2:
            raise UserError(
                f"--loss labels needs label words to choose from, and {source.name} has none: use --loss vocabulary"
            )
        return LabelLoss()
    return TokenLoss(per_row=len(options) > 1)


def _info(
    loaded: Loaded,
    source: Source,
    records: Sequence[Any],
    rows: Sequence[Row],
    encoder: Encoder,
    objective: TokenLoss | ClassLoss,
    options: Sequence[str],
    base: bool,
    seed: int,
) -> dict[str, Any]:
    labelled = len(options) > 1
    counts = Counter(r["label"] for r in rows)
    # The raw rows, so that the hash does not depend on the tokenizer that reads them.
    text = json.dumps([dict(r) for r in records], sort_keys=True, default=str)
    return {
        "model": loaded.name,
        "model_sha256": loaded.sha256,
        "kind": loaded.kind,
        "context": loaded.context,
        "max_length": encoder.max_length,
        "padding_idx_cleared": loaded.cleared_padding,
        "quantised": loaded.quantised,
        "base_curvature": base,
        "data": source.name,
        "data_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "rows": len(rows),
        "rows_available": None if source.running else len(split_records(source, seed)["train"]),
        "tokens": sum(_length(r) for r in rows),
        "truncated": encoder.counts["truncated"],
        "loss": objective.name,
        "loss_mean_over": "rows" if objective.per_row else "tokens",
        "labels": [o.strip() for o in source.labels or options] if labelled else None,
        "floor": max(counts.values()) / len(rows) if labelled else None,
    }


def _check_forward(task: Task, peft: str) -> None:
    """A small forward and backward pass: does the pair of model and adapter run, does the adapter take part, and are
    the logits of the needed positions those of the full ones? Two short rows of different length show padding too."""
    by_length = sorted(task.rows, key=_length)
    other = next((r for r in by_length if _length(r) > _length(by_length[0])), by_length[-1])
    batch = task.collate([by_length[0], other])
    objective = task.objective
    try:
        gradient = _adapter_gradient(task, batch)
        if not isinstance(objective, ClassLoss) and not _selection_is_exact(task.model, objective, batch):
            objective.select = False
            task.notes.append("this output layer needs all positions: the logits of whole rows are computed")
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, NotImplementedError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:240]
        raise UserError(
            f"{task.info['model']} does not run with --peft {peft} ({type(error).__name__}: {reason}): "
            f"choose another of {', '.join(adapters.TYPES)}"
        ) from error
    if gradient == 0.0:
        raise UserError(
            f"the loss of {task.info['model']} does not depend on its {task.peft_info['type']} adapter (its "
            f"gradient is zero): "
            f"the architecture ignores it, choose another of {', '.join(adapters.TYPES)}"
        )


def _length(row: Row) -> int:
    return len(row["options"][_right(row)]["input_ids"])


def _right(row: Row) -> int:
    return row["label"] if len(row["options"]) > 1 else 0


def _adapter_gradient(task: Task, batch: dict[str, Tensor]) -> float | None:
    """Largest entry of the adapter's gradient on one batch; None without an adapter."""
    found = [p for n, p in task.model.named_parameters() if p.is_floating_point() and task.is_peft(n)]
    if not found:
        return None
    before = [p.requires_grad for p in task.model.parameters()]
    try:
        task.model.requires_grad_(False)
        for p in found:
            p.requires_grad_(True)
        full = task.objective if isinstance(task.objective, ClassLoss) else _full(task.objective)
        loss = full.loss(full.forward(task.model, batch), batch)
        grads = torch.autograd.grad(loss, found, allow_unused=True) if loss.requires_grad else []
    finally:
        for p, flag in zip(task.model.parameters(), before, strict=True):
            p.requires_grad_(flag)
    return max((float(g.abs().max()) for g in grads if g is not None), default=0.0)


@torch.no_grad()
def _selection_is_exact(model: nn.Module, objective: TokenLoss, batch: dict[str, Tensor]) -> bool:
    z = _full(objective).forward(model, batch).double()
    try:
        few = objective.forward(model, batch).double()
    except Exception:  # an output layer that wants its input whole
        return False
    eps = torch.finfo(next(model.parameters()).dtype).eps
    return few.shape == z.shape and float((few - z).abs().max()) <= 100 * eps * float(z.abs().max())


def _full(objective: TokenLoss) -> TokenLoss:
    return type(objective)(per_row=objective.per_row, select=False)
