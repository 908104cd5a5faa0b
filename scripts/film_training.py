"""What the scripts share that train on the film snippets: the text, rows of tokens, losses, and the training loop."""

import gzip
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy

DATA = Path(__file__).parents[1] / "probes" / "data"
LENGTH = 128  # tokens of a row, and the models' context
PROMPT, ANSWERS, PROMPTED = " It was", (" terrible", " great"), 0.25


def snippets(split: str) -> list[dict]:
    """The rows of the embedded sentiment task: text, label, rating."""
    with gzip.open(DATA / "sentiment" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def film(split: str) -> list[str]:
    return [row["text"] for row in snippets(split)]


def packed(documents: list[list[int]], endings: list[list[int]], rng: random.Random) -> list[list[int]]:
    """Rows of exactly LENGTH + 1 tokens, documents in a fresh order; each document starts with the BOS token.

    endings  token lists, one of which follows a document with probability PROMPTED; drawn anew at every call.
    """
    order = documents[:]
    rng.shuffle(order)
    stream: list[int] = []
    for document in order:
        stream += document
        if endings and rng.random() < PROMPTED:
            stream += rng.choice(endings)
    offset = rng.randrange(LENGTH)
    return [stream[i : i + LENGTH + 1] for i in range(offset, len(stream) - LENGTH, LENGTH)]


class Pool:
    """Rows of one text, packed anew whenever they are used up."""

    def __init__(self, documents: list[list[int]], endings: list[list[int]], rng: random.Random) -> None:
        self.documents, self.endings, self.rng = documents, endings, rng
        self.rows: list[list[int]] = []

    def row(self) -> list[int]:
        if not self.rows:
            self.rows = packed(self.documents, self.endings, self.rng)
            self.rng.shuffle(self.rows)
        return self.rows.pop()


def next_token_loss(model: Module, rows: list[list[int]]) -> Tensor:
    """Mean cross-entropy of rows of LENGTH + 1 tokens, the first of which is not predicted."""
    ids = torch.tensor(rows)
    return cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())


def cosine(warmup: int, steps: int) -> Callable[[int], float]:
    """Share of the learning rate at step t: a linear start, then half a cosine down to 2 %."""
    return lambda t: min((t + 1) / warmup, 0.02 + 0.98 * (1 + math.cos(math.pi * t / steps)) / 2)


def descend(
    model: Module,
    optimizer: torch.optim.Optimizer,
    share: Callable[[int], float],
    steps: int,
    loss: Callable[[], Tensor],
    clip: float | None = None,
) -> Iterator[tuple[int, float]]:
    """The training loop: (number of the step from 1, loss of its batch) after every step; ``loss`` draws a batch at each call.

    share  of the learning rate at step t = 0, 1, ...; clip: largest norm of the whole gradient.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    for step in range(1, steps + 1):
        value = loss()
        value.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step, value.item()


def loss_of(model: Module, documents: list[list[int]], pad: int) -> float:
    """Mean nats a token over whole documents, each from its own BOS on (the BOS itself is never predicted)."""
    model.eval()
    total, count = 0.0, 0
    documents = sorted(documents, key=len)
    with torch.no_grad():
        for i in range(0, len(documents), 64):
            rows = [torch.tensor(d[: LENGTH + 1]) for d in documents[i : i + 64]]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
            logits = model(ids[:, :-1], attention_mask=(ids[:, :-1] != pad).long()).logits
            target = ids[:, 1:].masked_fill(ids[:, 1:] == pad, -100)
            total += cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
            count += int((target != -100).sum())
    model.train()
    return total / count


def unigram_loss(train: list[list[int]], held_out: list[list[int]], vocabulary: int) -> float:
    """Nats a token of the best context-free model: train frequencies with one added to every count."""
    counts = Counter(token for d in train for token in d[1:])
    total = sum(counts.values()) + vocabulary
    tokens = [token for d in held_out for token in d[1:]]
    return -sum(math.log((counts[token] + 1) / total) for token in tokens) / len(tokens)
