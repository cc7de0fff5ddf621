"""The methods that weight tokens or rows, each against its equation written out in plain torch, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from bench import float64, forward, small_model, step_of, tiny_trainer, token_rows, written_out
from datasets import Dataset
from test_losses import nll, nudge
from tiny import DEVICE, relative_difference, tiny_batch

from lfu.methods.examples import example_of, examples_of, key_of, losses_before_training
from lfu.methods.talr import TALR

TOLERANCE = 1e-9


def token_losses(model, batch=None):
    """(-log p of each labelled token (N,), its row (N,))."""
    batch = tiny_batch() if batch is None else batch
    logits, labels, _ = forward(model, batch)
    rows = (batch["labels"][:, 1:] != -100).nonzero()[:, 0]
    return -logits.log_softmax(-1)[range(len(labels)), labels], rows


def agree(trainer, value, batch=None):
    loss, found = step_of(trainer, batch)
    assert loss == pytest.approx(float(value.detach()), rel=1e-9)
    assert relative_difference(found, written_out(trainer.model, value)) < TOLERANCE


@pytest.mark.parametrize(
    ("theta", "top", "alpha"), [("full", 20, 1.0), ("lora", 5, 0.5), ("full", 61, 2.0), ("lora", 500, 1.0)]
)
def test_eaft(tmp_path, theta, top, alpha):
    t = tiny_trainer("eaft", tmp_path, theta=theta, method_args={"top": top, "alpha": alpha})
    logits, labels, _ = forward(t.model)
    total = 0.0
    for z, y in zip(logits, labels):
        p = torch.exp(z) / torch.exp(z).sum()
        best = torch.sort(p.detach(), descending=True).values[:top]
        best = best / best.sum()
        total = total - (-(best * best.log()).sum() / math.log(min(top, 61))) ** alpha * torch.log(p[y])
    agree(t, total / len(labels))


def test_eaft_with_exponent_zero_is_sft(tmp_path):
    (one, g), (two, h) = (
        step_of(tiny_trainer("eaft", tmp_path, method_args="alpha=0")),
        step_of(tiny_trainer("sft", tmp_path)),
    )
    assert one == pytest.approx(two, rel=1e-12)
    assert relative_difference(g, h) < TOLERANCE


@pytest.mark.parametrize("theta", ["full", "lora"])
@pytest.mark.parametrize("floor", [0.01, 0.4])
def test_talr(tmp_path, theta, floor):
    t = tiny_trainer("talr", tmp_path, theta=theta, method_args={"floor": floor})
    losses, rows = token_losses(t.model)
    means = sorted(float(losses[rows == row].mean().detach()) for row in range(3))
    weight = (-losses.detach() / means[1]).exp().clamp(min=floor)
    assert (weight == floor).any() == (floor == 0.4)
    agree(t, (weight * losses).mean())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_flow(tmp_path, temperature):
    t = tiny_trainer("flow", tmp_path, method_args={"temperature": temperature}, rows=token_rows(5))
    everything = tiny_batch(rows=5)
    losses, rows = token_losses(t.model, everything)
    means = torch.stack([losses[rows == row].mean() for row in range(5)]).detach()
    weight = (-means / (temperature * means.median())).exp()
    nudge(t.model)  # the weights are those of before training
    losses, rows = token_losses(t.model, everything)
    # the forward before training ran in float32 where models insist on it
    value = (weight[rows] * losses).mean()
    loss, found = step_of(t, everything)
    assert loss == pytest.approx(float(value.detach()), rel=1e-5)
    assert relative_difference(found, written_out(t.model, value)) < 1e-5


def test_stm_masks_what_the_untouched_model_finds_surprising(tmp_path):
    model = small_model(dtype=torch.float64)
    before = [token_losses(model, {k: v[i : i + 1] for k, v in tiny_batch(rows=6).items()})[0] for i in range(6)]
    perplexities = torch.cat(before).detach().exp()
    threshold = float(perplexities.sort().values[len(perplexities) // 2]) * 1.001
    t = tiny_trainer("stm", tmp_path, model=model, method_args={"threshold": threshold})
    for old, new, losses in zip(token_rows(), t.train_dataset, before):
        kept = iter(losses.exp() <= threshold)
        assert new["labels"] == [
            y if y != -100 and place and next(kept) else -100 for place, y in enumerate(old["labels"])
        ]
        assert new["input_ids"] == old["input_ids"]
    assert f"{len(perplexities) // 2 + 1:,} of {len(perplexities):,} labelled tokens" in t.notes[0]
    t.train()


def test_stm_refuses_to_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="no training token has a perplexity of 1\\.001 or less: raise stm"):
        tiny_trainer("stm", tmp_path, method_args="threshold=1.001")


@pytest.mark.parametrize("method", ["stm", "flow"])
def test_a_stream_of_rows_is_refused(tmp_path, method):
    from bench import byte_tokenizer, config

    from lfu import LfUTrainer

    rows = Dataset.from_list(token_rows()).to_iterable_dataset()
    with pytest.raises(ValueError, match=rf"method '{method}' reads all training rows first: .*not a stream"):
        LfUTrainer(small_model(), config(tmp_path, method), train_dataset=rows, processing_class=byte_tokenizer())


@pytest.mark.parametrize("options", [{}, {"padding_free": True, "max_length": None}, {"packing": True}])
def test_losses_before_training_are_each_rows_own(tmp_path, options):
    model = small_model(attn_implementation="eager")
    rows = token_rows(5)
    expected = []
    for row in rows:
        one = {k: torch.tensor([row[k]], device=DEVICE) for k in row}
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        expected.append(token_losses(model, one)[0].detach().float().cpu())
    t = tiny_trainer("sft", tmp_path, model=model, rows=rows, **{"max_length": 64, **options})
    losses = losses_before_training(t, "sft")
    for row, wanted in zip(rows, expected):
        found = losses[key_of(torch.tensor(row["input_ids"]))]
        assert len(found) == len(row["input_ids"])
        assert (found.isnan() == torch.tensor(row["labels"]).eq(-100)).all()
        torch.testing.assert_close(found[~found.isnan()], wanted, rtol=1e-4, atol=1e-5)


def test_rows_of_the_same_tokens_and_other_labels_keep_each_its_own(tmp_path):
    (row,) = token_rows(1)
    labelled = [i for i, label in enumerate(row["labels"]) if label != -100]
    halves = [
        row | {"labels": [y if place in kept else -100 for place, y in enumerate(row["labels"])]}
        for kept in (labelled[::2], labelled[1::2])
    ]
    t = tiny_trainer("stm", tmp_path, rows=halves, method_args="threshold=1e9")
    assert t.train_dataset["labels"] == [half["labels"] for half in halves]


def test_examples_are_told_apart_padded_or_packed():
    padded = tiny_batch(rows=2, length=6)
    keys = [key for key, _ in examples_of(padded)]
    lengths = padded["attention_mask"].sum(1).tolist()
    flat = torch.cat([ids[:n] for ids, n in zip(padded["input_ids"], lengths)])[None]
    packed = {"input_ids": flat, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    assert [key for key, _ in examples_of(packed)] == keys
    assert len(set(keys)) == 2
    assert example_of(packed, torch.tensor([0, lengths[0] - 1, lengths[0]])).tolist() == [0, 0, 1]
    assert example_of(padded, torch.tensor([0, 5, 6])).tolist() == [0, 0, 1]


@pytest.mark.parametrize("theta", ["full", "lora"])
def test_psft(tmp_path, theta):
    t = tiny_trainer("psft", tmp_path, theta=theta, method_args="clip=0.1")
    old = token_losses(t.model)[0].detach()
    plain = written_out(t.model, nll(*forward(t.model)[:2]))
    value, found = step_of(t)
    assert value == pytest.approx(-1)
    assert relative_difference(found, plain) < TOLERANCE  # at the old weights it is SFT's
    nudge(t.model)
    ratio = (old - token_losses(t.model)[0]).exp()
    assert 0 < int((ratio > 1.1).sum()) < len(ratio)
    agree(t, -torch.minimum(ratio, ratio.new_full((), 1.1)).mean())


def test_psft_renews_the_old_model_and_a_resumed_run_keeps_it(tmp_path):
    options = dict(dtype=torch.float32, max_steps=5, save_strategy="steps", save_steps=3, method_args="updates=2")
    whole = tiny_trainer("psft", tmp_path / "whole", **options)
    whole.train()
    for name, value in whole.methods[0].state_dict().items():  # of update 4, and there was a fifth
        assert not torch.equal(value, dict(whole.model.named_parameters())[name]), name
    resumed = tiny_trainer("psft", tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, one), (_, two) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        assert torch.equal(one, two), name


def test_asft_is_dft_and_kl(tmp_path):
    found = []
    for method in ("asft", "dft+kl"):
        t = tiny_trainer(method, tmp_path, method_args="weight=0.4")
        nudge(t.model)
        found.append(step_of(t))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert relative_difference(found[0][1], found[1][1]) < 1e-12


def test_a_batch_without_labels_is_no_error(tmp_path):
    empty = tiny_batch()
    empty["labels"] = torch.full_like(empty["labels"], -100)
    for name in ("eaft", "talr", "flow", "psft", "asft"):
        loss, found = step_of(tiny_trainer(name, tmp_path), empty, num_items=5)
        assert loss == 0, name
        assert all(not g.any() for g in found.values())


def test_talr_of_a_row_that_is_known_by_heart():
    batch = type("Batch", (), {"inputs": tiny_batch(), "positions": torch.arange(4)})
    assert TALR().weights(torch.zeros(4), batch).tolist() == [1.0] * 4


def test_they_train(tmp_path):
    with float64():
        for name in ("eaft", "talr", "flow", "psft", "asft"):
            t = tiny_trainer(name, tmp_path, max_steps=1)
            t.train()
            assert math.isfinite(t.state.log_history[0]["loss"])
