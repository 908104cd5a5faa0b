"""Data: every kind of source gives the same rows, the named tasks read as questions, splits are kept apart."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import FILMS, write

from probes import sources
from probes.objectives import IGNORE
from probes.prompts import TASKS
from probes.tasks import load_task


def test_every_kind_of_file_gives_the_same_rows(gpt2: Path, root: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    records = [{"text": t, "label": w} for t, w in zip(FILMS, ["bad", "good", "bad", "good", "good"], strict=True)]
    made: dict[str, Path] = {"jsonl": write(root / "a.jsonl", records)}
    made["json"] = root / "a.json"
    made["json"].write_text(json.dumps(records))
    for kind, mark in (("csv", ","), ("tsv", "\t")):
        made[kind] = root / f"a.{kind}"
        with made[kind].open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter=mark)
            writer.writeheader()
            writer.writerows(records)
    made["parquet"] = root / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), made["parquet"])
    made["folder"] = root / "a-folder"
    datasets.Dataset.from_list(records).save_to_disk(made["folder"])
    rows = {kind: load_task(gpt2, path, rank=2, rows=4).rows for kind, path in made.items()}
    assert len(rows["jsonl"]) == 4
    for kind, found in rows.items():
        assert found == rows["jsonl"], kind
    hashes = {load_task(gpt2, path, rank=2, rows=4).info["data_sha256"] for path in made.values()}
    assert len(hashes) == 1


def test_class_names_of_a_saved_data_set_are_the_label_words(gpt2: Path, root: Path) -> None:
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    parts = {
        split: datasets.Dataset.from_list([{"sentence": t, "label": i % 2} for i, t in enumerate(FILMS)], features)
        for split in ("train", "validation")
    }
    datasets.DatasetDict(parts).save_to_disk(root / "named")
    task = load_task(gpt2, root / "named", rank=2, rows=None)
    assert task.info["labels"] == ["no", "yes"]
    assert set(task.splits) == {"train", "dev"}
    assert len(task.rows) == 5


def test_the_hub_comes_first_and_its_validation_split_is_the_test_set(
    gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        train = [{"sentence": t, "label": i % 2} for i, t in enumerate(FILMS)]
        parts = {"train": train, "validation": train[:3], "test": [{"sentence": "x", "label": -1}]}
        return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "hub_reachable", lambda timeout=3.0: True)
    task = load_task(gpt2, "sst2", rank=2, rows=None)
    assert asked == [(("nyu-mll/glue", "sst2"), {})]
    assert {k: len(v) for k, v in task.splits.items()} == {"train": 5, "test": 3}
    load_task(gpt2, "someone/films:plain", rank=2, rows=2, labels=("no", "yes"))
    assert asked[1] == (("someone/films", "plain"), {})


def test_splits_are_disjoint_seeded_and_tokenised_on_demand(gpt2: Path, root: Path) -> None:
    many = write(root / "many.jsonl", [{"text": f"it was film {i}"} for i in range(50)])
    task = load_task(gpt2, many, rank=2, rows=10)
    train, test = ({tuple(r["options"][0]["targets"]) for r in task.splits[s]} for s in ("train", "test"))
    assert (len(train), len(test)) == (40, 10)
    assert not train & test
    assert {tuple(r["options"][0]["targets"]) for r in task.rows} <= train
    assert load_task(gpt2, many, rank=2, rows=10).rows == task.rows
    assert load_task(gpt2, many, rank=2, rows=10, seed=3).rows != task.rows


def test_long_passages_are_cut_and_label_words_are_not(gpt2: Path, root: Path) -> None:
    long = write(root / "long.jsonl", [{"text": "a very long film " * 20, "label": i % 2} for i in range(4)])
    task = load_task(
        gpt2, long, rank=2, rows=None, max_length=24, labels=("terrible", "great"), template="So: {text} it was"
    )
    assert task.info["truncated"] == len(task.rows)
    assert any("were cut" in n for n in task.notes)
    for row in task.rows:
        option = row["options"][row["label"]]
        assert len(option["input_ids"]) <= 24
        text = task.tokenizer.decode(option["input_ids"])
        assert text.startswith("So: a very")
        assert text.endswith(" it was")
        assert task.tokenizer.decode(option["targets"][-1:]) == [" terrible", " great"][row["label"]]


def test_prompt_and_completion_columns_train_on_the_completion_only(gpt2: Path, root: Path) -> None:
    pairs = write(root / "pairs.jsonl", [{"prompt": "it was", "completion": "a great film"}] * 3)
    task = load_task(gpt2, pairs, rank=2, rows=1)
    (option,) = task.rows[0]["options"]
    assert task.tokenizer.decode([t for t in option["targets"] if t != IGNORE]) == " a great film"
    assert task.info["loss_mean_over"] == "tokens"


RECORDS: dict[str, tuple[dict[str, Any], str, int]] = {
    "sst2": ({"sentence": "fine work . ", "label": 1}, "fine work . It was great", 1),
    "rte": (
        {"sentence1": "A sat.", "sentence2": "A exists.", "label": 0},
        'A sat.\nDoes this mean that "A exists." is true? Yes or No?\nYes',
        0,
    ),
    "cb": (
        {"premise": "A sat.", "hypothesis": "A stood", "label": 1},
        'Suppose A sat. Can we infer that "A stood"? Yes, No, or Maybe?\nNo',
        1,
    ),
    "copa": (
        {
            "premise": "The man slept.",
            "choice1": "He was tired.",
            "choice2": "It rained.",
            "question": "cause",
            "label": 0,
        },
        "The man slept because he was tired.",
        0,
    ),
    "boolq": (
        {"passage": "Snow is ice.", "question": "is snow ice", "answer": True},
        "Snow is ice. Is snow ice?\nYes",
        1,
    ),
    "winogrande": (
        {"sentence": "Al hit Bo so _ cried.", "option1": "Al", "option2": "Bo", "answer": "2"},
        "Al hit Bo so Bo cried.",
        1,
    ),
    "mrpc": (
        {"sentence1": "A ran.", "sentence2": "A moved.", "label": 1},
        "Do the following two sentences mean the same thing? Yes or No?\nSentence 1: A ran.\nSentence 2: A moved.\nYes",
        1,
    ),
    "wsc": (
        {"text": "Al left since he tired.", "span1_text": "Al", "span2_text": "he", "label": 1},
        'Al left since he tired.\nIn the previous sentence, does the pronoun "he" refer to Al? Yes or No?\nYes',
        1,
    ),
    "wic": (
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "A bank loan.", "label": 0},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA river bank.\nA bank loan.\nNo',
        0,
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_named_tasks_read_as_questions(name: str) -> None:
    record, text, label = RECORDS[name]
    example = TASKS[name].render(record)
    prompt = example.prompts[label if len(example.prompts) > 1 else 0]
    assert prompt.before + prompt.passage + prompt.after + example.options[example.label] == text
    assert example.label == label
    assert prompt.passage


def test_the_embedded_sentiment_task_is_balanced_enough_to_learn(gpt2: Path) -> None:
    task = load_task(gpt2, rank=2, rows=64)
    assert set(task.splits) == {"train", "dev", "test"}
    assert task.info["data"] == "sentiment"
    assert task.info["labels"] == ["terrible", "great"]
    assert 0.5 <= task.info["floor"] < 0.75
