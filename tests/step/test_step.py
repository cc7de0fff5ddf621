"""LfUStep at the edges: bad batches, what it costs, what it records, wrong arguments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, gradients, relative_difference, tiny_batch, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lfu import LfUStep
from lfu.model.anatomy import anatomy, layer_range
from lfu.model.representations import answer_positions
from lfu.step.gradients import sample_of
from lfu.step.record import Record
from lfu.step.soundness import BadBatch
from lfu.step.step import sft_loss
from lfu.step.strength import Strength
from lfu.training.advice import WINDOW, Advice
from lfu.undesirable import LoRA, Own, Steering, ascend

# -- what it does to the loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "steering", "own"])
def test_the_ascent_raises_the_sft_loss_by_alpha_times_the_norm(kind):
    """Eq. 2 to first order: l(aux + alpha g/||g||) = l + alpha ||g||."""
    model = tiny_model("llama")
    step = LfUStep(model, auxiliary=kind, alpha=1e-4)
    step.auxiliary.reset(lambda device: torch.Generator(device).manual_seed(0))
    batch = tiny_batch()
    with step.auxiliary.attached():
        loss = sft_loss(model, batch, 1.0)
        loss.backward()
        norm = ascend(step.auxiliary, step.auxiliary.take_gradients(), step.settings.alpha)
        moved = sft_loss(model, batch, 1.0)
    assert float(moved - loss) == pytest.approx(1e-4 * norm, rel=0.05)


def test_direction_says_which_way_the_model_goes():
    """Through h' theta moves AGAINST the ascent, the SFT loss falls with it; through h it moves along."""
    cosines = {}
    for direction in ("perturbed", "clean"):
        record = LfUStep(tiny_model("llama"), alpha=1e-3, direction=direction)(tiny_batch())
        cosines[direction] = record.gradient_cosine
    assert cosines["perturbed"] > 0.1
    assert cosines["clean"] == pytest.approx(-cosines["perturbed"], rel=0.05)


def test_strength_is_first_order_in_lam_times_alpha():
    """The two settings of the paper, 0.1 x 5 and 0.001 x 500, are of one strength; the loss values are not."""
    one, other = (LfUStep(tiny_model("llama"), alpha=a, lam=w)(tiny_batch()) for a, w in ((0.01, 5.0), (0.0001, 500.0)))
    assert one.gradient_ratio == pytest.approx(other.gradient_ratio, rel=0.05)
    assert one.consistency / other.consistency == pytest.approx(1e4, rel=0.1)


@pytest.mark.parametrize("kind", ["lora", "steering", "own"])
def test_training_with_it_learns(kind):
    model = tiny_model("llama", theta="lora", dtype=torch.float32)
    step = LfUStep(model, auxiliary=kind, alpha=0.01)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(15):
        losses.append(step(tiny_batch()).sft_loss)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


# -- what it costs -----------------------------------------------------------------------------------------------------


def _flops(run) -> int:
    """Without attention's own products: whether its kernel is one that is counted depends on torch's version."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() - counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)


@pytest.mark.parametrize("kind", ["lora", "steering", "own"])
@pytest.mark.parametrize("theta", ["full", "lora"])
def test_costs_two_forwards_and_two_backwards(kind, theta):
    """FLOPs: SFT + the decoder's forward and backward + the low-rank products; no head in the second pass."""
    model = tiny_model("llama", theta=theta, dtype=torch.float32, hidden_size=64, intermediate_size=96, head_dim=16)
    batch = tiny_batch(rows=2, length=48)
    sft = _flops(lambda: sft_loss(model, batch, 1.0).backward())
    decoder = _flops(
        lambda: anatomy(model).decoder(**{k: batch[k] for k in ("input_ids", "attention_mask")})[0].sum().backward()
    )
    rank = 2
    auxiliary = LoRA(rank=rank) if kind == "lora" else {"steering": Steering, "own": Own}[kind]()
    step = _flops(lambda: LfUStep(model, auxiliary=auxiliary)(batch))
    assert decoder < sft
    extra = 0.25 if kind == "lora" else 0.0  # rank 2 of 64: B A x forward and back, and its gradient
    assert step <= (sft + decoder) * (1 + extra) * 1.001


class _Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "most"), [("lora", 2.8), ("steering", 2.4), ("own", 2.4)])
def test_bookkeeping_launches_few_operations(kind, most):
    """Norms, sums and moves are taken over all tensors at once: a GPU waits for launches, not for arithmetic."""
    model, batch = tiny_model("llama", theta="lora", dtype=torch.float32), tiny_batch()
    step = LfUStep(model, auxiliary=kind)
    counts = []
    for run in (lambda: sft_loss(model, batch, 1.0).backward(), lambda: step(batch), lambda: step(batch)):
        model.zero_grad()
        with _Operations() as operations:
            run()
        counts.append(operations.count)
    assert counts[2] <= most * counts[0], counts


@pytest.mark.parametrize("family", FAMILIES)
def test_an_early_range_stops_early(family):
    """The perturbed forward runs no block, norm or head after the last compared layer."""
    model = tiny_model(family)
    parts = anatomy(model)
    runs = [0] * 4
    head_runs = 0

    def count(i):
        def hook(*_):
            runs[i] += 1

        return hook

    def count_head(*_):
        nonlocal head_runs
        head_runs += 1

    parts.model.get_output_embeddings().register_forward_hook(count_head)
    for i, block in enumerate(parts.blocks):
        block.register_forward_pre_hook(count(i))
    LfUStep(model, layers="1-2")(tiny_batch())
    assert runs == [2, 2, 1, 1]
    assert head_runs == 1


def test_memory_kept_between_the_passes_is_that_of_the_answer_tokens():
    batch = tiny_batch()
    step = LfUStep(tiny_model("llama"))
    where = answer_positions(batch["labels"])
    with step.reader.reading(where, detach=True) as found:
        step.reader.run(batch)
    assert {tuple(h.shape) for h in found.values()} == {(len(where), 16)}
    assert len(where) == int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("kind", ["lora", "own"])
def test_activations_of_both_passes_can_be_offloaded(kind):
    """What autograd keeps goes elsewhere and comes back: the same gradients."""
    found, packed = [], 0

    def pack(tensor):
        nonlocal packed
        packed += 1
        return tensor.clone()

    offload = lambda: torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    for on in (False, True):
        model = tiny_model("llama", theta="lora")
        step = LfUStep(model, auxiliary=kind, second_pass=offload) if on else LfUStep(model, auxiliary=kind)
        step(tiny_batch())
        found.append(gradients(model))
    assert packed > 100
    assert relative_difference(*found) == 0


# -- bad batches -------------------------------------------------------------------------------------------------------


def _no_labels():
    batch = tiny_batch()
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def test_no_labelled_token():
    model = tiny_model("llama")
    record = LfUStep(model)(_no_labels())
    assert record.skipped == "no labelled token"
    assert record.sft_loss == record.consistency == 0
    assert all(not g.any() for g in gradients(model).values())


def test_zero_ascent_gradient():
    """A model that already gives every token the same: no direction, no consistency, the SFT gradient stays."""
    model = tiny_model("mistral")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    record = LfUStep(model)(tiny_batch())
    assert record.skipped == "zero ascent gradient"
    assert model.get_output_embeddings().weight.grad.any()


@pytest.mark.parametrize("kind", ["lora", "steering", "own"])
def test_non_finite_loss_leaves_earlier_gradients(kind):
    model = tiny_model("llama", dtype=torch.float32)
    step = LfUStep(model, auxiliary=kind)
    step(tiny_batch())
    earlier = gradients(model)
    broken = LfUStep(model, auxiliary=kind, loss_fn=lambda m, b, n: sft_loss(m, b, n) * float("inf"))
    record = broken(tiny_batch(1))
    assert record.skipped == "non-finite loss"
    assert relative_difference(gradients(model), earlier) == 0


@pytest.mark.parametrize("where", [1, 2])
@pytest.mark.parametrize("kind", ["lora", "steering", "own"])
def test_non_finite_gradients_never_stay(kind, where):
    """A finite loss whose clean (1) or perturbed (2) backward overflows."""
    model = tiny_model("llama", dtype=torch.float32)
    calls = 0

    def backward(loss):
        nonlocal calls
        calls += 1
        (loss * (float("inf") if calls == where else 1.0)).backward()

    record = LfUStep(model, auxiliary=kind, backward=backward)(tiny_batch())
    assert record.skipped.startswith("non-finite")
    assert all(torch.isfinite(g).all() for g in gradients(model).values())
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("limit", [10**9, 300], ids=["all measured", "sampled"])
@pytest.mark.parametrize("where", [1, 2])
def test_a_non_finite_tensor_outside_the_sample_never_stays(monkeypatch, where, limit):
    """One weight's gradient overflows in one backward; measured tensors keep what earlier micro-batches gave."""
    monkeypatch.setattr("lfu.step.gradients.WHOLE", limit)
    model = tiny_model("llama", dtype=torch.float32)
    LfUStep(model)(tiny_batch())
    earlier = gradients(model)
    calls = 0
    victim = "model.layers.0.mlp.up_proj.weight"

    def backward(loss):
        nonlocal calls
        calls += 1
        handle = model.get_parameter(victim).register_hook(lambda g: g * float("nan")) if calls == where else None
        loss.backward()
        if handle:
            handle.remove()

    record = LfUStep(model, backward=backward)(tiny_batch(1))
    assert record.skipped.startswith("non-finite")
    after = gradients(model)
    assert all(torch.isfinite(g).all() for g in after.values())
    if limit > 300:  # dropped as a whole, the earlier part intact
        if where == 2:  # the SFT part of this one stays
            plain = tiny_model("llama", dtype=torch.float32)
            LfUStep(plain, lam=0)(tiny_batch(1))
            earlier = {name: g + gradients(plain)[name] for name, g in earlier.items()}
        assert relative_difference(after, earlier) < 1e-6


def test_infinite_gradients_of_both_signs():
    model = tiny_model("llama", dtype=torch.float32)
    for i, p in enumerate(model.parameters()):
        p.register_hook(lambda g, sign=(-1) ** i: torch.full_like(g, sign * float("inf")))
    record = LfUStep(model)(tiny_batch())
    assert record.skipped.startswith("non-finite")
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def test_theta_above_the_compared_layers_is_skipped_with_the_reason():
    model = tiny_model("llama", theta="subset")
    record = LfUStep(model, layers="1-2")(tiny_batch())
    assert record.skipped == "theta lies above the compared layers"


@pytest.mark.parametrize("kind", ["lora", "steering"])
def test_models_that_change_a_linear_output_in_place(kind):
    """OLMo's clip_qkv clamps q, k, v in place; the next block may do so with its input."""
    import transformers

    config = transformers.OlmoConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, clip_qkv=0.5
    )
    torch.manual_seed(0)
    record = LfUStep(transformers.OlmoForCausalLM(config), auxiliary=kind)(tiny_batch())
    assert record.consistency > 0


def test_norm_preserving_steering_survives_a_zero_hidden_state():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[0].zero_()
    batch = {k: v.flip(1) for k, v in tiny_batch().items()}  # left padding, token 0
    assert LfUStep(model, auxiliary=Steering(preserve_norm=True))(batch).skipped is None


def test_fp16_loss_scale_cancels():
    """A GradScaler's scale on both backward passes: the same gradients once unscaled, the same record."""
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = tiny_model("llama")
        backward = torch.Tensor.backward if scaler is None else lambda loss, s=scaler: s.scale(loss).backward()
        step = LfUStep(model, ascent_steps=2, backward=backward, grad_scaler=scaler)
        record = step(tiny_batch())
        scale = 1.0 if scaler is None else scaler.get_scale()
        found.append(({n: g / scale for n, g in gradients(model).items()}, record))
    assert relative_difference(found[0][0], found[1][0]) < 1e-6
    for name in ("sft_loss", "consistency", "gradient_ratio", "ascent_grad_norm"):
        assert getattr(found[0][1], name) == pytest.approx(getattr(found[1][1], name), rel=1e-6)


@pytest.mark.parametrize("mixed", [False, True], ids=["bf16 weights", "bf16 autocast"])
def test_bf16_resolves_the_papers_alpha_and_not_a_hundredth_of_it(mixed):
    """lam * alpha held: at 0.1 the bf16 consistency gradient is the float32 one, at 0.001 it is noise, and is told."""
    cosines, told = {}, {}
    for alpha in (0.3, 0.001):
        grads = []
        for dtype in (torch.float32, torch.bfloat16):
            # drawn in float32: what bf16 draws from one seed depends on torch's version
            stored = torch.float32 if mixed else dtype
            autocast = lambda on=mixed and dtype == torch.bfloat16: torch.autocast("cpu", torch.bfloat16, enabled=on)
            model = tiny_model("llama", dtype=torch.float32, hidden_size=64, head_dim=16).to(stored)
            step = LfUStep(model, alpha=alpha, lam=0.5 / alpha, autocast=autocast)
            sft = tiny_model("llama", dtype=torch.float32, hidden_size=64, head_dim=16).to(stored)
            with autocast():
                sft_loss(sft, tiny_batch(), 17.0).backward()
                record = step(tiny_batch())
            total, plain = gradients(model), gradients(sft)
            grads.append(torch.cat([(total[n].float() - plain[n].float()).flatten() for n in total]))
        cosines[alpha] = float(torch.cosine_similarity(*grads, dim=0))
        messages: list[str] = []
        advice = Advice(alpha, 0.5 / alpha, warn=messages.append)
        for _ in range(WINDOW):
            advice.watch(record)
        told[alpha] = any("too small for this precision" in m for m in messages)
    assert cosines[0.3] > 0.9 > 0.5 > cosines[0.001]
    assert told == {0.3: False, 0.001: True}


def test_raise_on_request():
    model = tiny_model("llama")
    with pytest.raises(BadBatch, match="no labelled token"):
        LfUStep(model, on_bad_batch="raise")(_no_labels())
    with pytest.raises(BadBatch, match="non-finite loss"):
        LfUStep(model, lam=0, on_bad_batch="raise", loss_fn=lambda *a: torch.tensor(math.nan))(tiny_batch())


def test_extra_ascent_passes_leave_the_random_stream_as_plain_sft():
    ends = []
    for options in ({"lam": 0}, {}, {"ascent_steps": 3}):
        model = tiny_model("gpt2", resid_pdrop=0.1, dtype=torch.float32)
        torch.manual_seed(5)
        LfUStep(model, **options)(tiny_batch())
        ends.append(torch.get_rng_state())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


# -- advice ------------------------------------------------------------------------------------------------------------


def _advised(losses=(), records=()):
    messages: list[str] = []
    advice = Advice(0.1, 5.0, warn=messages.append)
    for loss in losses:
        advice.watch_loss(loss)
    for record in records:
        advice.watch(record)
    return messages


def test_oscillating_losses_are_told_once_and_falling_or_noisy_ones_not():
    assert ["oscillates" in m for m in _advised([1.0, 3.0] * 20)] == [True]
    assert _advised([3.0 * 0.9**i for i in range(40)]) == []
    noise = torch.rand(200, generator=torch.Generator().manual_seed(0))
    assert _advised([2.0 + 0.3 * float(x) for x in noise]) == []


def test_a_run_that_skips_most_batches_is_told_why():
    messages = _advised(records=[Record(skipped="zero ascent gradient")] * 40)
    assert len(messages) == 1
    assert "not connected" in messages[0]
    assert _advised(records=[Record(skipped="no labelled token")] + [_healthy()] * 40) == []


def _healthy() -> Record:
    return Record(gradient_ratio=0.5, gradient_cosine=0.5, displacement={1: 0.05}, resolution=1e-7, tokens=5)


@given(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 1))
@settings(max_examples=25, deadline=None)
def test_answer_positions(mask, shift):
    """As many as the loss averages over; at t - 1 (paper) or t (code) of each answer token after the first position."""
    labels = torch.tensor([[5 if m else -100 for m in mask], [-100] * 6])
    want = [t - (1 - shift) for t in range(1, 6) if mask[t]]
    assert answer_positions(labels, ("predict", "answer")[shift]).tolist() == want


# -- lam = auto --------------------------------------------------------------------------------------------------------


@given(st.floats(1e-6, 1e6), st.floats(0.01, 10))
def test_strength_finds_a_constant_ratio_at_once(unit, target):
    control = Strength(target, start=1e-9)
    assert control.lam == 1e-9
    control.update(unit)
    assert control.lam * unit == pytest.approx(target)
    control.update(math.nan)
    control.update(0.0)
    assert control.lam * unit == pytest.approx(target)


@pytest.mark.parametrize("theta", ["full", "lora"])
def test_state_round_trip(theta):
    """To the last bit: also the order in which the LoRA auxiliary's products are taken goes with the state."""
    model = tiny_model("llama", theta=theta, dtype=torch.float32, hidden_size=64, head_dim=16, intermediate_size=96)
    step, twin = LfUStep(model, lam="auto"), LfUStep(model, lam="auto")
    for s in range(3):
        step(tiny_batch(s, rows=4, length=24))
    twin.load_state_dict(step.state_dict())
    assert twin.lam == step.lam
    found = []
    for one in (step, twin):
        model.zero_grad()
        found.append((one(tiny_batch(3, rows=4, length=24)), gradients(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(g, found[1][1][name]) for name, g in found[0][1].items())


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_sample_of_theta_fits(sizes, limit):
    theta = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    chosen = sample_of(theta, limit)
    assert chosen
    assert sum(p.numel() for p in chosen) <= max(limit, min(sizes))
    if sum(sizes) <= limit:
        assert len(chosen) == len(theta)


@pytest.mark.parametrize(("total", "room"), [(2**25, 2**25), (2**26, 2**22), (2**28, 2**23), (2**32, 2**25)])
def test_how_much_of_theta_is_measured(total, room):
    """All of it up to 2^25 elements, beyond that a 32nd within bounds."""
    theta = [torch.nn.Parameter(torch.empty(total // 2**12, device="meta")) for _ in range(2**12)]
    assert sum(p.numel() for p in sample_of(theta)) == room


def test_a_sampled_ratio_leaves_the_same_gradients(monkeypatch):
    found = []
    for limit in (10**9, 300):
        monkeypatch.setattr("lfu.step.gradients.WHOLE", limit)
        model = tiny_model("llama")
        LfUStep(model)(tiny_batch())
        LfUStep(model)(tiny_batch(1))
        found.append(gradients(model))
    assert relative_difference(*found) < 1e-14


# -- wrong arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "alpha must be"),
        ({"alpha": -0.1}, "alpha must be"),
        ({"alpha": math.inf}, "alpha must be"),
        ({"lam": -1}, "lam must be"),
        ({"lam": "some"}, "lam must be"),
        ({"strength": 1.0}, r"strength=1 is the target of lam='auto', and lam=5 is fixed: drop one"),
        ({"auxiliary": "magic"}, "unknown auxiliary 'magic': choose one of lora, own, steering"),
        ({"consistency": "magic"}, "unknown consistency"),
        ({"layers": "9"}, "this model has|it has layers 1-4"),
        ({"layers": "3-2"}, "backwards"),
        ({"positions": "magic"}, "unknown positions"),
        ({"direction": "magic"}, "unknown direction"),
        ({"ascent_steps": 0}, "ascent_steps"),
        ({"ascent_steps": 1.5}, "ascent_steps"),
        ({"blocks": "norm"}, "not an nn.ModuleList"),
    ],
    ids=str,
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        LfUStep(tiny_model("llama"), **options)


def test_a_batch_without_labels_is_named():
    batch = tiny_batch()
    del batch["labels"]
    with pytest.raises(ValueError, match="labels"):
        LfUStep(tiny_model("llama"))(batch)


def test_independent_batch_must_match_the_setting():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="ascent_batch"):
        LfUStep(model)(tiny_batch(), ascent_batch=tiny_batch())
    with pytest.raises(ValueError, match="ascent_batch"):
        LfUStep(model, ascent_batch="independent")(tiny_batch())


def test_models_it_cannot_work_with():
    import transformers

    t5 = transformers.T5Config(vocab_size=32, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8)
    with pytest.raises(ValueError, match="encoder-decoder"):
        LfUStep(transformers.T5ForConditionalGeneration(t5))
    with pytest.raises(ValueError, match="not a transformers model"):
        LfUStep(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no language-model head"):
        LfUStep(tiny_model("llama").model)
    bare = tiny_model("llama")
    for block in bare.model.layers:
        block.self_attn, block.mlp = torch.nn.Identity(), torch.nn.Identity()
    with pytest.raises(ValueError, match="no linear layer"):
        LfUStep(bare)


@pytest.mark.parametrize("theta", ["full", "lora"])
def test_a_compiled_model_is_refused_and_compiled_parts_without_hooks_are_not(theta):
    model = tiny_model("llama", theta=theta)
    blocks = anatomy(model).blocks
    blocks[0].mlp.act_fn.compile(backend="eager")
    LfUStep(model)
    with pytest.raises(ValueError, match=r"the model is compiled: .* before torch.compile"):
        LfUStep(torch.compile(model, backend="eager"))
    blocks[1].compile(backend="eager")
    with pytest.raises(ValueError, match=r"the module '.*layers\.1' is compiled"):
        LfUStep(model)


@given(st.integers(1, 80))
def test_thirds_cover_every_layer_once(depth):
    if depth < 3:
        return
    thirds = [layer_range(name, depth) for name in ("early", "middle", "late")]
    assert [layer for third in thirds for layer in third] == layer_range("all", depth) == list(range(1, depth + 1))
    if depth == 32:
        assert [(t[0], t[-1]) for t in thirds] == [(1, 11), (12, 22), (23, 32)]
