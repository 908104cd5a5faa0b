"""Tiny randomly initialised models of every architecture the toolkit promises, saved with a tokenizer as a folder
that `load_task` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from hybridtheory.blocks import partition
from hybridtheory.oracle import Oracle

if TYPE_CHECKING:
    from probes.tasks import Task

SPECIAL = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
V = 304  # 256 bytes, five special tokens, and merges that make one token of " great" and " terrible"
H, HEADS, LAYERS = 16, 2, 2
TEXT = ["it was great", "it was terrible", "the film was great", "the story was terrible"] * 4


def tokenizer(kind: str) -> tf.PreTrainedTokenizerFast:
    """Byte-level BPE; a causal one adds nothing, a masked one wraps in <s> </s>, a seq2seq one ends in </s>."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=V, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(TEXT, trainer)
    if kind in ("masked", "classification"):
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    elif kind == "seq2seq":
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        unk_token="<unk>",
    )


_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": V}
_LLAMA = {
    "hidden_size": H, "num_attention_heads": HEADS, "num_key_value_heads": 1, "num_hidden_layers": LAYERS,
    "intermediate_size": 32, "max_position_embeddings": 64, "attention_dropout": 0.1, **_IDS,
}  # fmt: skip
_BERT = {
    "hidden_size": H, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "intermediate_size": 32,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, **_IDS,
}  # fmt: skip

CONFIGS: dict[str, tuple[str, Any]] = {
    "gpt2": ("causal", lambda: tf.GPT2Config(n_embd=H, n_head=HEADS, n_layer=LAYERS, n_positions=64, **_IDS)),
    "gpt_neox": ("causal", lambda: tf.GPTNeoXConfig(
        hidden_size=H, num_attention_heads=HEADS, num_hidden_layers=LAYERS, intermediate_size=32,
        max_position_embeddings=64, hidden_dropout=0.1, attention_dropout=0.1, **_IDS)),
    "opt": ("causal", lambda: tf.OPTConfig(
        hidden_size=H, num_attention_heads=HEADS, num_hidden_layers=LAYERS, ffn_dim=32, word_embed_proj_dim=H,
        max_position_embeddings=64, dropout=0.1, **_IDS)),
    "bloom": ("causal", lambda: tf.BloomConfig(
        hidden_size=H, n_head=HEADS, n_layer=LAYERS, hidden_dropout=0.1, attention_dropout=0.1, **_IDS)),
    "llama": ("causal", lambda: tf.LlamaConfig(**_LLAMA)),
    "llama_tied": ("causal", lambda: tf.LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "mistral": ("causal", lambda: tf.MistralConfig(**_LLAMA, head_dim=8)),
    "qwen2": ("causal", lambda: tf.Qwen2Config(**_LLAMA)),
    "qwen3": ("causal", lambda: tf.Qwen3Config(**_LLAMA, head_dim=8)),
    "gemma": ("causal", lambda: tf.GemmaConfig(**_LLAMA, head_dim=8)),
    "phi": ("causal", lambda: tf.PhiConfig(**{**_LLAMA, "num_key_value_heads": 2}, resid_pdrop=0.1, embd_pdrop=0.1)),
    "falcon": ("causal", lambda: tf.FalconConfig(
        hidden_size=H, num_attention_heads=HEADS, num_hidden_layers=LAYERS, hidden_dropout=0.1, attention_dropout=0.1,
        **_IDS)),
    "mixtral": ("causal", lambda: tf.MixtralConfig(**_LLAMA, head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
    "bert": ("masked", lambda: tf.BertConfig(**_BERT)),
    "roberta": ("masked", lambda: tf.RobertaConfig(**_BERT)),
    "distilbert": ("masked", lambda: tf.DistilBertConfig(
        dim=H, n_heads=HEADS, n_layers=LAYERS, hidden_dim=32, max_position_embeddings=64, dropout=0.1,
        attention_dropout=0.1, **_IDS)),
    "albert": ("masked", lambda: tf.AlbertConfig(**_BERT, embedding_size=8)),
    "t5": ("seq2seq", lambda: tf.T5Config(
        d_model=H, d_kv=8, d_ff=32, num_layers=LAYERS, num_heads=HEADS, dropout_rate=0.1, decoder_start_token_id=0,
        **_IDS)),
    "bart": ("seq2seq", lambda: tf.BartConfig(
        d_model=H, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        dropout=0.1, decoder_start_token_id=2, forced_eos_token_id=None, **_IDS)),
}  # fmt: skip
AUTO = {
    "causal": tf.AutoModelForCausalLM,
    "masked": tf.AutoModelForMaskedLM,
    "seq2seq": tf.AutoModelForSeq2SeqLM,
    "classification": tf.AutoModelForSequenceClassification,
}


FILMS = ["the film was a warm story", "it was dull", "a terrible plot, and no good actor", "great", "it was sharp"]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """Records as a JSON-lines file."""
    path.write_text("\n".join(json.dumps(r) for r in records))
    return path


def f(task: Task, size: int = 3) -> float:
    """The task's loss, in batches of ``size`` rows."""
    return Oracle(task.model, task.objective, task.batches(size), partition(task.model, peft=task.is_peft)).value()


def save(name: str, folder: Path, head: str | None = None, **changes: Any) -> Path:
    """Write the tiny model ``name`` to ``folder``, its configuration changed by ``changes``.

    Weights are 4 times the usual, so that curvature is not all rounding; T5's are large as they are.
    """
    kind, config = CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = config()
        for key, value in changes.items():
            setattr(settings, key, value)
        model = AUTO[head or kind].from_config(settings)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and name != "t5":
                    parameter.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer(head or kind).save_pretrained(folder)
    return folder
