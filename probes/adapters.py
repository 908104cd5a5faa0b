"""--peft: attach or recognise an adapter, tell its parameters from the base's by name, and report what it is."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from hybridtheory.errors import UserError
from probes.models import Loaded, seeded

TYPES = ("lora", "ia3", "prefix", "prompt", "none")
_TASKS = {
    "causal": peft.TaskType.CAUSAL_LM,
    "seq2seq": peft.TaskType.SEQ_2_SEQ_LM,
    "classification": peft.TaskType.SEQ_CLS,
    # peft has no masked LM; this wrapper passes the base model's output through
    "masked": peft.TaskType.FEATURE_EXTRACTION,
}
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_KEY_VALUE = re.compile(r"\.(k|v|key|value|k_proj|v_proj|k_lin|v_lin|c_attn|query_key_value|qkv_proj|Wqkv)$")
_FEED_FORWARD_OUT = re.compile(r"\.(fc2|lin2|ffn_output|down_proj|dense_4h_to_h|fc_out|wo|w2|ff_out)$")
_PREFIXES = tuple(sorted(set(PEFT_TYPE_TO_PREFIX_MAPPING.values()) - {""}))


def is_peft(name: str) -> bool:
    """Whether a parameter's name belongs to the adapter, for every peft type, ``modules_to_save`` and trainable
    tokens included."""
    parts = name.split(".")
    return (
        "prompt_encoder" in parts
        or "modules_to_save" in parts
        or "trainable_tokens_delta" in parts
        or any(p.startswith(_PREFIXES) for p in parts)
    )


def attach(
    loaded: Loaded,
    kind_of_peft: str = "lora",
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] | str | None = None,
    virtual_tokens: int = 8,
    init: bool | str = True,
    seed: int = 0,
) -> tuple[nn.Module, dict[str, Any]]:
    """The model with its adapter, and what is known about the adapter ({} without one).

    kind_of_peft    "lora", "ia3", "prefix", "prompt", "none", or a folder that peft's ``save_pretrained`` wrote
                    (safetensors).
    alpha           LoRA's numerator: the update is (alpha / rank) B A; default 2 rank.
    targets         names of the modules to adapt (LoRA, IA3); default: peft's own for the architecture, else all
                    attention projections.
    virtual_tokens  of prompt and prefix tuning.
    init            peft's ``init_lora_weights`` (True: A Kaiming-uniform, B zero; "gaussian", "pissa", ...).
    """
    model = loaded.model
    if isinstance(model, peft.PeftModel):
        return model, describe(model)
    if loaded.adapter is not None and kind_of_peft not in TYPES:
        raise UserError(f"{loaded.name} already brings an adapter: leave --peft out")
    folder = loaded.adapter or (None if kind_of_peft in TYPES else Path(kind_of_peft))
    with warnings.catch_warnings(), seeded(seed):
        warnings.simplefilter("ignore")  # peft warns of what is set here on purpose
        if folder is not None:
            wrapped = _from_folder(model, folder)
        elif kind_of_peft == "none":
            return model, {}
        else:
            config = _config(loaded, kind_of_peft, rank, alpha, targets, virtual_tokens, init)
            wrapped = _wrapped(loaded, kind_of_peft, config)
    base = next(p for p in model.parameters() if p.is_floating_point())
    if base.dtype == torch.float64:  # peft makes prompts in float32 whatever the base
        wrapped.to(torch.float64)
    wrapped.eval()
    return wrapped, describe(wrapped)


def _config(
    loaded: Loaded, kind: str, rank: int, alpha: float | None, targets: Any, virtual_tokens: int, init: bool | str
) -> peft.PeftConfig:
    task = _TASKS[loaded.kind]
    if kind in ("prompt", "prefix"):
        if virtual_tokens < 1:
            raise UserError(f"prompt and prefix tuning need at least one virtual token, not {virtual_tokens}")
        return _prompt_config(loaded, kind, virtual_tokens)
    if rank < 1:
        raise UserError(f"the rank of an adapter is at least 1, not {rank}")
    model = loaded.model
    if kind == "lora":
        names = _targets(model, targets, "lora")
        return peft.LoraConfig(
            task_type=task,
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            target_modules=names,
            lora_dropout=0.0,
            init_lora_weights=init,
            fan_in_fan_out=_is_conv1d(model, names),
        )
    names = _targets(model, targets, "ia3")
    feed_forward = [n for n in names if n in _mapped(model, "ia3_ff") or _FEED_FORWARD_OUT.search("." + n)]
    return peft.IA3Config(
        task_type=task, target_modules=names, feedforward_modules=feed_forward, fan_in_fan_out=_is_conv1d(model, names)
    )


def _prompt_config(loaded: Loaded, kind: str, virtual_tokens: int) -> peft.PeftConfig:
    """The sizes of prompts and prefixes are read off the model: peft guesses them from key names that not every
    configuration uses."""
    model: Any = loaded.model
    config = model.config.get_text_config()
    width = model.get_input_embeddings().weight.shape[
        1
    ]  # ALBERT and some OPT embed in fewer dimensions than they compute in
    heads = getattr(config, "num_attention_heads", None) or 1  # a state-space model has none; a prompt needs none
    common = {
        "task_type": _TASKS[loaded.kind],
        "num_virtual_tokens": virtual_tokens,
        "num_layers": config.num_hidden_layers,
    }
    if kind == "prompt":
        # Only the encoder is given a prompt; peft's default would add a second one to the parameters that nothing
        # reads.
        return peft.PromptTuningConfig(
            token_dim=width, num_attention_heads=heads, num_transformer_submodules=1, **common
        )
    if not any("past_key_values" in inspect.signature(m.forward).parameters for m in model.modules()):
        raise UserError(
            f"prefix tuning puts keys and values in front of every attention, and {type(model).__name__} takes none "
            f"(no past_key_values in its forward): choose --peft prompt, lora or ia3"
        )
    common["num_layers"] = (
        getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None) or common["num_layers"]
    )
    # A prefix is keys and values: as wide as those are, which grouped and multi-query attention makes narrower than
    # the hidden states.
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    narrow = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    groups = (
        1 if narrow else getattr(config, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None) or heads
    )
    return peft.PrefixTuningConfig(token_dim=groups * size, num_attention_heads=groups, **common)


def _mapped(model: nn.Module, kind: str) -> list[str]:
    constants = peft.utils.constants
    table: dict[str, Any] = {
        "lora": constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
        "ia3": constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
        "ia3_ff": constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    }[kind]
    found = table.get(getattr(getattr(model, "config", None), "model_type", ""), [])
    return list(found) if not isinstance(found, str) else []


def _linears(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _targets(model: nn.Module, given: Sequence[str] | str | None, kind: str) -> list[str]:
    """Endings of module names: the user's, else peft's for the architecture, else found by what the layers are."""
    linears = _linears(model)
    inner = sorted({_in_layer(n) for n in linears if n != _output_name(model)})
    if given is not None:
        wanted = given.split(",") if isinstance(given, str) else list(given)
        if wanted == ["all-linear"]:
            return inner
        for name in wanted:
            if not any(_ends(path, name) for path, _ in model.named_modules()):
                known = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in linears}))
                raise UserError(f"the model has no module {name!r} to adapt: its linear layers are called {known}")
        return wanted
    mapped = [m for m in _mapped(model, kind) if any(_ends(n, m) for n in linears)]
    if mapped:
        return mapped
    if kind == "lora":
        # A state-space model has no attention; its fused kernels read out_proj's weight past any adapter on it.
        found = [n for n in inner if _ATTENTION.search(n)] or [n for n in inner if not _ends(n, "out_proj")]
    else:
        found = [n for n in inner if _KEY_VALUE.search("." + n) or _FEED_FORWARD_OUT.search("." + n)]
    if not found:
        raise UserError(
            f"no layer was found to put {kind} on: name some with --targets, of {', '.join(inner) or 'none'}"
        )
    return found


def _in_layer(path: str) -> str:
    """The part of a module's path after its last number: the same for every layer of a stack, and no other module's."""
    parts = path.split(".")
    last = max((i for i, p in enumerate(parts) if p.isdigit()), default=-1)
    return ".".join(parts[last + 1 :]) or path


def _output_name(model: Any) -> str | None:
    output = model.get_output_embeddings()
    return next((n for n, m in model.named_modules() if m is output), None)


def _is_conv1d(model: nn.Module, names: Sequence[str]) -> bool:
    """GPT-2 keeps its weights transposed, and peft has to be told."""
    return any(isinstance(m, Conv1D) and any(_ends(p, n) for n in names) for p, m in model.named_modules())


def _wrapped(loaded: Loaded, kind: str, config: peft.PeftConfig) -> peft.PeftModel:
    try:
        return peft.get_peft_model(loaded.model, config)
    except (ValueError, KeyError, AttributeError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"peft cannot put {kind} on {loaded.name} ({_line(error)}): choose another of {', '.join(TYPES)}"
        ) from None


def _from_folder(model: nn.Module, folder: Path) -> peft.PeftModel:
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"--peft is one of {', '.join(TYPES)} or a folder with adapter_config.json, and {folder} is neither"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"the adapter {folder} has no adapter_model.safetensors: pickled weights can run code and are not read"
        )
    try:
        return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"the adapter {folder} does not fit the model ({_line(error)}): pass the base that it was made for"
        ) from None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:240]


def describe(model: Any) -> dict[str, Any]:
    """type, rank, alpha, scale, init, targets, virtual_tokens, modules_to_save: what curvature of an adapter means
    little without."""
    config = model.active_peft_config
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    info: dict[str, Any] = {"type": {"prefix_tuning": "prefix", "prompt_tuning": "prompt"}.get(kind, kind)}
    if kind == "lora":
        scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        init = config.init_lora_weights
        info |= {
            "rank": config.r,
            "alpha": config.lora_alpha,
            "scale": scale,
            "init": "A Kaiming-uniform, B zero" if init is True else str(init),
        }
    elif kind == "ia3":
        info |= {"init": "ones"}
    elif config.is_prompt_learning:
        info |= {"virtual_tokens": config.num_virtual_tokens, "init": "N(0, 1) embedding"}
    targets = getattr(config, "target_modules", None)
    if targets:
        info["targets"] = targets if isinstance(targets, str) else sorted(targets)
    if getattr(config, "modules_to_save", None):
        saved = {
            m for m in config.modules_to_save if any(f".{m}.modules_to_save." in n for n, _ in model.named_parameters())
        }
        info["modules_to_save"] = sorted(saved)
    return info
