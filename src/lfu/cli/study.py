"""What `lfu compare` and `lfu sweep` share: their flags, the study that they ask for, and its report."""

from __future__ import annotations

import argparse
import secrets
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfu.cli import INTERRUPTED, output
from lfu.cli.study_flags import STRENGTHS, flags_of, refuse_unused_knobs, with_presets
from lfu.study.options import HOW, MEASURED, ROWS, WHAT, Options
from lfu.support.errors import UserError
from lfu.support.extras import need
from lfu.support.flags import LineParser, add_flags, at_least_one, flag, given_flags, pairs_of, switch
from lfu.support.words import counted

if TYPE_CHECKING:
    from lfu.study.study import Study


@dataclass(kw_only=True)
class Command:
    """The flags that say how a study is run; those of the study itself are `Options`."""

    preset: list[str] = flag(
        WHAT, [], "a shipped study (--list_presets) or a YAML file of flags; flags given here win. base, instruct and "
        "reps are those of lfu train and set LfU's strength", action="append", metavar="NAME",
    )  # fmt: skip
    list_presets: bool = switch(WHAT, "list the shipped studies and exit")
    output_dir: str = flag(HOW, "", "folder for runs and report (default: runs/compare or runs/sweep)", metavar="DIR")
    jobs: int = flag(
        HOW, 1, "processes at once, each with its share of the CPU threads, or one GPU if there are any; fewer if "
        "memory can't hold that many trainings", type=at_least_one,
    )  # fmt: skip
    submitit: dict[str, str] | None = flag(
        HOW, None, "run the --jobs processes on a cluster through submitit, with these parameters: "
        "slurm_partition=gpu,gpus_per_node=1,timeout_min=240 (cluster=local: on this machine)", type=pairs_of,
    )  # fmt: skip
    worker: str = flag(HOW, "", argparse.SUPPRESS)

    @property
    def alone(self) -> bool:
        """Whether this process does all the work."""
        return self.jobs == 1 and self.submitit is None and not self.worker

    def settings(self, rates: list[str]) -> dict[str, Any]:
        """What is compared, as fields of `Options`; `rates` are the learning rates that are tried."""
        raise NotImplementedError


def run_study(verb: str, kind: type[Command], argv: list[str], about: str | None) -> int:
    """A study from its flags. `verb`: `compare` or `sweep`; `about`: the text of its help."""
    from lfu import recipes
    from lfu.study import presets

    given, words = with_presets(_parser(verb, kind, about), verb, argv)
    command = kind(**given_flags(kind, given))
    if command.list_presets:
        for name, path in presets.shipped().items():
            settings = recipes.read(path)
            print(f"lfu {settings['verb']:<7} --preset {name:<16} {settings['about']}")
        return 0
    folder = Path(command.output_dir or f"runs/{verb}")
    output.check_writable(folder)
    _prepare(command)
    study = _study(verb, command, given, words, folder)
    try:
        with study.live if command.alone else nullcontext():
            _work(study, command, ["-m", "lfu.cli", verb, *argv])
    except KeyboardInterrupt as stop:
        if command.worker:  # the command that started it reports this
            raise SystemExit(INTERRUPTED) from stop
        tasks = study.plan().tasks
        done = f"{len(tasks) - len(study.todo())} of {len(tasks)} runs are finished and kept"
        raise KeyboardInterrupt(f"{done}: the same command continues from there.") from stop
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}: make room, and run the same command again") from error
    if command.worker:
        return 0
    return _report(study, verb, shlex.join(["lfu", verb, *argv]), presets.next_of(command.preset))


def _parser(verb: str, kind: type[Command], about: str | None) -> LineParser:
    usage = f"lfu {verb} --model MODEL --data DATA [--FLAG VALUE ...]"
    parser = LineParser(prog=f"lfu {verb}", description=about, usage=usage)
    for title in (WHAT, ROWS, MEASURED, HOW):
        parser.add_argument_group(title)
    for options in (kind, Options):
        add_flags(parser, options)
    return parser


def _prepare(command: Command) -> None:
    """Threads and GPUs of this process, before torch looks for them."""
    from lfu.study.processes import keep_one_gpu, leave_busy_cores

    if command.submitit is not None:
        need("--submitit", "cluster")
    if command.alone or command.worker:
        gpus = keep_one_gpu()
        if gpus > 1 and not command.worker:
            print(f"lfu: one of {gpus} GPUs is used: --jobs {gpus} uses all of them", file=sys.stderr)
    if command.alone:
        leave_busy_cores()


def _study(verb: str, command: Command, given: argparse.Namespace, words: list[str], folder: Path) -> Study:
    """The study that the flags ask for; nothing is written if there is a mistake in them."""
    from lfu.cli.arguments import parse, refuse_unused
    from lfu.report.compare_figures import one_curve
    from lfu.study.build import build
    from lfu.study.live import Board
    from lfu.study.settings import words_of

    flags, knobs = flags_of(words, verb)
    _, model, data = parse(words_of(flags))  # mistakes are told as lfu train tells them
    if not command.preset:  # a preset may have more: it is for other flags, too
        refuse_unused(model, data)
    compared = command.settings(given.learning_rates)
    options = Options(
        folder=folder,
        flags=flags,
        knobs=knobs,
        session=command.worker or secrets.token_hex(8),
        live=Board(),
        draw=one_curve,
        choose=_choice(command, given, data, compared),
        **given_flags(Options, given),
        **compared,
    )
    refuse_unused_knobs(options)
    with output.no_empty_leftovers(folder):
        study = build(options, parse)
    if not command.worker:
        _announce(study, options)
    return study


def _choice(command: Command, given: argparse.Namespace, data: Any, compared: dict[str, Any]) -> Any:
    """What chooses length and learning rate, unless a flag, a setting or a preset says one of them."""
    from lfu.cli import careful

    said = data.given | {name for setting in compared["settings"] for name, _ in setting.shared}
    said |= {"learning_rate"} if given.learning_rates else set()
    ours = not (said & careful.LENGTH_OR_RATE or set(command.preset) - {*STRENGTHS})
    wanted = ours if data.careful is None else data.careful
    return (lambda rows: careful.length_and_rate(rows, said)) if wanted else None


def _announce(study: Study, options: Options) -> None:
    """What is about to be done."""
    from lfu.cli import careful

    if study.chosen:
        study.say(careful.told(len(study.split.train), study.chosen).replace("\xa0", " "))
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
        f"{counted(count, 'setting')}, {counted(len(study.split.train), 'training row')}, {runs} runs"
        f"{'' if plan.whole else ' or more'}{f', {done} of them finished' if done else ''}; kept in {study.folder}"
    )


def _work(study: Study, command: Command, words: list[str]) -> None:
    from lfu.study.cluster import work_on_cluster
    from lfu.study.processes import work_in_processes
    from lfu.study.run import tidy, work

    if command.alone or command.worker:
        work(study)
    elif command.submitit is not None:
        work_on_cluster(study, command.jobs, words, command.submitit)
    else:
        work_in_processes(study, command.jobs, words)
    if not command.worker:
        tidy(study)


def _report(study: Study, verb: str, command: str, further: Sequence[str]) -> int:
    """Writes the report, and prints its first table, what was found, where it lies and what to do next."""
    from lfu.study.record import record_of

    record = record_of(study, verb, command)
    output.write_and_show(record, study.folder, tables=1)
    best = record["results"]["recommended"]
    kept = [study.shelf(run) for runs in study.plan().runs.values() for each in runs.values() for run in each
            if best and run.label == best["label"] and study.keep_models]  # fmt: skip
    if kept and kept[0].model.is_dir():
        print(f"talk     lfu chat {kept[0].model} --beside {record['settings']['model']}")
    for line in further:
        print(f"next     {line}")
    runs = [run for run in record["results"]["runs"] if run["label"] != "untouched"]
    failed = [run for run in runs if run["state"] == "failed"]
    if failed and not any(run["state"] == "finished" for run in runs):
        raise UserError(f"every run failed; the first, {failed[0]['label']}: {failed[0]['error']}")
    return 0
