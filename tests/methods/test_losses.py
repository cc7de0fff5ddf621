"""The methods that change the loss or the step, each against its equation written out in plain torch, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from bench import float64, forward, small_model, step_of, tiny_trainer, written_out
from peft import LoraConfig
from tiny import DEVICE, gradients, relative_difference, tiny_batch

THETA = ["full", "lora", "dora", "subset"]
TOLERANCE = 1e-9


def agree(trainer, value, expected, batch=None):
    loss, found = step_of(trainer, batch)
    assert loss == pytest.approx(float(value.detach()), rel=1e-10)
    assert relative_difference(found, expected) < TOLERANCE


def nll(logits, labels):
    return -logits.log_softmax(-1)[range(len(labels)), labels].mean()


@pytest.mark.parametrize("theta", THETA)
def test_sft(tmp_path, theta):
    t = tiny_trainer("sft", tmp_path, theta=theta)
    logits, labels, _ = forward(t.model)
    loss = nll(logits, labels)
    agree(t, loss, written_out(t.model, loss))


@pytest.mark.parametrize(
    ("theta", "beta", "h"),
    [
        ("full", 0.7, "linear"), ("full", 1.0, "linear"), ("full", 0.5, "logsigmoid"),
        ("lora", 0.7, "linear"), ("dora", 0.5, "logsigmoid"), ("subset", 1.0, "linear"),
    ],
)  # fmt: skip
def test_gem(tmp_path, theta, beta, h):
    t = tiny_trainer("gem", tmp_path, theta=theta, method_args={"beta": beta, "h": h})
    logits, labels, _ = forward(t.model)
    total = 0.0
    for z, y in zip(logits, labels):  # one token at a time, as the paper writes it
        p = torch.exp(z) / torch.exp(z).sum()
        q = (torch.exp(z / beta) / torch.exp(z / beta).sum()).detach()
        w = 1.0 if h == "linear" else 1 / (1 + torch.exp(-0.01 * (z - z[y]))).detach()
        total = total - (q * w * (torch.log(p[y]) - torch.log(p))).sum()
    loss = total / len(labels)
    agree(t, loss, written_out(t.model, loss))


def test_gem_at_beta_one_has_the_gradient_of_cross_entropy_and_its_own_value(tmp_path):
    """beta = 1, linear: grad of E_q[log p] at q = p is zero, so what is left is the cross-entropy's gradient."""
    t = tiny_trainer("gem", tmp_path, method_args="beta=1")
    plain = tiny_trainer("sft", tmp_path)
    (value, ours), (likelihood, theirs) = step_of(t), step_of(plain)
    assert relative_difference(ours, theirs) < TOLERANCE
    assert value != pytest.approx(likelihood)


@pytest.mark.parametrize("theta", THETA)
def test_dft(tmp_path, theta):
    t = tiny_trainer("dft", tmp_path, theta=theta)
    logits, labels, _ = forward(t.model)
    log_p = logits.log_softmax(-1)[range(len(labels)), labels]
    loss = -(log_p.exp().detach() * log_p).mean()
    agree(t, loss, written_out(t.model, loss))


@pytest.mark.parametrize(
    ("theta", "name", "anchor"),  # every pair of two values
    [
        (theta, name, ("zero", "start")[(i + j) % 2])
        for i, theta in enumerate(THETA)
        for j, name in enumerate(("l1", "l2"))
    ],
)
def test_feature_penalties(tmp_path, theta, name, anchor):
    t = tiny_trainer(name, tmp_path, theta=theta, method_args={"weight": 0.3, "anchor": anchor})
    anchors = [h.detach() for h in forward(t.model)[2]]
    nudge(t.model)
    logits, labels, hidden = forward(t.model)
    moved = [h - a if anchor == "start" else h for h, a in zip(hidden, anchors)]
    loss = nll(logits, labels) + 0.3 * sum((h.abs() ** int(name[1])).mean() for h in moved) / len(moved)
    agree(t, loss, written_out(t.model, loss))


@pytest.mark.parametrize(
    ("theta", "direction"),
    [
        ("full", "forward"), ("full", "reverse"), ("fresh lora", "forward"), ("fresh lora", "reverse"),
        ("lora", "forward"), ("dora", "reverse"), ("subset", "forward"), ("fresh dora", "reverse"),
    ],
)  # fmt: skip
def test_kl(tmp_path, theta, direction):
    fresh = theta.startswith("fresh")
    lora = LoraConfig(r=2, target_modules="all-linear", use_dora="dora" in theta) if fresh else None
    t = tiny_trainer(
        "kl", tmp_path, theta="full" if fresh else theta, peft_config=lora,
        method_args={"weight": 0.4, "direction": direction},
    )  # fmt: skip
    t.model.to(torch.float64)  # PEFT makes its adapters in float32
    untouched = forward(t.model)[0].detach().log_softmax(-1)
    assert t.methods[0].untouched.adapter_off == fresh
    nudge(t.model)
    logits, labels, _ = forward(t.model)
    log_p = logits.log_softmax(-1)
    one, two = (untouched, log_p) if direction == "forward" else (log_p, untouched)
    loss = nll(logits, labels) + 0.4 * (one.exp() * (one - two)).sum() / len(labels)
    agree(t, loss, written_out(t.model, loss))


def test_kl_is_zero_on_the_untouched_model_and_leaves_what_is_frozen_frozen(tmp_path):
    t = tiny_trainer("kl", tmp_path, peft_config=LoraConfig(r=2, target_modules="all-linear"))
    frozen = next(p for n, p in t.model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    step_of(t)
    assert t._metrics["train"]["kl/value"] == [pytest.approx(0, abs=1e-12)]
    assert not frozen.requires_grad
    assert t.model.training


def test_kl_keeps_no_copy_of_the_weights_for_a_fresh_adapter(tmp_path):
    fresh = tiny_trainer("kl", tmp_path, peft_config=LoraConfig(r=2, target_modules="all-linear"))
    assert fresh.methods[0].untouched.start == {}
    assert tiny_trainer("kl", tmp_path).methods[0].untouched.start


@pytest.mark.parametrize("name", ["gem", "kl", "l1", "l2", "dft", "eaft", "flow", "psft"])
def test_micro_batches_add_up_to_the_whole_batch(tmp_path, name):
    """Token sums over the labelled tokens of the update: four micro-batches and one batch of all rows agree."""
    t = tiny_trainer(name, tmp_path)
    nudge(t.model)
    batch = tiny_batch(rows=4)
    items = int((batch["labels"][:, 1:] != -100).sum())
    _, whole = step_of(t, batch)
    parts = None
    for row in range(4):
        _, g = step_of(t, {k: v[row : row + 1] for k, v in batch.items()}, accumulate=4, num_items=items)
        parts = g if parts is None else {n: parts[n] + g[n] for n in g}
    assert relative_difference(parts, whole) < TOLERANCE


@pytest.mark.parametrize("theta", THETA)
def test_sam(tmp_path, theta):
    t = tiny_trainer("sam", tmp_path, theta=theta, method_args="rho=0.3")
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    loss = nll(*forward(t.model)[:2])
    g = written_out(t.model, loss)
    length = torch.sqrt(sum((x**2).sum() for x in g.values()))
    found_loss, found = step_of(t)
    assert {n for n, p in t.model.named_parameters() if not torch.equal(p, before[n])} == set()
    with torch.no_grad():
        for n, p in t.model.named_parameters():
            if n in g:
                p.add_(0.3 * g[n] / length)
    worst = nll(*forward(t.model)[:2])
    assert found_loss == pytest.approx(float(loss.detach()), rel=1e-10)
    assert relative_difference(found, written_out(t.model, worst)) < TOLERANCE
    assert t._metrics["train"]["sam/worst_loss"] == [pytest.approx(float(worst.detach()), rel=1e-10)]
    assert float(worst.detach()) > float(loss.detach())


def test_sam_adds_to_the_gradients_of_earlier_micro_batches(tmp_path):
    t = tiny_trainer("sam", tmp_path)
    one, two = tiny_batch(0), tiny_batch(1)
    items = 30
    _, first = step_of(t, one, accumulate=2, num_items=items)
    _, second = step_of(t, two, accumulate=2, num_items=items)
    t.model.zero_grad()
    with float64():
        for batch in (one, two):
            t.training_step(t.model, dict(batch), num_items_in_batch=items)
    both = {n: first[n] + second[n] for n in first}
    assert relative_difference(gradients(t.model), both) < TOLERANCE


def test_sam_shares_dropout_masks_and_counts_the_tokens_once(tmp_path):
    model = small_model(dtype=torch.float64, attention_dropout=0.5)
    found = []
    for rho in (1e-9, None):  # with a tiny step SAM's second pass is the first, masks and all
        t = tiny_trainer("sft" if rho is None else "sam", tmp_path, model=copy.deepcopy(model),
                         method_args=None if rho is None else f"rho={rho}")  # fmt: skip
        torch.manual_seed(3)
        found.append((step_of(t)[1], t._total_train_tokens))
    assert relative_difference(found[0][0], found[1][0]) < 1e-6
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(
    ("theta", "spec"),
    [*[(theta, "lfu+kl") for theta in THETA], ("lora", "lfu+gem"), ("subset", "sam+kl"), ("full", "lfu_reps+l2")],
)
def test_terms_of_the_loss_join_a_step_of_two_passes(tmp_path, theta, spec):
    """lfu+kl: the gradient is LfU's with the KL's added to the loss it ascends on and descends from."""
    t = tiny_trainer(spec, tmp_path, theta=theta)
    nudge(t.model)
    _, combined = step_of(t)
    alone = {name: step_of_same(tiny_trainer(name, tmp_path, theta=theta), t.model) for name in spec.split("+")}
    for g in alone.values():
        assert relative_difference(combined, g) > 1e-6  # neither part is lost


def step_of_same(trainer, model):
    trainer.model.load_state_dict(model.state_dict())
    return step_of(trainer)[1]


def test_a_batch_without_labels_is_no_error(tmp_path):
    empty = tiny_batch()
    empty["labels"] = torch.full_like(empty["labels"], -100)
    for name in ("gem", "kl", "l1", "l2", "sam", "dft"):
        loss, found = step_of(tiny_trainer(name, tmp_path), empty, num_items=5)
        assert loss == 0
        assert all(not g.any() for g in found.values())


def nudge(model):
    """Moves theta a little, so that it is not where it started."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(DEVICE))
