"""MODEL becomes a model in evaluation mode, with its tokenizer and what has to be known about it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hybridtheory.blocks import check_places
from hybridtheory.errors import UserError
from hybridtheory.shards import whole
from probes.places import PACKAGED, Place, find, quiet
from probes.sources import hub_reachable

KINDS = {
    "causal": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
    "classification": transformers.AutoModelForSequenceClassification,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
}
_ARCHITECTURES = (
    (re.compile(r"ForSequenceClassification$"), "classification"),
    (re.compile(r"(ForConditionalGeneration|Seq2SeqLM)$"), "seq2seq"),
    (re.compile(r"(ForMaskedLM|ForPreTraining)$"), "masked"),
    (re.compile(r"(ForCausalLM|LMHeadModel)$"), "causal"),
)


@dataclass
class Loaded:
    """A model before any adapter is attached; ``notes`` are sentences for the user."""

    model: nn.Module
    tokenizer: Any
    kind: str
    name: str
    sha256: str
    context: int | None
    quantised: str | None = None
    adapter: Path | None = None
    cleared_padding: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_model(
    model: str | Path | None,
    *,
    labelled: bool,
    num_labels: int | None,
    head: str = "auto",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    cache: Path | None = None,
) -> Loaded:
    """Load ``model``: None (the embedded one), "smollm2" or "minilm" (installed packages), a folder, a GGUF file, or
    a hub name.

    head   which auto class: "auto" reads it off the configuration; a bare encoder becomes a classifier for labelled
           data, a masked LM otherwise.
    seed   initialises a head that the checkpoint lacks; the caller's global generator is left as it was.
    allow_pickle  reads weights that are only there as pickle (through torch's restricted unpickler); refused otherwise.
    cache  where a converted GGUF file is kept (default: $XDG_CACHE_HOME/hybridtheory).
    """
    place = find(model, cache)
    name, source = place.name, place.source
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not place.local:
        options |= {"revision": revision, "local_files_only": not hub_reachable()}
    notes = list(place.notes)
    with quiet(), seeded(seed):
        try:
            config = transformers.AutoConfig.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            raise UserError(_cannot_load(place, options, error)) from None
        kind = kind_of(config, labelled=labelled) if head == "auto" else head
        if kind not in KINDS:
            raise UserError(f"head is auto, {', '.join(KINDS)}, not {kind!r}")
        _no_dropout(config)
        if kind == "classification" and num_labels is not None:
            config.num_labels = _labels(config, num_labels, name)
        if hasattr(config, "num_local_experts") or hasattr(config, "num_experts"):
            options["experts_implementation"] = "eager"  # the grouped kernels of mixtures have no second derivative
        try:
            loaded, report = KINDS[kind].from_pretrained(
                source,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=None if allow_pickle else True,
                **options,
            )
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise UserError(_cannot_load(place, options, error, allow_pickle)) from None
        try:
            options.pop("experts_implementation", None)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise UserError(
                f"the model {name} comes without a tokenizer that can be read ({_line(error)}): save one beside it"
            ) from None
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        notes.append(f"the checkpoint of {name} lacks {shown}: initialised at random from seed {seed}")
    found = prepare(loaded, tokenizer, kind, name)
    found.adapter, found.notes = place.adapter, notes
    return found


def prepare(model: nn.Module, tokenizer: Any, kind: str, name: str) -> Loaded:
    """Evaluation mode, no dropout, no ``padding_idx``, a padding token; hash and context length read off."""
    check_places(model)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    cleared = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            # With it autograd leaves out the pad token's own gradient where that token is real: no longer the loss's
            # gradient.
            module.padding_idx = None
            cleared.append(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    config: Any = getattr(model, "config", None)
    if kind == "classification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id  # decoders look for the last token that is not padding
    if kind == "masked" and tokenizer.mask_token_id is None:
        raise UserError(
            f"the tokenizer of {name} has no mask token, which a masked language model needs: set one and save it"
        )
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        kind=kind,
        name=name,
        sha256=state_sha256(model),
        context=_context(config, tokenizer),
        quantised=_quantisation(config),
        cleared_padding=cleared,
    )


def state_sha256(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of the state dict, however files hold it; about 1 s per GB."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(whole(value.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generators start from ``seed`` inside and are the caller's again afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def kind_of(config: Any, *architectures: str, labelled: bool = False) -> str:
    """Which of `KINDS` a configuration (or a class name) describes."""
    for architecture in architectures or config.architectures or []:
        for pattern, kind in _ARCHITECTURES:
            if pattern.search(architecture):
                return kind
    if config.is_encoder_decoder:
        return "seq2seq"
    known = transformers.models.auto.modeling_auto
    if config.model_type in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "classification" if labelled else "masked"
    return "causal"


def _labels(config: Any, wanted: int, name: str) -> int:
    trained = [a for a in config.architectures or [] if a.endswith("ForSequenceClassification")]
    if trained and config.num_labels != wanted:
        raise UserError(
            f"the classifier {name} has {config.num_labels} classes and the data has {wanted} labels: they must agree"
        )
    return wanted


def _no_dropout(config: Any) -> None:
    """Every dropout rate of the configuration to zero: a loss that is drawn anew at each call has no curvature."""
    for part in (config, *(v for v in vars(config).values() if isinstance(v, transformers.PretrainedConfig))):
        for key, value in list(vars(part).items()):
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)


def _quantisation(config: Any) -> str | None:
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return None
    method = (
        quantisation.get("quant_method")
        if isinstance(quantisation, dict)
        else getattr(quantisation, "quant_method", None)
    )
    return str(getattr(method, "value", method) or "quantised")


def _context(config: Any, tokenizer: Any) -> int | None:
    """Tokens that a sequence may have; None where the positions are relative."""
    found = [getattr(config, k, None) for k in ("max_position_embeddings", "n_positions", "max_seq_len")]
    limits = [int(v) for v in found if isinstance(v, int) and v > 0]
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet", "data2vec-text"):
        limits = [v - (config.pad_token_id or 0) - 1 for v in limits]  # positions are numbered from pad_token_id + 1
    if tokenizer.model_max_length and tokenizer.model_max_length < 10**9:
        limits.append(int(tokenizer.model_max_length))
    return min(limits) if limits else None


def _cannot_load(place: Place, options: dict[str, Any], error: BaseException, allow_pickle: bool = True) -> str:
    if "safetensors" in str(error) and not allow_pickle:
        return (
            f"the model {place.name} has no weights as safetensors, and pickled ones can run code: convert them "
            f"(load once where you trust them, then save_pretrained), or pass --allow-pickle"
        )
    if not place.local and options["local_files_only"]:
        return (
            f"the model {place.name} is neither a folder nor in the local cache, and the hub cannot be reached: "
            f"pass a local folder or one of {', '.join(PACKAGED)}"
        )
    remedy = "the folder needs config.json, weights and a tokenizer" if place.local else "check the name and --revision"
    return f"the model {place.name} cannot be loaded ({_line(error)}): {remedy}"


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
