"""What a study is: its rows, its settings, what it examines; and what makes one run differ from another."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lfu.study import environment, keys
from lfu.study.folder import Shelf
from lfu.study.measure import Exam
from lfu.study.options import Options
from lfu.study.plan import UNTOUCHED, Design, Plan, Run, Task, planned
from lfu.study.rows import Split
from lfu.study.settings import Setting, is_lfu
from lfu.support.errors import UserError

Words = list[str]
Parse = Callable[[Words], tuple[Any, Any, Any]]  # flags of `lfu train` -> (LfUConfig, ModelConfig, data arguments)

QUIET = ("--report_to=none", "--disable_tqdm=true", "--log_level=error", "--logging_strategy=steps",
         "--logging_steps=1", "--logging_nan_inf_filter=false", "--eval_strategy=no")  # fmt: skip


@dataclass(kw_only=True)
class Study(Options):
    """What the user asked for, read and checked.

    Attributes:
        design: which runs there are.
        parse: as `lfu train` reads its flags.
        split, shaped: the rows, raw and in TRL's shapes.
        exam: what every model is measured on.
        environment: what of the machine that trains decides results: this one's, or the workers' (see `follow`).
        since: when the session began; see `lfu.study.folder.Place`.
    """

    design: Design
    parse: Parse
    split: Split
    shaped: Mapping[str, Any]
    exam: Exam
    since: float = field(default_factory=time.time)
    environment: dict[str, Any] = field(default_factory=lambda: environment.own())
    _configs: dict[Run, tuple[Any, Any]] = field(default_factory=dict)

    # -- what a run is -------------------------------------------------------------------------------------------------

    def words(self, run: Run) -> Words:
        """The flags of `lfu train` that give this run's model, output folder aside."""
        data, setting = self.folder / "data", run.setting
        words = [
            *self.flags.training,
            "--data",
            f"{data / 'train.jsonl'}",
            "--eval_data",
            f"{data / 'validation.jsonl'}",
        ]
        if setting is None:
            return [*words, "--method", "sft"]
        words += ["--method", setting.method, *(self.flags.own if is_lfu(setting.method) else ())]
        names = [name.strip() for name in setting.method.split("+")]
        knobs = {name: value for name, value in self.flags.knobs if name.partition(".")[0] in names}
        if knobs := knobs | dict(setting.knobs):
            plain = not any("," in value for value in knobs.values())
            text = ",".join(f"{name}={value}" for name, value in knobs.items())
            words += ["--method_args", text if plain else json.dumps(knobs)]
        words += [f"--{name}={value}" for name, value in setting.own + setting.shared]
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
        try:
            config, model, _ = self.parse([*self.words(run), *save, *QUIET, f"--output_dir={folder}"])
        except UserError as error:
            raise UserError(f"{run.label}: {error}") from error
        return config, model

    def key(self, run: Run) -> str:
        """The hash of what decides the run's result."""
        config, model = self.configs(run)
        given = keys.given_in(self.words(run))
        if run.setting is None:
            return keys.start_key(model, {name: v for name, v in self.everywhere.items() if name != "train"}, given)
        return keys.run_key(config, model, {**self.everywhere, "rows": self.limit(run.setting)}, given)

    @property
    def everywhere(self) -> dict[str, Any]:
        """What decides the results of all runs."""
        return self._content | self.environment

    @cached_property
    def _content(self) -> dict[str, Any]:
        """The part of it that is the same on every machine."""
        config, model = self.configs(UNTOUCHED)
        name, trust = str(model.model_name_or_path), bool(config.trust_remote_code)
        return {
            "code": keys.package_code(),
            "model": keys.model_files(name, model.model_revision, trust_remote_code=trust),
            "train": keys.digest(list(self.shaped["train"])),
            "exam": keys.digest(self.exam.settings()),
        }

    def limit(self, setting: Setting) -> int:
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

    def finished(self, task: Task) -> bool:
        """Whether the run got as far as the task wants it."""
        return self.shelf(task.run).finished(task.level)

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
        costs = [self.shelf(task.run).cost for task in self.plan().tasks if task.run.setting is not None]
        return max((cost["peak_memory"] or 0 for cost in costs if cost), default=None)
