"""What a study is: its rows, its settings, what it examines; and what makes one run differ from another."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lfu.study import environment, keys
from lfu.study.folder import Shelf
from lfu.study.live import Live
from lfu.study.measure import Exam
from lfu.study.plan import UNTOUCHED, Design, Plan, Run, Task, planned
from lfu.study.rows import Split
from lfu.study.settings import is_lfu
from lfu.support.errors import UserError

Words = list[str]
Draw = Callable[[str, Sequence[Mapping[str, Any]]], bytes]


@dataclass(frozen=True)
class Flags:
    """What is passed to `lfu train`'s parser for every run: flag words, sorted by whom they are for.

    Attributes:
        training: for all runs.
        own: for the runs with LfU in them.
        knobs: (method.knob, value) for the runs with that method in them.
    """

    training: Sequence[str] = ()
    own: Sequence[str] = ()
    knobs: Sequence[tuple[str, str]] = ()


@dataclass
class Study:
    """Everything that a study needs.

    Attributes:
        folder: where it lives.
        design: which runs there are.
        flags: what all runs have in common.
        parse: flag words -> (LfUConfig, ModelConfig, data arguments), as `lfu train` reads them.
        split, shaped: the rows, raw and in TRL's shapes.
        exam: what every model is measured on.
        save_steps: a checkpoint every so many steps; None: a training that is killed starts anew.
        keep_models: whether trained models stay.
        environment: what of the machine that trains decides results: this one's, or the workers' (see `follow`).
        session, since: who works on it, and from when on; see `lfu.study.folder.Place`.
        watch_forgetting: the share of a training's time that goes into measuring what it forgets on the way.
        say: tells the user one line.
        live: is told what happens in this process.
        draw: makes a picture (PNG) of a training curve, of its title and entries; None: no pictures.
    """

    folder: Path
    design: Design
    flags: Flags
    parse: Callable[[Words], tuple[Any, Any, Any]]
    split: Split
    shaped: Mapping[str, Any]
    exam: Exam
    session: str
    save_steps: int | None = None
    keep_models: bool = False
    watch_forgetting: float = 0.0
    say: Callable[[str], None] = lambda line: None
    live: Live = field(default_factory=Live)
    draw: Draw | None = None
    since: float = field(default_factory=time.time)
    environment: dict[str, Any] = field(default_factory=lambda: environment.own())
    _configs: dict[Run, tuple[Any, Any]] = field(default_factory=dict)

    # -- what a run is -------------------------------------------------------------------------------------------------

    def words(self, run: Run) -> Words:
        """The flags of `lfu train` that give this run's model, output folder aside."""
        data = self.folder / "data"
        words = [*self.flags.training, "--data", str(data / "train.jsonl")]
        words += ["--eval_data", str(data / "validation.jsonl")]
        setting = run.setting
        if setting is None:
            return [*words, "--method", "sft"]
        words += ["--method", setting.method]
        if is_lfu(setting.method):
            words += self.flags.own
        names = [name.strip() for name in setting.method.split("+")]
        knobs = {name: value for name, value in self.flags.knobs if name.partition(".")[0] in names}
        knobs |= dict(setting.knobs)
        if knobs:
            words += ["--method_args", _knob_text(knobs)]
        for name, value in setting.own + setting.shared:
            words += [f"--{name}={value}"]
        rate = [f"--learning_rate={run.learning_rate}"] if run.learning_rate else []
        return [*words, *rate, f"--max_steps={run.steps}", f"--seed={run.seed}"]

    def command(self, run: Run) -> Words:
        """The flags of `lfu train` that give this run's model, in a folder of its own."""
        return [*self.words(run), f"--output_dir=models/{self.shelf(run).path.name}"]

    def configs(self, run: Run) -> tuple[Any, Any]:
        """(LfUConfig, ModelConfig) of a run, without its folder.

        Raises:
            UserError: values that don't go together, with the setting's name.
        """
        if run not in self._configs:
            self._configs[run] = self.parsed(run, self.folder / "runs")
        return self._configs[run]

    def parsed(self, run: Run, folder: Path) -> tuple[Any, Any]:
        """The same, fresh, with checkpoints going to `folder`."""
        save = ["--save_strategy=no"]
        if self.save_steps:
            save = ["--save_strategy=steps", f"--save_steps={self.save_steps}", "--save_total_limit=1"]
        quiet = ["--report_to=none", "--disable_tqdm=true", "--log_level=error", "--logging_strategy=steps",
                 "--logging_steps=1", "--logging_nan_inf_filter=false", "--eval_strategy=no"]  # fmt: skip
        try:
            config, model, _ = self.parse([*self.words(run), *save, *quiet, f"--output_dir={folder}"])
        except UserError as error:
            raise UserError(f"{run.label}: {error}") from error
        return config, model

    def key(self, run: Run) -> str:
        """The hash of what decides the run's result."""
        if run.setting is None:
            more = {name: what for name, what in self.everywhere.items() if name != "train"}
            return keys.start_key(self.configs(run)[1], more, keys.given_in(self.words(run)))
        config, model = self.configs(run)
        more = {**self.everywhere, "rows": self.limit(run.setting)}
        return keys.run_key(config, model, more, keys.given_in(self.words(run)))

    @property
    def everywhere(self) -> dict[str, Any]:
        """What decides the results of all runs."""
        return self._content | self.environment

    @cached_property
    def _content(self) -> dict[str, Any]:
        """The part of it that is the same on every machine."""
        config, model = self.configs(UNTOUCHED)
        files = keys.model_files(
            str(model.model_name_or_path), model.model_revision, trust_remote_code=bool(config.trust_remote_code)
        )
        return {
            "code": keys.package_code(),
            "model": files,
            "train": keys.digest(list(self.shaped["train"])),
            "exam": keys.digest(self.exam.settings()),
        }

    def limit(self, setting: Any) -> int:
        """The training rows of a setting: the first so many."""
        return min(int(setting.values.get("data_limit", len(self.split.train))), len(self.split.train))

    # -- where it stands -----------------------------------------------------------------------------------------------

    @cached_property
    def shelf(self) -> Shelf:
        """The runs' folders."""
        return Shelf(self.folder, self.key, self.session, self.since)

    def follow(self) -> None:
        """From now on the runs are those of the machine that trained last in this folder, if any has.

        For a process that starts workers: they may run where another GPU is seen and other packages are installed.
        """
        noted = environment.noted(self.folder)
        if noted is not None and noted != self.environment:
            self.environment = noted
            self.__dict__.pop("shelf", None)

    def plan(self) -> Plan:
        """What is known to be done, as far as the results so far tell."""
        return planned(self.design, self.shelf)

    def open_tasks(self, plan: Plan) -> list[Task]:
        """What is neither finished nor failed."""
        return [task for task in plan.tasks if not (self.shelf(task.run).failed or self.finished(task))]

    def todo(self) -> list[Task]:
        """The open tasks that are known now."""
        return self.open_tasks(self.plan())

    def useful(self, jobs: int) -> int:
        """How many of `jobs` workers have something to do: all of them, if more tasks may follow those known now."""
        return jobs if not self.plan().whole else min(jobs, len(self.todo()))

    def peak_memory(self) -> int | None:
        """The most bytes that a training took so far, 0 where it can't be told; None where none is over."""
        places = [self.shelf(task.run) for task in self.plan().tasks if task.run.setting is not None]
        costs = [found["cost"] for place in places if (found := place.record or place.trained)]
        return max((cost["peak_memory"] or 0 for cost in costs), default=None)

    def finished(self, task: Task) -> bool:
        """Whether the run got as far as the task wants it."""
        return self.shelf(task.run).finished(task.level)


def _knob_text(knobs: Mapping[str, str]) -> str:
    plain = not any("," in value for value in knobs.values())
    return ",".join(f"{name}={value}" for name, value in knobs.items()) if plain else json.dumps(dict(knobs))
