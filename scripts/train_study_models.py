"""Train the two other architectures of the learning-rate study on the film snippets that ship with the package: one core, minutes each.

    python scripts/train_study_models.py            # studies/models/opt-relu and studies/models/llama
    python scripts/train_study_models.py llama      # one of them, to the same bytes

Text: the train split of the embedded sentiment task, with its tokenizer; a quarter of the snippets ends in the task's prompt and a label
word drawn by coin, as for the embedded model (`scripts/train_embedded.py`). Losses are stated; nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import time
from pathlib import Path

import torch
from film_training import (
    ANSWERS,
    DATA,
    LENGTH,
    PROMPT,
    Pool,
    cosine,
    descend,
    film,
    loss_of,
    next_token_loss,
    unigram_loss,
)
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

SEED = 0
LAST = 100  # steps whose batches the training loss at the end is a mean of: one batch says little
CARD = """---
license: apache-2.0
library_name: transformers
---
# {name}: a model of the learning-rate study

{what}, {parameters:,} parameters (float32), trained by hybridtheory (`scripts/train_study_models.py`) in {steps:,} steps on
{tokens:,} tokens of the film snippets' train split with the embedded model's tokenizer. It exists to be measured.

Loss on the film snippets, nats a token: batches of the last {last} steps {batches:.3f}, dev {dev:.3f}, test {test:.3f}; a unigram model on
the same test tokens {unigram:.3f}.

Text licence: the film snippets are MIT, copyright (c) 2014 cjhutto (see `probes/data/sentiment/LICENSE`); the tokenizer is the embedded
model's (see `probes/data/embedded/README.md`). The weights are under Apache-2.0.
"""
WHAT = {
    "opt-relu": "An OPT with ReLU, 4 layers of width 96",
    "llama": "A Llama with SiLU gates and rotary positions, 4 layers of width 96",
}


def fresh(name: str, vocabulary: int, **special: int) -> torch.nn.Module:
    """The model before its first step: a function of its name and `SEED` alone."""
    torch.manual_seed(SEED)
    if name == "opt-relu":
        return OPTForCausalLM(OPTConfig(
            vocab_size=vocabulary, hidden_size=96, word_embed_proj_dim=96, num_hidden_layers=4, ffn_dim=384, num_attention_heads=4,
            max_position_embeddings=LENGTH, activation_function="relu", dropout=0.0, attention_dropout=0.0, **special,
        ))  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True, **special,
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(WHAT)} (default: both)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "studies" / "models")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rows", type=int, default=16, help=f"rows of {LENGTH} tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    if unknown := [n for n in args.names if n not in WHAT]:
        parser.error(f"there is no model {unknown[0]!r}: choose from {', '.join(WHAT)}")
    torch.set_num_threads(1)  # the order of sums, and with it the bits, would depend on their number
    tokenizer = AutoTokenizer.from_pretrained(DATA / "embedded")
    tokens = {split: tokenizer(film(split))["input_ids"] for split in ("train", "dev", "test")}
    answers = [tokenizer(PROMPT + answer, add_special_tokens=False)["input_ids"] for answer in ANSWERS]
    unigram = unigram_loss(tokens["train"], tokens["test"], len(tokenizer))
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name in args.names or WHAT:
        model = fresh(name, len(tokenizer), **special)
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1)
        pool = Pool(tokens["train"], answers, random.Random(SEED))

        def loss(model: torch.nn.Module = model, pool: Pool = pool) -> torch.Tensor:
            return next_token_loss(model, [pool.row() for _ in range(args.rows)])

        start, batches = time.process_time(), []
        for step, batch in descend(model, optimizer, cosine(50, args.steps), args.steps, loss, clip=1.0):
            batches.append(batch)
            if step % 200 == 0:
                minutes = (time.process_time() - start) / 60
                print(f"{name}, step {step}: batch {batch:.3f}, {minutes:.1f} min", flush=True)
        losses = {split: loss_of(model, tokens[split], tokenizer.pad_token_id) for split in ("dev", "test")}
        last = batches[-LAST:]
        folder = args.out / name
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        card = CARD.format(
            name=name, what=WHAT[name], parameters=sum(p.numel() for p in model.parameters()), steps=args.steps,
            tokens=args.steps * args.rows * LENGTH, last=len(last), batches=sum(last) / len(last), unigram=unigram, **losses,
        )  # fmt: skip
        (folder / "README.md").write_text(card, encoding="utf-8")
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        minutes = (time.process_time() - start) / 60
        print(f"{name}: {losses}, unigram {unigram:.3f}, weights {digest[:12]}, {minutes:.1f} min of one core")


if __name__ == "__main__":
    main()
