"""L2-SP against the distance of whole weight matrices, written out: value, gradient, accumulation, resume."""

from __future__ import annotations

import pytest
import torch
from bench import float64, small_model, step_of, tiny_trainer, written_out
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny import DEVICE, relative_difference, tiny_batch

from lfu.methods.l2sp import lora_squared_distance
from lfu.methods.weights import lora_pairs

LORA = dict(r=2, lora_alpha=4, target_modules="all-linear")
THETA = {
    "full": {},
    "subset": {"theta": "subset"},
    "lora that was trained before": {"theta": "lora"},
    "dora": {"theta": "dora"},
    "fresh rslora": {"peft_config": LORA | dict(use_rslora=True)},
    "lora and a whole module": {"peft_config": LORA | dict(target_modules=["q_proj"], modules_to_save=["norm"])},
    "lora on the embedding": {"peft_config": LORA | dict(target_modules=["embed_tokens", "v_proj"])},
}  # fmt: skip


def trainer(folder, theta, method="l2sp", **options):
    options = {**THETA[theta], **options}
    if "peft_config" in options:
        options["peft_config"] = LoraConfig(**options["peft_config"])
    model = small_model(theta=options.pop("theta", "full"), tie_word_embeddings="embedding" not in theta)
    return tiny_trainer(method, folder, model=model, **options)


def changes(model):
    """What is measured, as whole matrices: `s B A` of each LoRA layer, and every other trainable parameter."""
    found = {}
    for name, module in model.named_modules():
        if "default" in getattr(module, "lora_A", {}):
            found[name] = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
        elif "default" in getattr(module, "lora_embedding_A", {}):
            B, A = module.lora_embedding_B["default"], module.lora_embedding_A["default"]
            found[name] = module.scaling["default"] * B @ A
    plain = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return found | {n: p for n, p in plain.items() if not any(f"lora_{x}" in n for x in ("A", "B", "embedding"))}


def move(model, size=0.05):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=g, dtype=p.dtype).to(DEVICE))


@pytest.mark.parametrize("theta", THETA)
def test_value_and_gradient(tmp_path, theta):
    t = trainer(tmp_path, theta, method_args="weight=0.7")
    start = {name: value.detach().clone() for name, value in changes(t.model).items()}
    move(t.model)
    t.methods[0].weight = 0.0
    without, plain = step_of(t)
    t.methods[0].weight = 0.7
    value, found = step_of(t)
    term = 0.7 / 2 * sum((now - start[name]).square().sum() for name, now in changes(t.model).items())
    assert value - without == pytest.approx(float(term.detach()), rel=1e-10)
    expected = written_out(t.model, term)
    assert relative_difference({n: found[n] - plain[n] for n in found}, expected) < 1e-9
    assert len(start) > 1
    assert t._metrics["train"]["l2sp/squared_distance"][-1] == pytest.approx(float(term.detach()) / 0.35)


def test_at_the_start_it_is_sft(tmp_path):
    plain, with_term = (step_of(trainer(tmp_path, "full", method)) for method in ("sft", "l2sp"))
    assert plain[0] == with_term[0]
    assert relative_difference(*[found for _, found in (plain, with_term)]) == 0


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_the_product_form_is_the_distance_of_the_matrices(r, rows, columns, seed):
    g = torch.Generator().manual_seed(seed)
    A, A0 = (torch.randn(r, columns, generator=g, dtype=torch.float64) for _ in range(2))
    B, B0 = (torch.randn(rows, r, generator=g, dtype=torch.float64) for _ in range(2))
    expected = (B @ A - B0 @ A0).square().sum()
    torch.testing.assert_close(lora_squared_distance(A, B, A0, B0), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-5])
def test_close_to_the_start_of_a_trained_adapter_nothing_cancels(size):
    g = torch.Generator().manual_seed(0)
    A0, B0 = torch.randn(4, 30, generator=g), torch.randn(20, 4, generator=g)
    A, B = A0 + size * torch.randn(4, 30, generator=g), B0 + size * torch.randn(20, 4, generator=g)
    expected = (B.double() @ A.double() - B0.double() @ A0.double()).square().sum()
    assert float(lora_squared_distance(A, B, A0, B0)) == pytest.approx(float(expected), rel=1e-4)


def test_autocast_does_not_make_it_coarse(tmp_path):
    t = tiny_trainer("l2sp", tmp_path, theta="lora", dtype=torch.float32)
    move(t.model)
    expected = float(t.methods[0].squared_distance().detach())
    with torch.autocast(DEVICE, torch.bfloat16):
        assert float(t.methods[0].squared_distance().detach()) == expected


def test_sums_are_in_float32_where_theta_is_narrower(tmp_path):
    t = tiny_trainer("l2sp", tmp_path, dtype=torch.bfloat16)
    start = [p.detach().clone() for p in t.anatomy.theta()]
    move(t.model)
    found = t.methods[0].squared_distance()
    assert found.dtype == torch.float32
    expected = sum(float((p.detach().double() - q.double()).square().sum()) for p, q in zip(t.anatomy.theta(), start))
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_it_counts_once_an_update(tmp_path, accumulate):
    """One plain gradient step: the term moves theta by - lr * weight * (theta - start), whatever the accumulation."""
    moved = []
    for method in ("sft", "l2sp"):
        t = tiny_trainer(
            method, tmp_path, method_args="weight=0.5" if method == "l2sp" else None, optim="sgd", learning_rate=0.1,
            max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=accumulate, max_grad_norm=0.0,
        )  # fmt: skip
        start = [p.detach().clone() for p in t.anatomy.theta()]
        move(t.model)
        before = [p.detach().clone() for p in t.anatomy.theta()]
        with float64():
            t.train()
        moved.append([p.detach() for p in t.anatomy.theta()])
    for plain, pulled, p, p0 in zip(*moved, before, start):
        torch.testing.assert_close(pulled - plain, -0.1 * 0.5 * (p - p0), rtol=1e-7, atol=1e-10)


def test_micro_batches_add_up_to_the_whole_term(tmp_path):
    t = trainer(tmp_path, "lora that was trained before", method_args="weight=3")
    move(t.model)
    whole = float(1.5 * t.methods[0].squared_distance().detach())
    with_term = [step_of(t, tiny_batch(seed), accumulate=4)[0] for seed in range(4)]
    t.methods[0].weight = 0.0
    without = [step_of(t, tiny_batch(seed), accumulate=4)[0] for seed in range(4)]
    assert sum(with_term) - sum(without) == pytest.approx(whole, rel=1e-9)


def test_a_heavy_weight_holds_theta_where_it_started(tmp_path):
    distance = []
    for weight in (0.0, 100.0):
        t = tiny_trainer("l2sp", tmp_path, method_args={"weight": weight}, max_steps=10, learning_rate=1e-3)
        t.train()
        distance.append(float(t.methods[0].squared_distance().detach()))
    assert distance[1] < 0.5 * distance[0]


def test_a_resumed_run_keeps_the_start_of_the_run(tmp_path):
    options = dict(dtype=torch.float32, max_steps=4, save_strategy="steps", save_steps=2, method_args="weight=1")
    whole = tiny_trainer("l2sp", tmp_path / "whole", **options)
    whole.train()
    resumed = tiny_trainer("l2sp", tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), (_, two) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        assert torch.equal(one, two), name
    distance = [float(t.methods[0].squared_distance().detach()) for t in (whole, resumed)]
    assert distance[0] == distance[1] > 0


def test_a_lora_on_a_bare_parameter_is_refused(tmp_path):
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.gate_proj.weight"])
    with pytest.raises(ValueError, match="bare parameter"):
        tiny_trainer("l2sp", tmp_path, peft_config=config)


def test_another_variant_of_lora_is_refused(tmp_path, monkeypatch):
    model = small_model(theta="dora")
    for pair in lora_pairs(tiny_trainer("sft", tmp_path, model=model).anatomy):
        assert pair.variant == "Dora"
    layer = next(module for module in model.modules() if "default" in getattr(module, "lora_variant", {}))
    layer.lora_variant["default"] = type("KasaLinearVariant", (), {})
    with pytest.raises(ValueError, match="not of Kasa"):
        tiny_trainer("l2sp", tmp_path, model=model)


# -- weight = auto -----------------------------------------------------------------------------------------------------


def with_gradients(t, seed=3, size=1.0):
    """Some gradient on every trained parameter; returns it by name."""
    g = torch.Generator().manual_seed(seed)
    named = {n: p for n, p in t.model.named_parameters() if p.requires_grad}
    for p in named.values():
        p.grad = size * torch.randn(p.shape, generator=g, dtype=p.dtype).to(DEVICE)
    return {n: p.grad.clone() for n, p in named.items()}


def norm(gradients):
    return float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients.values()])))


@pytest.mark.parametrize(
    ("args", "steps", "share", "theta"),
    [
        *[("share=0.4", 60, 0.4, theta) for theta in THETA],
        *[("share=0.4", 240, 0.2, theta) for theta in ("full", "fresh rslora")],
        *[("share=0.4,schedule=decay", 60, 0.4 * 0.25, theta) for theta in ("dora", "lora on the embedding")],
    ],
)
def test_auto_adds_a_pull_with_a_share_of_the_gradient(tmp_path, args, steps, share, theta):
    """After three quarters of the run; four times the updates, half the share."""
    t = trainer(tmp_path, theta, method_args=args)
    start = {name: value.detach().clone() for name, value in changes(t.model).items()}
    t.state.max_steps = steps
    sizes = []
    for done, size in ((0, 1.0), (steps * 3 // 4, 3.0)):
        t.state.global_step = done
        before = with_gradients(t, size=size)
        sizes.append(norm(before))
        t.methods[0].before_update(t)
        pull = {n: p.grad - before[n] for n, p in t.model.named_parameters() if p.requires_grad}
        if done == 0:  # nothing has moved
            assert norm(pull) == 0
            move(t.model)
    half = 0.5 * sum((now - start[name]).square().sum() for name, now in changes(t.model).items())
    wanted = written_out(t.model, half)
    scale = share * 3 / 4 * sum(sizes) / 2 / norm(wanted)
    assert relative_difference(pull, {n: scale * g for n, g in wanted.items()}) < 1e-6
    assert t._metrics["train"]["l2sp/weight"] == [0, pytest.approx(scale)]


def test_auto_leaves_the_loss_alone_and_a_broken_gradient_out(tmp_path):
    plain, auto = (tiny_trainer(method, tmp_path) for method in ("sft", "l2sp"))
    for t in (plain, auto):
        move(t.model)
    assert step_of(plain)[0] == step_of(auto)[0]
    state = auto.methods[0].state_dict()["gradients"].clone()
    with_gradients(auto, size=float("nan"))
    auto.methods[0].before_update(auto)
    assert torch.equal(auto.methods[0].state_dict()["gradients"], state)


@pytest.mark.parametrize(
    ("args", "theta"),
    [
        ("", "full"),
        ("", "fresh lora"),
        ("decoupled=true", "fresh lora"),
        ("decoupled=true,weight=2", "full"),
        ("schedule=decay", "full"),
    ],
)
def test_a_resumed_run_goes_on_as_it_was(tmp_path, args, theta):
    options = dict(dtype=torch.float32, max_steps=4, method_args=args or None)
    if theta != "full":
        options["peft_config"] = LoraConfig(**LORA)
    whole = tiny_trainer("l2sp", tmp_path / "whole", save_strategy="steps", save_steps=2, **options)
    whole.train()
    resumed = tiny_trainer("l2sp", tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), (_, two) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        assert torch.equal(one, two), name


def test_auto_holds_theta_nearer_to_its_start(tmp_path):
    distance = []
    for share in (1e-9, 0.9):
        t = tiny_trainer("l2sp", tmp_path, method_args={"share": share}, max_steps=20, learning_rate=1e-3)
        t.train()
        distance.append(float(t.methods[0].squared_distance().detach()))
    assert distance[1] < 0.9 * distance[0]


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("weight", [0.5, "auto"])
def test_decoupled_moves_the_weights_past_the_optimizer(tmp_path, optim, weight):
    moved = []
    for method in ("sft", "l2sp"):
        args = {"weight": weight, "decoupled": "true"} | ({"share": 0.3} if weight == "auto" else {})
        args = args if method == "l2sp" else None
        t = tiny_trainer(method, tmp_path, method_args=args, optim=optim, learning_rate=0.1, max_steps=1)
        start = [p.detach().clone() for p in t.anatomy.theta()]
        move(t.model)
        t.state.global_step, t.state.max_steps = 1, 2
        t.create_optimizer()
        before = [p.detach().clone() for p in t.anatomy.theta()]
        with_gradients(t)
        for m in t.methods:
            m.before_update(t)
        t.optimizer.step()
        moved.append([p.detach() for p in t.anatomy.theta()])
    changes = [p - p0 for p, p0 in zip(before, start)]
    flat = torch.cat([c.flatten() for c in changes])
    factor = 0.5 if weight == "auto" else weight
    if weight == "auto":  # its root mean square is share * t / T = 0.15 learning rates
        factor = 0.3 * 0.5 / float(flat.square().mean().sqrt())
    for plain, pulled, change in zip(*moved, changes):
        torch.testing.assert_close(pulled - plain, -0.1 * factor * change, rtol=1e-6, atol=1e-9)


def test_decoupled_shrinks_a_fresh_loras_product_and_refuses_another(tmp_path):
    t = trainer(tmp_path, "fresh rslora", method_args="decoupled=true,weight=2", learning_rate=0.1)
    move(t.model)
    t.create_optimizer()
    t.state.max_steps = 1
    before = {n: v.detach().clone() for n, v in changes(t.model).items()}
    with_gradients(t)
    t.methods[0].before_update(t)
    for name, value in changes(t.model).items():
        torch.testing.assert_close(value.detach(), 0.8 * before[name], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="does not start there: start a fresh adapter"):
        trainer(tmp_path, "lora that was trained before", method_args="decoupled=true")


@pytest.mark.parametrize("weight", [-1, "nan", "much"])
def test_a_weight_that_is_none_is_refused(tmp_path, weight):
    with pytest.raises(ValueError, match=r"l2sp\.weight must be auto, or >= 0, finite"):
        tiny_trainer("l2sp", tmp_path, method_args={"weight": weight})
