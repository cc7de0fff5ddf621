"""Anchor: the texts that the untouched model writes, and the KL to what it said of them."""

from __future__ import annotations

import pytest
import torch
from bench import float64, small_model, step_of, tiny_trainer, written_out
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from test_losses import nudge
from tiny import DEVICE, Float64Throughout, random_states, relative_difference, tiny_batch
from tiny_folder import byte_tokenizer

from lfu.methods.own_text import openings
from lfu.methods.run import Preparation
from lfu.methods.tokens import kl_of_top
from lfu.support.errors import UserError

VOCAB = len(byte_tokenizer())
QUICK = {"texts": 5, "tokens": 6, "batch": 3, "top": VOCAB}


def trainer(folder, method="anchor", theta="full", dtype=torch.float64, knobs=QUICK, **options):
    model = small_model(theta=theta, dtype=dtype, vocab_size=VOCAB)
    args = {f"anchor.{name}": value for name, value in {**knobs, "cache": str(folder / "texts")}.items()}
    return tiny_trainer(method, folder, model=model, method_args=args, **options)


def the(t):
    return next(m for m in t.methods if m.name == "anchor")


def logits_on(model, said, rows):
    ids, mask, labels = (t[rows].to(DEVICE) for t in (said.ids, said.mask, said.labels))
    with Float64Throughout():
        out = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    own = labels[:, 1:] != -100
    return out[:, :-1][own]


@pytest.mark.parametrize("theta", ["full", "lora", "fresh lora"])
def test_value_and_gradient_are_those_of_the_whole_kl(tmp_path, theta):
    fresh = theta == "fresh lora"
    lora = LoraConfig(r=2, target_modules="all-linear") if fresh else None
    t = trainer(tmp_path, theta="full" if fresh else theta, knobs=QUICK | {"weight": 0.3}, peft_config=lora)
    t.model.to(torch.float64)
    said = the(t).said
    start = logits_on(t.model, said, slice(None)).detach().log_softmax(-1)
    nudge(t.model)
    loss, found = step_of(t)
    rows = the(t)._draw(type("B", (), {"trainer": t, "inputs": tiny_batch()}))
    assert len(set(rows.tolist())) == 3
    # every text's own share of the rows of `start`
    counts = (said.labels[:, 1:] != -100).sum(1).tolist()
    r = torch.cat([start.split(counts)[row] for row in rows])
    p = logits_on(t.model, said, rows).log_softmax(-1)
    term = 0.3 * (r.exp() * (r - p)).sum(-1).mean()
    plain = tiny_trainer("sft", tmp_path, model=t.model)
    alone, g = step_of(plain)
    assert loss - alone == pytest.approx(float(term.detach()), rel=1e-5)
    expected = written_out(t.model, term)
    assert relative_difference({n: found[n] - g[n] for n in found}, expected) < 1e-4


def test_on_the_untouched_model_it_is_zero(tmp_path):
    t = trainer(tmp_path, knobs=QUICK | {"top": 8})
    step_of(t)
    assert t._metrics["train"]["anchor/kl"] == [pytest.approx(0, abs=1e-6)]


def test_it_counts_once_per_update(tmp_path):
    t = trainer(tmp_path)
    nudge(t.model)
    alone = tiny_trainer("sft", tmp_path, model=t.model)
    one, four = (step_of(t, accumulate=n)[0] - step_of(alone, accumulate=n)[0] for n in (1, 4))
    assert one == pytest.approx(4 * four, rel=1e-6)
    assert one > 0


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 10**6))
def test_the_top_tokens_give_a_lower_bound_and_all_of_them_the_whole(top, seed):
    g = torch.Generator().manual_seed(seed)
    log_r = torch.randn(4, 9, generator=g, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(4, 9, generator=g, dtype=torch.float64)
    whole = (log_r.exp() * (log_r - logits.log_softmax(-1))).sum(-1)
    best = log_r.topk(top)
    found = kl_of_top(logits, best.indices, best.values)
    assert (found <= whole + 1e-9).all()
    assert (found >= -1e-4).all()
    if top == 9:
        torch.testing.assert_close(found, whole)


def test_a_chat_model_writes_question_and_answer(tmp_path):
    tokenizer = byte_tokenizer()
    before, between = openings(tokenizer, "anchor")
    assert tokenizer.decode(before) == "<|im_start|>user\n"
    assert tokenizer.decode(between) == "<|im_end|>\n<|im_start|>assistant\n"
    said = the(trainer(tmp_path)).said
    for ids, labels, mask in zip(said.ids.tolist(), said.labels.tolist(), said.mask.sum(1).tolist()):
        assert ids[: len(before)] == before
        own = [i for i, label in enumerate(labels) if label != -100]
        assert own[0] >= len(before)
        assert 1 <= len(own) <= 6
        assert all(labels[i] == ids[i] for i in own)
        assert own[-1] == mask - 1
        assert tokenizer.decode(ids[:mask]).count("<|im_start|>assistant") == 1


def test_a_base_model_begins_with_bos_or_else_eos():
    tokenizer = byte_tokenizer(chat=False)
    assert openings(tokenizer, "anchor") == ([tokenizer.bos_token_id], [])
    tokenizer.bos_token = None
    assert openings(tokenizer, "anchor") == ([tokenizer.eos_token_id], [])


def test_texts_are_written_once_for_a_model_and_its_settings(tmp_path, capsys):
    first = the(trainer(tmp_path)).said
    assert "anchor: the untouched model writes 5 texts" in capsys.readouterr().err
    again = the(trainer(tmp_path)).said
    assert "writes" not in capsys.readouterr().err
    for name in vars(first):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    trainer(tmp_path, seed=8)
    trainer(tmp_path, knobs=QUICK | {"tokens": 5})
    assert len(list((tmp_path / "texts").glob("*.safetensors"))) == 3


def test_writing_leaves_the_random_state_alone_and_a_cut_off_file_is_written_anew(tmp_path):
    torch.manual_seed(1)
    expected = random_states()
    t = trainer(tmp_path / "a")
    torch.manual_seed(1)
    the(t).adapter(None, Preparation(t.model, t.processing_class, t.args, print))
    assert random_states() == expected
    (path,) = (tmp_path / "a" / "texts").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    assert torch.equal(the(trainer(tmp_path / "a")).said.ids, the(t).said.ids)


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "texts").write_text("x")
    with pytest.raises(UserError, match=r"anchor can't keep its texts in .*--method_args anchor\.cache=FOLDER"):
        trainer(tmp_path)


def test_a_resumed_run_is_the_same(tmp_path):
    options = dict(dtype=torch.float32, max_steps=4, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2,
                   per_device_train_batch_size=1)  # fmt: skip
    whole = trainer(tmp_path, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = trainer(tmp_path, output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), (_, two) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("spec", ["lfu+anchor", "lfu_reps+anchor", "sam+anchor", "anchor+kl", "eaft+anchor"])
def test_it_joins_other_methods(tmp_path, spec):
    t = trainer(tmp_path, spec)
    nudge(t.model)
    found = []
    with float64():
        for weight in (0.0, 1.0):
            the(t).weight = weight
            found.append(step_of(t)[1])
    assert all(g.isfinite().all() for g in found[1].values())
    assert relative_difference(*found) > 1e-6
