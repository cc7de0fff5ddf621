"""Getting a model: folders, adapters, the embedded default with its cache, and what is said when there is none."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_folder import byte_tokenizer, save_model
from transformers import FalconConfig, GPT2Config, LlamaConfig

from lfu.model import loading as models
from lfu.model.loading import load_model, load_tokenizer
from lfu.support.errors import UserError


@pytest.fixture
def full(tmp_path):
    return save_model(tmp_path / "full")


@pytest.fixture
def adapter(tmp_path, full):
    model = get_peft_model(load_model(full)[0], LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_full_model(full):
    model, tokenizer = load_model(full)
    assert model.dtype is torch.float32
    assert tokenizer.eos_token == "<|im_end|>"
    assert load_model(full, dtype="bfloat16")[0].dtype is torch.bfloat16


def test_an_adapter_brings_its_base(adapter, full):
    model, tokenizer = load_model(str(adapter))
    assert isinstance(model, PeftModel)
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.chat_template  # the base's: the adapter folder holds none
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(ids).logits, load_model(full)[0](ids).logits)
    trainable, _ = load_model(str(adapter), trainable=True)
    assert {n.split(".")[-3] for n, p in trainable.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_an_adapters_own_tokenizer_comes_first(adapter):
    byte_tokenizer(chat=False).save_pretrained(adapter)
    assert load_tokenizer(str(adapter)).chat_template is None
    assert load_model(str(adapter))[1].chat_template is None


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize(
    ("name", "message"),
    [("{}/nowhere/at/all", "does not exist"), ("nobody/no-such-model", "can't be loaded"), ("{}/file", "not a folder")],
)
def test_no_such_model(tmp_path, name, message, load):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=message):
        load(name.format(tmp_path))


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="can't be loaded"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_adapter_configuration(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "made_for", "ends"),
    [
        (GPT2Config(n_positions=48), 48, True),
        (LlamaConfig(max_position_embeddings=64), 64, False),
        (LlamaConfig(max_position_embeddings=64, rope_parameters={
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4
        }), 256, False),
        (FalconConfig(alibi=True), None, False),
    ],
    ids=["a table", "rotary", "rotary, stretched", "none"],
)  # fmt: skip
def test_how_many_tokens_a_model_was_made_for(tmp_path, config, made_for, ends):
    config.save_pretrained(tmp_path)
    assert models.context_length(str(tmp_path)) == (made_for, ends)


def test_an_encoder_decoder_is_refused_in_one_line(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=16, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"is not a decoder-only language model: LfU can't train encoder-decoders \(T5\)"
    ):
        load_model(str(tmp_path))
