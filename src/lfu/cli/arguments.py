"""What `lfu train` takes, from recipes and flags: `LfUConfig`, TRL's `ModelConfig` with the paper's LoRA, the data."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from trl import ModelConfig, TrlParser

from lfu import recipes
from lfu.cli.models import DTYPES
from lfu.config import LfUConfig
from lfu.data.templates import TEMPLATES
from lfu.support.choices import BELOW_ONE, check_within, optional, whole
from lfu.support.errors import UserError, did_you_mean, one_line
from lfu.support.flags import LineParser, by_name, option

if TYPE_CHECKING:
    from datasets import Dataset

USAGE = "lfu train --model MODEL --data DATA [--config RECIPE,...] [--FLAG VALUE]"
DESCRIPTION = """Fine-tune a model on your rows. As long as no flag says how to train, this is plain fine-tuning with a
learning rate, a length and held-out rows that fit the number of rows (see --careful). Otherwise the defaults below
hold, and --method is Learning from the Undesirable (others: lfu methods). --config takes shipped recipes or YAML files
of flags, merged from left to right (see: lfu recipes); flags given here win. Every field of trl.SFTConfig and
lfu.LfUConfig is a flag."""


# What transformers and TRL raise for a value that they refuse: a file that is not there, a package that is not
# installed, or one of Python's own conversions. Anything else is a mistake of the program's, and shown as one.
REFUSED = (ValueError, TypeError, OSError, ImportError, OverflowError)


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model arguments, with the paper's adapter as the default: LoRA r 8, alpha 16, on all linear layers."""

    _argument_group_name = "model"

    model_name_or_path: str | None = option(
        None, "Hub name, local model or adapter folder, or a built-in name: smollm2, gemma3-270m.", aliases=["--model"]
    )
    dtype: str | None = option(
        None, "Load the weights as this type. Default: float32 on a CPU and for full fine-tuning, else auto.",
        choices=DTYPES,
    )  # fmt: skip
    use_peft: bool = option(True, "Train a LoRA adapter; false trains all weights.")
    lora_r: int = option(8, "Rank of the adapter (paper: 8).")
    lora_alpha: int = option(16, "LoRA alpha (paper: 16).")
    lora_dropout: float = option(0.0, "LoRA dropout.")
    lora_target_modules: list[str] | None = option(["all-linear"], "Layers that get an adapter, or all-linear (paper).")

    trust_remote_code: bool = field(default=False, init=False, repr=False)  # no flag here: TRL 0.24's is LfUConfig's

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model_name_or_path:
            raise UserError("no model: give --model_name_or_path (a hub name, a folder, or smollm2), or a recipe")
        check_within(self, {"lora_r": whole(1), "lora_alpha": whole(1), "lora_dropout": BELOW_ONE})
        if self.load_in_4bit or self.load_in_8bit:
            self.dtype = self.dtype or "bfloat16"
            if not self.use_peft:
                raise UserError("quantised weights can't be trained: use an adapter (--use_peft true) with them")
        if self.dtype is None:
            # bf16 weights lose the small updates of full fine-tuning; autocast still computes in bf16 on a GPU.
            self.dtype = "auto" if self.use_peft and torch.cuda.is_available() else "float32"


@dataclass
class DataArguments:
    """What to train and evaluate on, and how much of it to show."""

    _argument_group_name = "data"

    data: str | None = option(
        None, "Training data: a json, jsonl, csv or parquet file or folder, a hub name, or word_problems[:N]."
    )
    data_config: str | None = option(None, "Configuration of a hub data set.")
    data_split: str = option("train", "Split to train on.")
    data_limit: int | None = option(None, "Train only on the first N rows.")
    eval_data: str | None = option(None, "Evaluation data, given like --data. Default: --data, with --eval_split.")
    eval_split: str | None = option(None, "Split to evaluate on. Default: test.")
    eval_limit: int | None = option(None, "Evaluate only on the first N rows.")
    eval_share: float = option(0.0, "Hold out this share of the rows for evaluation, chosen at random by --seed.")
    template: str = option(
        "auto", "How questions become prompts; auto means chat if the model has a chat template, else alpaca.",
        choices=list(TEMPLATES),
    )  # fmt: skip
    system: str | None = option(None, "System message (chat), or a text that replaces Alpaca's first paragraph.")
    careful: bool | None = option(
        None, "Choose learning rate, length, held-out rows and checkpoints by the number of rows. Default: true "
        "if no flag says how to train.",
    )  # fmt: skip
    show_rows: int = option(0, "Print the first N rows as they reach the model, what is learned marked; then train.")
    dry_run: bool = option(
        False, "Load, check and describe everything, print the first rows as --show_rows 2 does, and train nothing."
    )
    verbose: bool = option(False, "Also show the libraries' own progress bars, notes and metrics.")
    overwrite_output_dir: bool = option(False, "Replace the model and the checkpoints of an earlier run in output_dir.")

    # the fields that a flag or a recipe has set (others may be chosen for the user), and those that a flag has set
    given: frozenset[str] = field(default=frozenset(), init=False)
    typed: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError("no training data: give --data (a file, folder, hub name, or word_problems), or a recipe")
        if not 0 <= self.eval_share < 1:
            raise UserError(f"eval_share must be a share of the rows from 0 to below 1, got {self.eval_share:g}")
        if self.eval_share and (self.eval_data or self.eval_split):
            raise UserError("eval_share holds rows out, and eval_data brings others: give one of them")
        rows = optional(whole(1))
        check_within(self, {"data_limit": rows, "eval_limit": rows, "show_rows": whole(0)})
        if self.eval_split and not self.eval_data:
            self.eval_data = self.data

    def holds_out(self) -> bool | None:
        """Whether rows are held out, by flags or a recipe; None if these don't say."""
        said = self.given & {"eval_data", "eval_split", "eval_share"}
        return bool(self.eval_data or self.eval_share) if said else None

    def rows(self) -> Dataset:
        """The training rows as they are in their file."""
        from lfu.data.load import load_rows

        return load_rows(str(self.data), split=self.data_split, config=self.data_config, limit=self.data_limit)

    def eval_rows(self) -> Dataset | None:
        """The rows to evaluate on, if some are given."""
        from lfu.data.load import load_rows

        if not self.eval_data:
            return None
        config = self.data_config if self.eval_data == self.data else None
        return load_rows(self.eval_data, split=self.eval_split or "test", config=config, limit=self.eval_limit)


class TrainParser(TrlParser):
    """TRL's parser with one-line errors. Recipes are read as flags, so that both are checked alike."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{one_line(message)} (see: lfu train --help)")

    def flags(self) -> dict[str, str]:
        """Every flag that sets a field, without its dashes, with that field's name."""
        actions = [action for action in self._actions if action.dest != "help"]
        return {flag.lstrip("-"): action.dest for action in actions for flag in action.option_strings}


class TrainHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each flag in one spelling, and its default if it has one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spelled = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")]
        kept, action.option_strings = action.option_strings, spelled or action.option_strings
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = kept

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser(*more: type) -> TrainParser:
    """The parser of all flags of `lfu train`, and of `more` dataclasses."""
    parser = TrainParser(
        (LfUConfig, ModelArguments, DataArguments, *more), prog="lfu train", usage=USAGE, description=DESCRIPTION,
        allow_abbrev=False, formatter_class=TrainHelp,
    )  # fmt: skip
    for action in parser._actions:
        action.metavar = "true|false" if action.const is True else action.metavar
        if len(listed := ", ".join(map(str, action.choices or ()))) > 60:  # argparse would not break such a line
            action.metavar, action.help = action.dest.upper(), f"{action.help} One of {listed}."
    # assistant_only_loss None: of a conversation the answers are learned, whether or not its chat template marks them
    parser.set_defaults(
        output_dir="lfu-output", dataloader_pin_memory=torch.cuda.is_available(), assistant_only_loss=None
    )
    return parser


def parse(argv: Sequence[str], *more: type) -> tuple[Any, ...]:
    """A `LfUConfig`, `ModelArguments`, `DataArguments`, and `more` dataclasses of flags, from recipes and flags.

    Raises UserError: an unknown flag or recipe key (with the closest ones), or a value out of its range.
    """
    parser = make_parser(*more)
    names = parser.flags()
    settings, rest = with_recipes(argv, names)
    flags = recipes.as_flags(settings) + rest
    if unknown := parser.parse_known_args(flags)[1]:
        raise UserError(_unknown(unknown[0], names))
    try:
        config, model, data, *others = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except REFUSED as error:
        raise UserError(re.sub(r"\w+Strategy\.(\w+)", lambda name: name[1].lower(), one_line(error))) from error
    data.given, data.typed = _named(flags, names), _named(rest, names)
    config.assistant_only_loss = None if config.assistant_only_loss else config.assistant_only_loss
    return config, model, data, *others


def _named(words: Sequence[str], names: dict[str, str]) -> frozenset[str]:
    """The fields that the words set."""
    return frozenset(names.get(flag, flag) for flag in by_name(words))


def refuse_unused(model: ModelArguments, data: DataArguments) -> None:
    """Refuses a flag on the command line that would do nothing. Recipes may have some: they are for many models."""
    from lfu.data.load import check_part
    from lfu.model.loading import is_adapter

    unused: dict[str, str] = {}  # how a flag begins -> what it is for, which is missing
    if not model.use_peft:
        why = "an adapter, and --use_peft false trains all weights: drop one of them"
        unused |= dict.fromkeys(("lora_", "use_dora", "use_rslora"), why)
    elif is_adapter(str(model.model_name_or_path)):
        why = f"a new adapter, and {model.model_name_or_path} is one, which is trained further: drop it"
        unused |= dict.fromkeys(("lora_", "use_dora", "use_rslora"), why)
    if not model.load_in_4bit:
        unused |= dict.fromkeys(("bnb_", "use_bnb"), "weights of 4 bits: give --load_in_4bit true, too")
    if not data.eval_data:
        unused["eval_limit"] = "evaluation rows that are given: give --eval_data or --eval_split, too"
    for name in sorted(data.typed):
        if start := next((start for start in unused if name.startswith(start)), None):
            raise UserError(f"--{name} is for {unused[start]}")
    check_part(str(data.data), "data_", data.typed)
    check_part(str(data.eval_data), "eval_", data.typed)


def with_recipes(argv: Sequence[str], known: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """(the settings of --config's recipes by field, later ones winning; the other words). `known`: flag -> field."""
    early = LineParser(prog="lfu train", add_help=False)
    early.add_argument("--config", action="append", default=[])
    chosen, rest = early.parse_known_args(argv)
    merged: dict[str, Any] = {}
    for spec in chosen.config:
        for path, settings in recipes.parts(spec):
            for key in settings:
                if key not in known:
                    raise UserError(f"recipe {path}: unknown key {key!r}.{did_you_mean(key, known)}")
            merged |= {known[key]: value for key, value in settings.items()}
    for key in ("eval_strategy", "save_strategy", "logging_strategy"):
        if merged.get(key) is False:  # YAML reads a bare `no` as false
            merged[key] = "no"
    return merged, rest


def _unknown(word: str, names: dict[str, str]) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}: every setting is a flag, as in --data FILE"
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    return f"unknown flag --{name}.{did_you_mean(name, sorted(set(names.values())))} (see: lfu train --help)"
