"""WiSE-FT: the weights that the model computes with lie between the untouched and the tuned ones, exactly."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from bench import logits, small_model, tiny_trainer, token_rows
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model

from lfu.methods import methods_of
from lfu.methods.wise import GRID, chosen_alpha

LORA = dict(r=2, lora_alpha=4, target_modules="all-linear")
THETA = {
    "full": {},
    "subset": {"theta": "subset"},
    "lora": {"peft_config": LORA},
    "rslora": {"peft_config": LORA | dict(use_rslora=True)},
    "lora and biases": {"peft_config": LORA | dict(lora_bias=True)},
    "lora and a whole module": {"peft_config": LORA | dict(target_modules=["q_proj"], modules_to_save=["norm"])},
    "lora on the embedding": {"peft_config": LORA | dict(target_modules=["embed_tokens", "v_proj"])},
}  # fmt: skip


def trainer(method, folder, theta="full", layers=2, **options):
    options = {**THETA[theta], **options}
    if "peft_config" in options:
        options["peft_config"] = LoraConfig(**options["peft_config"])
    model = small_model(theta=options.pop("theta", "full"), tie_word_embeddings=False, num_hidden_layers=layers)
    return tiny_trainer(method, folder, model=model, **options)


def effective(model):
    """Every weight as the model computes with it, by name in the untouched model; and LoRA's own biases."""
    model = copy.deepcopy(model)
    found = {}
    for name, module in model.named_modules():
        biases = getattr(module, "lora_B", {})
        if "default" in biases and getattr(biases["default"], "bias", None) is not None:
            found[f"{name} bias"] = module.scaling["default"] * biases["default"].bias
            biases["default"].bias, module.lora_bias["default"] = None, False
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    return found | dict(model.named_parameters())


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
@pytest.mark.parametrize("theta", THETA)
def test_every_weight_is_interpolated(tmp_path, theta):
    alpha = 0.3
    tuned = trainer("sft", tmp_path, theta)
    start = effective(tuned.model)
    tuned.train()
    t = trainer("wise", tmp_path, theta, method_args={"alpha": alpha})
    t.train()
    kept, moved = effective(t.model), 0
    for name, end in effective(tuned.model).items():
        torch.testing.assert_close(kept[name], (1 - alpha) * start[name] + alpha * end, rtol=1e-10, atol=1e-12)
        moved += not torch.equal(start[name], end)
    assert moved


@pytest.mark.parametrize("theta", ["full", "lora"])
def test_the_ends_are_the_untouched_and_the_tuned_model(tmp_path, theta):
    tuned = trainer("sft", tmp_path, theta)
    untouched = logits(tuned.model)
    tuned.train()
    for alpha, expected in ((0, untouched), (1, logits(tuned.model))):
        t = trainer("wise", tmp_path, theta, method_args={"alpha": alpha})
        t.train()
        assert torch.equal(logits(t.model), expected)


def test_a_finished_resumed_run_keeps_the_start_of_the_run(tmp_path):
    options = dict(method_args="alpha=0.5", max_steps=4, save_strategy="steps", save_steps=2, dtype=torch.float32)
    whole = tiny_trainer("wise", tmp_path / "whole", **options)
    whole.train()
    resumed = tiny_trainer("wise", tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), (_, two) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        assert torch.equal(one, two), name


def put(model, start, tuned, alpha):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_((1 - alpha) * start[name] + alpha * tuned[name])


def test_alpha_is_chosen_by_the_evaluation_set(tmp_path):
    options = dict(layers=4, eval_rows=token_rows(5, seed=3), max_steps=8, learning_rate=3e-2)
    twin = trainer("sft", tmp_path, **options)
    start = {n: p.detach().clone() for n, p in twin.model.named_parameters()}
    twin.train()
    tuned = {n: p.detach().clone() for n, p in twin.model.named_parameters()}
    losses = {}
    for alpha in GRID:
        put(twin.model, start, tuned, alpha)
        losses[alpha] = twin.evaluate()["eval_loss"]
    for tolerance in (0.0, 0.01):
        wanted = next(a for a in GRID if losses[a] <= min(losses.values()) + tolerance)
        assert 0 < wanted < 1  # a case that has something to choose

        t = trainer("wise", tmp_path, method_args={"tolerance": tolerance}, **options)
        t.train()
        put(twin.model, start, tuned, wanted)
        for (name, kept), (_, expected) in zip(t.model.named_parameters(), twin.model.named_parameters()):
            torch.testing.assert_close(kept, expected, rtol=1e-10, atol=1e-12, msg=name)
        entry = t.state.log_history[-1]
        assert entry["wise/alpha"] == wanted
        for alpha, loss in losses.items():
            assert entry[f"wise/loss_at_{alpha:g}"] == pytest.approx(loss, rel=1e-5)
        assert entry["eval_loss"] == pytest.approx(losses[wanted], rel=1e-5)
        assert any(f"alpha {wanted:g}" in note and f"{losses[wanted]:.4f}" in note for note in t.notes)


def test_choosing_leaves_no_other_trace(tmp_path):
    t = trainer("wise", tmp_path, eval_rows=token_rows(3, seed=3))
    t.train()
    names = [set(entry) for entry in t.state.log_history]
    assert sum("eval_loss" in keys for keys in names) == 1
    assert not any(key.startswith("eval_") and key != "eval_loss" for keys in names for key in keys)
    assert t.model.training


LOSSES = st.lists(st.floats(0, 20), min_size=11, max_size=11).map(lambda xs: dict(zip(GRID, xs)))


@given(losses=LOSSES, tolerance=st.floats(0, 5), more=st.floats(0, 5))
def test_the_choice(losses, tolerance, more):
    alpha = chosen_alpha(losses, tolerance)
    best = min(losses.values())
    assert losses[alpha] <= best + tolerance
    assert all(losses[a] > best + tolerance for a in GRID if a < alpha)
    assert chosen_alpha(losses, tolerance + more) <= alpha


def test_a_loss_that_is_no_number_is_never_chosen():
    nan = float("nan")
    assert chosen_alpha({0.0: nan, 0.5: 2.0, 1.0: float("inf")}, 0.0) == 0.5
    assert chosen_alpha({0.0: nan, 1.0: nan}, 0.0) == 1.0


@pytest.mark.parametrize("alpha", ["0.5", 0.5, "auto"])
def test_alpha_as_the_command_line_gives_it(alpha):
    (method,) = methods_of("wise", {"wise.alpha": alpha})
    assert method.alpha == ("auto" if alpha == "auto" else 0.5)


@pytest.mark.parametrize("alpha", ["-0.1", 1.5, "half", "nan", "AUTO"])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"wise\.alpha must be auto, or >= 0 and <= 1"):
        methods_of("wise", {"wise.alpha": alpha})


def test_without_evaluation_data_auto_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"--eval_data.*wise.alpha=0.5"):
        trainer("wise", tmp_path)


@pytest.mark.parametrize("theta", ["lora", "dora"])  # these adapters start with a B that is not 0
def test_adapters_whose_mixture_is_no_such_adapter_are_refused(tmp_path, theta):
    with pytest.raises(ValueError, match="twice its rank: merge the adapter" if theta == "lora" else "with Dora"):
        tiny_trainer("wise", tmp_path, theta=theta, method_args="alpha=0.5")


def test_evaluation_that_casts_the_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bf16_full_eval cuts the weights"):
        trainer("wise", tmp_path, bf16_full_eval=True, eval_rows=token_rows(2))


def test_another_adapter_is_refused(tmp_path):
    model = get_peft_model(small_model(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="IA3"):
        tiny_trainer("wise", tmp_path, model=model, method_args="alpha=0.5")


def test_osf_is_refused():
    with pytest.raises(ValueError, match="not linear"):
        methods_of("wise+osf")


@pytest.mark.parametrize("theta", ["full", "lora", "lora and a whole module", "lora on the embedding"])
def test_lines_keeps_less_of_the_change_in_lower_blocks(tmp_path, theta):
    alpha = 0.3
    tuned = trainer("sft", tmp_path, theta, layers=3)
    start = effective(tuned.model)
    tuned.train()
    t = trainer("lines", tmp_path, theta, layers=3, method_args={"alpha": alpha})
    t.train()
    found, end = effective(t.model), effective(tuned.model)
    for name, value in found.items():
        block = re.search(r"layers\.(\d)\.", name)
        share = alpha if block is None else alpha + (1 - alpha) * int(block[1]) / 2
        torch.testing.assert_close(value, torch.lerp(start[name], end[name], share), rtol=1e-5, atol=1e-6)
    assert t.notes[-1] == "lines: kept 0.3 of the change in the first block, all of it in the last"


def test_lines_chooses_on_the_evaluation_set_and_says_so(tmp_path):
    t = trainer("lines", tmp_path, eval_rows=token_rows(3, seed=5), learning_rate=0.5, max_steps=1)
    t.train()
    best = next(entry for entry in t.state.log_history if "lines/alpha" in entry)
    assert best["lines/loss_at_0"] >= best["eval_loss"] == min(v for k, v in best.items() if "loss_at" in k)
    assert "(with alpha 0 " in t.notes[-1]
