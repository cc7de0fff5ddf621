"""Training inside a probe: the flags of `lfu train`, a trainer that keeps quiet, and the plain model that it leaves."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfu.cli.progress import phase
from lfu.study.settings import is_reserved
from lfu.support.errors import UserError, one_line
from lfu.support.quiet import quiet_libraries

OnStep = Callable[[int, Any], None]  # (steps taken, the model as it is then)
# What the probe decides itself, beside what a study does, so that every method is trained on the same rows in the same
# order.
OURS = {"model", "model_name_or_path", "data_seed", "dtype", "template", "system", "trust_remote_code", "load_in_4bit",
        "load_in_8bit", "data_config", "data_split", "data_limit"}  # fmt: skip
SHOWN = ("method", "method_args", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps",
         "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "alpha", "lam")  # fmt: skip
QUIET = ["--save_strategy", "no", "--eval_strategy", "no", "--report_to", "none", "--disable_tqdm", "true",
         "--log_level", "error", "--logging_strategy", "steps", "--logging_steps", "1"]  # fmt: skip


@dataclass(frozen=True)
class Fitted:
    """A trained model without adapter, the trainer's log (one entry per step), and what was said on the way."""

    model: Any
    log: list[dict[str, float]]
    said: list[str]


def method_list(text: str) -> list[str]:
    """The comma list of --methods."""
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


def words_of(
    values: Sequence[str],
    argument: str,
    methods: Sequence[str] = (),
    method: str = "",
    *,
    refused: Collection[str] = (),
) -> list[str]:
    """The words of those `[METHOD:]FLAGS` values of an argument that are for all methods, or for this one.

    Args:
        refused: flags that this argument can't have, beside those that the probe sets.
    """
    found: list[str] = []
    for value in values:
        head, colon, rest = value.partition(":")
        own = head.strip() if colon and methods and not head.lstrip().startswith("-") else ""
        if own and own not in methods:
            raise UserError(f"{argument} {value!r}: {own!r} is none of the methods {', '.join(methods)}")
        try:
            words = shlex.split(rest if own else value)
        except ValueError as error:
            raise UserError(f"{argument} {value!r}: {one_line(error)}") from error
        for word in words:
            name = word.lstrip("-").partition("=")[0].replace("-", "_")
            if word.startswith("--") and (name in OURS or name in refused or is_reserved(name)):
                raise UserError(f"{argument}: --{name} is set by the probe itself: leave it out")
        found += words if own in ("", method) else []
    return found


@dataclass(frozen=True)
class Training:
    """How the probe trains: by a method, with flags of `lfu train`; the settings are read anew for each training.

    Attributes:
        probe: with a base, a folder and a seed.
        method: as `--method` takes it.
        flags: the user's, given to `argument`.
    """

    probe: Any
    method: str
    flags: Sequence[str]
    argument: str

    def settings(self) -> tuple[Any, Any]:
        """(LfUConfig, ModelArguments); a mistake is told as `lfu train` tells it."""
        from lfu.cli.arguments import parse

        probe = self.probe
        own = {"model_name_or_path": probe.base, "data": "-", "method": self.method, "output_dir": probe.folder,
               "seed": str(probe.seed), "trust_remote_code": str(probe.trust_remote_code).lower()}  # fmt: skip
        words = [f"--{name}={value}" for name, value in own.items()]
        try:
            config, model_arguments, _ = parse([*self.flags, *words, *QUIET])
        except UserError as error:
            raise UserError(f"{self.argument} for method {self.method}: {error}") from error
        return config, model_arguments

    def described(self) -> dict[str, Any]:
        """What decides the training, JSON-ready."""
        config, model_arguments = self.settings()
        shown = {name: getattr(config, name) for name in SHOWN}
        plain_values = {name: getattr(value, "value", value) for name, value in shown.items()}  # an enum as its text
        adapter = f"LoRA r {model_arguments.lora_r}, alpha {model_arguments.lora_alpha}"
        return plain_values | {"trained": adapter if model_arguments.use_peft else "all weights"}

    @property
    def dtype(self) -> str | None:
        """What a model is loaded as that will be trained: float32 for full fine-tuning, as in `lfu train`."""
        return self.probe.dtype or (None if self.settings()[1].use_peft else "float32")

    def fit(
        self, title: str, model: Any, tokenizer: Any, pairs: Sequence[Mapping[str, Any]],
        visit: OnStep = lambda step, model: None,
    ) -> Fitted:  # fmt: skip
        """Trains a model in place, with a new adapter or all of its weights, and shows how far it is.

        Args:
            model: its adapter, if it has one, is merged first.
            pairs: `{"question", "answer"}` rows.
            visit: called after every optimizer step, with a model that may have its adapter attached.
        """
        from lfu.study.build import steps_of

        config, model_arguments = self.settings()
        data = rows(pairs, tokenizer, self.probe.template)
        with phase(title, steps_of(config, len(data))) as tick:

            def on_step(step: int, current: Any) -> None:
                tick(1)
                visit(step, current)

            return fit(plain(model), tokenizer, data, config, model_arguments, on_step)


def rows(pairs: Sequence[Mapping[str, Any]], tokenizer: Any, template: str) -> Any:
    """`{"question", "answer"}` rows as `lfu train` would train on them."""
    from datasets import Dataset

    from lfu.data.templates import to_training_rows

    with quiet_libraries():
        return to_training_rows(Dataset.from_list([*map(dict, pairs)]), template=template, tokenizer=tokenizer)


def plain(model: Any) -> Any:
    """The model with its adapter, if it has one, merged into its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def fit(model: Any, tokenizer: Any, data: Any, config: Any, model_arguments: Any, on_step: OnStep) -> Fitted:
    """Trains a plain model on what `rows` gives; `on_step` is called after every optimizer step."""
    from transformers import PrinterCallback, TrainerCallback, set_seed
    from trl import get_peft_config

    from lfu import LfUTrainer
    from lfu.training.advice import LfUAdvice

    class Step(TrainerCallback):
        """Passes on every optimizer step."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
            on_step(state.global_step, model)

    set_seed(config.seed)  # before PEFT draws the adapter
    with quiet_libraries(), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", LfUAdvice)
        trainer = LfUTrainer(
            model, args=config, train_dataset=data, processing_class=tokenizer,
            peft_config=get_peft_config(model_arguments), callbacks=[Step()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    log = [{"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry]
    said = [str(warning.message) for warning in heard if issubclass(warning.category, LfUAdvice)]
    return Fitted(plain(trainer.accelerator.unwrap_model(trainer.model)), log, [*trainer.notes, *said])
