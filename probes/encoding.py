"""Examples become token rows and rows become batches.

A row is {"options": [{"input_ids", "targets", ...}, ...], "label": int}: one token sequence per option (plain text
has one), of which a batch takes the right one (loss over the vocabulary) or all (loss over the label words).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hybridtheory.errors import UserError
from probes.objectives import IGNORE
from probes.prompts import Example, Prompt

Row = dict[str, Any]
MASKED_SHARE = 0.15  # BERT's (Devlin et al. 2019, section 3.1), with its 80/10/10 rule


@dataclass
class Encoder:
    """Turns `Example`s into rows for one model.

    kind         "causal", "masked", "seq2seq" or "classification".
    max_length   tokens a sequence may have (the model's context less its virtual tokens, or the user's smaller number).
    start        first token of a decoder (seq2seq).
    counts       "truncated" and "skipped" rows so far.
    """

    tokenizer: Any
    kind: str
    max_length: int
    seed: int = 0
    start: int | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        # The options of a row ask for the same prompt in turn. verbose=False: the tokenizer's own warning about long texts
        # is about rows that are cut below.
        self._ids = lru_cache(maxsize=4)(
            lambda text: self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        )
        # What the tokenizer puts around a text: [BOS] for Llama, [CLS] [SEP] for BERT, [EOS] for T5, nothing for GPT-2.
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        at = next((i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain), 0)
        self.before, self.after = full[:at], full[at + len(plain) :]

    def ids(self, text: str) -> list[int]:
        """Tokens of a bare text, without the special ones around it."""
        return self._ids(text) if text else []

    def running(self, text: str) -> list[Row]:
        """One long text cut into rows of ``max_length`` tokens; nothing is thrown away but a last piece of fewer than
        2 tokens."""
        room = self.max_length - self._room()
        ids = self.ids(text)
        pieces = [ids[i : i + room] for i in range(0, len(ids), room)]
        return [self._plain(piece) for piece in pieces if len(piece) >= 2]

    def __call__(self, example: Example) -> Row | None:
        """One row; None for a plain text of fewer than two tokens, in which nothing can be predicted."""
        if self.kind == "classification":
            return self._classified(example)
        if not example.options:
            ids = self.ids(example.prompts[0].passage)
            room = self.max_length - self._room()
            if len(ids) > room:
                self.counts["truncated"] += 1
            if len(ids) < 2:
                self.counts["skipped"] += 1
                return None
            return self._plain(ids[:room])
        prompts = example.prompts * (len(example.options) if len(example.prompts) == 1 else 1)
        return {"options": self._fitted(prompts, example.options), "label": example.label}

    # --- one sequence -------------------------------------------------------------------------------------------------

    def _room(self) -> int:
        """Positions that a plain text cannot have; a causal model's last token is predicted and never read."""
        return len(self.before) - 1 if self.kind == "causal" else len(self.before) + len(self.after)

    def _plain(self, ids: list[int]) -> Row:
        if self.kind == "causal":
            ids = self.before + ids
            option = {"input_ids": ids[:-1], "targets": ids[1:]}
        elif self.kind == "masked":
            masked, targets = mask_tokens(ids, self.tokenizer.mask_token_id, len(self.tokenizer), self.seed)
            option = self._wrap(masked, targets)
        else:  # seq2seq: the first half is read, the second half is written
            half = len(ids) // 2
            option = self._written(ids[:half], ids[half:])
        return {"options": [option], "label": 0}

    def _continued(self, prompt: Prompt, option: str) -> dict[str, list[int]]:
        asked = prompt.before + prompt.passage + prompt.after
        head, both = self.ids(asked), self.ids(asked + option)
        # Where the tokenizer merges across the border the option is tokenised alone: the prompt then is the same for
        # all options.
        tail = both[len(head) :] if both[: len(head)] == head and len(both) > len(head) else self.ids(option)
        if not tail:
            raise UserError(f"the answer {option!r} has no token in this tokenizer: choose other label words")
        if self.kind == "causal":
            ids = self.before + head + tail
            first = len(ids) - len(tail)
            if first == 0:
                raise UserError("a prompt without a token cannot be continued: give the prompt some text")
            return {"input_ids": ids[:-1], "targets": [IGNORE] * (first - 1) + tail}
        if self.kind == "masked":
            mask = self.tokenizer.mask_token_id
            return self._wrap(head + [mask] * len(tail), [IGNORE] * len(head) + tail)
        return self._written(head, tail)

    def _wrap(self, ids: list[int], targets: list[int]) -> dict[str, list[int]]:
        return {
            "input_ids": self.before + ids + self.after,
            "targets": [IGNORE] * len(self.before) + targets + [IGNORE] * len(self.after),
        }

    def _written(self, read: list[int], written: list[int]) -> dict[str, list[int]]:
        assert self.start is not None
        return {
            "input_ids": self.before + read + self.after,
            "decoder_input_ids": [self.start, *written[:-1]],
            "targets": written,
        }

    def _classified(self, example: Example) -> Row:
        if not example.text:
            raise UserError(
                "this task compares continuations and has no form for a classification head: use a language model"
            )
        whole = self.tokenizer(*example.text, verbose=False)["input_ids"]
        self.counts["truncated"] += len(whole) > self.max_length
        out = self.tokenizer(*example.text, truncation=True, max_length=self.max_length, verbose=False)
        option = {k: list(out[k]) for k in ("input_ids", "token_type_ids") if k in out}
        return {"options": [option], "label": example.label}

    # --- long texts ---------------------------------------------------------------------------------------------------

    def _fitted(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[dict[str, list[int]]]:
        """Every option's sequence, the passage cut (never the question, never the answer) until the longest one fits; the
        same cut for all options."""
        sequences = [self._continued(p, o) for p, o in zip(prompts, options, strict=True)]
        over = self._over(sequences)
        if over <= 0:
            return sequences
        self.counts["truncated"] += 1
        keep = min(len(self.ids(p.passage)) for p in prompts)
        while over > 0:
            keep -= over
            if keep <= 0:
                bare = [
                    self._continued(Prompt(p.before, "", p.after), o) for p, o in zip(prompts, options, strict=True)
                ]
                raise UserError(
                    f"the context is too short: {self.max_length} tokens are left for a row and the prompt alone, "
                    f"without its passage, needs {self._over(bare) + self.max_length}: raise --max-length or use fewer "
                    f"virtual tokens"
                )
            cut = [self.tokenizer.decode(self.ids(p.passage)[:keep]).strip() for p in prompts]
            shorter = [Prompt(p.before, c, p.after) for p, c in zip(prompts, cut, strict=True)]
            sequences = [self._continued(p, o) for p, o in zip(shorter, options, strict=True)]
            over = self._over(sequences)
        return sequences

    def _over(self, sequences: Sequence[dict[str, list[int]]]) -> int:
        """Tokens beyond the context in the longest sequence."""
        return max(len(s["input_ids"]) for s in sequences) - self.max_length


def mask_tokens(ids: list[int], mask: int, vocabulary: int, seed: int) -> tuple[list[int], list[int]]:
    """Masked input and targets, a pure function of (seed, tokens): 15 % are targets, of which 80 % masked, 10 %
    random, 10 % kept."""
    digest = hashlib.sha256(repr((seed, ids)).encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    order = torch.randperm(len(ids), generator=draw).tolist()
    picked = order[: max(1, round(MASKED_SHARE * len(ids)))]
    coin = torch.rand(len(picked), generator=draw).tolist()
    other = torch.randint(vocabulary, (len(picked),), generator=draw).tolist()
    masked, targets = list(ids), [IGNORE] * len(ids)
    for i, c, o in zip(picked, coin, other, strict=True):
        targets[i] = ids[i]
        masked[i] = mask if c < 0.8 else o if c < 0.9 else ids[i]
    return masked, targets


def single_token_options(row: Row) -> bool:
    """Whether all options are one token after the same prompt: then one sequence serves them all."""
    options = row["options"]
    return len(options) > 1 and all(
        sum(t != IGNORE for t in o["targets"]) == 1
        and [t == IGNORE for t in o["targets"]] == [t == IGNORE for t in options[0]["targets"]]
        and _before_target(o) == _before_target(options[0])
        for o in options
    )


def _before_target(option: dict[str, list[int]]) -> list[Any]:
    at = next(i for i, t in enumerate(option["targets"]) if t != IGNORE)
    written = option.get("decoder_input_ids")
    return [option["input_ids"][: at + 1], None] if written is None else [option["input_ids"], written[: at + 1]]


def collate(rows: Sequence[Row], pad: int, all_options: bool, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Rows -> batch (see `probes.objectives`), padded on the right to the longest sequence."""
    label = torch.tensor([r["label"] for r in rows], device=device)
    has_targets = "targets" in rows[0]["options"][0]
    if not all_options or not has_targets:
        right = [r["options"][r["label"] if has_targets else 0] for r in rows]
        return {**_pad(right, pad, device), "label": label}
    if all(single_token_options(r) for r in rows):
        batch = _pad([r["options"][r["label"]] for r in rows], pad, device)
        words = [[next(t for t in o["targets"] if t != IGNORE) for o in r["options"]] for r in rows]
        return {**batch, "label": label, "candidates": torch.tensor(words, device=device)}
    flat = _pad([o for r in rows for o in r["options"]], pad, device)
    return {**{k: v.view(len(rows), -1, v.shape[-1]) for k, v in flat.items()}, "label": label}


def _pad(options: Sequence[dict[str, list[int]]], pad: int, device: torch.device | str) -> dict[str, Tensor]:
    fill = {"input_ids": pad, "decoder_input_ids": pad, "targets": IGNORE, "token_type_ids": 0}

    def stack(key: str) -> Tensor:
        width = max(len(o[key]) for o in options)
        return torch.tensor([o[key] + [fill[key]] * (width - len(o[key])) for o in options], device=device)

    def real(key: str) -> Tensor:
        width = max(len(o[key]) for o in options)
        return torch.tensor([[1] * len(o[key]) + [0] * (width - len(o[key])) for o in options], device=device)

    batch = {k: stack(k) for k in options[0]}
    batch["attention_mask"] = real("input_ids")
    if "decoder_input_ids" in batch:
        batch["decoder_attention_mask"] = real("decoder_input_ids")
    return batch
