"""Whatever is raised, wherever it is raised: nothing stays on the model, and a step's gradients are there or not."""

from __future__ import annotations

import warnings
from functools import cache
from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from test_trainer import trainer, weights
from tiny import gradients, relative_difference, tiny_batch, tiny_model
from torch import nn
from transformers import TrainerCallback

from lfu import LfUStep
from lfu.step.consistency import MSE, Contrastive, Cosine, LogitKL
from lfu.step.pieces import cut
from lfu.step.step import sft_loss
from lfu.training.advice import LfUAdvice
from lfu.undesirable import LoRA, Own, Steering

AUXILIARIES = {"lora": LoRA, "steering": Steering, "own": Own}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


class Boom(Exception):
    """Nobody else raises it."""


def hooks(model: nn.Module) -> dict[str, list[int]]:
    """Module -> how many hooks of each kind; and those on parameters."""
    found = {name: [len(getattr(module, kind)) for kind in HOOKS] for name, module in model.named_modules()}
    return found | {name: [len(p._backward_hooks or ())] for name, p in model.named_parameters()}


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def raising(error: BaseException, call: int = 1):
    """A function that raises at its `call`-th call, and a count of its calls."""
    seen = SimpleNamespace(calls=0)

    def fail(*args, **kwargs):
        seen.calls += 1
        if seen.calls == call:
            raise error

    return fail, seen


# -- one micro-batch ---------------------------------------------------------------------------------------------------

# where it is raised -> (attribute of the step or its parts, calls of it before the one that raises)
PLACES = {
    "loss": ("loss_fn", 1),
    "first backward": ("backward", 1),
    "second backward": ("backward", 2),
    "consistency, first layer": ("term.consistency.forward", 1),
    "consistency, third layer": ("term.consistency.forward", 3),
    "reset": ("auxiliary.reset", 1),
    "attached, clean": ("auxiliary.attached", 1),
    "attached, perturbed": ("auxiliary.attached", 2),
    "gradients": ("auxiliary.take_gradients", 1),
    "move": ("auxiliary.move", 1),
    "freeze": ("auxiliary.freeze", 1),
    "autocast, perturbed": ("autocast", 1),
    "a block, clean": ("block", 1),
    "a block, perturbed": ("block", 2),
    "a hook on a gradient": ("gradient", 1),
    "a hook on a gradient, perturbed": ("gradient", 2),
}


def break_at(step: LfUStep, place: str, error: BaseException, monkeypatch) -> SimpleNamespace:
    """Makes `place` raise in the step's next call."""
    name, call = PLACES[place]
    fail, seen = raising(error, call)
    block = step.anatomy.blocks[1]
    if name == "block":
        monkeypatch.setattr(block, "forward", _after(fail, block.forward))
    elif name == "gradient":
        handle = next(block.parameters()).register_hook(fail)
        seen.undo = handle.remove
    else:
        owner, _, attribute = name.rpartition(".")
        target = attrgetter(owner)(step) if owner else step
        monkeypatch.setattr(target, attribute, _after(fail, getattr(target, attribute)))
    return seen


def _after(fail, original):
    def call(*args, **kwargs):
        fail()
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize("theta", ["subset", "full"])
@pytest.mark.parametrize("kind", AUXILIARIES)
@pytest.mark.parametrize("sampled", [False, True], ids=["", "sampled"])
def test_an_exception_anywhere_leaves_the_whole_micro_batch_or_none(monkeypatch, kind, sampled, theta):
    """One model after the other exception: after each of them it works as if nothing had happened."""
    model = tiny_model("llama", theta=theta, num_hidden_layers=3)
    if sampled:
        monkeypatch.setattr("lfu.step.gradients.WHOLE", 300)
    step = LfUStep(model, auxiliary=AUXILIARIES[kind]())
    step(tiny_batch(1))
    earlier, before = gradients(model), {k: v.clone() for k, v in model.state_dict().items()}
    for place in PLACES:
        if ("hook" in place) != (theta == "full"):  # a hook on a gradient needs one in each block
            continue
        with monkeypatch.context() as patch:
            seen = break_at(step, place, Boom(), patch)
            hooks_before, flags_before = hooks(model), flags(model)
            with pytest.raises(Boom):
                step(tiny_batch(2))
            assert hooks(model) == hooks_before, place
            assert flags(model) == flags_before, place
        getattr(seen, "undo", lambda: None)()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), place
        left = gradients(model)
        if (sampled and kind != "own" and place != "reset") or (sampled and kind == "own" and _late(place)):
            assert not any(g.any() for g in left.values()), f"{place}: parts can't be told apart, so none may stay"
        else:
            assert relative_difference(left, earlier) < 1e-12, place
        model.zero_grad()
        step.calls = 0
        step(tiny_batch(1))
        assert relative_difference(gradients(model), earlier) < 1e-12, place


def _late(place: str) -> bool:
    """After the ascent; until then `own` keeps all gradients apart."""
    return place in (
        "second backward", "consistency, first layer", "consistency, third layer", "attached, perturbed", "freeze",
        "autocast, perturbed", "a block, perturbed", "a hook on a gradient, perturbed",
    )  # fmt: skip


def test_an_exception_in_the_custom_parts_of_discard(monkeypatch):
    """Even where the auxiliary's own clearing up fails, the gradients are put together again."""
    model = tiny_model("llama")
    step = LfUStep(model)
    fail, _ = raising(Boom())
    monkeypatch.setattr(step.auxiliary, "discard", fail)
    with pytest.raises(Boom):
        step(tiny_batch(1))
    assert any(g.any() for g in gradients(model).values())
    assert not any(sum(counts) for counts in hooks(model).values())


# -- out of memory -----------------------------------------------------------------------------------------------------


def oom_above(model: nn.Module, rows: int, *, passes: tuple[int, ...] = (2,), backward: bool = False):
    """A hook on a block that is out of memory for more than so many rows, in the named passes.

    To see rows it needs a step with `trim=False`: without padding they are one sequence.
    """
    seen = SimpleNamespace(sizes=[], passes=0)
    block = model.model.layers[-2]

    def hook(module, args, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        seen.passes += 1
        seen.sizes.append(len(hidden))
        if min(seen.passes, 2) in passes and len(hidden) > rows:
            if not backward:
                raise torch.OutOfMemoryError("CUDA out of memory (a test)")
            hidden.register_hook(_out_of_memory)

    seen.handle = block.register_forward_hook(hook)
    return seen


def _out_of_memory(gradient):
    raise torch.OutOfMemoryError("CUDA out of memory (a test)")


CONSISTENCIES = {"mse": MSE(), "cosine": Cosine(), "logit_kl": LogitKL()}
PIECES = [  # every pair of two values
    pytest.param(kind, CONSISTENCIES[name], (1, 3, 1)[(i + j) % 3], (i + 2 * j) % 3 > 0, id=f"{kind}-{name}")
    for i, kind in enumerate(AUXILIARIES)
    for j, name in enumerate(CONSISTENCIES)
]


@pytest.mark.parametrize(("kind", "consistency", "fits", "backward"), PIECES)
@pytest.mark.filterwarnings("ignore:out of memory")
def test_the_perturbed_pass_in_pieces_leaves_the_same_gradients(kind, consistency, fits, backward):
    """Five rows, of which one has no answer at all."""
    whole, one, log_one = five_rows(kind, consistency)
    pieces, two, log_two = five_rows(kind, consistency, fits, backward)
    assert (one.pieces, two.pieces) == (1, {1: 4, 3: 2}[fits])
    assert relative_difference(pieces, whole) < 1e-5  # norms and softmaxes are float32, whatever the dtype
    for name in ("sft_loss", "consistency", "gradient_ratio", "gradient_cosine"):
        assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-4), name
    assert two.displacement == pytest.approx(one.displacement, rel=1e-4)
    assert two.consistency_per_layer == pytest.approx(one.consistency_per_layer, rel=1e-4)
    assert log_two == pytest.approx(log_one, rel=1e-4)


@pytest.mark.filterwarnings("ignore:out of memory")
def test_pieces_without_padding_leave_the_same_gradients():
    """The first try of the perturbed pass, over all rows as one sequence, is out of memory."""
    found, sizes = [], []
    for short in (False, True):
        model = tiny_model("llama", attn_implementation="sdpa")
        step = LfUStep(model)
        run = step.reader.run

        def first_is_too_much(batch, run=run, short=short):
            sizes.append(tuple(batch["input_ids"].shape))
            if short and len(sizes) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory (a test)")
            run(batch)

        step.reader.run = first_is_too_much
        batch = tiny_batch(3, rows=4)
        batch["attention_mask"][1:, 6:], batch["labels"][1:, 6:] = 0, -100
        assert step(batch).pieces == (2 if short else 1)
        found.append(gradients(model))
    tokens = [rows * width for rows, width in sizes]
    assert sizes[0] == sizes[1] == (1, tokens[2] + tokens[3])
    assert relative_difference(*found) < 1e-5


@cache  # what several cases are compared with
def five_rows(kind: str, consistency, fits: int | None = None, backward: bool = False):
    """Gradients, record and lam's running mean of the second of two micro-batches; the memory holds `fits` rows."""
    batch = tiny_batch(3, rows=5)
    batch["labels"][3] = -100
    model = tiny_model("llama", num_hidden_layers=3)
    step = LfUStep(model, auxiliary=AUXILIARIES[kind](), consistency=consistency, lam="auto", trim=False)
    step(batch)  # an earlier micro-batch of the update
    seen = oom_above(model, fits, backward=backward) if fits else None
    record = step(batch)
    assert not seen or min(seen.sizes) <= fits
    return gradients(model), record, step.strength.mean_log


@pytest.mark.parametrize(
    ("options", "config", "rows", "why"),
    [
        ({"consistency": Contrastive()}, {}, 3, "compares tokens of different rows"),
        ({"direction": "clean"}, {}, 3, "direction='clean'"),
        ({}, {"attention_dropout": 0.1}, 3, "dropout or embedding noise"),
        ({}, {}, 1, "can't be taken apart"),
        ({"consistency": MSE()}, {}, 3, "single rows don't fit"),
    ],
    ids=["contrastive", "clean", "dropout", "one row", "nothing fits"],
)
@pytest.mark.filterwarnings("ignore:out of memory")
def test_where_pieces_would_not_be_exact_the_error_says_so(options, config, rows, why):
    model = tiny_model("llama", **config)
    step = LfUStep(model, **options)
    step(tiny_batch(1))
    earlier = gradients(model)
    seen = oom_above(model, 0)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        step(tiny_batch(2, rows=rows))
    assert why in "".join(caught.value.__notes__)
    seen.handle.remove()
    assert relative_difference(gradients(model), earlier) < 1e-12
    assert not any(sum(counts) for counts in hooks(model).values())


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("kind", AUXILIARIES)
@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_sampled_theta_is_tried_in_pieces_until_a_backward_has_begun(monkeypatch, kind, backward):
    batch, found = tiny_batch(3, rows=4), []
    for short in (False, True):
        monkeypatch.setattr("lfu.step.gradients.WHOLE", 300)
        model = tiny_model("llama", num_hidden_layers=3)
        step = LfUStep(model, auxiliary=AUXILIARIES[kind](), trim=False)
        step(batch)
        seen = oom_above(model, 2, backward=backward) if short else None
        if short and backward:
            with pytest.raises(torch.OutOfMemoryError) as caught:
                step(batch)
            assert "its backward had begun" in "".join(caught.value.__notes__)
            assert min(seen.sizes) == 4
            assert not any(g.any() for g in gradients(model).values()), "parts can't be told apart, so none may stay"
            return
        assert step(batch).pieces == (2 if short else 1)
        found.append(gradients(model))
    assert relative_difference(*found) < 1e-5


def test_out_of_memory_in_the_clean_pass_leaves_earlier_micro_batches_alone():
    model = tiny_model("llama")
    step = LfUStep(model)
    step(tiny_batch(1))
    earlier = gradients(model)
    seen = oom_above(model, 0, passes=(1,))
    with pytest.raises(torch.OutOfMemoryError):
        step(tiny_batch(2))
    seen.handle.remove()
    assert relative_difference(gradients(model), earlier) < 1e-12
    assert not any(sum(counts) for counts in hooks(model).values())


def test_pieces_cover_every_row_once():
    batch = tiny_batch(0, rows=7)
    where = torch.arange(70)
    from lfu.step.pieces import Rows

    rows = Rows(batch | {"scalar": torch.tensor(3.0)}, where, {1: torch.arange(70.0)})
    for count in range(1, 8):
        pieces = cut(rows, count)
        assert len(pieces) == count
        assert torch.cat([piece.batch["input_ids"] for piece in pieces]).equal(batch["input_ids"])
        assert torch.cat([piece.target[1] for piece in pieces]).equal(torch.arange(70.0))
        assert all(piece.where.max() < piece.batch["labels"].numel() for piece in pieces)


# -- a whole training --------------------------------------------------------------------------------------------------


class Raises(TrainerCallback):
    """Raises at an event, in the second update or, of the events at the beginning, before the first."""

    def __init__(self, event: str):
        self.early = event in ("on_train_begin", "on_epoch_begin")
        setattr(self, event, self._raise)

    def _raise(self, args, state, control, **more):
        if self.early or state.global_step >= 1:
            raise Boom


EVENTS = ("on_train_begin", "on_epoch_begin", "on_evaluate", "on_prediction_step",
          "on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log",
          "on_save", "on_epoch_end", "on_train_end")  # fmt: skip
METHODS = ("lfu", "lfu+neftune", "kl", "sam", "ema")


def test_an_exception_in_a_callback_leaves_nothing_on_the_model(tmp_path):
    """One training after the other, of the same trainer."""
    t = trainer(tmp_path, neftune_noise_alpha=5.0, save_strategy="steps", save_steps=2)
    t.eval_dataset, t.args.eval_strategy, t.args.eval_steps = t.train_dataset, "steps", 1
    before = hooks(t.model), flags(t.model)
    for event in EVENTS:
        raises = Raises(event)
        t.add_callback(raises)
        with pytest.raises(Boom):
            t.train()
        t.remove_callback(raises)
        assert (hooks(t.model), flags(t.model)) == before, event


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_training_leaves_nothing_on_the_model(tmp_path, monkeypatch, method):
    """One training after the other, of the same trainer."""
    peft = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    t = trainer(tmp_path, method=method, peft=peft, max_steps=3)
    before = hooks(t.model), flags(t.model)
    for where in ("compute_loss", "model", "optimizer", "method"):
        with monkeypatch.context() as patch:
            break_training(t, method, where, patch)
            with pytest.raises(Boom):
                t.train()
        assert (hooks(t.model), flags(t.model)) == before, where


def break_training(t, method: str, where: str, monkeypatch) -> None:
    """Makes the next training raise."""
    fail, _ = raising(Boom(), 3)
    if where == "compute_loss":
        monkeypatch.setattr(t, "compute_loss", _after(fail, t.compute_loss))
    elif where == "model":
        block = t.anatomy.blocks[1]
        monkeypatch.setattr(block, "forward", _after(fail, block.forward))
    elif where == "optimizer":
        monkeypatch.setattr(torch.optim.AdamW, "step", _after(raising(Boom())[0], torch.optim.AdamW.step))
    else:
        monkeypatch.setattr(t, "log_metric" if "lfu" in method else "_prepare_inputs", raising(Boom())[0])


# -- not a number ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lfu", "sft", "kl", "gem", "lfu+neftune"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_theta_never_becomes_nan(tmp_path, method, where):
    """One micro-batch of three updates is broken: its update is left out or mended, told, and the run goes on."""
    t = trainer(tmp_path, method=method, max_steps=3, max_grad_norm=1.0)
    calls = 0

    def poison(module, args, output):
        nonlocal calls
        if module.training and torch.is_grad_enabled():
            calls += 1
            if calls == 3 and where == "loss":
                return output * float("nan")
            if calls == 3:
                output.register_hook(lambda g: g * float("nan"))
        return None

    t.model.model.norm.register_forward_hook(poison)
    start = weights(t)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        t.train()
    told = [str(each.message) for each in heard if issubclass(each.category, LfUAdvice)]
    if "lfu" in method:  # its step looks after itself, and counts
        assert sum(entry["lfu/skipped"] for entry in t.state.log_history if "lfu/skipped" in entry) == 0.5  # one of two
    else:
        assert [line for line in told if line.startswith("the gradient of update 2 is not finite: it is left out")]
    assert calls > 4
    assert all(torch.isfinite(value).all() for value in weights(t).values())
    assert any(not torch.equal(start[name], value) for name, value in weights(t).items())


def test_embeddings_that_are_nan_are_told_and_nothing_else_breaks(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = float("nan")
    others = {n: p.clone() for n, p in model.named_parameters() if "embed" not in n}
    t = trainer(tmp_path, model=model, max_steps=12, advice=True)
    with pytest.warns(UserWarning, match="Newest reason: non-finite loss"):
        t.train()
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)


def test_the_custom_loss_of_a_step_may_be_nan():
    model = tiny_model("llama")
    broken = lambda model, batch, items: sft_loss(model, batch, items) * float("nan")
    record = LfUStep(model, loss_fn=broken)(tiny_batch())
    assert record.skipped == "non-finite loss"
    assert not any(g.any() for g in gradients(model).values())
