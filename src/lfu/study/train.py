"""One training of a study: as `lfu train` does it, watched step by step, going on from a checkpoint if it has one."""

import ctypes
import json
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import get_peft_config, get_quantization_config

from lfu import LfUTrainer
from lfu.evaluation.record import machine
from lfu.forgetting.callback import ForgettingCallback
from lfu.methods import check_adapter, methods_of
from lfu.model.loading import adapter_base, is_adapter, load_model, load_tokenizer
from lfu.study.live import Board
from lfu.support.files import new_folder, write_text
from lfu.training.advice import advice_heard
from lfu.training.checkpoints import newest

# Of what the trainer logs: what a resumed run logs alike. Methods' own figures have a slash in their names.
LOGGED = ("step", "loss", "grad_norm", "learning_rate", "seconds")


class Diverged(Exception):
    """Training or scores came to numbers that are not finite."""


def train(
    config: Any, model_arguments: Any, rows: Any, eval_rows: Any, *, log: Path, out: Path, forgetting: float = 0.0,
    live: Board,
) -> dict[str, Any]:  # fmt: skip
    """Trains and saves the model in `out`, which is whole or not there.

    Args:
        config: its output_dir holds the checkpoints, if `save_strategy` asks for some.
        log: the file for one JSON line per step, for who looks on; a resumed run's begins with those of its checkpoint.
        forgetting: the share of the time in which to measure what is forgotten on the way; 0: not at all.

    Returns:
        What happened, JSON-ready: `cost` holds all that depends on the machine.

    Raises:
        Diverged: the loss came to no finite number. Other errors are those of model, methods and trainer.
    """
    start, memory = time.monotonic(), PeakMemory()
    watch = Watch(log, live)
    readings = _forgetting(forgetting, config)
    loaded = load_start(model_arguments, config)
    after_loading = time.monotonic()
    with advice_heard() as advice:
        trainer = make_trainer(config, model_arguments, rows, eval_rows, loaded, callbacks=[watch, *readings])
        trainer.remove_callback(PrinterCallback)  # it would print every step
        trainer.train_on(newest(Path(config.output_dir)))
    trained = time.monotonic()
    entries = logged(trainer.state.log_history)
    if not entries or any(entry["loss"] is None for entry in entries):
        raise Diverged("the training loss came to no finite number: a lower learning rate or alpha may help")
    with new_folder(out) as work:
        trainer.save_model(str(work))  # the tokenizer too
    seconds = [entry.pop("seconds") for entry in entries]
    cycle = trainer.step.cheaper.cycle(config.gradient_accumulation_steps) if trainer.step else 1
    return {
        "steps": entries[-1]["step"],
        "rows": len(trainer.train_dataset),
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "notes": list(trainer.notes),
        "advice": advice,
        "curve": entries,
        "forgetting": [{"step": r.step, **r.figures} for each in readings if each.memory for r in each.memory.readings],
        "cost": {
            "step_seconds": step_time(seconds, cycle),
            "unsteady": unsteadiness(seconds, cycle),
            "train_seconds": sum(seconds),
            "prepare_seconds": trained - after_loading - watch.spent,
            "load_seconds": after_loading - start,
            "peak_memory": memory.peak(),
            "memory_of": memory.what,
            # how many threads add up decides the rounding
            "machine": f"{machine()}, {torch.get_num_threads()} threads",
        },
    }


def make_trainer(
    config: Any, arguments: Any, rows: Any, eval_rows: Any = None, loaded: tuple[Any, Any] | None = None, **more: Any
) -> LfUTrainer:
    """The trainer that the flags of `lfu train` ask for, with `more` arguments of `SFTTrainer`.

    `loaded`: model and tokenizer, if they are there already. An adapter that is given as the model is trained further.
    """
    model, tokenizer = loaded or load_start(arguments, config)
    adapted = arguments.use_peft and not isinstance(model, PeftModel)  # by a fresh adapter
    for name in (arguments.lora_modules_to_save or ()) if adapted else ():
        if not any(module.endswith(name) for module, _ in model.named_modules()):  # PEFT would leave it out in silence
            raise ValueError(f"lora_modules_to_save {name}: the model has no module of that name")
    set_seed(config.seed)  # before PEFT draws the adapter, which TRL before 1.15 does not do
    return LfUTrainer(
        model, config, train_dataset=rows, eval_dataset=eval_rows, processing_class=tokenizer,
        peft_config=None if isinstance(model, PeftModel) else get_peft_config(arguments),
        tell=lambda line: None,  # whoever read the rows has said it
        **more,
    )  # fmt: skip


def check_methods(config: Any, arguments: Any) -> None:
    """Raises ValueError for a method that can't work with the adapter of the flags; no model is loaded."""
    name = str(arguments.model_name_or_path)
    further = is_adapter(name)
    adapter = PeftConfig.from_pretrained(Path(name).expanduser()) if further else get_peft_config(arguments)
    check_adapter(methods_of(config.method, config.method_args), adapter, further=further)


def _forgetting(share: float, config: Any) -> list[ForgettingCallback]:
    """What measures forgetting on the way, if `share` asks for it: three times in a short run, else eight times."""
    every = max(1, round(config.max_steps / (3 if config.max_steps < 40 else 8)))
    measuring = lambda: ForgettingCallback(every=every, share_of_time=share, page=False, say=lambda line: None)
    return [measuring()] if share else []


def step_time(seconds: list[float], cycle: int = 1) -> float:
    """Mean over the middle half of the cycles: steps may differ (`every=4`), cycles should not but for disturbances.

    The first step, which also warms up, is left out where there are others. Of a run shorter than a `cycle`, the steps
    after which a method's cost repeats, all steps count.
    """
    means = sorted(_cycle_means(seconds, cycle))
    cut = max(1, len(means) // 4) if len(means) > 2 else 0
    return fmean(means[cut : len(means) - cut])


def unsteadiness(seconds: list[float], cycle: int = 1) -> float:
    """How much the cycles' times differ: distance of their quartiles over their median."""
    means = _cycle_means(seconds, cycle)
    if len(means) < 4:
        return 0.0
    low, middle, high = quantiles(means, n=4)
    return (high - low) / middle


def _cycle_means(seconds: list[float], cycle: int) -> list[float]:
    rest = seconds[1:] or seconds
    return [fmean(rest[i : i + cycle]) for i in range(0, len(rest) - cycle + 1, cycle)] or [fmean(rest)]


def load_start(arguments: Any, config: Any, name: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) that `lfu train` starts from, or of another `name`, loaded alike. Errors as `load_model`."""
    given = str(arguments.model_name_or_path)
    return load_model(
        name or given, dtype=str(arguments.dtype), trust_remote_code=config.trust_remote_code, trainable=True,
        revision=arguments.model_revision if name in (None, given) else None,
        attn_implementation=arguments.attn_implementation, quantization_config=get_quantization_config(arguments),
    )  # fmt: skip


def load_tuned(arguments: Any, config: Any, folder: Path) -> tuple[Any, Any]:
    """The model that a run saved in `folder`: always from disk, so that it is the same for an interrupted study."""
    if not is_adapter(folder):
        return load_start(arguments, config, str(folder))
    name = str(arguments.model_name_or_path)
    model, _ = load_start(arguments, config, adapter_base(name) if is_adapter(name) else name)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=config.trust_remote_code)
    return PeftModel.from_pretrained(model, str(folder)), tokenizer


def logged(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The steps of a trainer's `log_history` that `Watch` has seen; what is no finite number is None."""
    broken = lambda value: isinstance(value, float) and not math.isfinite(value)
    kept = lambda name: name in LOGGED or "/" in name
    steps = (entry for entry in history if "seconds" in entry)
    return [{name: None if broken(value) else value for name, value in one.items() if kept(name)} for one in steps]


class Watch(TrainerCallback):
    """Tells `live` of each step, and adds the seconds that it took to what the trainer logs, which goes to a file, too.

    The trainer's log is part of its checkpoints: a resumed run has the lines of the steps before, and no others.
    """

    def __init__(self, path: Path, live: Board):
        self.path, self.live = path, live
        self.spent = self._last = self._step = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """What is known of the steps before."""
        write_text(self.path, "".join(map(_line, logged(state.log_history))))

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The clock starts: what other callbacks did since the step before doesn't count."""
        self._last = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The step's time is over."""
        self._step = _now() - self._last
        self.spent += self._step
        self.live.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """A step was logged; or what is forgotten, or the summary at the end, which have no loss."""
        self.live.logged(logs)
        if "loss" in logs:
            state.log_history[-1]["seconds"] = self._step
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(map(_line, logged(state.log_history[-1:])))


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class PeakMemory:
    """The most memory in use since it was made, in bytes: of the allocator on a GPU, else of the whole process."""

    def __init__(self) -> None:
        self._gpu = torch.cuda.is_available()
        self.what = "GPU, allocated" if self._gpu else "process, resident"
        if self._gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError, AttributeError):  # gives freed memory back to the system; glibc alone can
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
        except OSError:
            self.what = ""  # it can't be told for one run

    def peak(self) -> int | None:
        """Bytes; None where it can't be told."""
        if self._gpu:
            return torch.cuda.max_memory_allocated()
        if not self.what:
            return None
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
