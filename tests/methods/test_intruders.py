"""Intruder dimensions against the paper's equation in numpy; one ordinary adapter is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bench import logits, small_model, tiny_trainer
from peft import LoraConfig, PeftModel

from lfu.methods import methods_of
from lfu.methods.intruders import reduce_intruder_dimension

NEW = pytest.mark.skipif(reduce_intruder_dimension is None, reason="PEFT has it from 0.20 on")
LORA = dict(r=2, lora_alpha=4, target_modules="all-linear")


def model(dtype=torch.float64):
    return small_model(dtype=dtype, tie_word_embeddings=False)


def trainer(folder, dtype=torch.float64, lora=LORA, **options):
    return tiny_trainer("intruders", folder, model=model(dtype), peft_config=LoraConfig(**lora), **options)


def changes(of):
    """layer -> (W0, s B A), as numpy arrays."""
    layers = {n: m for n, m in of.named_modules() if "default" in getattr(m, "lora_A", {})}
    array = lambda t: t.detach().cpu().numpy().copy()
    return {n: (array(m.get_base_layer().weight), array(m.get_delta_weight("default"))) for n, m in layers.items()}


def make_intruders(t):
    """A large random change in every layer: directions that the old weights do not have."""
    for name, p in t.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=2.0)


def equation(W, change, strength, top_k, threshold):
    old = np.linalg.svd(W, full_matrices=False)[0]
    U, S, Vt = np.linalg.svd(W + change, full_matrices=False)
    intruders = [i for i in range(min(top_k, len(S))) if max(abs(U[:, i] @ old)) < threshold]
    wanted = change + (strength - 1) * sum((S[i] * np.outer(U[:, i], Vt[i]) for i in intruders), np.zeros_like(W))
    u, s, vt = np.linalg.svd(wanted, full_matrices=False)
    return (u[:, :2] * s[:2]) @ vt[:2], len(intruders)  # the best approximation of the adapter's rank, 2


@NEW
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("knobs", [{}, {"strength": 0.0, "top_k": 3, "threshold": 0.7}])
def test_intruders_are_made_smaller(tmp_path, knobs, rslora):
    t = trainer(tmp_path, lora=LORA | dict(use_rslora=rslora), method_args=knobs or None)
    make_intruders(t)
    before, settings = changes(t.model), {"strength": 0.75, "top_k": 10, "threshold": 0.5} | knobs
    t.finish()
    found = changes(t.model)
    expected = {name: equation(W, change, **settings) for name, (W, change) in before.items()}
    for name, (W, change) in found.items():
        np.testing.assert_array_equal(W, before[name][0])
        np.testing.assert_allclose(change, expected[name][0], rtol=0, atol=1e-8)
    count = sum(number for _, number in expected.values())
    assert count > 3
    layers = sum(number > 0 for _, number in expected.values())
    assert t.notes[-1].startswith(f"intruders: {count} found in {layers} layers")


@NEW
def test_without_intruders_nothing_changes(tmp_path):
    plain = tiny_trainer("sft", tmp_path, model=model(), peft_config=LoraConfig(**LORA), learning_rate=1e-4)
    plain.train()
    t = trainer(tmp_path, learning_rate=1e-4, method_args={"threshold": 0.1})
    t.train()
    assert t.notes[-1].startswith("intruders: none found")
    for (name, one), (_, two) in zip(plain.model.named_parameters(), t.model.named_parameters()):
        assert torch.equal(one, two), name


@NEW
def test_one_ordinary_adapter_is_left(tmp_path):
    t = trainer(tmp_path, torch.float32)
    names = {n: (tuple(p.shape), p.requires_grad, p.dtype) for n, p in t.model.named_parameters()}
    make_intruders(t)
    before = logits(t.model)
    t.finish()
    assert {n: (tuple(p.shape), p.requires_grad, p.dtype) for n, p in t.model.named_parameters()} == names
    assert (list(t.model.peft_config), t.model.active_adapters) == (["default"], ["default"])
    t.save_model(str(tmp_path / "saved"))
    assert not [entry.name for entry in (tmp_path / "saved").iterdir() if entry.is_dir()]
    after = logits(t.model)
    loaded = PeftModel.from_pretrained(model(torch.float32), str(tmp_path / "saved"))
    assert torch.equal(logits(loaded), after)
    assert not torch.allclose(before, after, atol=1e-2)
    t.train()  # and it can be trained further


@NEW
def test_bf16_weights(tmp_path):
    t = trainer(tmp_path, torch.bfloat16)
    make_intruders(t)
    t.finish()
    assert all(torch.isfinite(p).all() for p in t.model.parameters())
    assert not t.notes[-1].startswith("intruders: none")


@NEW
@pytest.mark.parametrize(("options", "message"), [
    ({}, "mends LoRA adapters: train one"),
    ({"theta": "dora"}, "not Dora"),
])  # fmt: skip
def test_other_thetas_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer("intruders", tmp_path, **options)


@NEW
def test_transposed_and_quantised_weights_are_refused(tmp_path):
    base = small_model("gpt2", dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(ValueError, match="holds its weight transposed"):
        tiny_trainer("intruders", tmp_path, model=base, peft_config=config)
    quantised = model()
    quantised.quantization_method = "bitsandbytes"
    with pytest.raises(ValueError, match="quantised"):
        tiny_trainer("intruders", tmp_path, model=quantised, peft_config=LoraConfig(**LORA))


@pytest.mark.parametrize("other", ["osf", "corda", "ema", "wise"])
def test_what_it_cannot_be_combined_with(other):
    with pytest.raises(ValueError, match="can't be combined"):
        methods_of(f"intruders+{other}")


def test_an_older_peft_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("lfu.methods.intruders.reduce_intruder_dimension", None)
    with pytest.raises(ValueError, match="needs PEFT"):
        trainer(tmp_path)
