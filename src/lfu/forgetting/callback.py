"""`ForgettingCallback`: what a run forgets, seen while it happens, in any trainer of transformers."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lfu.forgetting import show
from lfu.forgetting.budget import parsed
from lfu.forgetting.items import ItemSet, item_sets
from lfu.forgetting.keep import FILE, Memory, Reading
from lfu.forgetting.measuring import Measuring
from lfu.forgetting.schedule import Schedule, check_best, metric_of, would_be_best
from lfu.forgetting.share import tokens_per_step
from lfu.forgetting.trainer import log, resumed_from
from lfu.forgetting.unnoticed import has_untouched_base
from lfu.support.errors import UserError

NONE_FITS = "no checkpoint was within the budget: the last weights are kept"


class ForgettingCallback(TrainerCallback):
    """Measures what a model forgets while `Trainer`, a trainer of TRL's, or a subclass of them trains it.

    It asks the untouched model before the first step, and the model in training at every evaluation (without
    evaluations: ten times a run): 307 built-in multiple-choice questions, 40 passages of plain prose, text that the
    untouched model wrote itself, and files of your own. The figures go to every tracker as `forgetting/*` and into
    `state.log_history`. Each reading is one line on the terminal. The page comes at the end, in
    `<output_dir>/forgetting`.

    The untouched model is the one with the adapter switched off. When all weights are trained, its answers are kept,
    not a copy of it. The run itself is not changed in a single bit.

    Args:
        budget: how much may be forgotten. 0.02 means 2 % of the known questions (net), and 0.02 nats per token on
            prose. Or a mapping, `{"prose": 0.05}`, whose keys may be the stems of `files`, too.
        stop: end the run once the budget is spent beyond the noise (a sequential test).
        keep_best: leave the checkpoint with the best evaluation metric among those within the budget. Needs
            `load_best_model_at_end=True`.
        every: measure every so many steps, instead of at evaluations (with `keep_best`: at both).
        share_of_time: the most of the run's time that measuring may take. It is kept by asking fewer items, and in
            short runs by fewer readings. None: no limit.
        files: `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt` files. Rows have `question`, `choices` and `answer`,
            or a `text`.
        tokenizer: default: the trainer's.
        batch_size: items per forward pass.
        seed: of the order of the items and of the text that is written.
        page: write the record and the page at the end.
        say: is given each line for the user. Default: standard error.

    Raises:
        ValueError: an argument out of its range, or a file that can't be used. When training starts: a trainer without
            a tokenizer, or one that `keep_best` can't work with.
        UserError: a run of all weights is resumed, and the untouched model's answers are nowhere.
    """

    def __init__(
        self,
        budget: float | str | Mapping[str, float] | None = None,
        *,
        stop: bool = False,
        keep_best: bool = False,
        every: int | None = None,
        share_of_time: float | None = 0.05,
        files: Sequence[str | Path] | str | Path = (),
        tokenizer: Any = None,
        batch_size: int = 8,
        seed: int = 0,
        page: bool = True,
        say: Callable[[str], None] = show.say,
    ):
        self.sets: list[ItemSet] = item_sets([files] if isinstance(files, str | Path) else files, seed)
        self.budget = parsed(budget, [each.name for each in self.sets])
        if (stop or keep_best) and not self.budget:
            raise ValueError(f"{'stop' if stop else 'keep_best'}=True needs a budget, such as budget=0.02")
        if share_of_time is not None and not 0 < share_of_time <= 1:
            raise ValueError(f"share_of_time must be above 0 and at most 1, or None, got {share_of_time!r}")
        for name, value in (("every", every), ("batch_size", batch_size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
        self.stop, self.keep_best, self.share_of_time = stop, keep_best, share_of_time
        self.tokenizer, self.batch_size, self.seed, self.page, self._say = tokenizer, batch_size, seed, page, say
        self.schedule = Schedule(every, keep_best)
        self.measuring: Measuring | None = None
        self._skipped = False  # whether a checkpoint that might have been the best was not measured

    @property
    def memory(self) -> Memory | None:
        """What was measured so far; None before training."""
        return self.measuring.memory if self.measuring else None

    # -- what the trainer calls ----------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None,
        train_dataloader: Any = None, **more: Any,
    ) -> None:  # fmt: skip
        """Measures the untouched model, or takes up what an interrupted run knew."""
        if self.keep_best:
            check_best(args)
        tokenizer = self._tokenizer(processing_class)
        self._speaks = state.is_world_process_zero
        how = self.share_of_time, self.batch_size, self.seed
        self.measuring = measuring = Measuring(model, tokenizer, self.sets, self.budget, *how)
        if state.global_step:
            if measuring.recall(resumed_from(state, args), state.global_step):
                return
            if not has_untouched_base(model):
                raise UserError(
                    f"resuming at step {state.global_step}, and neither the checkpoint nor {_folder(args)} has a "
                    f"{FILE} with the untouched model's answers to these items: resume a run that had the callback "
                    "with the same files and seed, or leave the callback out"
                )
        first = measuring.begin(tokens_per_step(args, train_dataloader), state.global_step, state.max_steps)
        if state.global_step == 0:
            self._keep(first, args, state, control)
        cut = f" (of {measuring.longest} tokens, as the run is short)" if measuring.share.short else ""
        self.say(
            f"the untouched model knows {first['known']} of {first['items']} questions; prose "
            f"{first['prose_loss']:.3f} nats per token{cut}"
        )
        self._measure(args, state, control, needed=True)  # nothing at step 0: only a resumed run is no longer untouched

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """Measures where the number of steps says so."""
        if self.measuring and state.global_step % self.schedule.interval(args, state) == 0:
            self._measure(args, state, control)
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> Any:
        """Measures beside an evaluation. With `keep_best` only what is measured and in budget can become the best."""
        if not self.measuring or not self.schedule.at_evaluations(args):
            return control
        candidate = self.keep_best and would_be_best(args, state, metrics)
        reading = self._measure(args, state, control, useful=candidate or not self.keep_best)
        if candidate and state.global_step and (reading is None or reading.over):
            # logged already: only the choice of the best model reads it now
            metrics[metric_of(args)] = -math.inf if args.greater_is_better else math.inf
            if reading is None and not self._skipped:
                self._skipped = True
                self.say(
                    f"step {state.global_step} is not measured, to keep to share_of_time={self.share_of_time:.3g}; "
                    "only a checkpoint that was measured can be kept as the best"
                )
        return control

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Puts what is known beside the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.measuring and self._speaks and folder.is_dir():
            self.measuring.save(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The last reading, of the weights that are left, and the page."""
        if not self.measuring:
            return
        best = state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else None
        if self.keep_best:
            self.say(NONE_FITS if best is None else f"step {best} is kept, the best within the budget")
        if kept := self._measure(args, state, control, needed=True, step=best):
            if kept.over and (kept.shown or self.keep_best):
                self.say(
                    "the model that is left has forgotten more than the budget allows. A third of this learning rate "
                    f"({args.learning_rate / 3:.1g}) forgets less, and with few rows it may learn no less"
                )
            self._report(args, state, kept)

    def finished(self, trainer: Any) -> None:
        """Measures once more, for who has changed the weights after the last step (a moving average, for one)."""
        if self.measuring and self.measuring.memory.readings:
            args, state, memory = trainer.args, trainer.state, self.measuring.memory
            memory.readings = [r for r in memory.readings if r.step != state.global_step]
            if kept := self._measure(args, state, trainer.control, needed=True):
                self._report(args, state, kept)

    # -- the parts -----------------------------------------------------------------------------------------------------

    def say(self, line: str) -> None:
        """Tells the user a line, in one process."""
        if self._speaks:
            self._say(line)

    def _measure(
        self, args: Any, state: Any, control: Any, *, needed: bool = False, useful: bool = True, step: int | None = None
    ) -> Reading | None:
        """The reading of this step (or of the weights of `step`, if they are back): the one there is, or a new one.

        None where there is no time for it. `needed`: in any case; not `useful`: only if there is plenty.
        """
        measuring, step = self.measuring, state.global_step if step is None else step
        if measuring is None or step == 0:
            return None
        if there := [reading for reading in measuring.memory.readings if reading.step == step]:
            return there[0]
        left, fewest = self.schedule.still_to_come(args, state), 2 if self.keep_best else 1
        if not measuring.due(state.global_step, state.max_steps, left, fewest, useful) and not needed:
            return None
        reading = measuring.read(step, state.epoch or 0.0)
        self._keep(reading.figures | {"seconds": measuring.share.spent}, args, state, control)
        self.say(show.line(reading, self.budget))
        if self.stop and reading.shown:
            control.should_training_stop = True
            self.say(f"stopping at step {step}: the budget is spent")
        return reading

    def _tokenizer(self, processing_class: Any) -> Any:
        """A copy of the tokenizer, so that the trainer's stays as it is."""
        found = self.tokenizer or processing_class
        found = getattr(found, "tokenizer", found)
        if found is None:
            raise ValueError("the trainer has no processing_class: give ForgettingCallback(tokenizer=...)")
        return copy.deepcopy(found)

    def _keep(self, figures: Mapping[str, float], args: Any, state: Any, control: Any) -> None:
        """Saves what is known, and logs the newest figures."""
        if self.measuring and self._speaks:
            self.measuring.save(_folder(args))
        log(self, {f"forgetting/{name}": value for name, value in figures.items()}, args, state, control)

    def _report(self, args: Any, state: Any, kept: Reading) -> None:
        """What measuring took, and the page."""
        assert self.measuring is not None
        begun, where = time.monotonic(), ""
        whole = all(map(math.isfinite, kept.figures.values()))
        if not whole:
            self.say(f"the model of step {kept.step} is broken: its losses are no numbers, so there is no page")
        made = show.record(self.measuring, kept, state.global_step) if self.page and whole else {}
        if made and self._speaks:
            where = show.write(made, _folder(args))
        self.measuring.share.measured(time.monotonic() - begun)
        self.say(self.measuring.share.told())
        if where:
            self.say(where)


def _folder(args: Any) -> Path:
    return Path(args.output_dir) / "forgetting"
