"""`lfu export`: the merged model computes what the adapter on its base computes, and nothing is half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_folder import save_model

from lfu.cli import main
from lfu.model.loading import load_model


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(load_model(save_model(tmp_path / "base"))[0], LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained("adapter")
    return Path("adapter")


def test_merged_equals_adapter_on_base(adapter, capsys):
    for name in ("merged-abcdefgh", "merged-2-abcdefgh"):  # of killed exports to this folder, and to another one
        Path(f"new/.writing-new-{name}").mkdir(parents=True)
    assert main(["export", "adapter", "new/merged"]) == 0
    assert "Merged adapter into new/merged" in capsys.readouterr().out
    merged, tokenizer = load_model("new/merged")
    assert not isinstance(merged, PeftModel)
    assert tokenizer.chat_template
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = load_model("adapter")[0](ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(load_model("base")[0](ids).logits, expected, atol=1e-3)
    assert sorted(path.name for path in Path("new").iterdir()) == [".writing-new-merged-2-abcdefgh", "merged"]


def test_added_tokens_and_a_saved_head(tmp_path, monkeypatch):
    """As TRL saves an adapter whose chat template brought tokens along."""
    from tiny_folder import byte_tokenizer

    monkeypatch.chdir(tmp_path)
    base, more = save_model(tmp_path / "base", tie_word_embeddings=False), byte_tokenizer()
    more.add_tokens(["<a>", "<b>"])
    more.save_pretrained("more")
    Path("rows.jsonl").write_text('{"question": "q", "answer": "a<a>"}\n' * 2)
    argv = "--data rows.jsonl --max_steps 2 --learning_rate 0.1 --method sft --report_to none"
    flags = "--chat_template_path more --lora_modules_to_save lm_head"
    assert main(["train", "--model", base, "--output_dir", "adapter", *argv.split(), *flags.split()]) == 0
    assert main(["export", "adapter", "merged"]) == 0
    tuned, merged = load_model("adapter")[0], load_model("merged")[0]
    ids = torch.tensor([more("a<a><b>")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-5)
    assert main(["train", "--model", "adapter", "--output_dir", "further", *argv.split()]) == 0


@pytest.mark.parametrize("flags", ["", "--lora_modules_to_save lm_head"])
def test_added_tokens_beside_tied_embeddings_are_refused_before_training(tmp_path, monkeypatch, capsys, flags):
    from tiny_folder import byte_tokenizer

    monkeypatch.chdir(tmp_path)
    base, more = save_model(tmp_path / "base", tie_word_embeddings=True), byte_tokenizer()
    more.add_tokens(["<a>"])
    more.save_pretrained("more")
    Path("rows.jsonl").write_text('{"question": "q", "answer": "a<a>"}\n' * 2)
    common = f"--data rows.jsonl --max_steps 1 --chat_template_path more --report_to none {flags}"
    argv = ["train", "--model", base, *common.split()]
    assert main([*argv, "--output_dir", "out"]) == 2
    assert "embeddings are tied to its head: train all weights (--use_peft false)" in capsys.readouterr().err
    assert not Path("out").exists()
    if not flags:  # what is advised works
        assert main([*argv, "--output_dir", "out", "--use_peft", "false"]) == 0


def test_a_dtype_and_an_empty_folder(adapter):
    Path("merged").mkdir()
    assert main(["export", "adapter", "merged", "--dtype", "bfloat16"]) == 0
    assert load_model("merged", dtype="auto")[0].dtype is torch.bfloat16


def not_finite(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({name: torch.full_like(t, torch.nan) for name, t in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere", "merged"], "nowhere: no such folder"),
        (["base", "merged"], "not an adapter, there is no adapter_config.json in it (it is a full model already)"),
        (["adapter", "base"], "base: exists and is not empty"),
        (["adapter", "base/config.json"], "is a file"),
        (["adapter"], "required: OUT_DIR"),
        (["adapter", "merged", "--dtype", "int3"], "invalid choice: 'int3'"),
    ],
)
def test_wrong_inputs(adapter, argv, message, capsys):
    before = sorted(Path().rglob("*"))
    assert main(["export", *argv]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert message in err[0]
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("damage", ["nan", "no base"])
def test_a_merge_that_fails_leaves_nothing(adapter, damage, capsys):
    if damage == "nan":
        not_finite(adapter)
    else:
        Path("base").rename("moved")
    before = sorted(Path().rglob("*"))
    assert main(["export", "adapter", "new/merged"]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("lfu export: error")]) == 1
    assert sorted(Path().rglob("*")) == before
