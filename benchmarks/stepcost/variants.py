"""What is timed: one micro-batch of SFT, of LfU with any options, of a method's trainer, or of the naive step."""

from __future__ import annotations

import ast
import copy
import inspect
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lfu import LfUStep
from lfu.methods import REGISTRY
from lfu.model.anatomy import anatomy
from lfu.model.representations import answer_positions
from lfu.model.row_attention import PackedRows, attention_in
from lfu.step.cheaper import Cheaper, draw_layers, draw_rows, generator, settle_budget
from lfu.step.settings import StepSettings
from lfu.step.step import sft_loss
from lfu.support.errors import did_you_mean
from lfu.undesirable import KINDS
from stepcost.cases import needed_lengths

# What is neither an auxiliary (LfUStep) nor a method (LfUTrainer).
PLAIN = {
    "sft": "forward and backward of the plain loss (F+B): what all ratios are to",
    "trainer": "training_step of TRL's SFTTrainer",
    "oracle": "the naive step of tests/oracle.py (3F+3B)",
    "decoder": "forward and backward of the decoder alone, no head: the second pass at its barest",
    "decoder_unpadded": "the same over the tokens up to the last label, without padding",
}
# Micro-batches of a sample of a form that draws rows or layers anew each time, and the samples one is chosen among.
DRAWS, SAMPLES = 4, 64


@dataclass(frozen=True)
class Variant:
    """A name and its options, as `lora:every=2` gives them."""

    text: str
    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Run:
    """One micro-batch a call.

    Attributes:
        once: forward and backward of one micro-batch.
        calls: how many make a sample: an approximate form's differ in cost, so a whole cycle is measured.
        rewind: back to the first of them, so that each sample has the same ones.
    """

    once: Callable[[], Any]
    calls: int = 1
    rewind: Callable[[], None] = lambda: None

    def __call__(self) -> Any:
        return self.once()

    def sample(self) -> None:
        """A whole cycle."""
        self.rewind()
        for _ in range(self.calls):
            self.once()


def parse_variant(text: str) -> Variant:
    """`lora:every=2,alpha=0.05` -> its auxiliary and the keywords of `LfUStep` or of the auxiliary (`rank=16`).

    Raises:
        ValueError: an unknown name or option, or no `key=value`.
    """
    name, _, rest = text.partition(":")
    known = [*PLAIN, *KINDS, *(m for m in REGISTRY if m != "sft")]
    if name not in known:
        raise ValueError(f"unknown variant {name!r}: use one of {', '.join(known)}.{did_you_mean(name, known)}")
    options: dict[str, Any] = {}
    for part in rest.replace(":", ",").split(",") if rest else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{text!r}: {part!r} is not of the form option=value, as in lora:alpha=0.05")
        options[key.strip()] = _value(value.strip())
    _check_options(text, name, options)
    return Variant(text, name, options)


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    try:
        return words[text.lower()] if text.lower() in words else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check_options(text: str, name: str, options: dict[str, Any]) -> None:
    if name in PLAIN and options:
        raise ValueError(f"{text!r}: {name} takes no options")
    if name in KINDS:
        known = [*_keywords(LfUStep), *_keywords(StepSettings), *_keywords(KINDS[name])]
        for key in options:
            if key not in known:
                raise ValueError(f"{text!r}: LfUStep has no option {key!r}.{did_you_mean(key, known)}")


def _keywords(cls: Any) -> list[str]:
    inside = ("self", "model", "settings", "named", "auxiliary", "loss_fn", "backward", "autocast", "grad_scaler")
    return [name for name in inspect.signature(cls.__init__).parameters if name not in (*inside, "args", "kwargs")]


def make_step(variant: Variant, model: Any, batch: dict[str, torch.Tensor]) -> Run:
    """The variant on a twin of `model`, gradients left on theta.

    Args:
        variant: what to run.
        model: a model of `make_model`; its parameters are shared, its modules are not: hooks and TRL's patched forward
            of one variant don't reach another.
        batch: of `make_batch`, on the model's device.
    """
    twin = twin_of(model)
    items = float((batch["labels"][:, 1:] != -100).sum())
    if variant.name == "sft":
        return Run(lambda: sft_loss(twin, batch, items).backward())
    if variant.name.startswith("decoder"):
        return Run(_decoder_step(twin, batch, unpadded=variant.name == "decoder_unpadded"))
    if variant.name == "oracle":
        return Run(_oracle_step(twin, batch))
    if variant.name in KINDS:
        return _lfu_run(lfu_step(variant, twin, len(batch["labels"])), batch)
    return _trainer_run(variant, twin, batch, items)


def lfu_step(variant: Variant, model: Any, rows: int) -> LfUStep:
    """The `LfUStep` of a variant in `KINDS`; a `budget` is settled for so many rows."""
    own = _keywords(KINDS[variant.name])
    auxiliary = KINDS[variant.name](**{k: v for k, v in variant.options.items() if k in own})
    step = LfUStep(model, auxiliary=auxiliary, **{k: v for k, v in variant.options.items() if k not in own})
    if step.budget is not None:
        settle_budget(step, rows)
    return step


def _lfu_run(step: LfUStep, batch: dict[str, torch.Tensor]) -> Run:
    calls = cycle(step.cheaper)
    first = typical_start(step, batch, calls)

    def rewind() -> None:
        step.calls = first

    return Run(lambda: step(batch), calls, rewind)


def cycle(form: Cheaper) -> int:
    """Micro-batches until each kind of step has had its turn: `every`, `stale`, and `DRAWS` where one is random."""
    return (form.stale or form.every) * (DRAWS if form.part < 1 or form.random_layers else 1)


def typical_start(step: LfUStep, batch: dict[str, torch.Tensor], calls: int) -> int:
    """The first micro-batch of the sample whose drawn rows and layers cost the most nearly what all samples do.

    A few draws at random would be off by a tenth of a step. The cost of a draw is taken as its tokens times the
    depth that the second pass must reach.
    """
    form = step.cheaper
    if form.part == 1 and not form.random_layers:
        return 0
    where, width = answer_positions(batch["labels"], step.settings.positions), batch["labels"].shape[1]

    def drawn(index: int) -> int:
        source, chosen, layers = generator(step.settings.seed, index), where, step.reader.layers
        if form.part < 1:
            chosen, _ = draw_rows(where, width, form.part, source)
        if form.random_layers:
            layers = draw_layers(layers, form.random_layers, source)
        ends = {place // width: place % width + 1 for place in chosen.tolist()}  # of a row: the last counts
        return sum(ends.values()) * layers[-1]

    found = {  # of `every`, the micro-batches with a consistency
        first: sum(drawn(i) for i in range(first, first + calls, form.every))
        for first in range(0, SAMPLES * calls, calls)
    }
    mean = sum(found.values()) / len(found)
    return min(found, key=lambda first: abs(found[first] - mean))


def twin_of(model: Any) -> Any:
    """A copy of the modules with the same parameters in them."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _decoder_step(model: Any, batch: dict[str, torch.Tensor], unpadded: bool) -> Callable[[], Any]:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    rows = None
    if unpadded:  # the real tokens in one sequence, attention in their rows
        ids, device = batch["input_ids"], batch["input_ids"].device
        taken = torch.arange(ids.shape[1]) < torch.tensor(lengths := lengths_of(batch))[:, None]
        places = taken.nonzero().to(device)
        inputs = {"input_ids": ids[taken.to(device)][None], "position_ids": places[None, :, 1]}
        rows = PackedRows.of(torch.tensor(lengths), device)
    decoder = anatomy(model).decoder

    def run() -> None:
        with attention_in(rows, model.config):
            decoder(**inputs, use_cache=False).last_hidden_state.sum().backward()

    return run


def lengths_of(batch: dict[str, torch.Tensor]) -> list[int]:
    """`needed_lengths` of a batch."""
    return needed_lengths(batch["labels"])


def _oracle_step(model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], Any]:
    from oracle import Oracle

    depth, device = model.config.num_hidden_layers, batch["input_ids"].device
    oracle = Oracle(
        model, auxiliary="lora", alpha=0.1, lam=5.0, consistency="mse", layers=list(range(1, depth + 1)),
    )  # fmt: skip
    weights = dict(oracle.model.named_parameters())
    shapes = [weights[name] for name in oracle.linear_weights()]
    a = [torch.randn(8, w.shape[1], device=device, dtype=w.dtype) / w.shape[1] ** 0.5 for w in shapes]

    def run() -> None:
        inside: AbstractContextManager[Any] = nullcontext() if device.type == "cpu" else device
        with inside:  # it makes its B on the default device
            oracle(batch, a_matrices=a)

    return run


def _trainer_run(variant: Variant, model: Any, batch: dict[str, torch.Tensor], items: float) -> Run:
    """`training_step`, each micro-batch an update of its own."""
    trainer = make_trainer(variant, model, batch)
    count = torch.tensor(int(items), device=batch["input_ids"].device)
    step = getattr(trainer, "step", None)  # LfU's
    calls = 1 if step is None else cycle(step.cheaper)
    first = 0 if step is None else typical_start(step, batch, calls)

    def once() -> None:
        trainer.training_step(trainer.model, dict(batch), num_items_in_batch=count)
        trainer.state.global_step += 1  # what `every` and the draws go by
        trainer._metrics["train"].clear()

    def rewind() -> None:
        trainer.state.global_step, trainer._micro = first, (-1, 0)

    return Run(once, calls, rewind if step is not None else lambda: None)


def make_trainer(variant: Variant, model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """SFTTrainer, or LfUTrainer with a method: `sam:rho=0.1` by its knobs, `lfu:alpha=0.05` by the config's fields."""
    from datasets import Dataset
    from tiny_folder import byte_tokenizer
    from trl import SFTConfig, SFTTrainer

    from lfu import LfUConfig, LfUTrainer

    settings: dict[str, Any] = dict(
        output_dir=str(Path(tempfile.gettempdir()) / "lfu-step-cost"), report_to="none", bf16=False,
        use_cpu=batch["input_ids"].device.type == "cpu", gradient_checkpointing=False, disable_tqdm=True,
        per_device_train_batch_size=len(batch["input_ids"]), gradient_accumulation_steps=1,
        max_length=batch["input_ids"].shape[1], dataloader_pin_memory=False,
    )  # fmt: skip
    rows = Dataset.from_dict({name: batch[name].tolist() for name in ("input_ids", "labels")})
    if variant.name == "trainer":
        trainer = SFTTrainer(model, args=SFTConfig(**settings), train_dataset=rows, processing_class=byte_tokenizer())
    else:
        own: dict[str, Any] = {"method": variant.name, "advice": False}
        if variant.name.startswith("lfu"):
            own |= variant.options
        elif variant.options:
            own["method_args"] = {f"{variant.name}.{key}": value for key, value in variant.options.items()}
        trainer = LfUTrainer(
            model, args=LfUConfig(**settings, **own), train_dataset=rows, processing_class=byte_tokenizer()
        )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer
