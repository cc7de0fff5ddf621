"""EWC: the Fisher information of the model's own texts, and the pull in its metric."""

from __future__ import annotations

import shutil

import pytest
import torch
from bench import float64, small_model, step_of, tiny_trainer, written_out
from test_losses import nudge
from tiny import DEVICE, Float64Throughout, relative_difference
from tiny_folder import byte_tokenizer

from lfu.support.errors import UserError

VOCAB = len(byte_tokenizer())


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setenv("LFU_CACHE", str(tmp_path / "cache"))

    def make(theta="full", **knobs):
        model = small_model(theta=theta, vocab_size=VOCAB)
        with float64():
            return tiny_trainer("ewc", tmp_path, model=model, method_args={"texts": 4, "tokens": 6, **knobs})

    return make


def fisher_by_hand(model, said):
    """Name -> F: squared gradients of each text's own tokens, summed over texts; then of mean 1."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    for ids, labels, mask in zip(*(t.to(DEVICE) for t in (said.ids, said.labels, said.mask))):
        with Float64Throughout():
            log_p = model(input_ids=ids[None], attention_mask=mask[None]).logits[0, :-1].log_softmax(-1)
        own = labels[1:] != -100
        value = log_p[own].gather(-1, labels[1:][own][:, None]).sum()
        for name, g in zip(named, torch.autograd.grad(value, list(named.values()), allow_unused=True)):
            total[name] += 0 if g is None else g**2
    mean = torch.cat([t.flatten() for t in total.values()]).mean()
    return {n: t / mean for n, t in total.items()}


@pytest.mark.parametrize("theta", ["full", "subset"])
def test_value_and_gradient(made, theta):
    t = made(theta, weight=0.3)
    model = t.model.eval()
    fisher = fisher_by_hand(model, t.methods[0].said)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if n in fisher}
    nudge(model)
    found = step_of(t)
    term = 0.15 * sum((fisher[n] * (p - start[n]) ** 2).sum() for n, p in model.named_parameters() if n in fisher)
    t.methods[0].weight = 0.0
    alone = step_of(t)
    assert found[0] - alone[0] == pytest.approx(float(term.detach()), rel=1e-6)
    change = {n: found[1][n] - alone[1][n] for n in found[1]}
    assert relative_difference(change, written_out(model, term)) < 1e-6


def test_auto_pulls_in_the_metric(made):
    t = made(share=0.4)
    fisher = fisher_by_hand(t.model.eval(), t.methods[0].said)
    named = dict(t.model.named_parameters())
    start = {n: p.detach().clone() for n, p in named.items()}
    nudge(t.model)
    t.state.global_step, t.state.max_steps = 30, 60
    for p in named.values():
        p.grad = torch.ones_like(p)
    t.methods[0].before_update(t)
    pull = {n: p.grad - 1 for n, p in named.items()}
    wanted = {n: fisher[n] * (p.detach() - start[n]) for n, p in named.items()}
    size = lambda each: float(torch.linalg.vector_norm(torch.cat([v.flatten() for v in each.values()])))
    assert size(pull) == pytest.approx(0.2 * sum(p.numel() for p in named.values()) ** 0.5)
    scale = size(pull) / size(wanted)
    assert relative_difference(pull, {n: scale * v for n, v in wanted.items()}) < 1e-6


def test_messages_are_its_own(made, tmp_path, capsys):
    """It has the texts of anchor, and none of its knobs."""
    made()
    assert "ewc: the untouched model writes 4 texts" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("x")
    with pytest.raises(UserError, match=r"ewc can't keep its texts in .*that can be written to, LFU_CACHE=FOLDER"):
        made()


def test_lora_is_refused(made):
    with pytest.raises(ValueError, match=r"'ewc' weighs single weights: train all weights .* or use l2sp"):
        made("lora")


def test_it_trains(made):
    t = made()
    with float64():
        t.train()
    assert t._total_train_tokens > 0
