"""The study itself: takes the next task that nobody works on, does it, and looks again at what is to do.

Any number of processes may work on one study, on one machine or on several with a shared folder: each run is held by
one of them, and a process that dies lets go of its run.
"""

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from peft import PeftType
from transformers import set_seed

from lfu.evaluation.record import describe_model, plain
from lfu.evaluation.weight_drift import keep_weights, weight_drift
from lfu.model.loading import is_adapter, training_tokenizer
from lfu.study import keys
from lfu.study.folder import MODEL, PARTS, TRAINER, Place
from lfu.study.measure import parts_of
from lfu.study.plan import UNTOUCHED, Plan, Run, Task
from lfu.study.settings import Setting
from lfu.study.study import Study
from lfu.study.train import Diverged, load_start, load_tuned, train
from lfu.support.errors import UserError, one_line
from lfu.support.files import write_bytes
from lfu.support.quiet import quiet_libraries
from lfu.support.words import counted

WAIT = 2.0  # seconds between two looks at runs that others work on
FORMAT = 1


class Died(Exception):
    """A process ended without a word."""


def work(study: Study) -> None:
    """Does what is to do until nothing is left. A run that fails is kept as failed, and the others go on."""
    keys.note(study.folder, study.environment)
    with quiet_libraries(), _imports_out_of_the_way():
        while True:
            plan = study.plan()
            todo = study.open_tasks(plan)
            if not todo:
                return
            study.live.tasks(todo)
            ahead = partial(_ahead, study, plan, todo)
            if any(_try(study, task, ahead) for task in todo):
                _drop_losers(study)
            else:
                time.sleep(WAIT)  # all of them are held by others


def _try(study: Study, task: Task, ahead: Callable[[], str]) -> bool:
    """Does the task if no other process has it. False: another one does."""
    place = study.shelf(task.run)
    with place.held() as ours:
        if not ours:
            return False
        if study.finished(task) or place.failed:
            return True  # another process has just done it
        if (place.marked() or {}).get("session") == study.session:
            place.fail(Died("the process that worked on it died, perhaps of too little memory"), "", "")
            place.unmark()
            study.say(f"{_name(task.run)}: failed: its process died")
            return True
        place.mark()
        try:
            _perform(study, task, place, ahead)
        finally:
            place.unmark()
    return True


def _perform(study: Study, task: Task, place: Place, ahead: Callable[[], str]) -> None:
    run, phase, start = task.run, "setting up", time.monotonic()
    try:
        config = study.configs(run)[0].to_dict()
        place.begin(run.described | {
            "command": study.words(run), "everywhere": study.everywhere,
            "config": {name: value for name, value in config.items() if name not in keys.NO_MATTER},
        })  # fmt: skip
        if run.setting is not None and not (place.trained and place.model.is_dir()):
            phase = "training"
            _train(study, run, run.setting, place)
        trained = time.monotonic()
        if task.level != "timing":
            phase = "measuring"
            _measure(study, task, place)
        training, measuring = trained - start, time.monotonic() - trained
        done = [f"trained in {training:.0f} s"] if run.setting and training > 0.5 else []
        done += [f"measured in {measuring:.0f} s"] if task.level != "timing" else []
        study.say(f"{_name(run)}: {', '.join(done) or 'done'}; {ahead()}")
    except Exception as error:  # whatever it is, the other runs go on; KeyboardInterrupt is no Exception
        if isinstance(error, OSError) and not isinstance(error, UserError) and error.errno == 28:
            raise  # no space left: nothing can go on
        place.fail(error, phase, traceback.format_exc(), diverged=isinstance(error, Diverged))
        failure = place.failure
        study.say(f"{_name(run)}: failed in {phase}: {failure['error'] if failure else one_line(error)}")
    finally:
        study.live.clock.ends()
        gc.collect()  # modules refer to each other in circles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _train(study: Study, run: Run, setting: Setting, place: Place) -> None:
    config, model_arguments = study.parsed(run, place.path / TRAINER)
    study.live.stage(run, "training", run.steps)
    rows = study.shaped["train"].select(range(study.limit(setting)))
    result = train(
        config, model_arguments, rows, study.shaped["validation"], log=place.log, out=place.model,
        forgetting=study.watch_forgetting, live=study.live,
    )  # fmt: skip
    if place.trained:  # its weights were dropped: the time that equal time goes by stays that of the first training
        result["cost"] = place.trained["cost"]
    if study.draw:
        write_bytes(place.path / "curve.png", study.draw(f"{run.label}, seed {run.seed}", result["curve"]))
    place.keep("trained", result)
    place.drop(TRAINER)  # checkpoints: the trained model is there


def _measure(study: Study, task: Task, place: Place) -> None:
    """The parts that aren't measured yet; the record, if all are wanted."""
    run, parts = task.run, parts_of(study.exam)
    chooses = bool(study.exam.measures) or study.design.bisection is not None or place.part("validation") is not None
    wanted = PARTS.get(task.level) or [name for name in parts if name != "validation" or chooses]
    missing = [name for name in wanted if place.part(name) is None]
    start = time.monotonic()
    model = cache(partial(_loaded, study, run, place))
    study.live.stage(run, "measuring", sum(parts[name].items for name in missing))
    for name in missing:
        result = plain(parts[name].measure(*model(), progress=study.live.advance))
        try:
            json.dumps(result, allow_nan=False)
        except ValueError as error:
            raise Diverged(f"a score is no finite number ({name}): the trained model is broken") from error
        place.keep(f"part-{name}", {"result": result})
    if task.level != "full":
        return
    if place.part("about") is None:
        place.keep("part-about", {"result": _about(study, run, model()[0])})
    about, trained = place.part("about"), {k: v for k, v in (place.trained or {}).items() if k != "key"}
    record = run.described | {
        "format": FORMAT, "method": run.setting.method if run.setting else "", "model": about["model"],
        "measures": {name: place.part(name) for name in wanted} | {"distance": about["distance"]}, **trained,
        "cost": trained.get("cost", {}) | {"measure_seconds": time.monotonic() - start},
    }  # fmt: skip
    place.finish(record, keep_model=study.keep_models)


def _loaded(study: Study, run: Run, place: Place) -> tuple[Any, Any]:
    """The run's model, where it computes, and its tokenizer."""
    config, arguments = study.configs(run)
    model, tokenizer = load_tuned(arguments, config, place.model) if run.setting else load_start(arguments, config)
    if not run.setting:  # asked as the trained models are: with --chat_template_path and --eos_token
        tokenizer = training_tokenizer(arguments, config)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # new tokens, as a template may bring them
            set_seed(config.seed)
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if keys.device() == "cuda" and model.device.type == "cpu":  # quantised weights are there already
        model.to("cuda")
    return model, tokenizer


def _about(study: Study, run: Run, model: Any) -> dict[str, Any]:
    """The model's description, and how far it is from the untouched one, as a share of its norm."""
    _, arguments = study.configs(UNTOUCHED)
    name, quantised = str(arguments.model_name_or_path), arguments.load_in_4bit or arguments.load_in_8bit
    found = {"model": describe_model(name, model), "distance": None}
    if run.setting is None or "distance" not in study.exam.measures or quantised:
        return found
    plain = getattr(getattr(model, "active_peft_config", None), "peft_type", None) == PeftType.LORA
    in_model = plain and not is_adapter(name)  # the untouched weights are those without the adapter
    drift = weight_drift(None if in_model else _start_weights(study), model)
    return found | {"distance": drift.overall.relative}


def _start_weights(study: Study) -> Path:
    """The untouched model's weights as they act, written once."""
    path = study.folder / "runs" / f"start-{study.everywhere['model'][:8]}.safetensors"
    with FileLock(study.folder / "runs" / "start.lock"):
        if not path.is_file():
            config, arguments = study.configs(UNTOUCHED)
            unfinished = path.with_suffix(".partial")
            keep_weights(load_start(arguments, config)[0], unfinished)
            unfinished.replace(path)
    return path


def _drop_losers(study: Study) -> None:
    """Weights of trials whose learning rate was not chosen."""
    if study.keep_models:
        return
    plan = study.plan()
    needed = {task.run for task in plan.tasks if task.level == "full"}
    for task in plan.tasks:
        decided = task.run.setting in plan.rates if task.level == "search" else task.level == "rung" and plan.runs
        place = study.shelf(task.run)
        if decided and task.run not in needed and place.model.is_dir() and not place.marked():
            place.drop(MODEL)


def tidy(study: Study) -> None:
    """After the last run: what only an unfinished study needs."""
    if study.keep_models or study.todo():
        return
    for task in study.plan().tasks:
        if not study.shelf(task.run).any_failure:  # one that failed in measuring is measured again, not trained
            study.shelf(task.run).drop(MODEL)
    for file in (study.folder / "runs").glob("start-*.safetensors"):
        file.unlink(missing_ok=True)


@contextmanager
def _imports_out_of_the_way() -> Iterator[None]:
    """Collecting garbage looks at all the libraries' own objects each time; not so inside."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _name(run: Run) -> str:
    if run.setting is None:
        return "untouched model"
    steps = counted(run.steps, "step")
    return f"{run.label}, seed {run.seed}, learning rate {run.learning_rate}, {steps}"


def _ahead(study: Study, plan: Plan, todo: Sequence[Task]) -> str:
    """How much follows the first of `todo`."""
    if len(todo) < 2:
        return "the last one" if plan.whole else "more may follow"
    left = study.live.clock.left()
    return f"{len(todo) - 1}{'' if plan.whole else ' or more'} to go{f', {left}' if left else ''}"
