"""The approximate forms: what each draws and weighs, what it costs, that off is exact, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DEVICE, Float64Throughout, gradients, tiny_batch, tiny_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.flop_counter import FlopCounterMode

from lfu import LfUStep
from lfu.model.anatomy import anatomy
from lfu.step.cheaper import (
    BESIDE,
    Cheaper,
    Sizes,
    cost,
    draw_layers,
    draw_rows,
    generator,
    longest_cycle,
    settle_budget,
    within,
)
from lfu.step.step import sft_loss
from lfu.undesirable import Auxiliary, LoRA, Steering

# -- what is drawn -----------------------------------------------------------------------------------------------------


def test_rows_are_drawn_without_bias():
    """The weighted mean over draws is the sum over all rows; only rows with an answer are drawn."""
    where = torch.tensor([1, 2, 3, 21, 30, 31])  # rows 0, 2, 3 of width 10
    value = torch.arange(40.0)
    total = 0.0
    for i in range(3000):
        chosen, share = draw_rows(where, 10, 0.34, generator(1, i))
        assert share == 3.0
        assert len({int(w) // 10 for w in chosen}) == 1
        total += share * float(value[chosen].sum())
    assert total / 3000 == pytest.approx(float(value[where].sum()), rel=0.05)


@given(st.integers(2, 40), st.integers(1, 39), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_layers_are_neighbours_on_a_ring(depth, count, index):
    layers = list(range(3, 3 + depth))
    drawn = draw_layers(layers, min(count, depth), generator(0, index))
    assert len(set(drawn)) == min(count, depth)
    assert drawn == sorted(drawn)
    gaps = sum((a + 1 - b) != 0 for a, b in itertools.pairwise(drawn))
    assert gaps <= 1
    assert not gaps or (drawn[0] == 3 and drawn[-1] == 2 + depth)


def test_each_layer_is_as_likely():
    counts = [0] * 6
    for i in range(3000):
        for layer in draw_layers(range(6), 2, generator(0, i)):
            counts[layer] += 1
    assert max(counts) / min(counts) < 1.15


# -- the gradients -----------------------------------------------------------------------------------------------------


def flat(model):
    return torch.cat([g.flatten() for g in gradients(model).values()])


def taken(batches, *, theta="full", **options):
    """The gradient that each of the calls adds, and the records."""
    model = tiny_model("llama", theta=theta)
    step, found, records = LfUStep(model, **options), [], []
    for batch in batches:
        model.zero_grad()
        with Float64Throughout():
            records.append(step(batch))
        found.append(flat(model))
    return found, records


def plain(batch, theta="full"):
    return taken([batch], theta=theta, lam=0)[0][0]


def test_every_acts_on_each_kth_update_with_k_times_the_weight():
    batches = [tiny_batch(s) for s in range(4)]
    exact, _ = taken(batches)
    found, records = taken(batches, every=3)
    assert [r.form for r in records] == ["exact", "not due", "not due", "exact"]
    assert [r.lam for r in records] == [15.0, 0.0, 0.0, 15.0]
    sft, _ = taken(batches, lam=0)
    for i in (1, 2):
        torch.testing.assert_close(found[i], sft[i])
    for i in (0, 3):
        torch.testing.assert_close(found[i] - sft[i], 3 * (exact[i] - sft[i]))
    assert {r.approximate for r in records} == {"every=3"}


def test_every_counts_updates_not_micro_batches():
    model = tiny_model("llama", dtype=torch.float32)
    step = LfUStep(model, every=2)
    forms = [step(tiny_batch(i), index=i, update=i // 2).form for i in range(8)]
    assert forms == (["exact"] * 2 + ["not due"] * 2) * 2


def test_part_is_unbiased_for_a_given_auxiliary(monkeypatch):
    """Two of three rows: over all three pairs the mean of the gradients is the exact one."""
    batch = tiny_batch()
    sft = plain(batch)
    exact, seen = taken([batch])[0][0] - sft, {}
    for seed in range(40):
        model = tiny_model("llama")
        step = LfUStep(model, part=0.67)
        chosen = draw_rows(torch.arange(30), 10, 0.67, generator(seed, 0))[0]
        key = tuple(sorted({int(w) // 10 for w in chosen}))
        if key in seen:
            continue
        monkeypatch.setattr("lfu.step.second_pass.generator", lambda _, index, seed=seed: generator(seed, index))
        with Float64Throughout():
            step(batch)
        seen[key] = flat(model) - sft
        if len(seen) == 3:
            break
    torch.testing.assert_close(sum(seen.values()) / 3, exact, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("why", ["trim=False", "dynamic rope", "other masks"])
def test_part_leaves_rows_out_where_nothing_can_be_trimmed(why):
    """The second forward sees the drawn rows alone, and the gradient is that of the trimmed pass."""
    batch, shapes, found = tiny_batch(), [], []
    for trim in (True, False):
        model = tiny_model("llama", attention_dropout=0.1 if why == "other masks" else 0.0)
        if why == "dynamic rope" and not trim:
            model.config.rope_parameters = model.config.rope_parameters | {"rope_type": "dynamic"}
        step = LfUStep(model, part=0.67, trim=trim or why == "dynamic rope", same_dropout=why != "other masks")
        run = step.reader.run
        step.reader.run = lambda b, run=run: (shapes.append(b["input_ids"].shape), run(b))
        step(batch)
        found.append(flat(model))
    assert shapes[1] == (2, 10)
    if why != "other masks":
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_part_is_refused_where_noise_shows_only_when_it_is_drawn():
    model = tiny_model("llama", dtype=torch.float32)
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: out + torch.rand_like(out))
    with pytest.raises(ValueError, match="with dropout or embedding noise saves nothing"):
        LfUStep(model, part=0.5)(tiny_batch())


def test_a_budget_leaves_part_alone_where_masks_are_drawn():
    for dropout in (0.0, 0.1):
        step = LfUStep(tiny_model("llama", attention_dropout=dropout), budget=1.65)
        settle_budget(step, 4)
        assert (step.cheaper.part < 1) == (dropout == 0)


def test_random_layers_average_to_the_exact_gradient(monkeypatch):
    """Over the four places where two of four layers can start."""
    batch = tiny_batch()
    sft = plain(batch)
    exact, found = taken([batch])[0][0] - sft, []
    for start in range(4):
        ring = sorted((start + i) % 4 + 1 for i in range(2))
        monkeypatch.setattr("lfu.step.second_pass.draw_layers", lambda layers, n, g, ring=ring: ring)
        grads, records = taken([batch], random_layers=2)
        assert sorted(records[0].consistency_per_layer) == ring
        found.append(grads[0] - sft)
    torch.testing.assert_close(sum(found) / 4, exact, rtol=1e-8, atol=1e-12)


FIRST_ORDER = [
    ("lora", "mse", "full"), ("steering", "mse", "full"), ("own", "mse", "full"), ("own", "mse", "lora"),
    ("lora", "cosine", "lora"), ("steering", "contrastive", "full"), ("lora", "logit_kl", "lora"),
    ("own", "logit_kl", "lora"),
]  # fmt: skip


@pytest.mark.parametrize(("auxiliary", "consistency", "theta"), FIRST_ORDER)
def test_stale_is_the_exact_gradient_to_first_order_in_alpha(auxiliary, consistency, theta):
    """On the direction of the exact step at the same theta: the relative error falls as alpha does."""
    batch, errors = tiny_batch(), []
    sft = plain(batch, theta)
    for alpha in (0.1, 0.01, 0.001):
        found, records = taken(
            [batch, batch], theta=theta, auxiliary=auxiliary, consistency=consistency, alpha=alpha, lam=1.0, stale=2
        )
        assert [r.form for r in records] == ["exact", "first-order"]
        exact, first = (g - sft for g in found)
        errors.append(float((exact - first).norm() / exact.norm()))
        assert records[1].consistency == pytest.approx(records[0].consistency, rel=1e-6)
        assert records[1].displacement == pytest.approx(records[0].displacement, rel=1e-6)
        if alpha == 0.001:
            assert float(torch.cosine_similarity(exact, first, dim=0)) > 0.999
    assert errors[1] < 0.3 * errors[0] or errors[0] < 1e-3
    assert errors[2] < 0.3 * errors[1]


@pytest.mark.parametrize("options", [{"part": 0.5}, {"random_layers": 2}, {"layers": "early"}], ids=str)
def test_stale_goes_with_the_others(options):
    batch = tiny_batch()
    found, records = taken([batch, batch], alpha=1e-3, lam=500.0, stale=2, **options)
    assert records[1].form == "first-order"
    assert float((found[1] - plain(batch)).norm()) > 0


def test_stale_with_gradient_checkpointing_and_dropout():
    found = []
    for checkpointing in (None, "round the forward", "round the block"):
        model = tiny_model("gpt2", resid_pdrop=0.2, dtype=torch.float32)
        step = LfUStep(model, stale=2, alpha=1e-3, lam=500.0)
        if checkpointing == "round the forward":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        elif checkpointing:
            for i, block in enumerate(model.transformer.h):
                model.transformer.h[i] = checkpoint_wrapper(block)
        for _ in range(2):
            torch.manual_seed(3)
            model.zero_grad()
            record = step(tiny_batch())
        assert record.form == "first-order"
        assert max(record.displacement.values()) < 0.05  # the same masks in both forwards
        found.append(flat(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=1e-3, atol=1e-5)


def test_stale_leaves_nothing_behind_and_goes_on_from_its_state():
    for kind in ("lora", "steering", "own"):
        model = tiny_model("llama", theta="lora", dtype=torch.float32)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        step = LfUStep(model, auxiliary=kind, stale=4)
        step(tiny_batch(0))
        twin = LfUStep(model, auxiliary=kind, stale=4)
        twin.load_state_dict(step.state_dict())
        model.zero_grad()
        record = step(tiny_batch(1))
        want = flat(model)
        model.zero_grad()
        assert twin(tiny_batch(1)) == record
        assert torch.equal(flat(model), want)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert sum(len(m._forward_hooks) for m in model.modules()) == 0


@pytest.mark.parametrize("what", ["loss", "hidden", "backward"])
def test_stale_never_lets_a_non_finite_number_stay(what):
    model = tiny_model("llama", dtype=torch.float32)
    step = LfUStep(model, stale=2)
    step(tiny_batch())
    earlier = flat(model)
    if what == "loss":
        step.loss_fn = lambda m, b, n: sft_loss(m, b, n) * float("inf")
    elif what == "hidden":
        step.direction.components = [t * float("inf") for t in step.direction.components]
    else:
        step.backward = lambda loss: (loss * float("inf")).backward()
    record = step(tiny_batch(1))
    assert record.form == "first-order"
    assert record.skipped.startswith("non-finite")
    assert torch.isfinite(flat(model)).all()
    if what == "hidden":  # the SFT part of this micro-batch stays
        other = tiny_model("llama", dtype=torch.float32)
        LfUStep(other, lam=0)(tiny_batch(1))
        earlier = earlier + flat(other)
    torch.testing.assert_close(flat(model), earlier, rtol=1e-4, atol=1e-6)


# -- what it costs -----------------------------------------------------------------------------------------------------


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def padded(rows=4, length=32):
    batch = tiny_batch(rows=rows, length=length)
    for i in range(rows):
        end = length - 6 * i
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            batch[name][i, end:] = fill
    return batch


@pytest.mark.parametrize("theta", ["full", "lora"])
def test_counted_cost(theta):
    """Exact: within 5 % of F + B + the decoder's F + B on the unpadded rows. Each approximate form: below it."""
    shape = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=192, head_dim=16, attn_implementation="sdpa")
    model, batch = tiny_model("llama", theta=theta, dtype=torch.float32, **shape), padded()
    decoder = anatomy(model).decoder

    def unpadded():
        ids = [row[mask.bool()][:-1] for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
        positions = torch.cat([torch.arange(len(row), device=DEVICE) for row in ids])
        decoder(input_ids=torch.cat(ids)[None], position_ids=positions[None], use_cache=False)[0].sum().backward()

    sft = flops(lambda: sft_loss(model, batch, 1.0).backward())
    floor = sft + flops(unpadded)
    assert flops(lambda: LfUStep(model, auxiliary="own")(batch)) <= 1.05 * floor
    # r = 1 of d = 64 costs what r = 8 of d = 512 does
    auxiliaries = {"steering": Steering, "lora": lambda: LoRA(rank=1)}
    forms = ({"every": 4}, {"part": 0.5}, {"stale": 4}, {"random_layers": 1}, {"budget": 1.35}, {"budget": 1.7})

    counts: dict[tuple[str, str], float] = {}  # by what a budget picks, too

    def counted(auxiliary: str, calls: int, **form) -> float:
        """Per micro-batch, in units of SFT's step."""
        step = LfUStep(model, auxiliary=auxiliaries[auxiliary](), **form)
        if step.budget:
            settle_budget(step, len(batch["labels"]))
        key = auxiliary, str(step.cheaper)
        if key not in counts:
            counts[key] = sum(flops(lambda: step(batch)) for _ in range(calls)) / calls / sft
        return counts[key]

    exact = {auxiliary: counted(auxiliary, 1) for auxiliary in auxiliaries}
    assert exact["steering"] <= 1.05 * floor / sft
    for i, form in enumerate(forms):  # each with either auxiliary on one of the two thetas
        auxiliary = list(auxiliaries)[(i + (theta == "lora")) % 2]
        found = counted(auxiliary, 4, **form)
        assert found < 0.95 * exact[auxiliary], (form, auxiliary)
        assert found <= form.get("budget", found)


@pytest.mark.parametrize("low", [1, 2, 3])
def test_backward_ends_at_the_lowest_layer_of_theta(low):
    """Theta in the layers from `low` on: the perturbed backward reaches no block below, not even under PEFT's and
    gradient checkpointing's `enable_input_require_grads`."""
    model = tiny_model("llama", dtype=torch.float32)
    for name, p in model.named_parameters():
        p.requires_grad_(any(f"layers.{i}." in name for i in range(low, 4)))
    model.enable_input_require_grads()
    reached: list[int] = []
    passes = 0

    def backward(loss):
        nonlocal passes
        passes += 1
        reached.clear()
        loss.backward()

    def watch(i):
        def hook(module, args, output):
            if output.requires_grad:
                output.register_hook(lambda g: reached.append(i + 1))

        return hook

    for i, block in enumerate(model.model.layers):
        block.register_forward_hook(watch(i))
    assert LfUStep(model, backward=backward)(tiny_batch()).skipped is None
    assert passes == 2
    assert min(reached) == low + 1  # the blocks before it, layers 1..low, are out of the graph


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_between_the_passes_only_the_answer_tokens_are_kept(dtype):
    """N x d a layer, in the model's dtype, in storages of their own."""
    from lfu.model.representations import answer_positions

    model, batch = tiny_model("llama", dtype=dtype), tiny_batch(rows=3, length=40)
    batch["labels"][:, :-8] = -100
    where = answer_positions(batch["labels"])
    step = LfUStep(model)
    with step.reader.reading(where, detach=True) as found:
        model(**{k: v for k, v in batch.items() if k != "labels"})
    held = sum(h.untyped_storage().nbytes() for h in found.values())
    assert held == len(where) * 16 * 4 * dtype.itemsize
    assert {h.dtype for h in found.values()} == {dtype}


# -- the table ---------------------------------------------------------------------------------------------------------


@given(st.floats(1.01, 2.5), st.booleans(), st.integers(1, 16), st.integers(1, 80), st.integers(0, 40), st.booleans())
def test_a_budget_is_kept_and_never_spends_less_than_it_must(budget, full, rows, top, below, stale):
    layers, depth = range(min(below, top - 1) + 1, top + 1), top + below
    sizes = Sizes(full, rows, layers, depth)
    form = within(budget, sizes, stale)
    assert cost(form, sizes) <= budget + 1e-9
    assert stale or not form.stale
    assert form.cycle() <= longest_cycle(Cheaper(), budget)
    if budget >= 1 + BESIDE + top / depth:
        assert form.exact


def test_a_range_that_ends_early_costs_its_share_and_a_late_draw_costs_what_lies_below():
    early = cost(Cheaper(), Sizes(False, 1, range(1, 5), 12))
    assert early == pytest.approx(1 + BESIDE + 4 / 12)
    assert within(1.5, Sizes(False, 4, range(1, 5), 12)).exact
    # one of 9..12: the forward runs 9 to 12 of 12 layers
    late = cost(Cheaper(random_layers=1), Sizes(False, 1, range(9, 13), 12))
    assert late == pytest.approx(1 + BESIDE + (9 + 10 + 11 + 12) / 4 / 12)


@pytest.mark.parametrize(
    ("budget", "rows", "want"),
    [
        (1.3, 4, "every=4"),
        (1.4, 4, "part=0.25"),
        (1.35, 1, "every=4"),
        (1.65, 4, "part=0.5"),
        (1.7, 1, "stale=4"),
        (3.0, 4, ""),
    ],
)
def test_what_a_budget_picks_on_a_lora_theta(budget, rows, want):
    assert str(within(budget, Sizes(False, rows, range(1, 5), 4))) == want


@pytest.mark.parametrize(
    ("form", "accumulation", "cycle"),
    [({}, 1, 1), ({"every": 4}, 3, 4), ({"stale": 4}, 1, 4), ({"stale": 4}, 4, 1), ({"stale": 6}, 4, 3)],
)
def test_updates_after_which_the_cost_repeats(form, accumulation, cycle):
    assert Cheaper(**form).cycle(accumulation) == cycle


# -- refused -----------------------------------------------------------------------------------------------------------


class OfOnesOwn(Auxiliary):
    bind = reset = lambda self, *a: None
    parameters = lambda self: []
    attached = discard = lambda self: None
    __repr__ = lambda self: "OfOnesOwn()"  # a test's name must be the same in each process


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be"),
        ({"every": 1.5}, "every must be"),
        ({"part": 0}, "part must be"),
        ({"part": 1.5}, "part must be"),
        ({"stale": 1}, "stale must be"),
        ({"stale": True}, "stale must be"),
        ({"random_layers": -1}, "random_layers must be"),
        ({"random_layers": 4}, "leaves none out"),
        ({"random_layers": 1, "consistency": "logit_kl"}, "random_layers=1 would do nothing"),
        ({"stale": 2, "every": 2}, "several updates old"),
        ({"stale": 2, "direction": "clean"}, "drop direction='clean'"),
        ({"stale": 2, "consistency": "logit_kl"}, "head that is not trained"),
        ({"stale": 2, "auxiliary": OfOnesOwn()}, "OfOnesOwn has none"),
        ({"part": 0.5, "config": {"attention_dropout": 0.1}}, "part=0.5 with dropout .* saves nothing"),
        ({"budget": 1.0}, "budget must be"),
        ({"budget": 1.5, "every": 2}, "drop every=2"),
    ],
    ids=str,
)
def test_refused_with_one_line(options, message):
    options = dict(options)
    model = tiny_model("llama", **options.pop("config", {}))
    with pytest.raises(ValueError, match=message) as refusal:
        LfUStep(model, **options)
    assert "\n" not in str(refusal.value)


def test_off_is_the_exact_step():
    assert Cheaper().exact
    assert str(Cheaper()) == ""
    batch = tiny_batch()
    a, b = (taken([batch], **o)[0][0] for o in ({}, {"every": 1, "part": 1.0, "stale": 0, "random_layers": 0}))
    assert torch.equal(a, b)


def test_stale_is_refused_in_several_processes():
    from lfu.parallel.refusals import refuse_in_several

    refuse_in_several(False, False, 0)
    with pytest.raises(ValueError, match="stale=4 runs in one process: under DDP, FSDP and DeepSpeed use every"):
        refuse_in_several(False, False, 4)
