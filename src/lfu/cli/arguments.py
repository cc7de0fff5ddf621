"""What `lfu train` takes, from recipes and flags: `LfUConfig`, TRL's `ModelConfig` with the paper's LoRA, the data."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from trl import ModelConfig, TrlParser

from lfu import recipes
from lfu.cli.parser import LineParser
from lfu.config import LfUConfig
from lfu.data.templates import TEMPLATES
from lfu.support.errors import UserError, did_you_mean, one_line

USAGE = "lfu train [--config RECIPE[,RECIPE...]] --model_name_or_path MODEL --data DATA [--FLAG VALUE ...]"
DESCRIPTION = """Fine-tune a model with Learning from the Undesirable, or another --method (see: lfu methods). --config
takes shipped recipes or YAML files of flags, merged from left to right (see: lfu recipes); flags given here win. Every
field of trl.SFTConfig and lfu.LfUConfig is a flag."""


# What transformers and TRL raise for a value that they refuse: a file that is not there, a package that is not
# installed, or one of Python's own conversions. Anything else is a mistake of the program's, and shown as one.
REFUSED = (ValueError, TypeError, OSError, ImportError, OverflowError)


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model arguments, with the paper's adapter as the default: LoRA r 8, alpha 16, on all linear layers."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model"],
            "help": "Hub name, local model or adapter folder, or a built-in name: smollm2, gemma3-270m.",
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Load the weights as this type. Default: float32 on a CPU and for full fine-tuning, else auto.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA adapter; false trains all weights."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter (paper: 8)."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA alpha (paper: 16)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the layers that get an adapter, or all-linear (paper)."},
    )

    trust_remote_code: bool = field(default=False, init=False, repr=False)  # no flag here: TRL 0.24's is LfUConfig's

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model_name_or_path:
            raise UserError("no model: give --model_name_or_path (a hub name, a folder, or smollm2), or a recipe")
        if self.load_in_4bit or self.load_in_8bit:
            self.dtype = self.dtype or "bfloat16"
            if not self.use_peft:
                raise UserError(
                    "quantised weights can't be trained: use an adapter (--use_peft true) with load_in_4bit"
                )
        if self.dtype is None:
            # bf16 weights lose the small updates of full fine-tuning; autocast still computes in bf16 on a GPU.
            self.dtype = "auto" if self.use_peft and torch.cuda.is_available() else "float32"


@dataclass
class DataArguments:
    """What to train and evaluate on."""

    _argument_group_name = "data"

    data: str | None = field(
        default=None,
        metadata={
            "help": "Training data: a json, jsonl, csv or parquet file or folder, a hub name, or word_problems[:N]."
        },
    )
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    data_split: str = field(default="train", metadata={"help": "Split to train on."})
    data_limit: int | None = field(default=None, metadata={"help": "Train only on the first N rows."})
    eval_data: str | None = field(
        default=None,
        metadata={"help": "Evaluation data, given like --data. Default: --data, if --eval_split is given."},
    )
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on. Default: test."})
    eval_limit: int | None = field(default=None, metadata={"help": "Evaluate only on the first N rows."})
    template: str = field(
        default="auto",
        metadata={
            "help": "How questions become prompts; auto means chat if the model has a chat template, else alpaca.",
            "choices": list(TEMPLATES),
        },
    )
    system: str | None = field(
        default=None, metadata={"help": "System message (chat), or a text that replaces Alpaca's first paragraph."}
    )
    show_rows: int = field(
        default=0,
        metadata={"help": "Print the first N rows as they reach the model, with what is learned marked; then train."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the model and the checkpoints of an earlier run in output_dir."}
    )

    eval_share: float = field(
        default=0.0, metadata={"help": "Hold out this share of the rows for evaluation, chosen at random by --seed."}
    )
    careful: bool | None = field(
        default=None,
        metadata={
            "help": "Choose method, length, held-out rows and checkpoints by the number of rows. Default: true if no "
            "flag says how to train."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Load, check and describe everything, then stop before training."}
    )
    verbose: bool = field(
        default=False, metadata={"help": "Also show the libraries' own progress bars, notes and metrics."}
    )

    # the names of all fields that a flag or a recipe has set; what is not among them may be chosen for the user
    given: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError(
                "no training data: give --data (a file, a folder, a hub name, or word_problems), or a recipe"
            )
        if not 0 <= self.eval_share < 1:
            raise UserError(f"eval_share must be a share of the rows from 0 to below 1, got {self.eval_share:g}")
        if self.eval_share and (self.eval_data or self.eval_split):
            raise UserError("eval_share holds rows out, and eval_data brings others: give one of them")
        if self.show_rows < 0:
            raise UserError(f"show_rows must be a number of rows, got {self.show_rows}")
        if self.eval_split and not self.eval_data:
            self.eval_data = self.data


class TrainParser(TrlParser):
    """TRL's parser with one-line errors. Recipes are read as flags, so that both are checked alike."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{one_line(message)} (see: lfu train --help)")

    def flags(self) -> dict[str, str]:
        """Every flag that sets a field, without its dashes, with that field's name."""
        return {
            flag.lstrip("-"): action.dest
            for action in self._actions if action.dest != "help"
            for flag in action.option_strings
        }  # fmt: skip


def make_parser(*more: type) -> TrainParser:
    """Every flag of `lfu train`, and those of `more` dataclasses."""
    parser = TrainParser(
        (LfUConfig, ModelArguments, DataArguments, *more),
        prog="lfu train",
        usage=USAGE,
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # assistant_only_loss None: of a conversation the answers are learned, whether or not its chat template marks them
    parser.set_defaults(
        output_dir="lfu-output", dataloader_pin_memory=torch.cuda.is_available(), assistant_only_loss=None
    )
    return parser


def parse(argv: list[str], *more: type) -> tuple[Any, ...]:
    """Reads recipes and flags: a `LfUConfig`, `ModelArguments`, `DataArguments`, and `more` dataclasses of flags.

    Raises:
        UserError: for an unknown flag or recipe key (with the closest ones), or a value out of its range.
    """
    early = LineParser(prog="lfu train", add_help=False)
    early.add_argument("--config", action="append", default=[])
    chosen, rest = early.parse_known_args(argv)
    parser = make_parser(*more)
    flags = recipes.as_flags(_settings(chosen.config, parser)) + rest
    if unknown := parser.parse_known_args(flags)[1]:
        raise UserError(_unknown(unknown[0], parser))
    try:
        config, model, data, *others = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except REFUSED as error:
        raise UserError(one_line(error)) from error
    names = parser.flags()
    words = (flag.lstrip("-").partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--"))
    data.given = frozenset(names.get(word, word) for word in words)
    config.assistant_only_loss = None if config.assistant_only_loss else config.assistant_only_loss
    return config, model, data, *others


def _settings(specs: list[str], parser: TrainParser) -> dict:
    known = parser.flags()
    merged: dict = {}
    for spec in specs:
        for path, settings in recipes.parts(spec):
            for key in settings:
                if key not in known:
                    raise UserError(f"recipe {path}: unknown key {key!r}.{did_you_mean(key, known)}")
            merged |= {known[key]: value for key, value in settings.items()}
    for key in ("eval_strategy", "save_strategy", "logging_strategy"):
        if merged.get(key) is False:  # YAML reads a bare `no` as false
            merged[key] = "no"
    return merged


def _unknown(word: str, parser: TrainParser) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}: every setting is a flag, as in --data FILE"
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    known = sorted(set(parser.flags().values()))
    return f"unknown flag --{name}.{did_you_mean(name, known)} (see: lfu train --help)"
