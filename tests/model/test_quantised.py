"""QLoRA: theta is a LoRA adapter on a base whose linear layers hold 4 bits a weight (bitsandbytes, on a CPU too)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import gradients, tiny_batch
from tiny_folder import save_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lfu import LfUStep
from lfu.cli import main
from lfu.model.loading import load_model
from lfu.model.rng import generators
from lfu.undesirable import KINDS

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """Rows of 64 weights, a whole block of NF4 each."""
    return save_model(tmp_path_factory.mktemp("base"), hidden_size=64, head_dim=16, intermediate_size=128)


def adapted(model):
    """With a float32 adapter that has left its zero; the same numbers on each call."""
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return model.train()


def quantised(base: str, dtype: torch.dtype = torch.float32):
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return adapted(AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=how))


def dequantised(base: str):
    """The model that the 4 bits stand for, in float32."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    four = quantised(base).get_base_model()
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = four.get_submodule(name).base_layer.weight
            module.weight.data = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return adapted(plain)


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_auxiliary_changes_no_bit(base, kind):
    """With bf16 arithmetic round a float32 adapter, as QLoRA is trained."""
    model, batch = quantised(base, torch.bfloat16), tiny_batch()
    step = LfUStep(model, auxiliary=kind)
    before = logits(model, batch)
    auxiliary = step.auxiliary
    auxiliary.reset(generators(0, 0))
    with auxiliary.attached():
        assert torch.equal(logits(model, batch), before)
    auxiliary.discard()
    record = step(batch)
    assert record.skipped is None
    assert record.gradient_ratio > 0
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_that_four_bits_are_multiplied_in_is_the_resolution(base, dtype):
    """Of hidden states that are float32: an alpha below it moves nothing but rounding, and the advice says so."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
    model = adapted(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=how))
    record = LfUStep(model)(tiny_batch())
    assert record.resolution == torch.finfo(dtype).eps


@pytest.mark.parametrize("options", [{"auxiliary": kind} for kind in KINDS] + [{"consistency": "logit_kl"}], ids=str)
def test_the_step_is_that_of_the_dequantised_weights(base, options):
    found, wanted, batch = quantised(base), dequantised(base), tiny_batch()
    ours, theirs = (LfUStep(model, **options)(batch) for model in (found, wanted))
    assert ours.displacement == pytest.approx(theirs.displacement, rel=1e-4)
    ours, theirs = gradients(found), gradients(wanted)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_lfu_train_on_four_bits_saves_an_adapter_that_loads(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"question": "q", "answer": "a b"}\n' * 4)
    words = (
        "--load_in_4bit --max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "
        "--learning_rate 0.1 --report_to none"
    )
    assert main(["train", "--model", base, "--data", "rows.jsonl", "--output_dir", "out", *words.split()]) == 0
    saved = load_file("out/adapter_model.safetensors")
    assert all("lora_" in name for name in saved)
    assert all(bool(value.isfinite().all()) for value in saved.values())
    assert any(float(value.abs().max()) > 0 for name, value in saved.items() if "lora_B" in name)
    model, _ = load_model("out")
    assert isinstance(model, PeftModel)
    loaded = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
