"""The fast step against the naive one, in float64, to 1e-10 relative: every auxiliary, consistency, layer range, theta.

Also: what accumulates to what, that the zero auxiliary changes no bit, and that nothing is left on the model.
"""

from __future__ import annotations

import itertools
from functools import lru_cache, partial

import pytest
import torch
from oracle import Oracle
from peft import LoraConfig, PolyConfig, get_peft_model
from tiny import DEVICE, FAMILIES, Float64Throughout, gradients, relative_difference, tiny_batch, tiny_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from trl.models import enable_selective_activation_checkpointing

from lfu import LfUStep
from lfu.model.anatomy import anatomy, layer_range
from lfu.model.rng import generators
from lfu.undesirable import LoRA, Own, Steering, ascend

TOLERANCE = 1e-10
AUXILIARIES = {
    "lora": lambda: LoRA(rank=3),
    "steering": lambda: Steering(),
    "steering_norm": lambda: Steering(preserve_norm=True),
    "own": lambda: Own(),
}
CONSISTENCIES = ["mse", "cosine", "contrastive", "logit_kl"]
LAYERS = ["all", "early", "middle", "late", "2-3"]


def pair(model, auxiliary="lora", oracle=None, *, consistency="mse", layers="all", alpha=0.1, lam=5.0, **options):
    """The step and the oracle with the same settings; `oracle`: one of this model and auxiliary, which gets them."""
    step = LfUStep(
        model,
        auxiliary=AUXILIARIES[auxiliary](),
        consistency=consistency,
        layers=layers,
        alpha=alpha,
        lam=lam,
        **options,
    )
    options.pop("ascent_batch", None)
    if oracle:
        oracle.consistency, oracle.layers = consistency, layer_range(layers, 4)
        return step, oracle
    oracle = Oracle(
        model,
        auxiliary=auxiliary.removesuffix("_norm"),
        preserve_norm=auxiliary.endswith("_norm"),
        consistency=consistency,
        layers=layer_range(layers, 4),
        alpha=alpha,
        lam=lam,
        **options,
    )
    return step, oracle


def drawn(step: LfUStep, index: int):
    """The random A that the step draws for micro-batch `index`."""
    if not isinstance(step.auxiliary, LoRA):
        return None
    step.auxiliary.reset(generators(step.settings.seed, index))
    return [a.clone() for a, _ in step.auxiliary.pairs]


def assert_agree(model, step, oracle, batch=None, ascended=None, **call):
    """`ascended`: what the naive step gave for the same ascent before, which is then not taken again."""
    batch = tiny_batch() if batch is None else batch
    a = drawn(step, 0)
    naive = dict(held=ascended["aux"]) if ascended else dict(a_matrices=a, **call)
    with Float64Throughout():
        record = step(batch, **call)
        want = oracle(batch, **naive)
    norm = (ascended or want)["norm"]
    assert relative_difference(gradients(model), want["grads"]) < TOLERANCE
    assert record.sft_loss == pytest.approx(want["sft_loss"], rel=TOLERANCE)
    assert record.consistency == pytest.approx(want["consistency"], rel=1e-9)
    assert record.ascent_grad_norm == pytest.approx(norm, rel=TOLERANCE)
    flat = lambda grads: torch.cat([g.flatten() for g in grads.values()])
    sft, cons = flat(want["sft_grads"]), flat(want["cons_grads"])
    assert record.gradient_ratio == pytest.approx(float(cons.norm() / sft.norm()), rel=1e-8)
    assert record.gradient_cosine == pytest.approx(float(cons @ sft / cons.norm() / sft.norm()), rel=1e-8, abs=1e-10)
    return want | {"norm": norm}


def settings_of(family, theta):
    """(auxiliary, consistency, layers): over the families each of them with each other; on Llama with all weights every
    pair of two of the three."""
    turn, adapted = FAMILIES.index(family), theta == "lora"
    numbered = itertools.product(*map(enumerate, (AUXILIARIES, CONSISTENCIES, LAYERS)))
    for (i, auxiliary), (j, consistency), (k, layers) in numbered:
        if consistency == "logit_kl":  # Eq. 7 has no layers
            wanted = layers == "all" and ((family, theta) == ("llama", "full") or (i + j + turn + 2 * adapted) % 4 == 0)
        elif (family, theta) == ("llama", "full"):
            wanted = (i + k) % 3 == j
        else:
            wanted = (i + j + turn + 2 * adapted) % 4 == 0 and k == (i + 2 * turn + adapted) % len(LAYERS)
        if wanted:
            yield auxiliary, consistency, layers


def assert_steps_are_the_oracles(family, theta, chosen):
    """One model, and for each auxiliary one naive ascent: the ascent knows no consistency and no layers."""
    model, naive = tiny_model(family, theta=theta), {}
    for auxiliary, consistency, layers in chosen:
        model.zero_grad()
        oracle, ascended = naive.get(auxiliary, (None, None))
        step, oracle = pair(model, auxiliary, oracle, consistency=consistency, layers=layers)
        naive[auxiliary] = oracle, assert_agree(model, step, oracle, ascended=ascended)


@pytest.mark.parametrize("theta", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_is_the_oracle(family, theta):
    assert_steps_are_the_oracles(family, theta, settings_of(family, theta))


@pytest.mark.soak
@pytest.mark.parametrize("theta", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_is_the_oracle_in_every_setting(family, theta):
    every = itertools.product(AUXILIARIES, CONSISTENCIES, LAYERS)
    assert_steps_are_the_oracles(family, theta, [one for one in every if one[1] != "logit_kl" or one[2] == "all"])


def test_the_settings_cover_every_pair():
    axes = AUXILIARIES, CONSISTENCIES, LAYERS
    for family, theta in itertools.product(FAMILIES, ("full", "lora")):
        assert all({one[n] for one in settings_of(family, theta)} >= {*axis} for n, axis in enumerate(axes[:2]))
    for chosen, pairs in (
        (list(settings_of("llama", "full")), itertools.combinations(range(3), 2)),
        ([one for family in FAMILIES for one in settings_of(family, "full")], [(0, 1)]),
    ):
        for one, two in pairs:
            every = set(itertools.product(axes[one], axes[two])) - {("logit_kl", layers) for layers in LAYERS[1:]}
            assert {(setting[one], setting[two]) for setting in chosen} == every


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
@pytest.mark.parametrize(
    "options",
    [
        {"positions": "answer"},
        {"final_norm": False},
        {"direction": "clean"},
        {"direction": "clean", "consistency": "logit_kl"},
        {"ascent_steps": 3},
        {"consistency": "mse", "layers": "4", "final_norm": False},
    ],
    ids=str,
)
def test_options(auxiliary, options):
    model = tiny_model("llama")
    assert_agree(model, *pair(model, auxiliary, **options))


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_independent_ascent_batch(auxiliary):
    model = tiny_model("llama")
    step, oracle = pair(model, auxiliary, ascent_batch="independent")
    assert_agree(model, step, oracle, ascent_batch=tiny_batch(seed=7, rows=2))


@pytest.mark.parametrize("auxiliary", ["steering", "own"])
@pytest.mark.parametrize("theta", ["subset", "dora"])
def test_other_thetas(theta, auxiliary):
    model = tiny_model("llama", theta=theta)
    assert_agree(model, *pair(model, auxiliary))


STEERED = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def invoked():
    batch = tiny_batch()
    batch["input_ids"][:, 1:3] = torch.tensor([7, 9])
    return batch


def steered(config):
    """aLoRA acts from its invocation tokens on, Poly by the row's task: PEFT's wrapper tells them in each forward."""
    model = get_peft_model(tiny_model("llama"), config, autocast_adapter_dtype=False).double().to(DEVICE)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_an_adapter_that_acts_from_its_invocation_on(auxiliary):
    model = steered(LoraConfig(alora_invocation_tokens=[7, 9], **STEERED))
    assert_agree(model, *pair(model, auxiliary), invoked())
    assert not any(m._forward_pre_hooks for m in model.modules() if hasattr(m, "base_layer"))
    plain = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    LfUStep(model, auxiliary=AUXILIARIES[auxiliary]())(invoked())
    assert relative_difference(gradients(model), plain) < 1e-5  # norms and softmaxes in float32


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_an_adapter_that_acts_by_task(auxiliary):
    model = steered(PolyConfig(n_tasks=3, **STEERED)).eval()  # in training mode it draws its routes: not the oracle's
    assert_agree(model, *pair(model, auxiliary), tiny_batch() | {"task_ids": torch.tensor([0, 2, 1], device=DEVICE)})


def test_x_lora_is_refused():
    model = tiny_model("llama", theta="lora")
    model.active_peft_config.peft_type = "XLORA"
    with pytest.raises(ValueError, match="X-LoRA runs every layer twice"):
        LfUStep(model)


def test_lora_auxiliary_on_a_frozen_lower_half():
    model = tiny_model("llama", theta="subset")
    assert_agree(model, *pair(model, "lora"))


def test_lora_auxiliary_beside_a_dora_theta():
    """BA is added to the output of the DoRA layer: compared by finite differences of the loss along the ascent."""
    model = tiny_model("llama", theta="dora")
    step = LfUStep(model, auxiliary=LoRA(rank=3), alpha=1e-6)
    losses = []
    batch = tiny_batch()
    with Float64Throughout():
        record = step(batch)
        auxiliary = step.auxiliary
        auxiliary.reset(generators(42, 0))
        for moved in (False, True):
            with auxiliary.attached():
                loss = step.loss_fn(model, batch, 17.0)
                losses.append(float(loss.detach()))
                if not moved:
                    loss.backward()
                    norm = ascend(auxiliary, auxiliary.take_gradients(), 1e-6)
    assert (losses[1] - losses[0]) / 1e-6 == pytest.approx(norm, rel=1e-4)
    assert record.ascent_grad_norm == pytest.approx(norm, rel=1e-9)


def _checkpoint(model, form):
    """Turns gradient checkpointing on; it then goes round a block's forward, or round the block with its hooks."""
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()
    if form == "round the block":  # FSDP2's, after the step was made
        parts = anatomy(model)
        for i, block in enumerate(parts.blocks):
            parts.decoder.layers[i] = checkpoint_wrapper(block)
        return
    if form == "attention kept":
        enable_selective_activation_checkpointing(model)
    kwargs = {"context_fn": partial(create_selective_checkpoint_contexts, _products)} if form == "products kept" else {}
    model.gradient_checkpointing_enable({"use_reentrant": False, **kwargs})


def _products(context, operation, *args, **kwargs):
    """The selective policy of torch's own examples: what the linear layers gave is kept, the rest is computed again."""
    kept = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTED = ["round the forward", "round the block", "attention kept", "products kept"]


@pytest.mark.parametrize(
    ("auxiliary", "theta", "form"),
    [
        (a, ("full", "lora")[(i + j) % 2], form)
        for i, a in enumerate(AUXILIARIES)
        for j, form in enumerate(CHECKPOINTED)
    ],
)
def test_gradient_checkpointing_gives_the_same_gradients(auxiliary, theta, form):
    """Hooks inside a block fire again in the recompute; the auxiliary must be there still, in the same place. Every
    pair of auxiliary, theta and form."""
    assert relative_difference(_checkpointed(auxiliary, theta, form), _checkpointed(auxiliary, theta)) < 1e-14


@lru_cache  # without checkpointing, for two forms each
def _checkpointed(auxiliary, theta, form=None):
    model = tiny_model("qwen", theta=theta)
    step = LfUStep(model, auxiliary=AUXILIARIES[auxiliary](), layers="2-3")
    if form:
        _checkpoint(model, form)
    record = step(tiny_batch())
    by_name = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients(model).items()}
    return by_name | {"consistency": torch.tensor([record.consistency])}


def test_padding_free_rows_equal_padded_rows():
    """One flat row with position_ids, as TRL packs: the same gradients as the padded batch."""
    batch = tiny_batch()
    keep = batch["attention_mask"].bool()
    positions = torch.cat([torch.arange(int(m.sum()), device=DEVICE) for m in keep])
    labels = batch["labels"][keep]
    labels[positions == 0] = -100
    flat = {"input_ids": batch["input_ids"][keep][None], "labels": labels[None], "position_ids": positions[None]}
    found = []
    for b in (batch, flat):
        model = tiny_model("llama", attn_implementation="sdpa")
        with Float64Throughout():
            LfUStep(model)(b)
        found.append(gradients(model))
    assert relative_difference(*found) < TOLERANCE


# -- accumulation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", ["full", "lora"])
@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_accumulation_over_three_micro_batches(auxiliary, theta):
    """Each micro-batch ascends on its own; the gradients add up to the oracle's."""
    model = tiny_model("llama", theta=theta)
    step, oracle = pair(model, auxiliary)
    batches = [tiny_batch(seed=s, rows=1 + s) for s in range(3)]
    items = float(sum((b["labels"][:, 1:] != -100).sum() for b in batches))
    draws = [drawn(step, i) for i in range(3)]
    with Float64Throughout():
        for batch in batches:
            step(batch, num_items=items)
        wants = [oracle(b, a_matrices=a, items=items)["grads"] for b, a in zip(batches, draws)]
    total = {name: sum(want[name] for want in wants) for name in wants[0]}
    assert relative_difference(gradients(model), total) < TOLERANCE


@pytest.mark.parametrize("auxiliary", ["lora", "steering"])
def test_sft_and_held_consistency_of_four_equal_one_big_batch(auxiliary):
    """For a given auxiliary the token-weighted parts add up to the one big batch's exactly."""
    model = tiny_model("llama")
    step, oracle = pair(model, auxiliary)
    batches = [tiny_batch(seed=s) for s in range(4)]
    big = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
    items = float((big["labels"][:, 1:] != -100).sum())
    with Float64Throughout():
        held = oracle(big, a_matrices=drawn(step, 0))
        parts = [oracle(b, items=items, held=held["aux"]) for b in batches]
    for key in ("sft_grads", "cons_grads"):
        total = {name: sum(part[key][name] for part in parts) for name in held[key]}
        assert relative_difference(total, held[key]) < TOLERANCE
    # the step itself: with one auxiliary held through all four micro-batches
    alone = tiny_model("llama")
    frozen = LfUStep(alone, auxiliary=_Held(held["aux"], auxiliary))
    with Float64Throughout():
        for b in batches:
            frozen(b, num_items=items)
    assert relative_difference(gradients(alone), held["grads"]) < TOLERANCE


class _Held:
    """Makes an auxiliary that is at a given place after each ascent."""

    def __new__(cls, aux, kind):
        base = LoRA if kind == "lora" else Steering

        class Held(base):
            def move(self, steps, length=1.0):
                super().move(steps, length)
                values = [t.detach() for t in aux.values()]
                tensors = [t for pair in self.pairs for t in pair] if kind == "lora" else self.vectors
                with torch.no_grad():
                    for t, value in zip(tensors, values, strict=True):
                        t.copy_(value)

        return Held(rank=3) if kind == "lora" else Held()


# -- the no-op, and what is left behind --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("theta", ["full", "lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_auxiliary_changes_no_bit(family, theta, dtype):
    """Outputs and theta's gradients alike; every auxiliary on every family and theta, in one of the two dtypes."""
    if family == "gpt2" and theta == "dora":
        pytest.skip("PEFT has no DoRA for Conv1D")
    model, batch = tiny_model(family, theta=theta, dtype=dtype), tiny_batch()

    def passed():
        model.zero_grad()
        out = model(**batch)
        out.loss.backward()
        return out.logits.detach(), gradients(model)

    logits, grads = passed()
    turn = FAMILIES.index(family) + (dtype == torch.float32)
    for auxiliary in list(AUXILIARIES)[turn % 2 :: 2]:
        step = LfUStep(model, auxiliary=AUXILIARIES[auxiliary]())
        step.auxiliary.reset(generators(0, 0))
        with step.auxiliary.attached():
            found, found_grads = passed()
        assert torch.equal(found, logits), auxiliary
        assert all(torch.equal(found_grads[n], grads[n]) for n in grads), auxiliary


def _hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_no_trace_is_left(auxiliary):
    model = tiny_model("llama", theta="lora", dtype=torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    step = LfUStep(model, auxiliary=AUXILIARIES[auxiliary]())
    hooks = _hooks(model)
    step(tiny_batch())
    assert _hooks(model) == hooks
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("at_call", [1, 2])
@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_no_trace_after_an_exception(auxiliary, at_call):
    """An error in the clean (1) or the perturbed backward (2): hooks gone, weights and earlier gradients as before."""
    model = tiny_model("llama", dtype=torch.float32)
    calls = 0

    def backward(loss):
        nonlocal calls
        calls += 1
        if calls == at_call + 2:
            raise RuntimeError("out of memory")
        loss.backward()

    step = LfUStep(model, auxiliary=AUXILIARIES[auxiliary](), backward=backward)
    step(tiny_batch())
    earlier = gradients(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="out of memory"):
        step(tiny_batch(1))
    assert _hooks(model) == 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert relative_difference(gradients(model), earlier) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_representations_are_transformers_hidden_states(family):
    model = tiny_model(family, dtype=torch.float32)
    batch = tiny_batch()
    step = LfUStep(model)
    where = torch.arange(batch["input_ids"].numel(), device=DEVICE)
    with step.reader.reading(where, detach=True) as found:
        step.reader.run(batch)
    states = model(**batch, output_hidden_states=True).hidden_states
    for layer in range(1, 5):
        assert torch.equal(found[layer], states[layer].flatten(0, 1)), layer
