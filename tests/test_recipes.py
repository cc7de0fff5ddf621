"""Every shipped combination is a valid configuration with the paper's settings; recipes merge from left to right."""

from __future__ import annotations

import itertools

import pytest

from lfu.cli.arguments import parse
from lfu.data.templates import TEMPLATES
from lfu.recipes import as_flags, find, parts, shipped
from lfu.support.errors import UserError

BY_GROUP: dict[str, list[str]] = {}
for name, path in shipped().items():
    BY_GROUP.setdefault(path.parent.name, []).append(name)
COMBINATIONS = list(itertools.product(BY_GROUP["models"], BY_GROUP["data"], BY_GROUP["variants"]))
PAPER = {
    "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "num_train_epochs": 3,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_length": 2048, "seed": 42,
}  # fmt: skip


def test_the_papers_models_and_data_are_there():
    assert len(BY_GROUP["models"]) == 5
    assert len(BY_GROUP["data"]) == 4
    assert {"lora", "reps"} <= set(BY_GROUP["variants"])


@pytest.mark.parametrize("names", COMBINATIONS, ids=",".join)
def test_every_combination_parses(names):
    # Dolly is a file that the user brings
    config, model, data = parse(["--config", ",".join(names), "--data", "dolly.json"])
    assert {name: getattr(config, name) for name in PAPER} == PAPER
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (8, 16, 0.0)
    assert (model.use_peft, model.lora_target_modules) == (True, "all-linear")
    assert data.template == ("chat" if names[0] in ("llama-3.1-8b-instruct", "qwen3-8b") else "alpaca")
    instruct = names[0] == "llama-3.1-8b-instruct"
    alpha, lam = {"lora": (0.001, 500.0) if instruct else (0.1, 5.0), "reps": (0.1, 0.1), "sft": (None, 0.0)}[names[2]]
    assert config.lam == lam
    assert alpha is None or config.alpha == alpha
    assert config.auxiliary == ("steering" if names[2] == "reps" else "lora")


def test_without_a_variant_the_settings_are_the_papers_too():
    config, model, data = parse(["--config", "llama-3.1-8b,gsm8k"])
    assert {name: getattr(config, name) for name in PAPER} == PAPER
    assert (model.model_name_or_path, data.data, data.data_config) == (
        "meta-llama/Llama-3.1-8B", "openai/gsm8k", "main",
    )  # fmt: skip


def test_the_embedded_default():
    config, model, data = parse(["--config", "smollm2"])
    assert model.model_name_or_path == "smollm2"
    assert model.dtype == "float32"
    assert not config.bf16
    assert data.data.startswith("word_problems")
    assert data.template in TEMPLATES


def test_later_files_and_then_flags_win(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("model: a\ndata: d\nlearning-rate: 1e-3\nmax_length: 10\nseed: 1\n")
    two.write_text("model_name_or_path: b\nlearning_rate: 2e-3\nmax_length: null\n")
    config, model, _ = parse(["--config", f"{one},{two}", "--seed", "7"])
    assert (model.model_name_or_path, config.learning_rate, config.max_length, config.seed) == ("b", 2e-3, 2048, 7)
    config, model, _ = parse([f"--config={one}", "--config", str(two)])
    assert (model.model_name_or_path, config.seed) == ("b", 1)


def test_a_bare_no_is_a_strategy(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("model: m\ndata: d\nsave_strategy: no\ngradient_checkpointing: no\n")
    config, _, _ = parse(["--config", str(path)])
    assert config.save_strategy == "no"
    assert config.gradient_checkpointing is False


def test_a_path_may_hold_a_comma(tmp_path):
    path = tmp_path / "a,b.yaml"
    path.write_text("seed: 3\n")
    assert parts(str(path)) == [(path, {"seed": 3})]


def test_values_become_flags():
    settings = {"a": True, "b": [1, "x"], "c": {"k": 1}, "d": None, "e": -0.5, "f": "two words"}
    assert as_flags(settings) == ["--a=true", "--b", "1", "x", '--c={"k": 1}', "--e=-0.5", "--f=two words"]


@pytest.mark.parametrize("name", shipped())
def test_each_begins_with_a_line_that_says_what_it_is(name):
    first = find(name).read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'. Did you mean learning_rate"),
        ("- a\n- b", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("learning_rate: fast", "--learning_rate.*invalid float value: 'fast'"),
        ("max_steps: [1, 2]", "unexpected argument '2'"),
        ("use_peft: perhaps", "--use_peft"),
    ],
)
def test_what_can_be_wrong_in_a_file(tmp_path, text, message):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        parse(["--config", str(path), "--model", "m", "--data", "d"])


@pytest.mark.parametrize("spec", ["gsm9k", "llama-3.1-8b,gsm9k", "missing.yaml", ","])
def test_a_recipe_that_is_not_there(spec):
    with pytest.raises(UserError, match="lfu recipes"):
        parts(spec)
