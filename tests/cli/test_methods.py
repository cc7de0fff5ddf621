"""Every method through the command line, on each kind of theta; `lfu methods`; combinations and refusals."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lfu.cli import main
from lfu.methods import REGISTRY, method_class
from lfu.methods.knobs import knobs_of
from lfu.model.loading import load_model

THETA = {
    "lora": "--lora_r 2",
    "dora": "--lora_r 2 --use_dora true --gradient_checkpointing false",
    "full": "--use_peft false --gradient_checkpointing false",
}
# What a method can't do without on the command line, or is quicker with.
NEEDS = {
    "replay": "--method_args replay.data=general.jsonl,replay.share=0.3",
    "wise": "--method_args wise.alpha=0.5",
    "lines": "--method_args lines.alpha=0.5",
    "sdft": "--method_args sdft.max_new_tokens=2",
    "stm": "--method_args stm.threshold=1000",
    "ewc": "--method_args ewc.texts=4,ewc.tokens=4",
    "anchor": "--method_args anchor.texts=4,anchor.tokens=4",
}
# (method, theta) -> a word of the one line that refuses it.
REFUSED: dict[tuple[str, str], str] = {
    ("wise", "dora"): "not linear",
    ("lines", "dora"): "not linear",
    ("corda", "full"): "adapter",
    ("oft", "full"): "adapter",
    ("ewc", "lora"): "single weights",
    ("ewc", "dora"): "single weights",
    ("oft", "dora"): "use_dora",
    ("osf", "full"): "adapter",
    ("osf", "dora"): "use_dora",
    ("corda", "dora"): "use_dora",
    ("intruders", "full"): "adapters",
    ("intruders", "dora"): "Dora",
}

if find_spec("peft.tuners.lora.intruders") is None:  # what `make ranges` has for LLaMA-Factory
    REFUSED |= {("intruders", theta): "needs PEFT" for theta in THETA}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with training rows and general rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LFU_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"What is {i} + {i}?", "answer": f"{i} + {i} is #### {2 * i}"} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    general = [{"question": f"Say {word}.", "answer": word} for word in ("yes", "no", "maybe", "hello")]
    Path("general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in general))
    return tmp_path


def train(model, method, *flags, output="out"):
    words = [word for flag in flags for word in flag.split()]
    fixed = "--max_steps 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --report_to none"
    quick = "--disable_tqdm true --learning_rate 1e-2 --warmup_steps 0 --logging_steps 1 --save_strategy no"
    return main(
        ["train", "--model", model, "--data", "rows.jsonl", "--output_dir", output, "--method", method,
         *fixed.split(), *quick.split(), *words]
    )  # fmt: skip


@torch.no_grad()
def logits(folder):
    return load_model(folder)[0].eval()(torch.arange(3, 23)[None]).logits


@pytest.fixture(scope="module")
def before(model):
    """The untouched model's logits."""
    return logits(model)


@pytest.mark.parametrize("theta", THETA)
@pytest.mark.parametrize("method", REGISTRY)
def test_every_method_trains_on_every_theta(here, model, before, capsys, monkeypatch, method, theta):
    if (method, theta) in REFUSED:
        monkeypatch.setattr("lfu.cli.train.load_start", lambda *given: pytest.fail("it is refused too late"))
    code = train(model, method, THETA[theta], NEEDS.get(method, ""), "--max_steps 2")
    err = capsys.readouterr().err
    if word := REFUSED.get((method, theta)):
        assert code == 2
        assert err.splitlines()[-1].startswith("lfu train: error:")
        assert word in err.splitlines()[-1]
        assert not Path("out").exists()
        return
    assert code == 0, err
    assert 0 < float((logits("out") - before).abs().max()) < float("inf")


@pytest.mark.parametrize(
    "spec",
    ["lfu+neftune", "lfu+kl", "gem+neftune", "dft+kl", "im+gem", "sdft+lfu", "replay+kl+neftune", "sam+l2sp", "lfu+ema",
     "kl+l2", "sft+neftune", "corda+kl"],
)  # fmt: skip
def test_methods_that_act_on_different_places_combine(here, model, spec):
    needs = {"replay": "--method_args replay.data=general.jsonl", "sdft": NEEDS["sdft"]}.get(spec.partition("+")[0], "")
    assert train(model, spec, THETA["lora"], needs, "--max_steps 1") == 0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gem+dft", "gem and dft can't be combined: of each, it replaces the loss of a token"),
        ("lfu+sam", "it runs a second pass in every step"),
        ("lfu+lfu_reps", "it runs a second pass in every step"),
        ("ema+wise", "it decides which weights are kept"),
        ("lfu+lfu", "names 'lfu' twice"),
        ("gme", "unknown method 'gme'"),
        ("gem+", "unknown method ''"),
    ],
)
def test_impossible_pairs_are_refused_with_the_reason(here, model, capsys, spec, said):
    assert train(model, spec) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("method", "args", "said"),
    [
        ("gem", "beta=0", "gem.beta must be a finite number > 0 and <= 1, got '0'"),
        ("gem", "gem.h=cubic", "gem.h must be one of linear, logsigmoid"),
        ("gem", "gem.betta=0.5", "Did you mean gem.beta"),
        ("gem", "kl.weight=1", "unknown method in method_args 'kl'"),
        ("gem", "beta", "is not of the form setting=value"),
        ("kl+l2", "weight=1", "could be kl.weight or l2.weight: say which"),
        ("kl", "weight=nan", "kl.weight must be a finite number >= 0"),
        ("sft", "rate=1", "sft has no settings"),
        ("neftune", "alpha=-1", "neftune.alpha must be"),
    ],
)
def test_wrong_knobs_are_refused_before_anything_is_loaded(here, model, capsys, method, args, said):
    assert train(model, method, f"--method_args {args}") == 2
    assert said in capsys.readouterr().err


def test_knobs_reach_the_method(here, model):
    assert train(model, "neftune", "--method_args neftune.alpha=5", output="five") == 0
    assert train(model, "neftune", output="default") == 0
    assert train(model, "neftune", "--method_args alpha=50", output="fifty") == 0
    five, default, fifty = (load_file(f"{name}/adapter_model.safetensors") for name in ("five", "default", "fifty"))
    assert all(torch.equal(five[k], default[k]) for k in five)
    assert any(not torch.equal(five[k], fifty[k]) for k in five)


@pytest.mark.parametrize("method", ["ema", "sam", "kl", "l2sp", "lfu+kl"])
def test_resume_ends_where_the_whole_run_ends(here, model, method):
    saving = "--save_strategy steps --save_steps 2"
    assert train(model, method, saving, output="whole") == 0
    assert train(model, method, saving, f"--resume_from_checkpoint {here}/whole/checkpoint-2", output="resumed") == 0
    whole, resumed = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_resuming_a_complete_run_still_gives_the_weights_that_the_method_keeps(here, model):
    saving = "--save_strategy steps --save_steps 3 --use_peft false --method_args wise.alpha=0.5"
    assert train(model, "wise", saving) == 0
    before = load_file("out/model.safetensors")
    assert train(model, "wise", saving, "--resume_from_checkpoint true") == 0
    after = load_file("out/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_list_names_every_method_with_cost_and_source(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for name in REGISTRY:
        assert any(line.split()[:1] == [name] for line in out.splitlines()), name
    assert "arXiv 2511.13052" in out


@pytest.mark.parametrize("name", REGISTRY)
def test_one_method_is_told_with_its_knobs(capsys, name):
    assert main(["methods", name]) == 0
    out = " ".join(capsys.readouterr().out.split())
    method = method_class(name)
    assert method.source in out
    for f in knobs_of(method):
        assert f"{name}.{f.name}={f.default}" in out
    assert main(["methods", "nmae"]) == 2
