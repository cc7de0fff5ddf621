"""The ascent in 16-bit models: its norm and step against float64, and what rounding takes of it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tiny import DEVICE, gradients, tiny_batch, tiny_model
from torch.overrides import TorchFunctionMode

from lfu import LfUStep, Record
from lfu.model.anatomy import anatomy
from lfu.model.precision import round_at_random
from lfu.model.rng import generators
from lfu.step.step import sft_loss
from lfu.undesirable import KINDS, auxiliary_of

WIDE = dict(num_hidden_layers=2, hidden_size=64, head_dim=16)


def model_of(dtype: torch.dtype, theta: str = "full", numbers: torch.dtype = torch.bfloat16):
    """The same weights in every dtype: those that `numbers` can hold."""
    return tiny_model("llama", theta=theta, dtype=numbers, **WIDE).to(dtype)


def as_trained():
    """Float32 weights with digits that autocast cuts off, as training leaves them (docs/method.md)."""
    return model_of(torch.float32, numbers=torch.float32)


def adapter_in_float32():
    model = model_of(torch.bfloat16, "lora")
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return model


# name -> (model, autocast's dtype)
MODELS = {
    "bf16": (lambda: model_of(torch.bfloat16), None),
    "bf16 with a float32 adapter": (adapter_in_float32, None),
    "float32 under bf16 autocast": (as_trained, torch.bfloat16),
    "float32 under fp16 autocast": (as_trained, torch.float16),
}


def seen_by(step: LfUStep) -> tuple[Record, torch.Tensor]:
    """The record of one micro-batch, and its ascent gradient: the direction that it moves in."""
    seen, take = [], step.auxiliary.take_gradients

    def take_and_note():
        gradients = take()
        seen.append(torch.cat([g.flatten().double() for g in gradients if g is not None]))
        return gradients

    step.auxiliary.take_gradients = take_and_note
    return step(tiny_batch()), seen[0]


def rounds_at_random(model, eps: float, seed: int):
    """Each module's output, and the gradient that comes back to it, is off by up to half of `eps`, at random.

    What a dtype with this machine epsilon does to the model, whichever processor or library computes it: the draws are
    the same on every device.
    """
    source = torch.Generator().manual_seed(seed)

    def rounded(t):
        noise = torch.rand(t.shape, generator=source, dtype=t.dtype).to(t.device) - 0.5
        return t * (1 + eps * noise)

    def visit(module, args, output):
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            output = rounded(output)
            if output.requires_grad:
                output.register_hook(rounded)
        return output

    for module in model.modules():
        module.register_forward_hook(visit)


class CastsWeights(TorchFunctionMode):
    """What autocast does to the weight of each product, in a model of any dtype: it is rounded where it is used."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, weight, *bias = args
            args = (x, weight + (weight.to(self.dtype).to(weight) - weight).detach(), *bias)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_norm_direction_and_step_are_those_of_float64_to_the_models_precision(name, kind, monkeypatch):
    """No further from float64 than four times what rounding at random by the dtype's epsilon does to the same model.

    Autocast rounds the weights as well, also those that `own` has moved. The whole step runs under autocast, too, whose
    cache of cast weights must not outlive a move of `own`.
    """
    # A in the float64 model as in the others: from one seed float64 draws other numbers than float32
    monkeypatch.setattr("lfu.undesirable.lora.component_dtype", lambda dtype: torch.float32)
    make, mixed = MODELS[name]
    theta = "lora" if "adapter" in name else "full"
    eps = torch.finfo(mixed or torch.bfloat16).eps
    in_float64 = lambda: model_of(torch.float64, theta, torch.float32 if mixed else torch.bfloat16)
    exact, right = seen_by(LfUStep(in_float64(), auxiliary=kind))
    autocast = lambda: torch.autocast(DEVICE, dtype=mixed, enabled=mixed is not None)
    with autocast():
        record, found = seen_by(LfUStep(make(), auxiliary=kind, autocast=autocast))

    emulated = []
    for seed in range(4):
        model = in_float64()
        rounds_at_random(model, eps, seed)
        with CastsWeights(mixed) if mixed else nullcontext():
            emulated.append(seen_by(LfUStep(model, auxiliary=kind)))
    worst = lambda off: 4 * max(off(*one) for one in emulated)
    direction = lambda record, g: float((g / g.norm() - right / right.norm()).norm())
    norm = lambda record, g: abs(record.ascent_grad_norm / exact.ascent_grad_norm - 1)
    assert record.skipped is None
    assert direction(record, found) < worst(direction) < 1
    assert norm(record, found) < max(worst(norm), eps)
    for layer, moved in exact.displacement.items():
        noise = lambda record, g, layer=layer, moved=moved: abs(record.displacement[layer] - moved)
        assert noise(record, found) < max(worst(noise), eps), layer


@pytest.mark.parametrize("kind", ["lora", "steering"])
def test_components_are_float32_whatever_the_model_is(kind):
    step = LfUStep(model_of(torch.bfloat16), auxiliary=kind)
    step.auxiliary.reset(lambda device: torch.Generator(device).manual_seed(0))
    assert {p.dtype for p in step.auxiliary.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_at_random_gives_a_neighbour_and_on_average_the_number(dtype):
    numbers = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    source = torch.Generator(DEVICE).manual_seed(1)
    draws = torch.stack([round_at_random(numbers, dtype, source).double() for _ in range(4000)])
    gap = torch.finfo(dtype).eps * numbers.abs().double()  # at least half of the distance of the two neighbours
    assert ((draws - numbers).abs() <= gap).all()
    # four standard deviations of the mean: a draw's is at most half of the distance
    assert ((draws.mean(0) - numbers).abs() <= 4 * gap / 4000**0.5).all()


def test_own_on_bf16_weights_takes_steps_far_below_what_they_resolve():
    """The loss rises by alpha ||g|| (Eq. 2 to first order), on average; rounded to the nearest, hardly at all."""
    alpha, exact = 1e-3, model_of(torch.float64)
    plain = sft_loss(exact, tiny_batch(), 1.0)
    plain.backward()
    steps = [p.grad.float() for p in exact.parameters()]
    norm = float(torch.cat([g.flatten() for g in steps]).norm())
    model, moved = model_of(torch.bfloat16), model_of(torch.float64)
    own = auxiliary_of("own")
    own.bind(anatomy(model))

    def rise(source) -> float:
        own.reset(source)
        own.move(steps, alpha / norm)
        moved.load_state_dict(model.state_dict())
        own.discard()
        with torch.no_grad():
            return float(sft_loss(moved, tiny_batch(), 1.0) - plain) / (alpha * norm)

    found = torch.tensor([rise(generators(0, index)) for index in range(32)])
    assert float(found.mean()) == pytest.approx(1.0, abs=4 * float(found.std()) / 32**0.5)
    assert float(found.std()) < 0.5
    assert rise(None) < 0.5
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), model_of(torch.bfloat16).parameters()))


def test_own_rounds_alike_in_a_micro_batch_that_runs_again():
    again = []
    for _ in range(2):
        model = model_of(torch.bfloat16)
        LfUStep(model, auxiliary="own")(tiny_batch(), index=3)
        again.append(gradients(model))
    assert all(torch.equal(g, again[1][name]) for name, g in again[0].items())
