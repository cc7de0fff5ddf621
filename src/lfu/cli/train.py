"""`lfu train`: from flags and recipes to a fine-tuned model in a folder. What is cheap to check is checked first."""

import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

import lfu
from lfu import ForgettingCallback, LfUConfig, LfUTrainer
from lfu.cli import careful, output
from lfu.cli.arguments import DataArguments, ModelArguments, parse, refuse_unused
from lfu.cli.forgetting import ForgettingArguments, curve
from lfu.cli.screen import Screen, facts, folded, summary
from lfu.cli.stop import Stop
from lfu.cli.training_rows import load_data
from lfu.data.show import shown
from lfu.methods import methods_of
from lfu.model.loading import is_adapter
from lfu.step.record import BadBatch
from lfu.study.train import check_methods, load_start, make_trainer
from lfu.support.errors import UserError, leading, one_line, value_errors_are_the_users
from lfu.support.files import remove_folder, restore
from lfu.support.words import filled, tell
from lfu.training import checkpoints
from lfu.training.resuming import newest_checkpoint, run_of

MODEL_FILES = re.compile(r"(adapter_)?model.*\.(safetensors|bin)(\.index\.json)?|adapter_config\.json|config\.json")


def run(argv: list[str]) -> int:
    """Trains, saves, and prints a summary."""
    config, model, data, watch = parse(argv, ForgettingArguments)
    refuse_unused(model, data)
    raw = None
    if careful.wanted(data):
        raw = data.rows()
        chosen = careful.choices(len(raw), data.given, held_out=data.holds_out())
        config, model, data, watch = parse([*chosen, *argv], ForgettingArguments)
        _say(careful.told(len(raw), chosen))
    callback = watch.callback(_say if data.verbose else _say_what_the_screen_does_not, config, data.given)
    folder = Path(config.output_dir)
    resume_from = _check_output(config, folder, data.overwrite_output_dir)
    with folded(data.verbose, _say):
        rows, eval_rows = load_data(config, model, data, raw, _say)
        with output.no_empty_leftovers(folder, always=data.dry_run):
            trainer = _trainer(config, model, rows, eval_rows)
            if raw is None and (note := careful.untold(data)):
                _say(note)
            if callback:
                trainer.add_callback(callback)
            return _run(trainer, data, folder, resume_from, callback)


def _run(
    trainer: Any, data: DataArguments, folder: Path, resume_from: str | None, callback: ForgettingCallback | None
) -> int:
    """Shows what is about to be done, does it, and shows what was done."""
    done_before = checkpoints.state_of(resume_from)["global_step"] if resume_from else 0  # it may be gone by the end
    about = facts(trainer, str(data.data))
    if leading():
        print(*(filled(text, f"{name:<9}", " " * 9) for name, text in about.items()), sep="\n", flush=True)
        rows = data.show_rows or 2 * data.dry_run
        for line in shown(trainer, rows, colour=sys.stdout.isatty() and not os.getenv("NO_COLOR")):
            print(line)
    if data.dry_run:
        _say("a dry run: nothing was trained or written")
        return 0
    if not data.verbose:
        Screen(trainer, folder, often="logging_steps" not in data.given)
    if data.overwrite_output_dir and trainer.is_world_process_zero():
        for entry in _earlier_run(folder):
            (remove_folder if entry.is_dir() else os.remove)(entry)
    start = time.monotonic()
    _train(trainer, folder, resume_from, callback)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        if callback:
            curve(callback)
        print(summary(trainer, folder, time.monotonic() - start, done_before))
    return 0


def _train(trainer: Any, folder: Path, resume_from: str | None, callback: ForgettingCallback | None) -> None:
    """Trains and saves. Raises KeyboardInterrupt, with the way to resume as its message, after Ctrl-C."""
    complete = resume_from is not None and checkpoints.is_complete(resume_from, trainer.args)
    if complete and trainer.is_deepspeed_enabled:
        raise UserError(
            f"the run in {folder} is complete, and DeepSpeed has a model only to train it: to save it, give the same "
            f"command without a launcher, or take the weights in {resume_from}"
        )
    try:
        with Stop(trainer, _say), _one_line(folder, trainer):
            trainer.train_on(resume_from)
            if callback and trainer.finishes and not complete and not trainer.interrupted:
                callback.finished(trainer)
            if not trainer.interrupted:
                trainer.save_model(str(folder))  # the tokenizer too
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_how_to_resume(folder, trainer)) from error
    if trainer.interrupted:
        raise KeyboardInterrupt(_how_to_resume(folder, trainer))


def _check_output(config: LfUConfig, folder: Path, overwrite: bool) -> str | None:
    """The checkpoint to resume from, or None. Raises UserError if the output folder can't or should not be used."""
    output.check_writable(folder)
    restore(folder)  # a checkpoint that a killed run was replacing
    checkpoint = _checkpoint(config)
    if checkpoint and overwrite:
        raise UserError("--resume_from_checkpoint continues a run, --overwrite_output_dir deletes it: give one of them")
    if checkpoint:
        run_of(checkpoint, methods_of(config.method, config.method_args))  # another method is refused at once
    earlier = _earlier_run(folder)
    if earlier and not checkpoint and not overwrite:
        raise UserError(
            f"output folder {folder} holds an earlier run ({earlier[0].name}): choose another --output_dir, "
            "continue it with --resume_from_checkpoint true, or replace it with --overwrite_output_dir"
        )
    return checkpoint


def _earlier_run(folder: Path) -> list[Path]:
    """What an earlier run left: its model's files and its checkpoint folders."""
    files = [path for path in folder.glob("*") if path.is_file() and MODEL_FILES.fullmatch(path.name)]
    return sorted([*files, *checkpoints.checkpoints(folder)])


def _checkpoint(config: LfUConfig) -> str | None:
    wanted, bare = str(config.resume_from_checkpoint or ""), config.save_only_model
    if wanted.lower() in ("false", "no", "0", ""):
        return None
    if wanted.lower() in ("true", "yes", "1"):
        return newest_checkpoint(config, lambda line: _say(f"warning: {line}"))
    path = Path(wanted)
    if not path.is_dir():
        raise UserError(f"--resume_from_checkpoint {wanted}: not a checkpoint folder (no such folder)")
    if fault := checkpoints.fault(path, save_only_model=bare):
        other = checkpoints.newest(path.parent, save_only_model=bare)
        hint = f": go on from {other} instead" if other else ""
        raise UserError(f"--resume_from_checkpoint {wanted}: not a checkpoint folder to resume from, {fault}{hint}")
    return wanted


def _trainer(config: LfUConfig, model: ModelArguments, rows: Dataset, eval_rows: Dataset | None) -> LfUTrainer:
    name = str(model.model_name_or_path)
    go_on = is_adapter(name)
    if go_on and not model.use_peft:
        raise UserError(f"model {name} is an adapter: merge it first (lfu export {name} OUT_DIR) to train all weights")
    with value_errors_are_the_users():
        check_methods(config, model)
    loaded = load_start(model, config)
    if go_on:
        _say(f"training the adapter {name} further: it keeps its lora_ settings")
    try:
        return make_trainer(config, model, rows, eval_rows, loaded)
    except (ValueError, ImportError) as error:
        raise UserError(one_line(error)) from error


def _say(text: str) -> None:
    if leading():
        tell(f"lfu train: {text}")


def _say_what_the_screen_does_not(line: str) -> None:
    """What the forgetting callback says, except readings: the lines of the steps and the curve show those."""
    if not line.startswith("step ") or "over budget" in line:
        _say(line)


def _how_to_resume(folder: Path, trainer: Any) -> str:
    last, stopped = checkpoints.newest(folder), f"Stopped after step {trainer.state.global_step}"
    if last is None:
        return f"{stopped}; no checkpoint was saved yet (--save_steps 50 saves one every 50 steps)."
    return f"{stopped}; go on from {last} with the same command and --resume_from_checkpoint true"


@contextmanager
def _one_line(folder: Path, trainer: Any) -> Iterator[None]:
    """Turns a full disk or memory, a bad batch, or settings that a library refuses when it starts into one line."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, ArithmeticError, TypeError, KeyError) as error:
        if "DeepSpeed config values" in str(error):  # transformers compares launch file and flags when it starts
            raise UserError(f"the launch file and the flags disagree: {one_line(error)}") from error
        if not (what := _stopped_by(error, folder, trainer.state.global_step + 1)):
            # before there is a schedule, libraries make what settings ask for: --optim_args, --lr_scheduler_kwargs, ...
            if "metric_for_best_model" in str(error) or (trainer.lr_scheduler is None and _of_a_library(error)):
                text = error.args[0] if isinstance(error, KeyError) else error  # which would add quotes
                raise UserError(f"training can't go on with these flags: {one_line(text)}") from error
            raise
        raise UserError(f"{what}. {_how_to_resume(folder, trainer)}") from error


def _of_a_library(error: Exception) -> bool:
    """Whether code outside this package raised it."""
    return not traceback.extract_tb(error.__traceback__)[-1].filename.startswith(str(Path(lfu.__file__).parent))


def _stopped_by(error: Exception, folder: Path, step: int) -> str | None:
    if isinstance(error, OSError):
        where = error.filename or folder
        return f"{where} can't be written or read ({error.strerror or one_line(error)}): mend that"
    if isinstance(error, torch.OutOfMemoryError):
        notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        return (
            f"out of memory in step {step}.{notes} A smaller --per_device_train_batch_size with more "
            "--gradient_accumulation_steps, or a smaller --max_length, needs less"
        )
    if isinstance(error, BadBatch):
        return (
            f"step {step}, {error}, and --on_bad_batch is raise: look at its rows, lower --alpha or --learning_rate, "
            "or use --on_bad_batch skip"
        )
    return None
