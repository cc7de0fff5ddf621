"""The rows of `lfu train`: loaded, shaped, tokenised and checked before the model is loaded."""

import gc
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec

from datasets import Dataset
from transformers.integrations import get_reporting_integration_callbacks

from lfu.cli.arguments import DataArguments, ModelArguments
from lfu.config import LfUConfig
from lfu.data.duplicates import repeated, shared
from lfu.data.learned import tokenised
from lfu.data.lengths import about_cuts
from lfu.data.show import rule
from lfu.data.templates import check_chat_template, to_training_rows
from lfu.methods import methods_of
from lfu.methods.method import Method
from lfu.model.loading import context_length, training_tokenizer
from lfu.support.errors import UserError, one_line, value_errors_are_the_users
from lfu.support.words import listed

Say = Callable[[str], None]


def load_data(
    config: LfUConfig, model: ModelArguments, data: DataArguments, raw: Dataset | None, say: Say
) -> tuple[Dataset, Dataset | None]:
    """The rows to train and to evaluate on. Needs the tokenizer, not the model. `raw`: training rows if loaded."""
    _check_packages(config, model)
    sets = [data.rows() if raw is None else raw]
    sets += [] if (given := data.eval_rows()) is None else [given]
    held_out = _held_out(sets, config, data)
    tokenizer = training_tokenizer(model, config)
    check_chat_template(tokenizer)
    tell = cache(say)  # what is odd in both sets is said once
    shape = {"template": data.template, "system": data.system, "text_field": config.dataset_text_field}
    rows = [to_training_rows(sets[0], tokenizer=tokenizer, tell=tell, **shape)]
    for each in sets[1:]:
        with value_errors_are_the_users(f"--eval_data {data.eval_data}"):
            rows.append(to_training_rows(each, tokenizer=tokenizer, tell=tell, **shape))
    if data.template in ("alpaca", "none") and not isinstance(next(iter(rows[0][0].values())), str):
        what = f"--template {data.template} is for questions, and conversations go through the chat template"
        if "template" in data.typed:
            raise UserError(f"{what}: drop it")
        say(f"note: {what}")  # a recipe's
    learned = [tokenised(each, tokenizer, config, tell, kind) for each, kind in zip(rows, ("", "evaluation "))]
    if held_out:  # only now, so that a row has the number that it has in the file
        rows, learned = (_parted(each[0], held_out, config.seed) for each in (rows, learned))
    for line in _about_rows(*rows):
        say(line)
    _about_lengths(learned, config, _fit_the_context(config, model, say), say)
    methods = methods_of(config.method, config.method_args)
    if not any("labels" in method.places for method in methods):
        say(f"note: {rule(rows[0][0], config)}")
    if all(type(method).rows is Method.rows for method in methods):
        # else a method changes the rows: it gets them as texts, and the trainer tokenises them anew
        rows, config.assistant_only_loss = learned, False  # which TRL refuses beside labels that are there
    return rows[0], rows[1] if len(rows) > 1 else None


def _held_out(sets: list[Dataset], config: LfUConfig, data: DataArguments) -> int:
    """How many of the training rows are split off to evaluate on. Switches evaluation on where there are any."""
    held_out, share = 0, data.eval_share
    if share and len(sets) == 1:
        held_out = round(share * len(sets[0]))
        if not 0 < held_out < len(sets[0]):
            raise UserError(f"eval_share {share:g} of {len(sets[0])} rows leaves none on one side")
    if len(sets) > 1 or held_out:
        if config.eval_strategy == "no":
            config.eval_strategy, config.do_eval = type(config.eval_strategy)("epoch"), True
    elif config.eval_strategy != "no":
        raise UserError(f"eval_strategy is {config.eval_strategy.value}, with nothing to evaluate: give --eval_data")
    return held_out


def _parted(rows: Dataset, held_out: int, seed: int) -> list[Dataset]:
    """The rows to train on and those held out: the same for any rows of that number."""
    split = rows.train_test_split(held_out, seed=seed)
    return [split["train"], split["test"]]


def _about_rows(rows: Dataset, eval_rows: Dataset | None = None) -> Iterator[str]:
    """What is odd about the rows, in sentences."""
    if count := repeated(rows):
        yield f"note: {count} of {len(rows)} rows are there before, word for word"
    if eval_rows is not None and (count := shared(eval_rows, rows)):
        yield (
            f"warning: {count} of {len(eval_rows)} evaluation rows are among the training rows, too: their loss says "
            "what was learned by heart"
        )


def _fit_the_context(config: LfUConfig, arguments: ModelArguments, say: Say) -> int | None:
    """Lowers max_length to the model's last position. Returns how many tokens the model was made for, if known."""
    longest, ends = context_length(
        str(arguments.model_name_or_path), arguments.model_revision, trust_remote_code=config.trust_remote_code
    )
    if longest and ends and (config.max_length is None or config.max_length > longest):
        beyond = "no limit" if config.max_length is None else f"max_length {config.max_length}"
        say(f"note: the model's context is {longest} tokens: rows are cut there, not at {beyond}")
        config.max_length = longest
    return longest


def _about_lengths(learned: list[Dataset], config: LfUConfig, context: int | None, say: Say) -> None:
    """Says which rows are cut, and which are left out."""
    packed = (config.packing, config.packing if config.eval_packing is None else config.eval_packing)
    for rows, what, is_packed in zip(learned, ("rows", "evaluation rows"), packed):
        for line in about_cuts(rows, what, config, packed=is_packed, context=context):
            say(f"warning: {line}")


def _check_packages(config: LfUConfig, model: ModelArguments) -> None:
    """Refuses settings that need a package which is not installed, before anything is loaded."""
    config.report_to = [name for each in config.report_to for name in listed(each)]
    for name in config.report_to:
        if lacking := _lacking(name):
            raise UserError(f"--report_to {name}: {lacking}")
    optim = str(getattr(config.optim, "value", config.optim))
    needed = {
        "--use_liger_kernel": config.use_liger_kernel and "liger_kernel",
        "--load_in_4bit or --load_in_8bit": (model.load_in_4bit or model.load_in_8bit) and "bitsandbytes",
        f"--optim {optim}": next((package for part, package in _OPTIMIZERS.items() if part in optim), None),
    }
    for flag, package in needed.items():
        if package and find_spec(package) is None:
            raise UserError(f"{flag} needs the package {package}, which is not installed: install it, or drop the flag")


def _lacking(tracker: str) -> str:
    """What the tracker's callback says is missing, or an empty text."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # some fail again when they are deleted
    try:
        for callback in get_reporting_integration_callbacks([tracker]):
            callback()
    except (RuntimeError, ImportError, ValueError) as error:
        return one_line(error)
    finally:
        gc.collect()
        sys.unraisablehook = hook
    return ""


_OPTIMIZERS = {  # part of an optimizer's name -> package
    "bnb": "bitsandbytes", "8bit": "bitsandbytes", "galore": "galore_torch", "apollo": "apollo_torch", "apex": "apex",
    "lomo": "lomo_optim", "torchao": "torchao", "4bit": "torchao", "schedule_free": "schedulefree",
    "stable_adamw": "optimi", "grokadamw": "grokadamw",
}  # fmt: skip
