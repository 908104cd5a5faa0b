"""The losses, computed a second time by hand or by transformers itself, one unpadded sequence at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FILMS, f, save, write
from torch.nn import functional as F

from probes.encoding import mask_tokens
from probes.objectives import IGNORE, LabelLoss
from probes.tasks import Task, load_task


def logits(task: Task, ids: list[int], **more: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return task.model(input_ids=torch.tensor([ids]), **more).logits[0].double()


@pytest.mark.parametrize("words", [("terrible", "great"), ("dull", "warm")])
@pytest.mark.parametrize("loss", ["vocabulary", "labels"])
def test_label_word_losses_by_hand(gpt2: Path, films: Path, loss: str, words: tuple[str, str]) -> None:
    """An option's tokens are summed, the mean is over rows; one-token options share a sequence, longer ones do not."""
    task = load_task(gpt2, films, rank=2, rows=4, labels=words, template="{text} it was", loss=loss)
    assert ("candidates" in task.batches(4)[0]) == (loss == "labels" and words == ("terrible", "great"))
    total = 0.0
    for row in task.rows:
        scores = []
        for option in row["options"]:
            logp = F.log_softmax(logits(task, option["input_ids"]), -1)
            answer = [(i, t) for i, t in enumerate(option["targets"]) if t != IGNORE]
            scores.append(sum(float(logp[i, t]) for i, t in answer))
        assert task.tokenizer.decode([t for _, t in answer]) == " " + words[-1]
        both = torch.tensor(scores, dtype=torch.float64)
        right = -both[row["label"]] if loss == "vocabulary" else -F.log_softmax(both, 0)[row["label"]]
        total += float(right)
    assert f(task) == pytest.approx(total / len(task.rows), rel=1e-5)
    assert task.info["loss"].startswith("cross-entropy over the " + ("vocabulary" if loss == "vocabulary" else "label"))


def test_causal_text_is_the_loss_that_transformers_computes(gpt2: Path, root: Path) -> None:
    (root / "long.txt").write_text("the film was a warm story and it was great. " * 20)
    task = load_task(gpt2, root / "long.txt", peft="none", rows=None, max_length=32)
    lengths = {len(r["options"][0]["input_ids"]) for r in task.rows}
    assert max(lengths) == 32
    with torch.no_grad():
        model: Any = task.model
        sums = [
            float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            for r in task.rows
            for ids in [torch.tensor([[*r["options"][0]["input_ids"], r["options"][0]["targets"][-1]]])]
        ]
    assert f(task) == pytest.approx(sum(sums) / sum(len(r["options"][0]["targets"]) for r in task.rows), rel=1e-5)
    assert task.info["loss_mean_over"] == "tokens"
    assert task.info["truncated"] == 0


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_seq2seq_is_the_loss_that_transformers_computes(name: str, root: Path, films: Path) -> None:
    task = load_task(save(name, root / name), films, peft="none", rows=3, labels=("dull", "warm"))
    total = 0.0
    for row in task.rows:
        option = row["options"][row["label"]]
        ids, targets = torch.tensor([option["input_ids"]]), torch.tensor([option["targets"]])
        with torch.no_grad():
            total += float(task.model(input_ids=ids, labels=targets).loss) * targets.shape[1]
    assert f(task) == pytest.approx(total / 3, rel=1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_classifier_is_the_loss_that_transformers_computes(name: str, root: Path, films: Path) -> None:
    folder = save(name, root / f"{name}-classifier", head="classification")
    task = load_task(folder, films, rank=2, rows=4)
    assert task.kind == "classification"
    assert any("lacks" in n for n in load_task(save(name, root / f"{name}-bare"), films, head="classification").notes)
    total = 0.0
    for row in task.rows:
        ids = torch.tensor([row["options"][0]["input_ids"]])
        with torch.no_grad():
            total += float(task.model(input_ids=ids, labels=torch.tensor([row["label"]])).loss)
    assert f(task) == pytest.approx(total / 4, rel=1e-5)
    scores, labels = task.scores()
    assert scores.shape == (4, 2)
    assert labels.tolist() == [r["label"] for r in task.rows]


def test_masked_text_predicts_what_was_masked(root: Path, films: Path) -> None:
    texts = write(root / "texts.jsonl", [{"text": t} for t in FILMS])
    task = load_task(save("bert", root / "bert"), texts, rank=2, rows=3)
    again = load_task(root / "bert", texts, rank=2, rows=3)
    assert task.rows == again.rows
    assert task.rows != load_task(root / "bert", texts, rank=2, rows=3, seed=1).rows
    for row in task.rows:
        (option,) = row["options"]
        assert option["input_ids"][0] == 1
        assert option["input_ids"][-1] == 2
        assert option["targets"][0] == option["targets"][-1] == IGNORE
        assert any(t != IGNORE for t in option["targets"])
    named = load_task(root / "bert", films, rank=2, rows=3, labels=("terrible", "great"), template="{text} it was")
    for row in named.rows:  # the label word is asked for by a mask in its place
        option = row["options"][row["label"]]
        assert [i for i, t in enumerate(option["targets"]) if t != IGNORE] == [
            i for i, t in enumerate(option["input_ids"]) if t == named.tokenizer.mask_token_id
        ]


def test_masking_is_berts_rule() -> None:
    """15 % of the tokens, 80/10/10: shares of 60,000 draws within five standard errors; a pure function of its arguments."""
    ids = list(range(5, 1005))
    masked = kept = n = 0
    for seed in range(400):
        out, targets = mask_tokens(ids, 3, 100_000, seed)
        picked = [i for i, t in enumerate(targets) if t != IGNORE]
        assert len(picked) == 150
        assert all(targets[i] == ids[i] for i in picked)
        assert all(out[i] == ids[i] for i in set(range(1000)) - set(picked))
        n += len(picked)
        masked += sum(out[i] == 3 for i in picked)
        kept += sum(out[i] == ids[i] for i in picked)
    assert abs(masked / n - 0.8) < 5 * (0.8 * 0.2 / n) ** 0.5
    assert abs(kept / n - 0.1) < 5 * (0.1 * 0.9 / n) ** 0.5
    assert mask_tokens(ids, 3, 100, 7) == mask_tokens(ids, 3, 100, 7)


def test_scores_rank_the_options(gpt2: Path, films: Path) -> None:
    """The scores are log-likelihoods: their softmax is what the label loss is computed from."""
    task = load_task(gpt2, films, rank=2, rows=4, labels=("dull", "warm"))
    scores, labels = task.scores(size=3)
    labelled = load_task(gpt2, films, rank=2, rows=4, labels=("dull", "warm"), loss="labels")
    expected = float(F.cross_entropy(scores, labels))
    assert f(labelled) == pytest.approx(expected, rel=1e-5)


def test_only_the_needed_positions_logits_are_computed(gpt2: Path, films: Path) -> None:
    task = load_task(gpt2, films, rank=2, rows=4, labels=("terrible", "great"), template="{text} it was")
    (batch,) = task.batches(4)
    seen: list[torch.Size] = []
    handle = task.model.get_output_embeddings().register_forward_hook(lambda m, a, out: seen.append(out.shape))
    z = task.objective.forward(task.model, batch)
    handle.remove()
    assert seen == [torch.Size([1, 4, 304])]
    task.objective.select = False
    assert torch.allclose(task.objective.forward(task.model, batch), z, rtol=1e-5, atol=1e-5)


def test_types_keep_their_width(gpt2: Path, films: Path) -> None:
    for dtype, width in (("float64", torch.float64), ("bfloat16", torch.float32), ("float32", torch.float32)):
        task = load_task(gpt2, films, rank=2, rows=2, dtype=dtype)
        (batch,) = task.batches(2)
        assert task.objective.loss(task.objective.forward(task.model, batch), batch).dtype == width


def test_label_loss_is_bounded_by_the_vocabulary_loss(gpt2: Path, films: Path) -> None:
    """Restricting the softmax to the options drops terms from its denominator: the loss can only fall."""
    tasks = [
        load_task(gpt2, films, rank=2, rows=6, labels=("terrible", "great"), loss=loss) for loss in ("vocabulary", "labels")
    ]  # fmt: skip
    assert isinstance(tasks[1].objective, LabelLoss)
    assert f(tasks[1]) < f(tasks[0])
