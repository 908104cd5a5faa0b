"""The Trainer subclass takes the steps of the plain loop; the callback measures and changes nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from toys import VOCABULARY, is_lora, language_model, with_lora
from transformers import Trainer, TrainingArguments

from hybridtheory.blocks import partition
from hybridtheory.errors import UserError
from hybridtheory.optimizers import build
from probes.integrations import HybridTrainer, KeepBase, SmoothnessCallback

# accelerate pins memory by default, and says so where there is no accelerator.
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


def rows(n: int = 12):
    x = torch.randint(0, VOCABULARY, (n, 8), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": r, "attention_mask": torch.ones_like(r), "labels": r.clone()} for r in x]


def collate(chosen):
    return {k: torch.stack([r[k] for r in chosen]) for k in chosen[0]}


def model_and(method="hybrid", **options):
    model = with_lora(language_model("gpt2"))
    base, peft = partition(model, "group", is_lora)
    return model, build(method, model, base, peft, lr_base=1e-3, lr_peft=0.1, seed=5, **options)


def arguments(folder, **more):
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 6, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "save_strategy": "no",
            "disable_tqdm": True, "logging_steps": 1, "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant", **more,
        },
    )  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_takes_the_steps_of_the_plain_loop(accumulate, tmp_path):
    model, optimizer = model_and()
    args = arguments(tmp_path, gradient_accumulation_steps=accumulate, per_device_train_batch_size=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    trainer = HybridTrainer(
        model, args, train_dataset=rows(24), data_collator=collate, optimizers=(optimizer, schedule)
    )
    trainer.train()

    other, own = model_and()
    schedule = torch.optim.lr_scheduler.LambdaLR(own, lambda t: 1 / (1 + t))
    losses = []
    for step in range(6):
        parts = []
        for turn in range(accumulate):
            at = (step * accumulate + turn) * 2
            batch = collate(rows(24)[at : at + 2])

            def closure(backward=False, batch=batch):
                loss = other(**batch).loss
                if backward:
                    loss.backward()
                return loss

            parts.append(float((own.step if turn == accumulate - 1 else own.accumulate)(closure)))
        schedule.step()
        losses.append(sum(parts) / accumulate)
    assert own.counts == optimizer.counts
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=name)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=1e-4)
    assert optimizer.steps == trainer.state.global_step == 6


def test_a_trainers_run_resumes_with_the_base_that_had_moved(tmp_path):
    def trainer(model, optimizer, folder, **more):
        args = arguments(folder, save_strategy="steps", save_steps=3, **more)
        return HybridTrainer(
            model,
            args,
            train_dataset=rows(24),
            data_collator=collate,
            optimizers=(optimizer, None),
            callbacks=[KeepBase()],
        )

    whole, optimizer = model_and()
    trainer(whole, optimizer, tmp_path / "whole").train()
    model, optimizer = model_and()
    trainer(model, optimizer, tmp_path / "cut", max_steps=3).train()
    model, optimizer = model_and()
    trainer(model, optimizer, tmp_path / "cut").train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert optimizer.steps == 6
    for (name, a), b in zip(model.named_parameters(), whole.named_parameters()):
        assert torch.equal(a, b[1]), name
    (tmp_path / "cut" / "checkpoint-6" / KeepBase.NAME).unlink()
    model, optimizer = model_and()
    with pytest.raises(UserError, match="without the moved base weights"):
        trainer(model, optimizer, tmp_path / "cut", max_steps=8).train(
            resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-6")
        )


def test_a_plain_trainer_is_told_in_one_sentence(tmp_path):
    model, optimizer = model_and()
    with pytest.raises(UserError, match="Hybrid drives its own evaluations"):
        Trainer(
            model, arguments(tmp_path), train_dataset=rows(), data_collator=collate, optimizers=(optimizer, None)
        ).train()
    with pytest.raises(UserError, match="this is AdamW: pass optimizers"):
        HybridTrainer(model, arguments(tmp_path), train_dataset=rows(), data_collator=collate).train()


def test_the_callback_watches_and_changes_nothing(tmp_path):
    def train(callback):
        model = with_lora(language_model("gpt2"))
        trainer = Trainer(
            model, arguments(tmp_path, learning_rate=1e-2, logging_steps=2), train_dataset=rows(), data_collator=collate
        )
        if callback is not None:
            callback.log = trainer.log
            trainer.add_callback(callback)
        trainer.train()
        flags = [p.requires_grad for p in model.parameters()]
        return copy.deepcopy(model.state_dict()), flags, trainer.state.log_history

    watch = SmoothnessCallback([collate(rows())], every=3, max_steps=6, max_vectors=3, directions=4)
    plain, flags, _ = train(None)
    watched, same, log = train(watch)
    assert flags == same
    assert all(torch.equal(plain[k], watched[k]) for k in plain)
    assert not watch.notes
    assert [entry["step"] for entry in watch.history] == [0, 3, 6]
    first, last = watch.history[0], watch.history[-1]
    assert "smoothness/base/L0" not in first
    assert {"smoothness/base/L0", "smoothness/peft/L1", "smoothness/eta_base", "smoothness/eta_peft"} <= set(last)
    assert last["smoothness/ratio"] == pytest.approx(last["smoothness/eta_peft"] / last["smoothness/eta_base"])
    for point in watch.points:  # an envelope lies above what it envelops
        b = point.blocks["base"]
        height = max(abs(b.lam_max.value), abs(b.lam_min.value))
        line = last["smoothness/base/L0"] + last["smoothness/base/L1"] * point.grad_norm
        assert height <= line * (1 + 1e-9)
    logged = [entry for entry in log if "smoothness/ratio" in entry]
    assert [entry["step"] for entry in logged] == [0, 3, 6]
    assert all(math.isfinite(v) for entry in watch.history for v in entry.values())


def test_bad_input_and_a_measurement_that_fails_do_not_end_the_training(tmp_path):
    with pytest.raises(UserError, match="every is a number of steps"):
        SmoothnessCallback([collate(rows())], every=0)
    watch = SmoothnessCallback([torch.zeros(1)], every=3)  # no labels and no loss_fn
    model = with_lora(language_model("gpt2"))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), data_collator=collate, callbacks=[watch])
    trainer.train()
    assert trainer.state.global_step == 6
    assert len(watch.notes) == 3
    assert "loss_fn must be given" in watch.notes[0]
