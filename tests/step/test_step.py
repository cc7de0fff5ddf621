"""LfUStep: what a step does to the loss, what it costs, bad batches, wrong arguments."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import DEVICE, FAMILIES, gradients, random_states, relative_difference, tiny_batch, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lfu import LfUStep
from lfu.model.anatomy import anatomy
from lfu.step.record import BadBatch
from lfu.step.step import sft_loss
from lfu.training.advice import WINDOW, Advice
from lfu.undesirable import LoRA, Own, Steering

# -- what it does to the loss ------------------------------------------------------------------------------------------


def test_direction_says_which_way_the_model_goes():
    """Through h' theta moves AGAINST the ascent, the SFT loss falls with it; through h it moves along."""
    cosines = {}
    for direction in ("perturbed", "clean"):
        record = LfUStep(tiny_model("llama"), alpha=1e-3, direction=direction)(tiny_batch())
        cosines[direction] = record.gradient_cosine
    assert cosines["perturbed"] > 0.1
    assert cosines["clean"] == pytest.approx(-cosines["perturbed"], rel=0.05)


@pytest.mark.parametrize("kind", ["lora", "steering", "own"])
def test_training_with_it_learns(kind):
    model = tiny_model("llama", theta="lora", dtype=torch.float32)
    step = LfUStep(model, auxiliary=kind, alpha=0.01)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
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
    shape = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=96, head_dim=16)
    model = tiny_model("llama", theta=theta, dtype=torch.float32, **shape)
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
    record = LfUStep(transformers.OlmoForCausalLM(config).to(DEVICE), auxiliary=kind)(tiny_batch())
    assert record.consistency > 0


@pytest.mark.parametrize("mixed", [False, True], ids=["bf16 weights", "bf16 autocast"])
def test_bf16_resolves_the_papers_alpha_and_not_a_hundredth_of_it(mixed):
    """lam * alpha held: at 0.1 the bf16 consistency gradient is the float32 one, at 0.001 it is noise, and is told."""
    cosines, told = {}, {}
    for alpha in (0.3, 0.001):
        grads = []
        for dtype in (torch.float32, torch.bfloat16):
            # drawn in float32: what bf16 draws from one seed depends on torch's version
            stored = torch.float32 if mixed else dtype
            autocast = lambda on=mixed and dtype == torch.bfloat16: torch.autocast(DEVICE, torch.bfloat16, enabled=on)
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
        advice = Advice(0.5 / alpha, warn=messages.append)
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
        ends.append(random_states())
    assert ends[0] == ends[1] == ends[2]


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
        (
            {"consistency": "logit_kl", "layers": "early"},
            "layers='early' would do nothing, as LogitKL does not",
        ),
        ({"consistency": "logit_kl", "final_norm": False}, "final_norm=False would do nothing"),
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
