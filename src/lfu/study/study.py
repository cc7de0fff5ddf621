"""What a study is: its rows, its settings, what it examines; and what makes one run differ from another."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lfu.evaluation.record import digest
from lfu.methods import as_method_args
from lfu.study import keys
from lfu.study.folder import Place, path_of
from lfu.study.measure import Exam
from lfu.study.options import Options
from lfu.study.plan import UNTOUCHED, Design, Plan, Run, Task, planned
from lfu.study.rows import Split
from lfu.study.settings import YARDSTICK, Setting, classes_of, is_lfu, words_of
from lfu.support.errors import value_errors_are_the_users

Parse = Callable[[list[str]], tuple[Any, Any, Any]]  # flags of `lfu train` -> (LfUConfig, ModelConfig, data arguments)

QUIET = ("--report_to=none", "--disable_tqdm=true", "--log_level=error", "--logging_strategy=steps",
         "--logging_steps=1", "--logging_nan_inf_filter=false", "--eval_strategy=no")  # fmt: skip


@dataclass(kw_only=True)
class Study(Options):
    """What the user asked for, read and checked."""

    design: Design
    parse: Parse  # as `lfu train` reads its flags
    split: Split  # the rows as read
    shaped: Mapping[str, Any]  # and in TRL's shapes
    exam: Exam  # what every model is measured on
    chosen: list[str]  # what `choose` came to
    since: float = field(default_factory=time.time)  # when the session began; see `Place`
    environment: dict[str, Any] = field(default_factory=lambda: keys.here())  # see `follow`
    _configs: dict[Run, tuple[Any, Any]] = field(default_factory=dict)
    _places: dict[Run, Place] = field(default_factory=dict)

    def words(self, run: Run) -> list[str]:
        """The flags of `lfu train` that give this run's model, output folder aside."""
        data, setting = self.folder / "data", run.setting
        method = setting.method if setting else YARDSTICK
        words = words_of(self.flags, with_lfu=is_lfu(method))
        words += [f"--data={data / 'train.jsonl'}", f"--eval_data={data / 'validation.jsonl'}", f"--method={method}"]
        if setting is None:
            return words
        known = classes_of(method)
        knobs = {name: value for name, value in self.knobs.items() if name.partition(".")[0] in known}
        if knobs := knobs | dict(setting.knobs):
            words += [f"--method_args={as_method_args(knobs)}"]
        words += [f"--{name}={value}" for name, value in setting.own + setting.shared]
        rate = [f"--learning_rate={run.learning_rate}"] if run.learning_rate else []
        return [*words, *rate, f"--max_steps={run.steps}", f"--seed={run.seed}"]

    def command(self, run: Run) -> list[str]:
        """The flags of `lfu train` that give this run's model, in a folder of its own."""
        return [*self.words(run), f"--output_dir=models/{self.shelf(run).path.name}"]

    def configs(self, run: Run) -> tuple[Any, Any]:
        """(LfUConfig, ModelConfig) of a run, without its folder. Raises UserError, with the setting's name."""
        if run not in self._configs:
            self._configs[run] = self.parsed(run, self.folder / "runs")
        return self._configs[run]

    def parsed(self, run: Run, folder: Path) -> tuple[Any, Any]:
        """The same, fresh, with checkpoints going to `folder`."""
        save = ["--save_strategy=no"]
        if self.save_steps:
            save = ["--save_strategy=steps", f"--save_steps={self.save_steps}", "--save_total_limit=1"]
        with value_errors_are_the_users(run.label):
            config, model, _ = self.parse([*self.words(run), *save, *QUIET, f"--output_dir={folder}"])
        return config, model

    def key(self, run: Run) -> str:
        """The hash of what decides the run's result."""
        config, model = self.configs(run)
        given = keys.RESOLVED & {*self.flags, *(run.setting.values if run.setting else ())}
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
            "train": digest(list(self.shaped["train"])),
            "exam": digest(asdict(self.exam)),
        }

    def limit(self, setting: Setting) -> int:
        """The training rows of a setting: the first so many."""
        return min(int(setting.values.get("data_limit", len(self.split.train))), len(self.split.train))

    def say(self, line: str) -> None:
        """Tells the user one line."""
        self.live.say(f"lfu: {line}")

    def shelf(self, run: Run) -> Place:
        """The run's place: two settings that come to one training (`lfu`, `lfu:alpha=auto`) have one."""
        if run not in self._places:
            key = self.key(run)
            known = next((place for place in self._places.values() if place.key == key), None)
            self._places[run] = known or Place(path_of(self.folder, run, key), key, self.session, self.since)
        return self._places[run]

    def follow(self) -> None:
        """From now on the runs are those of the machine that trained last in this folder, if any has.

        For a process that starts workers: they may run where another GPU is seen and other packages are installed.
        """
        noted = keys.noted(self.folder)
        if noted is not None and noted != self.environment:
            self.environment = noted
            self._places.clear()

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
