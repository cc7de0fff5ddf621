"""LfU in transformers' own Trainer: the same updates as a loop written by hand, and as without it where lam is 0."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from transformers import Trainer, TrainingArguments

from lfu import LfUStep
from lfu.integrations.any_trainer import with_lfu
from lfu.training.checkpoints import STATE_FILE

ROWS = [
    {
        "input_ids": torch.randint(3, 60, (9,), generator=torch.Generator().manual_seed(i)),
        "attention_mask": torch.ones(9),
    }
    for i in range(8)
]
for number, row in enumerate(ROWS):
    row["labels"] = row["input_ids"].clone()
    row["labels"][: 2 + number % 4] = -100


def trainer(folder, kind=Trainer, model=None, **options):
    settings = dict(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, seed=1,
        learning_rate=1e-2, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        max_grad_norm=0.0,
    )  # fmt: skip
    model = tiny_model(dtype=torch.float32) if model is None else model
    return kind(model=model, args=TrainingArguments(**settings | options), train_dataset=ROWS)


def weights(t):
    return {name: value.clone() for name, value in t.model.state_dict().items()}


def test_lam_zero_is_the_trainer_itself(tmp_path):
    found = []
    for kind in (Trainer, with_lfu(Trainer, lam=0.0)):
        t = trainer(tmp_path, kind)
        t.train()
        found.append(weights(t))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)  # Trainer divides the loss, the step the sum


def test_an_update_is_that_of_a_loop_by_hand(tmp_path):
    t = trainer(tmp_path, with_lfu(Trainer, alpha=0.1, lam=3.0), max_steps=1, optim="sgd", lr_scheduler_type="constant")
    seen = []
    inner = t.compute_loss
    t.compute_loss = lambda model, inputs, **more: (seen.append(inputs), inner(model, inputs, **more))[1]
    t.train()
    assert len(seen) == 2

    model = tiny_model(dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = LfUStep(model, alpha=0.1, lam=3.0, seed=1)
    items = sum(int((b["labels"][:, 1:] != -100).sum()) for b in seen)
    for index, batch in enumerate(seen):
        step(batch, num_items=items, index=index)
    for name, p in model.named_parameters():
        torch.testing.assert_close(t.model.get_parameter(name), before[name] - 1e-2 * p.grad, rtol=1e-4, atol=1e-6)


def test_what_is_logged(tmp_path):
    t = trainer(tmp_path, with_lfu(Trainer, lam="auto"))
    t.train()
    logged = [entry for entry in t.state.log_history if "loss" in entry]
    assert len(logged) == 3
    wanted = {"skipped", "lam", "alpha", "sft_loss", "gradient_ratio", "gradient_cosine", "ascent_grad_norm",
              "consistency", "displacement"}  # fmt: skip
    for entry in logged:
        assert {name.removeprefix("lfu/") for name in entry if name.startswith("lfu/")} == wanted
        assert entry["lfu/consistency"] > 0
        assert entry["lfu/skipped"] == 0
        assert entry["loss"] == pytest.approx(entry["lfu/sft_loss"], rel=0.2)
    plain = trainer(tmp_path / "plain", Trainer)
    plain.train()
    assert logged[0]["lfu/sft_loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-5)
    assert t.last_record.form == "exact"


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    options = dict(save_strategy="steps", save_steps=2, max_steps=4)
    whole = trainer(tmp_path / "whole", with_lfu(Trainer, lam="auto"), **options)
    whole.train()
    assert (tmp_path / "whole/checkpoint-2" / STATE_FILE).exists()
    again = trainer(tmp_path / "again", with_lfu(Trainer, lam="auto"), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    for name, value in weights(whole).items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_a_loss_that_is_no_number_reaches_no_weight(tmp_path):
    t = trainer(tmp_path, with_lfu(Trainer), max_steps=1, gradient_accumulation_steps=1)
    before = weights(t)
    t.model.model.norm.register_forward_hook(lambda module, args, output: output * float("nan"))
    t.train()
    assert t.last_record.skipped == "non-finite loss"
    assert all(torch.equal(before[name], value) for name, value in weights(t).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"alhpa": 0.1}, "Did you mean alpha"), ({"loss_fn": None}, "lfu has no setting 'loss_fn'")],
)
def test_a_setting_that_does_not_exist_is_told(settings, message):
    with pytest.raises(ValueError, match=message):
        with_lfu(Trainer, **settings)


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ValueError, match="torch_compile"):
        trainer(tmp_path, with_lfu(Trainer), torch_compile=True)
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in ROWS]
    run = with_lfu(Trainer)(model=tiny_model(dtype=torch.float32), args=trainer(tmp_path).args, train_dataset=rows)
    with pytest.raises(ValueError, match="the batches of Trainer have no 'labels'"):
        run.train()
