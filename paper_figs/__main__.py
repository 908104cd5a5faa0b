"""Draw the papers' figures: `python -m paper_figs [NAME ...]`, PDF and PNG with the caption beside each in docs/figures.

    python -m paper_figs                    # all of them (make figures)
    python -m paper_figs local_smoothness   # one
    python -m paper_figs --list             # names, what they show, which records they need

Exit code 2 and one sentence for a figure whose record is missing: nothing is drawn from what is not there.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from hybridtheory.errors import UserError
from paper_figs.records import load
from probes.figures import style

FIGURES = (
    "local_smoothness", "cosine_and_variance", "cosine_laws", "error_budget", "descent", "bounds", "captured", "rates", "loss_curves",
    "bilevel", "cost_memory", "cost_time",
)  # fmt: skip


def module(name: str) -> ModuleType:
    if name not in FIGURES:
        raise UserError(f"there is no figure {name!r}: choose from {', '.join(FIGURES)}")
    return import_module(f"paper_figs.{name}")


def draw(name: str, root: Path, out: Path) -> list[Path]:
    """OUT/NAME.pdf, .png and .md."""
    figure_of = module(name)
    data = [load(r, root, f"the figure {name}") for r in figure_of.RECORDS]
    with style():
        figure = figure_of.draw(*data)
    if figure is None:
        raise UserError(
            f"the records of the figure {name} ({', '.join(figure_of.RECORDS)}) hold nothing that it shows: make them again with "
            f"python studies/records.py {' '.join(figure_of.RECORDS)}"
        )
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix in ("png", "pdf"):
        # Without the date, the same records give the same bytes.
        metadata: dict[str, Any] = {"CreationDate": None} if suffix == "pdf" else {"Software": None}
        paths.append(out / f"{name}.{suffix}")
        partial = out / f".partial-{name}.{suffix}"
        with style():
            figure.savefig(partial, metadata=metadata, format=suffix)
        os.replace(partial, paths[-1])
    sources = ", ".join(f"`{root.name}/{r}`" for r in figure_of.RECORDS)
    paths.append(out / f"{name}.md")
    paths[-1].write_text(f"{figure_of.caption(*data)} Records: {sources}.\n", encoding="utf-8")
    return paths


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m paper_figs", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures to draw (default: all)")
    parser.add_argument("--records", type=Path, default=Path("docs/reports"), help="folder of the run folders")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--list", action="store_true", help="names, what they show, which records they need")
    wanted = parser.parse_args(arguments)
    try:
        if wanted.list:
            for name in FIGURES:
                print(
                    f"{name:<22}{(module(name).__doc__ or '').partition(chr(10))[0]} [{', '.join(module(name).RECORDS)}]"
                )
            return 0
        for name in wanted.names or FIGURES:
            print(*draw(name, wanted.records, wanted.out)[:2])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: no figure can be written to {wanted.out} ({error.strerror or error}): give another --out",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
