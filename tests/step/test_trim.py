"""The second pass without padding: the same states at the compared positions, whatever the shape of the batch."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from tiny import DEVICE, VOCAB, Float64Throughout, gradients, relative_difference, tiny_batch, tiny_model
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lfu import LfUStep
from lfu.model.anatomy import anatomy
from lfu.model.representations import answer_positions
from lfu.model.rng import generators
from lfu.model.row_attention import attention_in
from lfu.step import second_pass
from lfu.step.pieces import Rows
from lfu.step.step import sft_loss
from lfu.step.trim import PACKS, trimmed
from lfu.undesirable import LoRA

SMALL = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    num_experts=2, num_local_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, sliding_window=4,
    shared_expert_intermediate_size=8,
)  # fmt: skip


def ragged(lengths, width=24, answer=3, seed=0):
    """Right-padded rows of these lengths, the last `answer` tokens of each labelled."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=g).to(DEVICE)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, n in enumerate(lengths):
        ids[i, n:], mask[i, :n] = 0, 1
        labels[i, n - min(answer, n) : n] = ids[i, n - min(answer, n) : n]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def states(model, batch, where, rows=None):
    with attention_in(rows, model.config.get_text_config()):
        out = model.base_model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)[0]
    return out.flatten(0, 1)[where]


def both(model, batch):
    """The last layer's states at the compared positions: of the whole batch, and of the trimmed one."""
    where = answer_positions(batch["labels"])
    small, there, rows = trimmed(batch, where, anatomy(model))
    with Float64Throughout() if model.dtype == torch.float64 else nullcontext(), torch.no_grad():
        return states(model, batch, where), states(model, small, there, rows), small


@pytest.mark.parametrize("kind", sorted(PACKS))
def test_every_family_in_the_list_packs(kind):
    """One long row among short ones: one sequence, the same states. sliding_window=4 cuts inside the rows."""
    config = transformers.AutoConfig.for_model(kind, **SMALL)
    config.use_sliding_window = True
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    experts = any("experts" in name for name, _ in model.named_modules())
    model = (model.float() if experts else model.double()).to(DEVICE)  # grouped_mm has no float64
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    want, got, small = both(model, ragged([24, 6, 5, 7]))
    assert small["input_ids"].shape == (1, 24 + 6 + 5 + 7 - 4)  # the last token of a row predicts nothing
    assert "attention_mask" not in small
    torch.testing.assert_close(got, want, **(dict(rtol=1e-4, atol=1e-5) if experts else dict(rtol=1e-9, atol=1e-11)))


def _left(batch):
    """Left-padded rows of the same content."""
    rolled = {k: v.clone() for k, v in batch.items()}
    for i, n in enumerate(batch["attention_mask"].sum(1).tolist()):
        for k in rolled:
            rolled[k][i] = batch[k][i].roll(-n)
    return rolled


def _shapes(name):
    batch = ragged([9, 7, 8], width=16)
    long = {k: torch.cat([v, v.new_full((3, 4), -100 if k == "labels" else 0)], 1) for k, v in batch.items()}
    numbered = torch.arange(16, device=DEVICE).expand(3, -1)
    none = torch.full_like(batch["labels"][1], -100)
    return {
        "right": batch,
        "tail": long,
        "left": _left(batch),
        "left, positions given": {**_left(batch), "position_ids": numbered - 7},
        "right, positions given": {**batch, "position_ids": numbered},
        "no mask": {k: v for k, v in batch.items() if k != "attention_mask"},
        "packed": {
            "input_ids": batch["input_ids"][:1], "labels": batch["labels"][:1],
            "position_ids": torch.tensor([[*range(4), *range(12)]], device=DEVICE),
        },
        "a row without an answer": {**batch, "labels": torch.stack([batch["labels"][0], none, batch["labels"][2]])},
        "one row": {k: v[:1] for k, v in batch.items()},
    }[name]  # fmt: skip


SHAPES = [
    "right", "tail", "left", "left, positions given", "right, positions given", "no mask", "packed",
    "a row without an answer", "one row",
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_shapes(family, shape):
    batch = _shapes(shape)
    if "positions" in shape and family == "gpt2":
        batch["position_ids"] = batch["position_ids"].clamp(min=0)
    want, got, small = both(tiny_model(family, attn_implementation="sdpa").eval(), batch)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    assert small["input_ids"].numel() < batch["input_ids"].numel()


@given(st.lists(st.integers(2, 16), min_size=1, max_size=5), st.integers(1, 4), st.booleans(), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_any_lengths(lengths, answer, left, seed):
    batch = ragged(lengths, width=16, answer=answer, seed=seed)
    batch = _left(batch) if left else batch
    want, got, _ = both(_model(), batch)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


_kept: list = []


def _model():
    if not _kept:
        _kept.append(tiny_model("llama", attn_implementation="sdpa").eval())
    return _kept[0]


CASES = [
    *[  # every pair of family, theta and auxiliary
        (family, ("full", "lora")[(i + j) % 2], auxiliary, "packed")
        for i, family in enumerate(["llama", "qwen", "mistral", "gpt2"])
        for j, auxiliary in enumerate(["lora", "steering", "own"])
    ],
    ("llama", "full", "lora", "left"), ("gpt2", "lora", "steering", "left"), ("qwen", "full", "own", "left"),
    ("llama", "lora", "lora", "cut"), ("gpt2", "full", "own", "cut"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "theta", "auxiliary", "form"), CASES)
def test_the_step_is_the_oracle_on_a_trimmed_batch(family, theta, auxiliary, form):
    model = tiny_model(family, theta=theta, attn_implementation="eager" if form == "cut" else "sdpa")
    batch = _left(ragged([9, 7], width=16)) if form in ("left", "cut") else ragged([20, 5, 4, 6], width=22)
    step = LfUStep(model, auxiliary=LoRA(rank=3) if auxiliary == "lora" else auxiliary)
    small, *_ = trimmed(batch, answer_positions(batch["labels"]), step.anatomy)
    assert small["input_ids"].shape == {"left": (1, 14), "cut": (2, 8)}.get(form, (1, 31))
    a = None
    if auxiliary == "lora":
        step.auxiliary.reset(generators(step.settings.seed, 0))
        a = [pair[0].clone() for pair in step.auxiliary.pairs]
    oracle = Oracle(model, auxiliary=auxiliary, alpha=0.1, lam=5.0, consistency="mse", layers=[1, 2, 3, 4])
    with Float64Throughout():
        step(batch)
        want = oracle(batch, a_matrices=a)["grads"]
    assert relative_difference(gradients(model), want) < 1e-10


@pytest.mark.parametrize("auxiliary", ["lora", "own"])
def test_checkpointed_blocks_attend_in_the_same_rows(auxiliary):
    """They run again in the backward."""
    found = []
    for checkpointing in (False, True):
        model = tiny_model("mistral", attn_implementation="sdpa")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        LfUStep(model, auxiliary=auxiliary)(ragged([20, 5, 4, 6], width=22))
        found.append(gradients(model))
    assert relative_difference(*found) < 1e-12


def test_the_attention_comes_back_after_an_error():
    model = tiny_model("llama", attn_implementation="sdpa")
    step = LfUStep(model)
    step.reader.run = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        step(ragged([20, 5, 4, 6], width=22))
    assert model.config._attn_implementation == "sdpa"
    model(**ragged([20, 5], width=22))  # and the model works


@pytest.mark.parametrize("consistency", ["contrastive", "logit_kl"])
def test_chunks_change_nothing(monkeypatch, consistency):
    found = []
    for chunk in (2**24, 3 * VOCAB):
        monkeypatch.setattr("lfu.step.consistency.CHUNK", chunk)
        model = tiny_model("llama")
        with Float64Throughout():
            LfUStep(model, consistency=consistency)(tiny_batch())
        found.append(gradients(model))
    assert relative_difference(*found) < 1e-12


def test_dropout_keeps_the_shape(monkeypatch):
    """Its masks belong to a shape: the second pass sees the whole batch, and with alpha to 0 the same states."""
    shapes = []
    for dropout in (0.0, 0.3):
        model = tiny_model("gpt2", resid_pdrop=dropout, dtype=torch.float32, attn_implementation="sdpa")
        step = LfUStep(model, alpha=1e-30)
        run = step.reader.run
        monkeypatch.setattr(step.reader, "run", lambda b, run=run: (shapes.append(b["input_ids"].shape), run(b)))
        record = step(ragged([9, 7, 8], width=16))
        assert max(record.displacement.values()) < 1e-5
    assert shapes == [(1, 21), (3, 16)]


def test_the_second_batch_is_made_before_the_first_forward(monkeypatch):
    """It reads numbers off the device, which then has nothing else to finish."""
    seen = []
    monkeypatch.setattr("lfu.step.second_pass.trimmed", lambda *a: (seen.append("trimmed"), trimmed(*a))[1])
    loss = lambda *a: (seen.append("loss"), sft_loss(*a))[1]
    LfUStep(tiny_model("llama", dtype=torch.float32), loss_fn=loss)(ragged([9, 7, 8], width=16))
    assert seen == ["trimmed", "loss"]


@pytest.mark.parametrize(
    "why", ["packed by TRL", "dynamic rope", "not causal", "4-d mask", "a compared token is masked", "trim=False"]
)
def test_what_is_not_safe_stays_whole(why):
    model = tiny_model("llama", dtype=torch.float32)
    batch = ragged([9, 7, 8], width=16)
    where = answer_positions(batch["labels"])
    if why == "packed by TRL":  # its bounds are tensors of their own; and it has one token to cut
        rows = [{"input_ids": list(range(3, 3 + n)), "labels": [-100, *range(4, 3 + n)]} for n in (9, 7)]
        batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
        if "cu_seq_lens_q" not in batch:
            pytest.skip("this TRL writes no bounds")
        assert {"seq_idx", "position_ids"} <= batch.keys()
        where = answer_positions(batch["labels"])
        assert where[-1] == batch["input_ids"].shape[1] - 2
    elif why == "dynamic rope":
        model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    elif why == "not causal":
        model.config.is_causal = False
    elif why == "4-d mask":
        batch["attention_mask"] = torch.ones(3, 1, 16, 16, device=DEVICE)
    elif why == "a compared token is masked":
        batch["attention_mask"][0, 7] = 0
    else:
        assert second_pass.smaller(LfUStep(model, trim=False), Rows(batch, where, {}))[0] is batch
        return
    small, there, _ = trimmed(batch, where, anatomy(model))
    assert small["input_ids"] is batch["input_ids"]
    assert there is where
