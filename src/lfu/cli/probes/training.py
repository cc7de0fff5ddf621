"""Training inside a probe: the flags of `lfu train`, a trainer that keeps quiet, and the plain model that it leaves."""

from __future__ import annotations

import argparse
import shlex
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lfu.support.errors import UserError, one_line
from lfu.support.quiet import quiet_libraries

OnStep = Callable[[int, Any], None]  # (steps taken, the model as it is then)
# What a probe says itself, so that every method of it is trained on the same rows in the same order.
RESERVED = {"model", "model_name_or_path", "method", "output_dir", "seed", "data_seed", "dtype", "template", "system",
            "trust_remote_code", "push_to_hub", "report_to", "resume_from_checkpoint", "overwrite_output_dir",
            "load_in_4bit", "load_in_8bit", "data", "data_config",
            "data_split", "data_limit", "disable_tqdm", "log_level"}  # fmt: skip
LENGTH = {"max_steps", "num_train_epochs"}  # for probes that say themselves how long is trained
RESERVED_STARTS = ("eval", "save", "logging", "do_", "push_to", "hub_")
SHOWN = ("method", "method_args", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps",
         "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "alpha", "lam")  # fmt: skip
QUIET = ["--save_strategy", "no", "--eval_strategy", "no", "--report_to", "none", "--disable_tqdm", "true",
         "--log_level", "error", "--logging_strategy", "steps", "--logging_steps", "1"]  # fmt: skip


@dataclass(frozen=True)
class Fitted:
    """A trained model without adapter, the trainer's log (one entry a step), and what was said on the way."""

    model: Any
    log: list[dict[str, float]]
    said: list[str] = field(default_factory=list)


def add_train_flags(parser: argparse.ArgumentParser, default_methods: str) -> None:
    """--methods and --train."""
    parser.add_argument(
        "--methods",
        metavar="M,M",
        help=f"methods of lfu train to compare (see: lfu methods; default: {default_methods})",
    )
    parser.add_argument(
        "--train", action="append", default=[], metavar="[METHOD:]FLAGS",
        help="flags of lfu train in quotes, for one method or for all: "
        "--train '--learning_rate 3e-4 --use_peft false' --train 'lfu:--lam auto'; may be repeated (a flag without a "
        "value needs the equals sign: --train=--packing)",
    )  # fmt: skip


def method_list(text: str) -> list[str]:
    """The comma list of --methods.

    Raises:
        UserError: no such method; one named twice.
    """
    from lfu.methods import methods_of

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        try:
            methods_of(name)
        except ValueError as error:
            raise UserError(f"--methods: {one_line(error)}") from error
    if len(set(names)) < len(names):
        raise UserError(f"--methods names one method twice: {text}")
    return names


def flags_of(
    values: Sequence[str], methods: Sequence[str], argument: str = "--train", *, refused: Collection[str] = ()
) -> dict[str, list[str]]:
    """Method -> its flags, from the values of --train in the order in which they were given.

    Args:
        refused: flags that this probe sets, beside `RESERVED`.

    Raises:
        UserError: quotes that don't close, a flag that the probe sets itself, a method that isn't compared.
    """
    found: dict[str, list[str]] = {method: [] for method in methods}
    for value in values:
        head, colon, rest = value.partition(":")
        own = bool(colon) and not head.lstrip().startswith("-") and head.strip() != ""
        if own and head.strip() not in found:
            raise UserError(f"{argument} {value!r}: {head.strip()!r} is none of the methods {', '.join(methods)}")
        try:
            words = shlex.split(rest if own else value)
        except ValueError as error:
            raise UserError(f"{argument} {value!r}: {one_line(error)}") from error
        _refuse_reserved(words, argument, RESERVED | set(refused))
        for method in [head.strip()] if own else methods:
            found[method] += words
    return found


def _refuse_reserved(words: Sequence[str], argument: str, reserved: Collection[str]) -> None:
    for word in words:
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        if word.startswith("--") and (name in reserved or name.startswith(RESERVED_STARTS)):
            raise UserError(f"{argument}: --{name} is set by the probe itself: leave it out")


def arguments(
    given: argparse.Namespace, base: str, method: str, flags: Sequence[str], *, folder: str, seed: int,
    before: Sequence[str] = (), after: Sequence[str] = (), argument: str = "--train",
) -> tuple[Any, Any]:  # fmt: skip
    """(LfUConfig, ModelArguments) for one training, fresh ones at every call.

    Args:
        flags: the user's; `before` are defaults that they change, `after` is what they can't.

    Raises:
        UserError: as `lfu train` for its flags.
    """
    from lfu.cli.arguments import parse

    own = ["--model_name_or_path", base, "--data", "-", "--method", method, "--output_dir", folder, "--seed", str(seed)]
    own += ["--trust_remote_code", str(given.trust_remote_code).lower(), *QUIET, *after]
    try:
        config, model_arguments, _ = parse([*before, *flags, *own])
    except UserError as error:
        raise UserError(f"{argument} for method {method}: {error}") from error
    return config, model_arguments


def described(config: Any, model_arguments: Any) -> dict[str, Any]:
    """What decided a training, JSON-ready."""
    shown = {name: getattr(config, name) for name in SHOWN}
    plain_values = {name: getattr(value, "value", value) for name, value in shown.items()}  # an enum as its text
    adapter = f"LoRA r {model_arguments.lora_r}, alpha {model_arguments.lora_alpha}"
    return plain_values | {"trained": adapter if model_arguments.use_peft else "all weights"}


def training_rows(rows: Sequence[Mapping[str, Any]], tokenizer: Any, template: str) -> Any:
    """`{"question", "answer"}` rows as `lfu train` would train on them."""
    from datasets import Dataset

    from lfu.data.templates import to_training_rows

    pairs = [{"question": row["question"], "answer": row["answer"]} for row in rows]
    with quiet_libraries():
        return to_training_rows(Dataset.from_list(pairs), template=template, tokenizer=tokenizer)


def with_dtype(given: argparse.Namespace, model_arguments: Any) -> argparse.Namespace:
    """`given` with the dtype to load a model in that will be trained: float32 for full fine-tuning, as `lfu train`."""
    dtype = given.dtype or ("float32" if not model_arguments.use_peft else None)
    return argparse.Namespace(**vars(given) | {"dtype": dtype})


def plain(model: Any) -> Any:
    """The model with its adapter, if it has one, merged into its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def fit(
    model: Any, tokenizer: Any, rows: Any, config: Any, model_arguments: Any, on_step: OnStep | None = None
) -> Fitted:
    """Trains the model in place with a new adapter, or all of its weights, as the arguments say.

    Args:
        model: a plain model, without adapter.
        rows: what `training_rows` gives.
        on_step: called after every optimizer step, with a model that may have its adapter attached.

    Raises:
        ValueError: settings that a method can't work with.
    """
    from transformers import PrinterCallback, set_seed
    from trl import get_peft_config

    from lfu import LfUTrainer
    from lfu.training.advice import LfUAdvice

    set_seed(config.seed)  # before PEFT draws the adapter
    with quiet_libraries(), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", LfUAdvice)
        trainer = LfUTrainer(
            model, args=config, train_dataset=rows, processing_class=tokenizer,
            peft_config=get_peft_config(model_arguments), callbacks=[_callback(on_step)] if on_step else None,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    log = [{"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry]
    said = [str(warning.message) for warning in heard if issubclass(warning.category, LfUAdvice)]
    return Fitted(plain(trainer.accelerator.unwrap_model(trainer.model)), log, [*getattr(trainer, "notes", []), *said])


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for what a trainer insists on having one for; nothing stays in it."""
    return tempfile.TemporaryDirectory(prefix="lfu-probe-")


def _callback(on_step: OnStep) -> Any:
    from transformers import TrainerCallback

    class Step(TrainerCallback):
        """Passes on every optimizer step."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
            on_step(state.global_step, model)

    return Step()
