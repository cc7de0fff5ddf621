"""A study from what the user asked for: everything is read and checked here, before anything is trained."""

import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from lfu.data.columns import as_dataset, rows_of
from lfu.data.learned import tokenised
from lfu.data.lengths import about_cuts, about_lengths
from lfu.data.load import BUILT_IN, load_rows
from lfu.data.shapes import shape_of
from lfu.data.templates import to_training_rows
from lfu.model.loading import context_length, training_tokenizer
from lfu.step.cheaper import Cheaper, longest_cycle
from lfu.study.choose import fitting
from lfu.study.folder import slug
from lfu.study.halving import RUNGS, short_steps
from lfu.study.measure import make_exam
from lfu.study.options import Options
from lfu.study.plan import Design
from lfu.study.rows import Kept, Shape, Split, built_in, retention, split, trained_on, write_rows
from lfu.study.settings import Setting, with_yardsticks, words_of
from lfu.study.study import Parse, Study
from lfu.study.train import check_methods
from lfu.support.errors import UserError, value_errors_are_the_users
from lfu.support.words import counted

# flags that every run is given by the study: its own files; learning rate and steps
ROWS = {
    "data", "data_config", "data_split", "data_limit", "eval_data", "eval_split", "eval_limit", "dataset_text_field",
    "careful",
}  # fmt: skip
OF_RUN = {"learning_rate", "max_steps"}
Tell = Callable[[str], None]
LEAST_KEPT = 6  # items: a third of them choose


def build(options: Options, parse: Parse) -> Study:
    """Reads and checks everything, then writes the rows into the study's folder. Raises UserError before that."""
    config, model, data = parse(words_of(options.flags))
    if config.packing and config.max_steps < 1:
        raise UserError("with --packing give --max_steps: all methods get the same number of steps")
    tokenizer = training_tokenizer(model, config)
    odd: list[str] = []  # about the rows that are trained on or scored
    shape = partial(to_training_rows, template=data.template, tokenizer=tokenizer, system=data.system)
    parts, config.dataset_text_field = _rows(options, data, config.dataset_text_field, shape), "text"
    settings = with_yardsticks(fitting(options.settings, parts) if options.skip_larger else options.settings)
    shaped = _shaped(parts, partial(shape, tell=odd.append))
    with value_errors_are_the_users():
        exam = make_exam(
            parts, shaped, _kept(options, parts, shape), tokenizer, options, template=data.template,
            system=data.system, batch_size=config.per_device_eval_batch_size,
        )  # fmt: skip
    _tell_of_tokens(shaped, tokenizer, config, model, odd.append)
    parts.said.extend(f"{line}." for line in dict.fromkeys(odd))
    flags = {name: words for name, words in options.flags.items() if name not in ROWS}
    if chosen := options.choose(len(parts.train)) if options.choose else []:
        flags |= {flag.removeprefix("--"): [flag, value] for flag, value in zip(chosen[::2], chosen[1::2])}
        parts.said.append(f"These flags were chosen by the number of training rows: {' '.join(chosen)}.")
        config, *_ = parse([*words_of(flags), "--data=-"])
    rates = options.learning_rates or [f"{config.learning_rate:g}"]

    @cache
    def total_steps(setting: Setting) -> int:
        shared = [f"--{name}={value}" for name, value in setting.shared]
        return steps_of(parse([*words_of(flags), "--data", "-", *shared])[0], study.limit(setting))

    design = Design(
        settings, options.seeds, rates, total_steps, options.modes, options.bisection,
        halving=("rung" if exam.kept else "search") if options.halving else None,
        cycle=lambda setting: _cycle(study.configs(design.first_run(setting, rates[0]))[0]),
    )  # fmt: skip
    own = {"flags": {name: words for name, words in flags.items() if name not in OF_RUN}}
    study = Study(
        **vars(options) | own, design=design, parse=parse, split=parts, shaped=shaped, exam=exam, chosen=chosen
    )
    _check(study)
    for name in ("train", "validation", "test"):
        write_rows(getattr(parts, name), options.folder / "data" / f"{name}.jsonl")
    return study


def steps_of(config: Any, rows: int) -> int:
    """The optimizer steps of a training on so many rows, as transformers' Trainer counts them."""
    if config.max_steps > 0:
        return config.max_steps
    size = config.per_device_train_batch_size  # a run is one process on one device
    batches = rows // size if config.dataloader_drop_last else math.ceil(rows / size)
    return math.ceil(config.num_train_epochs * max(1, math.ceil(batches / config.gradient_accumulation_steps)))


def _cycle(config: Any) -> int:
    """Updates after which the cost of an update repeats."""
    if config.lam == 0:
        return 1
    form = Cheaper(config.every, config.part, config.stale, config.random_layers)
    return longest_cycle(form, config.budget, config.gradient_accumulation_steps)


def _rows(options: Options, data: Any, text_field: str, shape: Shape) -> Split:
    """Training rows and those held out, as `lfu train` would read them; plain texts are called `text`."""
    if options.test_rows and data.eval_data:
        raise UserError("--test_rows splits test rows off, and --eval_data gives them: give one of them")
    if options.validation_rows and options.validation_data:
        raise UserError("--validation_rows splits rows off, and --validation_data gives them: give one of them")
    rows, test, validation = data.rows(), data.eval_rows(), None
    if test is None and data.data.partition(":")[0] == BUILT_IN:
        test = load_rows(BUILT_IN, split="test", limit=options.test_rows or data.eval_limit)
    if options.validation_data:
        validation = load_rows(options.validation_data, split="validation", config=None)
    given = [None if found is None else _with_text(found, text_field) for found in (validation, test)]
    test_rows, own = options.test_rows if test is None else None, _with_text(rows, text_field)
    with value_errors_are_the_users("train rows"):
        shape(as_dataset(own))  # what can't be read has the number that it has in the file
    return split(own, *given, validation_rows=options.validation_rows, test_rows=test_rows)


def _with_text(rows: Any, text_field: str) -> list[dict[str, Any]]:
    if text_field != "text" and shape_of([], rows.column_names, text_field).columns == (text_field,):
        rows = rows.select_columns([text_field]).rename_column(text_field, "text")
    return rows_of(rows)


def _shaped(parts: Split, shape: Shape) -> dict[str, Any]:
    """The rows in one of TRL's shapes; all of one shape."""
    found = {}
    for name in ("train", "validation", "test"):
        with value_errors_are_the_users(f"{name} rows"):
            found[name] = shape(as_dataset(getattr(parts, name)))
    if len({tuple(sorted({"messages", "prompt", "text"} & set(rows.column_names))) for rows in found.values()}) > 1:
        raise UserError("training, validation and test rows must have the same columns")
    return found


def _kept(options: Options, parts: Split, shape: Shape) -> list[Kept]:
    """What should be kept; what of it is trained on is said."""
    if "forgetting" not in options.measures:
        return []
    sets = built_in(options.retention_limit)
    for name, file in options.kept_files:
        rows = load_rows(file, split="test", limit=options.retention_limit)
        sets.append(retention(slug(name), rows, file, shape))
        if seen := trained_on(rows_of(rows), parts.train):
            parts.said.append(f"{seen} of {len(rows)} items of {name}, to be kept, are training rows, word for word.")
    names = [each.name for each in sets]
    for each in sets:
        if len(each.rows) < LEAST_KEPT:
            raise UserError(f"{each.name} has {len(each.rows)} items to keep: give at least {LEAST_KEPT}")
        if names.count(each.name) > 1:
            raise UserError(f"two sets to keep are called {each.name!r}: name them, as in --retention mine=FILE")
    return sets


def _tell_of_tokens(shaped: Mapping[str, Any], tokenizer: Any, config: Any, model: Any, tell: Tell) -> None:
    """Which training rows are cut or left out, which rows are too long, and what the chat template changes in them."""
    name, trust = str(model.model_name_or_path), config.trust_remote_code
    context, _ = context_length(name, model.model_revision, trust_remote_code=trust)
    for part, rows in shaped.items():
        kind = "training " if part == "train" else f"{part} "
        tokens, what = tokenised(rows, tokenizer, config, tell, kind), f"{kind}rows"
        if part == "train":
            lines = about_cuts(tokens, what, config, packed=config.packing, context=context)
        else:
            lines = about_lengths(tokens, what, max_length=None, context=context)
        for line in lines:
            tell(line)


def _check(study: Study) -> None:
    """Every setting's config can be made, and it has rows to train on: else a UserError, with the setting's name."""
    design, most = study.design, len(study.split.train)
    if design.halving and (design.bisection or "time" in design.equal):
        raise UserError("--halving compares trainings of equal steps: drop --bisect, and --equal time")
    for setting in design.settings:
        limit = setting.values.get("data_limit")
        if limit is not None and not (limit.isdecimal() and 1 <= int(limit) <= most):
            raise UserError(
                f"{setting.label}: data_limit must be a whole number from 1 to the {most} rows that are left for "
                "training"
            )
        for rate in design.rates_of(setting):
            run = design.first_run(setting, rate)
            config, model = study.configs(run)
            with value_errors_are_the_users(run.label):
                check_methods(config, model)
            if design.halving and config.get_warmup_steps(short := short_steps(run.steps, RUNGS[0])) >= short:
                raise UserError(
                    f"{setting.label}: --halving trains for {counted(short, 'step')} of {run.steps} at first, all of "
                    "it warm-up, so that nothing would be learned and all would look alike: give --warmup_steps 0, or "
                    "more steps (--num_train_epochs, a smaller --gradient_accumulation_steps)"
                )
    if design.bisection:
        highest = design.bisection.setting(design.bisection.high)
        study.configs(design.first_run(highest, design.rates[0]))
