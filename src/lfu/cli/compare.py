"""Which fine-tuning method, on your model and your data? Trains with each, several seeds, and measures what every one
learned, forgot and cost; writes a report to send round. Runs are kept: the same command goes on where it was stopped.

Every other flag of lfu train is passed to all runs alike (--learning_rate, --num_train_epochs, --use_peft, ...)."""

from __future__ import annotations

import argparse
import secrets
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfu.cli import INTERRUPTED, output
from lfu.cli.parser import LineParser
from lfu.cli.study_flags import refuse_unused, sort_flags
from lfu.support.errors import UserError
from lfu.support.extras import need
from lfu.support.flags import add_flags, at_least_one, given_flags, pairs_of

if TYPE_CHECKING:
    from lfu.cli.live import Board
    from lfu.study.options import Options
    from lfu.study.study import Study

RATE_FLAGS = ("--learning_rate", "--learning-rate")
LISTS = ("methods", "retention")  # several words each, and given several times they add up


def run(argv: list[str]) -> int:
    """Trains, measures, writes the report, and prints what was found.

    Raises:
        UserError: for anything the user can put right before training; or every run failed.
        KeyboardInterrupt: after Ctrl-C, with the way to go on as its message.
    """
    return run_study("compare", argv, __doc__, add_methods, settings_of_methods)


def add_methods(parser: argparse.ArgumentParser) -> None:
    """What is compared."""
    parser.add_argument(
        "--methods", nargs="+", action="extend", metavar="M,M",
        help="methods of lfu train (see: lfu methods), with settings if you like: sft,neftune,lfu:alpha=0.01:lam=1; "
        "sft is added if it is missing; may be repeated",
    )  # fmt: skip


def settings_of_methods(given: argparse.Namespace) -> dict[str, Any]:
    """The settings that --methods names.

    Raises:
        UserError: none; an unknown method or knob; one named twice.
    """
    from lfu.study.settings import parse_setting

    texts = [text for words in given.methods or [] for text in words.split(",") if text.strip()]
    if not texts:
        raise UserError("no methods: give --methods sft,lfu,... (see: lfu methods), or a --preset")
    settings = [parse_setting(text) for text in texts]
    twice = next((one.label for one in settings if settings.count(one) > 1), None)
    if twice:
        raise UserError(f"--methods names {twice!r} twice")
    return {"settings": settings}


# --- what lfu compare and lfu sweep share ----------------------------------------------------------------------------


def run_study(
    verb: str,
    argv: list[str],
    about: str | None,
    add: Callable[[argparse.ArgumentParser], None],
    settings_of: Callable[[argparse.Namespace], dict[str, Any]],
) -> int:
    """A study from its flags.

    Args:
        verb: `compare` or `sweep`.
        add: adds the verb's own flags.
        settings_of: the parsed flags -> fields of `Options`.
    """
    parser = _parser(verb, about, add)
    given, words = _parse(parser, verb, argv)
    if given.list_presets:
        return _list_presets()
    from lfu.study.processes import leave_busy_cores

    folder = Path(given.output_dir)
    output.check_writable(folder)
    if given.submitit is not None:
        need("--submitit", "cluster")
    alone = given.jobs == 1 and given.submitit is None and not given.worker
    if alone or given.worker:
        _keep_one_gpu(given)
    if alone:
        leave_busy_cores()
    from lfu.cli.live import Board
    from lfu.study import presets

    board = Board()
    study = _study(verb, given, words, settings_of, board)
    command = shlex.join(["lfu", verb, *argv])
    try:
        with board if alone else nullcontext():
            _work(study, given, ["-m", "lfu.cli", verb, *argv])
    except KeyboardInterrupt as stop:
        if given.worker:  # the command that started it says so
            raise SystemExit(INTERRUPTED) from stop
        raise KeyboardInterrupt(_how_to_go_on(study)) from stop
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror or error}: make room there, and run the same command again"
        ) from error
    return 0 if given.worker else _report(study, verb, command, presets.next_of(given.preset))


def _study(
    verb: str, given: argparse.Namespace, words: list[str], settings_of: Callable[[argparse.Namespace], dict[str, Any]],
    board: Board,
) -> Study:  # fmt: skip
    """The study that the flags ask for; nothing is written if there is a mistake in them."""
    from lfu.cli.arguments import parse
    from lfu.report.compare_figures import one_curve
    from lfu.study.build import build
    from lfu.study.options import Options

    folder = Path(given.output_dir)
    flags = sort_flags(words, verb)
    parse(list(flags.training))  # unknown flags, no model, no data: said as lfu train says it
    options = Options(
        folder=folder,
        flags=flags,
        session=given.worker or secrets.token_hex(8),
        say=lambda line: board.say(f"lfu: {line}"),
        live=board,
        draw=one_curve,
        **given_flags(Options, given),
        **settings_of(given),
    )
    refuse_unused(options, flags)
    with output.no_empty_leftovers(folder):
        study = build(options, parse)
    if not given.worker:
        _announce(study, options)
    return study


def _parser(verb: str, about: str | None, add: Callable[[argparse.ArgumentParser], None]) -> LineParser:
    from lfu.study.options import HOW, WHAT, Options

    parser = LineParser(
        prog=f"lfu {verb}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"lfu {verb} --model MODEL --data DATA [--FLAG VALUE ...]",
    )  # fmt: skip
    what = parser.add_argument_group(WHAT)
    add(what)  # type: ignore[arg-type]
    what.add_argument(
        "--preset", action="append", default=[], metavar="NAME",
        help="a shipped study (--list_presets) or a YAML file of flags; flags given here win. base, instruct "
        "and reps are those of lfu train and set LfU's strength",
    )  # fmt: skip
    what.add_argument("--list_presets", action="store_true", help="list the shipped studies and exit")
    groups = {WHAT: what}
    add_flags(parser, Options, groups)
    how = groups[HOW]
    how.add_argument(
        "--output_dir", default=f"runs/{verb}", metavar="DIR", help="folder for runs and report (default: %(default)s)"
    )
    how.add_argument(
        "--jobs", type=at_least_one, default=1, metavar="N",
        help="processes at once, each with its share of the CPU threads, or one GPU if there are any; "
        "fewer if memory can't hold that many trainings (default: 1)",
    )  # fmt: skip
    how.add_argument(
        "--submitit", type=pairs_of, metavar="KEY=VALUE,...",
        help="run the --jobs processes on a cluster through submitit, with these parameters: "
        "slurm_partition=gpu,gpus_per_node=1,timeout_min=240 (cluster=local: on this machine)",
    )  # fmt: skip
    how.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser


def _parse(parser: LineParser, verb: str, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the study's flags, the words left for lfu train), presets merged under what was given.

    Raises:
        UserError: --learning_rate beside --learning_rates; no such preset.
    """
    from lfu.study import presets

    given, rest = parser.parse_known_args(argv)
    chosen_rate = _one_rate(given, rest)
    strengths = [name for name in given.preset if name in ("base", "instruct", "reps")]
    merged = [presets.words_of(name, verb) for name in given.preset if name not in strengths]
    if not merged and not strengths:
        return given, rest
    below = [word for words in merged for word in words]
    _, of_presets = parser.parse_known_args(below)
    both, _ = parser.parse_known_args([*below, *argv])
    for name in LISTS:  # a list takes the place of one below it
        lists = [getattr(parser.parse_known_args(words)[0], name, None) for words in [*merged, argv]]
        setattr(both, name, next((found for found in reversed(lists) if found), getattr(both, name, None)))
    if chosen_rate:
        both.learning_rates = None
    return both, [*of_presets, *(f"--preset={name}" for name in strengths), *rest]


def _one_rate(given: argparse.Namespace, rest: Sequence[str]) -> bool:
    """Whether --learning_rate was given; beside --learning_rates it would be passed over.

    Raises:
        UserError: both were given.
    """
    chosen = any(word.partition("=")[0] in RATE_FLAGS for word in rest)
    if chosen and given.learning_rates:
        raise UserError("--learning_rates says which are tried, and --learning_rate would be passed over: give one")
    return chosen


def _keep_one_gpu(given: argparse.Namespace) -> None:
    from lfu.study.processes import keep_one_gpu

    gpus = keep_one_gpu()
    if gpus > 1 and not given.worker:
        print(f"lfu: one of {gpus} GPUs is used: --jobs {gpus} uses all of them", file=sys.stderr)


def _list_presets() -> int:
    from lfu import recipes
    from lfu.study import presets

    for name, path in presets.shipped().items():
        settings = recipes.read(path)
        print(f"lfu {settings['verb']:<7} --preset {name:<16} {settings['about']}")
    return 0


def _announce(study: Study, options: Options) -> None:
    """What is about to be done."""
    for setting in study.design.settings:
        if setting not in options.settings:
            study.say(f"{setting.label} is added: it is what the others are measured against")
    for setting in options.settings:
        if setting not in study.design.settings:
            study.say(f"{setting.label} is left out: {len(study.split.train)} rows are left for training")
    plan, count = study.plan(), len(study.design.settings)
    runs = len({task.run for task in plan.tasks})
    done = runs - len({task.run for task in study.open_tasks(plan)})
    study.say(
        f"{count} setting{'s' if count > 1 else ''}, {len(study.split.train):,} training rows, {runs} runs"
        f"{'' if plan.whole else ' or more'}{f', {done} of them finished' if done else ''}; kept in {study.folder}"
    )


# --- doing it --------------------------------------------------------------------------------------------------------


def _work(study: Study, given: argparse.Namespace, command: list[str]) -> None:
    from lfu.study.cluster import work_on_cluster
    from lfu.study.processes import work_in_processes
    from lfu.study.run import tidy, work

    if given.worker:
        work(study)
    elif given.submitit is not None:
        work_on_cluster(study, given.jobs, command, given.submitit)
    elif given.jobs == 1:
        work(study)
    else:
        work_in_processes(study, given.jobs, command)
    if not given.worker:
        tidy(study)


def _how_to_go_on(study: Study) -> str:
    plan = study.plan()
    done = len(plan.tasks) - len(study.open_tasks(plan))
    return f"{done} of {len(plan.tasks)} runs are finished and kept: the same command goes on from there."


def _report(study: Study, verb: str, command: str, further: Sequence[str]) -> int:
    """Writes the report, and prints its first table, what was found, where it lies and what to do next."""
    from lfu.study.record import record_of

    record = record_of(study, verb, command)
    output.write_and_show(record, study.folder, tables=1)
    best = record["results"]["recommended"]
    kept = [study.shelf(run) for runs in study.plan().runs.values() for each in runs.values() for run in each
            if best and run.label == best["label"] and study.keep_models]  # fmt: skip
    if kept and kept[0].has_model:
        print(f"talk     lfu chat {kept[0].model} --beside {record['settings']['model']}")
    for line in further:
        print(f"next     {line}")
    runs = [run for run in record["results"]["runs"] if run["label"] != "untouched"]
    failed = [run for run in runs if run["state"] == "failed"]
    if failed and not any(run["state"] == "finished" for run in runs):
        raise UserError(f"every run failed; the first, {failed[0]['label']}: {failed[0]['error']}")
    return 0
