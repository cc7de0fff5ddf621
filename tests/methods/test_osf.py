"""OSF: it starts as the untouched model, its largest singular directions stay, and what is saved can be used."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from bench import logits, small_model, tiny_trainer
from packaging.version import Version
from peft import IA3Config, LoraConfig, PeftModel

from lfu.methods import methods_of
from lfu.methods.osf import _start

LORA = dict(r=2, target_modules="all-linear")


def model(dtype=torch.float32, **options):
    return small_model(dtype=dtype, tie_word_embeddings=False, **options)


def trainer(folder, base=None, lora=LORA, **options):
    return tiny_trainer(
        "osf", folder, model=model() if base is None else base, peft_config=LoraConfig(**lora), **options
    )


@torch.no_grad()
def changes(t):
    """layer -> (untouched weight, change), in float64. PEFT before 0.21 has no `get_delta_weight`."""
    untouched, found = model(t.anatomy.model.dtype), {}
    for name, layer in t.anatomy.model.named_modules():
        if hasattr(layer, "osf_svd_params"):
            W = untouched.get_submodule(name).weight.double()
            found[name] = W, copy.deepcopy(layer).double()(torch.eye(W.shape[1]).to(W)).T - W
    return found


def in_the_fixed(t, keep):
    """Per layer: the part of the change in the fixed left, and in the fixed right directions, as a share of it."""
    for W, change in changes(t).values():
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        k = int(keep * len(S)) if keep < 1 else int(keep)
        yield from (float(part.norm() / change.norm()) for part in (U[:, :k].T @ change, change @ Vt[:k].T))


def half(folder, dtype=torch.bfloat16):
    """A trainer of a model in half precision; None where PEFT is too old for it, which has to be said."""
    if dtype == torch.float32 or Version(peft.__version__) >= Version("0.21"):
        return trainer(folder, model(dtype))
    with pytest.raises(ValueError, match=r"'osf' needs PEFT 0\.21 or newer for a model in bfloat16"):
        trainer(folder, model(dtype))
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_untouched_model_and_learns(tmp_path, dtype):
    t = half(tmp_path, dtype)
    if t is None:
        return
    untouched = logits(model(dtype))
    # PEFT before 0.21 multiplies with the decomposition: float32 rounds it against the largest logit
    atol = 100 * torch.finfo(torch.float32).eps * untouched.abs().max().item()
    torch.testing.assert_close(logits(t.model), untouched, rtol=0, atol=atol)
    t.train()
    losses = [entry["loss"] for entry in t.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not torch.allclose(logits(t.model), untouched, atol=1e-2)
    assert "takes the place of the LoRA adapter" in t.notes[0]


def test_where_peft_keeps_no_copy_of_the_start_it_is_what_is_there(tmp_path):
    layers = [m for m in trainer(tmp_path).anatomy.model.modules() if hasattr(m, "osf_svd_params")]
    for name in ("U_low", "V_low"):
        kept = [_start(layer, name, "default") for layer in layers]
        for layer in layers:
            layer._modules.pop(f"_osf_{name}_init", None)
        torch.testing.assert_close([_start(layer, name, "default") for layer in layers], kept, rtol=0, atol=0)


@pytest.mark.parametrize("keep", [0.5, 0.25, 3])
def test_the_largest_directions_stay_what_they_are(tmp_path, keep):
    t = trainer(tmp_path, method_args={"keep": keep}, max_steps=10)
    t.train()
    assert {tuple(W.shape) for W, _ in changes(t).values()} == {(16, 16), (8, 16), (24, 16), (16, 24)}
    assert max(in_the_fixed(t, keep)) < 1e-4
    for W, change in changes(t).values():  # so the fixed part of the new weight's SVD is the old one's
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        k = int(keep * len(S)) if keep < 1 else int(keep)
        torch.testing.assert_close(U[:, :k].T @ (W + change) @ Vt[:k].T, torch.diag(S[:k]), rtol=1e-4, atol=1e-4)


def test_projected_gradients_alone_do_not_keep_them(tmp_path):
    """Why project='step' is there."""
    t = trainer(tmp_path, method_args={"project": "gradient"}, max_steps=10)
    t.train()
    assert max(in_the_fixed(t, 0.5)) > 0.05


def test_in_half_precision_projecting_again_changes_nothing(tmp_path):
    t = half(tmp_path)
    if t is None:
        return
    t.train()
    before = {name: change for name, (_, change) in changes(t).items()}
    for _ in range(100):
        t.methods[0].after_update(t)
    for name, (_, change) in changes(t).items():
        assert float((change - before[name]).norm() / before[name].norm()) < 1e-3


def test_what_is_saved_loads_and_merges(tmp_path):
    t = trainer(tmp_path, save_strategy="steps", save_steps=3)
    t.train()
    t.save_model(str(tmp_path / "saved"))
    for folder in ("saved", "checkpoint-3"):
        loaded = PeftModel.from_pretrained(model(), str(tmp_path / folder))
        assert torch.equal(logits(loaded), logits(t.model))
    merged = loaded.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), logits(t.model), rtol=1e-4, atol=1e-4)


def test_resume_ends_where_the_whole_run_ends(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), (_, two) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        assert torch.equal(one, two), name


def test_only_the_targeted_layers_are_adapted(tmp_path):
    t = trainer(tmp_path, lora=LORA | dict(target_modules=["q_proj", "down_proj"]))
    assert {name.rpartition(".")[2] for name in changes(t)} == {"q_proj", "down_proj"}


@pytest.mark.parametrize(("options", "message"), [
    ({"lora": LORA | dict(modules_to_save=["norm"])}, "modules_to_save=.*: drop it"),
    ({"lora": LORA | dict(use_dora=True)}, "use_dora=True: drop it"),
    ({"method_args": "keep=8"}, "leaves nothing to train in a layer of rank 8"),
    ({"method_args": "keep=1.5"}, "a share below 1 or a whole number"),
    ({"method_args": "keep=0"}, "osf.keep must be"),
    ({"method_args": "project=none"}, "osf.project must be one of"),
])  # fmt: skip
def test_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_other_thetas_are_refused(tmp_path):
    with pytest.raises(ValueError, match="use_peft true"):
        tiny_trainer("osf", tmp_path)
    with pytest.raises(ValueError, match="an adapter already"):
        tiny_trainer("osf", tmp_path, theta="lora")
    with pytest.raises(ValueError, match="got IA3Config"):
        tiny_trainer("osf", tmp_path, peft_config=IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"adapts nn.Linear layers"):
        trainer(tmp_path, small_model("gpt2", dtype=torch.float32), LORA | dict(target_modules=["c_attn"]))
    quantised = model()
    quantised.quantization_method = "bitsandbytes"
    with pytest.raises(ValueError, match="quantised"):
        trainer(tmp_path, quantised)


def test_only_one_method_starts_the_adapter():
    with pytest.raises(ValueError, match="it decides how the adapter starts"):
        methods_of("osf+corda")
