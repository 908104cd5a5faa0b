"""Peak memory that probe-smoothness prints before it works, beside what it then holds; writes docs/reports/memory.md.

    python benchmarks/memory.py                 # all rows; those already in runs/bench/memory are kept
    python benchmarks/memory.py --only wide     # rows whose names contain a word, measured again
    python benchmarks/memory.py --fresh         # all rows, measured again

Promised: within 20 % of the measured peak, or within 100 MiB of it, whichever allows more (`hybridtheory.memory`). Every row is a process
of its own (`tests/peaks.py`), whose largest resident set is measured, whole, until the measuring ends. It depends on the C library.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
CACHE, REPORT = ROOT / "runs" / "bench" / "memory", ROOT / "docs" / "reports" / "memory.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from peaks import SHORT  # noqa: E402

from hybridtheory import memory  # noqa: E402

# Folder -> architecture of tests/tiny_models.py and what is changed in it.
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "tiny GPT-2": ("gpt2", {}),
    "tiny BERT": ("bert", {}),
    "Llama": ("llama", {
        "hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 4, "intermediate_size": 1024}),
    "OPT, 50,000 words": ("opt", {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "vocab_size": 50_000}),
    "GPT-2, 50,000 words": ("gpt2", {"n_embd": 128, "n_layer": 1, "vocab_size": 50_000}),
    "wide GPT-2": ("gpt2", {"n_embd": 512, "n_layer": 6, "n_head": 8}),
}  # fmt: skip
MIB = 1 << 20
# Model ("": embedded), PEFT, engine, rows, rows at a time (0: all), and other settings.
ROWS: list[tuple[str, str, str, int, int, dict[str, Any]]] = [
    ("tiny GPT-2", "lora", "exact", 4, 0, {}),
    ("tiny GPT-2", "prompt", "forward", 4, 2, {}),
    ("tiny GPT-2", "ia3", "exact", 4, 1, {}),
    ("tiny GPT-2", "prefix", "difference", 4, 2, {}),
    ("tiny BERT", "lora", "exact", 4, 2, {}),
    ("tiny BERT", "none", "difference", 4, 0, {}),
    ("Llama", "lora", "exact", 2, 1, {}),
    ("Llama", "none", "difference", 2, 2, {}),
    ("OPT, 50,000 words", "lora", "exact", 2, 1, {}),
    ("Llama", "lora", "difference", 4, 2, {}),
    ("OPT, 50,000 words", "ia3", "forward", 4, 0, {}),
    ("GPT-2, 50,000 words", "lora", "exact", 4, 2, {}),
    ("GPT-2, 50,000 words", "lora", "exact", 2, 1, {}),
    ("GPT-2, 50,000 words", "none", "difference", 4, 0, {}),
    ("GPT-2, 50,000 words", "lora", "exact", 8, 0, {"max_memory": 1050 * MIB}),
    ("", "lora", "exact", 4, 2, {}),
    ("", "none", "exact", 2, 1, {}),
    ("", "prefix", "exact", 2, 0, {}),
    ("wide GPT-2", "lora", "exact", 2, 1, {}),
]
LENGTH = 16  # tokens a row, of models other than the embedded one

DTYPES = ("float32", "bfloat16")


def name(row: tuple[str, str, str, int, int, dict[str, Any]]) -> str:
    model, peft, engine, rows, at_once, more = row
    limit = f", --max-memory {more['max_memory'] // MIB}MiB" if "max_memory" in more else ""
    return f"{model or 'embedded GPT-2'}, {peft}, {engine}, {at_once or 'all'} of {rows} rows{limit}"


def spec(row: tuple[str, str, str, int, int, dict[str, Any]]) -> dict[str, Any]:
    """A line for tests/peaks.py."""
    model, peft, engine, rows, at_once, more = row
    loading: dict[str, Any] = {"peft": peft, "rows": rows}
    if model:
        loading |= {"model": str(CACHE / model), "data": str(CACHE / "films.jsonl"), "max_length": LENGTH}
    return {"loading": loading, "settings": {"engine": engine, "micro_batch": at_once or rows, **more}}


def models() -> None:
    """The models and a few rows of text, where they are not there yet."""
    if all((CACHE / folder / "tokenizer_config.json").exists() for folder in MODELS):
        return
    from tiny_models import FILMS, save, write

    CACHE.mkdir(parents=True, exist_ok=True)
    write(CACHE / "films.jsonl", [{"text": f"{t} " * 6, "label": i % 2} for i, t in enumerate(FILMS * 2)])
    for folder, (architecture, changes) in MODELS.items():
        save(architecture, CACHE / folder, **changes)


def loading_line(dtype: str, f: dict[str, Any]) -> str:
    size = (CACHE / "wide GPT-2" / "model.safetensors").stat().st_size
    return f"| {dtype} | {mib(size)} | {mib(f['peak'])} | {f['peak'] / size:.2f} | {mib(f['held'])} |"


def mib(b: float) -> str:
    return f"{b / MIB:.0f}"


def line(row: str, f: dict[str, Any]) -> str:
    estimated, measured = f["estimated"], f["measured"]
    kept = "yes" if memory.within(estimated, measured) else "NO"
    off = f"{mib(estimated - measured)} ({(estimated - measured) / measured:+.0%})"
    return f"| {row} | {mib(estimated)} | {mib(measured)} | {off} | {kept} | {f['terms'].removesuffix(' MiB')} |"


def report(found: dict[str, dict[str, Any]], loads: dict[str, dict[str, Any]]) -> str:
    kept = sum(memory.within(f["estimated"], f["measured"]) for f in found.values())
    notes = [f"- {row}: {note}" for row, f in found.items() for note in f["warnings"]]
    short = " ".join(f"{k} {v:g}" for k, v in SHORT.items())
    return "\n".join([
        "# Peak memory: estimated and measured",
        "",
        f"Written by `python benchmarks/memory.py`; torch {torch.__version__}, CPU, float32, one thread. `probe-smoothness` prints",
        "its peak memory before it works. Promised: within 20 % of what it then takes, or within 100 MiB, whichever allows more.",
        f"**{kept} of {len(found)} rows are.**",
        "",
        "Measured is the largest resident set of the whole process (interpreter, libraries, weights and data included) until the",
        "measuring ends, the report left out; every row is a process of its own. All are in MiB. The last column is the estimate's:",
        "the fullest moment and what holds it then. Models other than the embedded one are random (`benchmarks/memory.py` has their",
        f"sizes) on rows of at most {LENGTH} tokens. Runs are short ({short}): a phase that is repeated holds",
        "what it held. The tiny models take less than 100 MiB beside the process and could hardly miss.",
        "",
        "| model, PEFT, engine, rows at a time | estimated | measured | difference | within? | fullest moment |",
        "|---|---|---|---|---|---|",
        *(line(row, f) for row, f in found.items()),
        *(["", *notes] if notes else []),
        "",
        "## Loading",
        "",
        "Weights are used where the safetensors file is mapped, or converted tensor by tensor, its mapped pages beside them. Peak above",
            "the level before, of the wide GPT-2; every byte is read, for its SHA-256.",
            "",
            "| dtype | file | peak | peak / file | held after |",
        "|---|---|---|---|---|",
        *(loading_line(dtype, f) for dtype, f in loads.items()),
        "",
    ])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose names contain this, measured again")
    parser.add_argument("--fresh", action="store_true", help="measure all rows again")
    options = parser.parse_args()
    if options.fresh:
        shutil.rmtree(CACHE, ignore_errors=True)
    models()
    kept = CACHE / "rows.json"
    rows: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    specs = {name(r): spec(r) for r in ROWS}
    specs |= {f"loading, {d}": {"loading": {"model": str(CACHE / "wide GPT-2"), "dtype": d}} for d in DTYPES}
    wanted = [n for n in specs if (options.only in n if options.only else n not in rows)]
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "peaks.py")], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.stdin is not None and run.stdout is not None
    run.stdin.write("".join(json.dumps(specs[n]) + "\n" for n in wanted))
    run.stdin.close()
    for row, said in zip(wanted, run.stdout):
        rows[row] = json.loads(said)
        print(row, said, end="", flush=True)
        kept.write_text(json.dumps(rows, indent=1))
    if run.wait():
        return 2
    found = {name(r): rows[name(r)] for r in ROWS if name(r) in rows}
    loads = {d: rows[f"loading, {d}"] for d in DTYPES if f"loading, {d}" in rows}
    if len(found) == len(ROWS) and len(loads) == len(DTYPES):
        REPORT.write_text(report(found, loads))
    return 0 if all(memory.within(f["estimated"], f["measured"]) for f in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
