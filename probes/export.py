"""What a trained model leaves behind for other programs: the adapter as peft saves it, and the whole model with the adapter merged in.

The adapter alone is enough where only it was trained. Where base weights moved, they are part of the result: the merged model is
written too, or, for adapters that cannot be merged (prompts, prefixes), the moved base beside the adapter.
"""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

from hybridtheory.errors import UserError
from hybridtheory.ranks import joined
from probes.tasks import Task

MERGEABLE = ("lora", "ia3")


def export(task: Task, folder: Path, moved_base: bool, merged: bool = False) -> list[str]:
    """Names of the folders written under ``folder``. ``merged``: the whole model although the adapter would do."""
    if not joined().writes:
        return []
    model: Any = task.model
    kind = str(task.peft_info.get("type", "")).lower()
    done = []
    if kind:
        done.append(_save(folder / "adapter", task, model))
    if not (moved_base or merged):
        return done
    if not kind:
        done.append(_save(folder / "model", task, model))
    elif kind in MERGEABLE:
        # On a copy: the model goes on being the one that was trained, to the bit.
        done.append(_save(folder / "merged", task, copy.deepcopy(model).merge_and_unload()))
    elif moved_base:
        done.append(_save(folder / "base", task, model.get_base_model()))
    return done


def _save(folder: Path, task: Task, model: Any) -> str:
    """`save_pretrained` beside the place, then a rename: nobody finds half a model."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # a GGUF file's: the weights in memory are not quantised any more
    try:
        model.save_pretrained(partial)
        task.tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except Exception as error:
        if not (isinstance(error, OSError) or type(error).__name__ == "SafetensorError"):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"the model could not be exported to {folder} ({error}): make room and add --resume; the trained weights are in the "
            f"checkpoint"
        ) from error
    return folder.name
