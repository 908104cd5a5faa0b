"""Checkpoints: weights and optimizer state as safetensors, everything else as JSON, no pickle.

    FOLDER/step-000120/weights.safetensors   the trained blocks, by parameter name
                       state.safetensors     tensors of the optimizer's state
                       state.json            the rest of it, with the step and the model it belongs to

A checkpoint is written beside its place and renamed when it is whole and on the disk: a full disk, a kill or a power cut at any moment
leaves a whole one behind. The one before it is removed later, when a loss has shown that the new weights are good (`keep`).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.ranks import joined

# Classes whose instances a method keeps in its state: rebuilt from their fields. Nothing else is, and no code is read from a file.
OBJECTS = (("galore_torch.galore_projector", "GaLoreProjector"),)

WEIGHTS, TENSORS, REST = "weights.safetensors", "state.safetensors", "state.json"


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold of a nested state; its tensors go to ``tensors`` under numbered names.

    JSON has string keys and lists only, so mappings become lists of pairs and tuples are marked. Floats survive: Python writes them
    with all their digits, and reads back its own NaN and Infinity.
    """
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {"pairs": [[pack(k, tensors), pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list):
        return [pack(v, tensors) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [pack(v, tensors) for v in value]}
    if (kind := (type(value).__module__, type(value).__qualname__)) in OBJECTS:
        return {"object": [*kind, pack(vars(value), tensors)]}
    raise UserError(
        f"this method's state cannot be checkpointed: a {type(value).__name__} cannot be kept ({value!r:.80})"
    )


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "object":
        module, name, fields = held
        if (module, name) not in OBJECTS:
            raise ValueError(f"{module}.{name} is not of this project")
        made = object.__new__(getattr(importlib.import_module(module), name))
        vars(made).update(unpack(fields, tensors))
        return made
    if kind == "tuple":
        return tuple(unpack(v, tensors) for v in held)
    return {unpack(k, tensors): unpack(v, tensors) for k, v in held}


def weights_of(blocks: Sequence[Block]) -> dict[str, Tensor]:
    return {n: p.detach() for b in blocks for n, p in b.parameters.items()}


def sha256(weights: Mapping[str, Tensor]) -> str:
    """Of names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint."""
    return max(folder.glob("step-*"), default=None)


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints."""
    return sorted(step_of(path) for path in folder.glob("step-*"))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def save(
    folder: Path, step: int, blocks: Sequence[Block], state: Mapping[str, Any], identity: Mapping[str, Any]
) -> Path:
    """Write the checkpoint of ``step`` beside older ones. UserError, with the older ones whole, when it cannot be written.

    Of several processes the first one writes, and all go on when it has.
    """
    target, partial = folder / f"step-{step:09d}", folder / f".partial-step-{step:09d}"
    ranks = joined()
    if not ranks.writes:
        ranks.meet()
        return target
    old = latest(folder) if folder.is_dir() else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".partial-*"):
            shutil.rmtree(leftover)
        partial.mkdir()
        tensors: dict[str, Tensor] = {}
        rest = {"step": step, "identity": dict(identity), "state": pack(state, tensors)}
        save_file({n: t.cpu().contiguous() for n, t in weights_of(blocks).items()}, partial / WEIGHTS)
        save_file(tensors, partial / TENSORS)
        (partial / REST).write_text(json.dumps(rest))
        for path in (*partial.iterdir(), partial):
            _sync(path)
        if target.exists():  # the run ended at this very step and was resumed
            shutil.rmtree(target)
        os.replace(partial, target)
        _sync(folder)
    except Exception as error:  # safetensors has an exception of its own for a full disk
        if not (isinstance(error, OSError) or type(error).__name__ == "SafetensorError"):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        kept = f"the checkpoint of step {step_of(old)} is whole" if old else "there was none before it"
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the checkpoint of step {step} could not be written to {folder} ({reason}): {kept}") from error
    ranks.meet()
    return target


def keep(folder: Path, step: int) -> None:
    """Remove every checkpoint but that of ``step``; of several processes the first one does."""
    for path in folder.glob("step-*") if joined().writes else ():
        if step_of(path) != step:
            shutil.rmtree(path)


def drop(folder: Path, step: int) -> None:
    """Remove the checkpoint of ``step``, which no process sees any more afterwards."""
    ranks = joined()
    ranks.meet()  # none of them is still counting
    if ranks.writes:
        shutil.rmtree(folder / f"step-{step:09d}", ignore_errors=True)
    ranks.meet()


def load(checkpoint: Path, blocks: Sequence[Block], identity: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """(step, optimizer and scheduler state); the weights go into the blocks. UserError for what belongs to another model."""
    try:
        rest = json.loads((checkpoint / REST).read_text())
        weights, tensors = load_file(checkpoint / WEIGHTS), load_file(checkpoint / TENSORS)
    except Exception as error:
        if not isinstance(error, OSError | ValueError) and type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"the checkpoint {checkpoint} cannot be read ({error}): remove it to start again") from error
    own = weights_of(blocks)
    for key, value in identity.items():
        if rest["identity"].get(key) != value:
            raise UserError(
                f"{checkpoint} is a checkpoint of another run: its {key} is {str(rest['identity'].get(key))[:60]} and this one's "
                f"is {str(value)[:60]}; nothing was loaded"
            )
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in weights.items()}:
        raise UserError(
            f"{checkpoint} is a checkpoint of another model: it holds {len(weights)} tensors of other names or shapes than the "
            f"{len(own)} that this method trains; nothing was loaded"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    return rest["step"], unpack(rest["state"], tensors)


def _sync(path: Path) -> None:
    """A rename is on the disk only after what it names: without this a power cut can leave a whole name with an empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
