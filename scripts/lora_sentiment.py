"""Can the embedded model learn the embedded task? LoRA, AdamW, plain torch and peft: test accuracy beside the floor.

    python scripts/lora_sentiment.py            # a few minutes on one core

The label word is the next token after the prompt; the loss is the cross-entropy over the whole vocabulary, and the
prediction is the likelier of the two label words. Learning rate and epochs were chosen on dev; test is scored once.
"""

import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from film_training import ANSWERS, DATA, PROMPT, descend, snippets
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Result:
    """Accuracy and majority floor on the test split, and the distance between them in standard errors of the accuracy."""

    accuracy: float
    floor: float
    rows: int

    @property
    def standard_errors(self) -> float:
        return (self.accuracy - self.floor) / math.sqrt(self.accuracy * (1 - self.accuracy) / self.rows)


class LabelWords:
    """Rows of the task as token ids up to the label word, and the model's logits at that one position."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder)
        self.words = torch.tensor([self.tokenizer(w, add_special_tokens=False)["input_ids"] for w in ANSWERS])[:, 0]
        self.prompt = self.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
        )
        self.model = get_peft_model(base, config).eval()

    def rows(self, split: str) -> list[tuple[list[int], int]]:
        records = snippets(split)
        room = self.tokenizer.model_max_length - len(self.prompt)
        texts = self.tokenizer([r["text"] for r in records])["input_ids"]
        return [(ids[:room] + self.prompt, r["label"]) for ids, r in zip(texts, records)]

    def logits(self, rows: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        """(logits at the label word's position (rows, vocabulary), labels (rows,))."""
        ids = pad_sequence([torch.tensor(r) for r, _ in rows], batch_first=True, padding_value=0)
        last = torch.tensor([len(r) - 1 for r, _ in rows])
        mask = (torch.arange(ids.shape[1]) <= last[:, None]).long()
        gpt2 = self.model.get_base_model()
        hidden = gpt2.transformer(ids, attention_mask=mask).last_hidden_state[torch.arange(len(rows)), last]
        return gpt2.lm_head(hidden), torch.tensor([label for _, label in rows])

    @torch.no_grad()
    def evaluate(self, split: str) -> Result:
        rows = sorted(self.rows(split), key=lambda r: len(r[0]))
        right = positive = 0
        for i in range(0, len(rows), 100):
            logits, labels = self.logits(rows[i : i + 100])
            right += int((logits[:, self.words].argmax(1) == labels).sum())
            positive += int(labels.sum())
        return Result(right / len(rows), max(positive, len(rows) - positive) / len(rows), len(rows))


def train(
    folder: Path = DATA / "embedded", *, lr: float = 3e-3, epochs: float = 1.0, rank: int = 8, seed: int = 0
) -> LabelWords:
    """Batches of 32 from reshuffled epochs, linear decay to zero."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    task = LabelWords(folder, rank)
    everything = task.rows("train")
    optimizer = torch.optim.AdamW([p for p in task.model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    steps = int(epochs * len(everything) / 32)
    order: list[tuple[list[int], int]] = []

    def loss() -> Tensor:
        nonlocal order
        if len(order) < 32:
            order = rng.sample(everything, len(everything))
        batch, order = order[:32], order[32:]
        logits, labels = task.logits(batch)
        return cross_entropy(logits, task.words[labels])

    for _ in descend(task.model, optimizer, lambda t: min((t + 1) / 10, 1 - t / max(steps, 1)), steps, loss):
        pass
    return task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DATA / "embedded")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test", help="dev to choose settings, test to report")
    args = parser.parse_args()
    task = train(args.model, lr=args.lr, epochs=args.epochs, rank=args.rank, seed=args.seed)
    result = task.evaluate(args.split)
    print(
        f"{args.split}: accuracy {result.accuracy:.4f}, majority {result.floor:.4f}, "
        f"{result.standard_errors:.1f} standard errors above it ({result.rows} rows)"
    )


if __name__ == "__main__":
    main()
