"""Training inside a probe: the flags of `lfu train`, a trainer that keeps quiet, and the plain model that it leaves."""

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfu.cli.progress import phase
from lfu.support.errors import UserError, value_errors_are_the_users
from lfu.support.flags import by_name
from lfu.support.quiet import quiet_libraries
from lfu.support.words import listed

OnStep = Callable[[int, Any], None]  # (steps taken, the model as it is then)
# What the probe decides itself, beside what a study does, so that every method is trained on the same rows in the same
# order.
OURS = {"model", "model_name_or_path", "data_seed", "dtype", "template", "system", "trust_remote_code", "load_in_4bit",
        "load_in_8bit", "data_config", "data_split", "data_limit"}  # fmt: skip
SHOWN = ("method", "method_args", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps",
         "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "alpha", "lam")  # fmt: skip


@dataclass(frozen=True)
class Fitted:
    """A trained model without adapter, the trainer's log (one entry per step), and the advice given on the way."""

    model: Any
    log: list[dict[str, float]]
    said: list[str]


def method_list(text: str) -> list[str]:
    """The comma list of --methods."""
    from lfu.methods import methods_of

    names = listed(text)
    for name in names:
        with value_errors_are_the_users("--methods"):
            methods_of(name)
    if len(set(names)) < len(names):
        raise UserError(f"--methods names one method twice: {text}")
    return names


def words_of(
    values: Sequence[str], argument: str, methods: Sequence[str] = (), method: str = "", *,
    refused: Collection[str] = (),
) -> list[str]:  # fmt: skip
    """The words of those `[METHOD:]FLAGS` values of an argument that are for all methods, or for this one.

    `refused`: flags that this argument can't have, beside those that the probe sets.
    """
    from lfu.study.settings import is_reserved

    found: list[str] = []
    for value in values:
        head, colon, rest = value.partition(":")
        own = head.strip() if colon and methods and not head.lstrip().startswith("-") else ""
        if own and own not in methods:
            raise UserError(f"{argument} {value!r}: {own!r} is none of the methods {', '.join(methods)}")
        with value_errors_are_the_users(f"{argument} {value!r}"):
            words = shlex.split(rest if own else value)
        for name in by_name(words):
            if name in OURS or name in refused or is_reserved(name):
                raise UserError(f"{argument}: --{name} is set by the probe itself: leave it out")
        found += words if own in ("", method) else []
    return found


@dataclass(frozen=True)
class Training:
    """How a probe trains: by a method, with the user's flags of `lfu train`, parsed anew for each training."""

    probe: Any
    method: str
    flags: Sequence[str]
    argument: str

    def settings(self) -> tuple[Any, Any]:
        """(LfUConfig, ModelArguments); a mistake is told as `lfu train` tells it."""
        from lfu.cli.arguments import parse
        from lfu.study.study import QUIET

        probe = self.probe
        own = {"model_name_or_path": probe.base, "data": "-", "method": self.method, "output_dir": probe.folder,
               "seed": str(probe.seed), "trust_remote_code": str(probe.trust_remote_code).lower()}  # fmt: skip
        words = [f"--{name}={value}" for name, value in own.items()]
        with value_errors_are_the_users(f"{self.argument} for method {self.method}"):
            config, model_arguments, _ = parse([*self.flags, *words, *QUIET, "--save_strategy=no"])
        return config, model_arguments

    def described(self) -> dict[str, Any]:
        """What decides the training, JSON-ready."""
        config, model_arguments = self.settings()
        values = [getattr(config, name) for name in SHOWN]
        adapter = f"LoRA r {model_arguments.lora_r}, alpha {model_arguments.lora_alpha}"
        shown = {name: getattr(value, "value", value) for name, value in zip(SHOWN, values)}  # an enum as its text
        return shown | {"trained": adapter if model_arguments.use_peft else "all weights"}

    @property
    def dtype(self) -> str | None:
        """How to load a model that will be trained: in float32 for full fine-tuning, as in `lfu train`."""
        return self.probe.dtype or (None if self.settings()[1].use_peft else "float32")

    def fit(self, title: str, model: Any, tokenizer: Any, pairs: Sequence[Mapping[str, Any]],
            visit: OnStep = lambda step, model: None) -> Fitted:  # fmt: skip
        """Trains a model, without its adapter if it has one, on `{"question", "answer"}` rows, and shows how far it is.

        `visit` is called after every optimizer step, with a model that may have its adapter attached.
        """
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback

        from lfu.data.templates import to_training_rows
        from lfu.study.build import steps_of
        from lfu.study.train import make_trainer
        from lfu.training.advice import advice_heard

        class Step(TrainerCallback):
            """Passes on every optimizer step."""

            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
                tick(1)
                visit(state.global_step, model)

        (config, arguments), start = self.settings(), (plain(model), tokenizer)
        with phase(title, steps_of(config, len(pairs))) as tick, quiet_libraries(), advice_heard() as said:
            dataset = Dataset.from_list([*map(dict, pairs)])
            rows = to_training_rows(dataset, template=self.probe.template, tokenizer=tokenizer)
            trainer = make_trainer(config, arguments, rows, loaded=start, callbacks=[Step()])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        log = [{"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry]
        return Fitted(plain(trainer.accelerator.unwrap_model(trainer.model)), log, [*trainer.notes, *said])


def plain(model: Any) -> Any:
    """The model with its adapter, if it has one, merged into its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
