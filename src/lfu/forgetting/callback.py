"""`ForgettingCallback`: what a run forgets, seen while it happens, in any trainer of transformers."""

from __future__ import annotations

import copy
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lfu.forgetting import show
from lfu.forgetting.budget import beyond_noise, evidence, parsed, spent
from lfu.forgetting.deal import Dealer
from lfu.forgetting.items import PROSE, WRITTEN, ItemSet, item_sets
from lfu.forgetting.keep import FILE, Memory, Reading
from lfu.forgetting.measure import Asker, compare
from lfu.forgetting.share import Share, tokens_per_step
from lfu.forgetting.trainer import log, resumed_from
from lfu.forgetting.unnoticed import has_untouched_base, unnoticed, unsloth, untouched
from lfu.forgetting.written import write

TEXTS = 24  # that the untouched model writes
PILOT = 8  # questions that say how fast the model reads


class ForgettingCallback(TrainerCallback):
    """Measures what a model forgets while `Trainer`, any trainer of TRL, or a subclass of them trains it.

    It asks the untouched model before the first step, and the model in training at every evaluation (without
    evaluation: ten times a run): 307 built-in multiple-choice questions, 40 passages of plain prose, text that the
    untouched model wrote itself, and files of your own. The figures go to every tracker as `forgetting/*` and into
    `state.log_history`; each reading is one line on the terminal; the page comes at the end, in
    `<output_dir>/forgetting`.

    The untouched model is the one with the adapter switched off; with all weights in training its answers are kept,
    not a copy of it. The run itself is not changed in a single bit.

    Args:
        budget: how much may be forgotten: 0.02 is 2 % of the known questions (net) and 0.02 nats on prose. Or a
            mapping, `{"prose": 0.05}`, whose keys may be the stems of `files`, too. See `lfu.forgetting.budget`.
        stop: end the run once the budget is spent beyond the noise (a sequential test).
        keep_best: leave the checkpoint with the best evaluation metric among those within the budget. Needs
            `load_best_model_at_end=True`.
        every: measure every so many steps, and not at evaluations (`keep_best`: there, too).
        share_of_time: most of the run's time that measuring may take; kept by asking fewer items. None: no limit.
        files: `.jsonl`, `.json` or `.txt` files; rows with `question`, `choices` and `answer`, or with `text`.
        tokenizer: default: the trainer's.
        batch_size: items per forward pass.
        seed: of the order of items and of the text that is written.
        page: write the record and the page at the end.
        say: takes each line to tell the user. Default: standard error.

    Raises:
        ValueError: an argument out of its range, or a file that can't be used; when training starts: a trainer without
            tokenizer, or one that `keep_best` can't work with.
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
        self.stop, self.keep_best, self.every, self.share_of_time = stop, keep_best, every, share_of_time
        self.tokenizer, self.batch_size, self.seed, self.page, self.say = tokenizer, batch_size, seed, page, say
        self.memory: Memory | None = None

    # -- what the trainer calls ----------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None,
        train_dataloader: Any = None, **more: Any,
    ) -> None:  # fmt: skip
        """Measures the untouched model, or takes up what an interrupted run knew."""
        self._check(args)
        self.model, self._first_step = model, state.global_step
        self.dealer = Dealer(model)
        sharded = self.dealer.size > 1
        self.asker = Asker(
            self._tokenizer(processing_class), self.sets, self.batch_size, not (unsloth() or sharded), self.dealer
        )
        sizes = {each.name: len(each.items) for each in self.sets} | {WRITTEN: TEXTS}
        self.share = Share(self.share_of_time, sizes)
        self.share.begin()
        self.memory = self._remembered(args, state) if state.global_step else None
        if self.memory is not None:
            self.share.part, self.share.spent, self.share.each = (
                self.memory.part, self.memory.spent, self.memory.each
            )  # fmt: skip
            return
        self._ask_untouched(args, state, train_dataloader)
        first = compare(self._memory.before, self._memory.before, self.sets)
        log(self, {f"forgetting/{name}": value for name, value in first.items()}, args, state, control)
        if state.is_world_process_zero:
            self.say(
                f"the untouched model knows {first['known']:.0f} of {first['items']:.0f} questions; prose "
                f"{first['prose_loss']:.3f} nats per token"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """Measures where the number of steps says so."""
        if self.memory is None or state.global_step % self._interval(args, state):
            return control
        return self._measure(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> Any:
        """Measures beside an evaluation; with `keep_best` one over the budget can't become the best."""
        if self.memory is None or not self._at_evaluations(args):
            return control
        control = self._measure(args, state, control, needed=self.keep_best)
        newest = self._memory.readings[-1] if self._memory.readings else None
        if self.keep_best and newest is not None and newest.step == state.global_step and newest.over:
            name = args.metric_for_best_model
            name = name if name.startswith("eval_") else f"eval_{name}"
            if name in (metrics or {}):  # logged already: only the choice of the best model reads it now
                metrics[name] = -math.inf if args.greater_is_better else math.inf
        return control

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Puts what is known beside the checkpoint."""
        source, folder = self._folder(args) / FILE, Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.memory is not None and state.is_world_process_zero and folder.is_dir() and source.is_file():
            shutil.copyfile(source, folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The last reading, and the page."""
        if self.memory is None:
            return
        best = state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else None
        if best is None:
            self._measure(args, state, control, needed=True)
            if self.keep_best and state.is_world_process_zero:
                self.say("no checkpoint was within the budget: the last weights are kept")
        if self._memory.readings:
            kept = next((r for r in self._memory.readings if r.step == best), self._memory.readings[-1])
            self._report(args, state, kept)
        self.model = None

    # -- measuring -----------------------------------------------------------------------------------------------------

    @property
    def _memory(self) -> Memory:
        assert self.memory is not None
        return self.memory

    def _ask_untouched(self, args: Any, state: Any, train_dataloader: Any) -> None:
        start = time.monotonic()
        with unnoticed(self.model), untouched(self.model):
            pilot = {each.name: min(PILOT, len(each.items)) for each in self.sets}
            for _ in range(2):  # the first one warms up
                begun = time.monotonic()
                self.asker.ask(self.model, pilot, None)
                seconds = time.monotonic() - begun
            self.share.each = self.dealer.agreed(seconds) / sum(pilot.values())
            tokens = tokens_per_step(args, train_dataloader)
            # forward and backward of a training token take three times the forward of one that is asked
            per_token = self.share.each * sum(pilot.values()) / self._tokens_in(pilot)
            self.share.plan(
                self.dealer.agreed(3 * per_token * tokens) * state.max_steps, self._readings(args, state) + 2
            )
            counts = self.share.counts()
            prose = next(each for each in self.sets if each.name == PROSE)
            written = write(
                self.model, self.asker.tokenizer, prose.items[: counts[WRITTEN]], self.dealer,
                seed=self.seed, cached=not unsloth(),
            )  # fmt: skip
            before = self.asker.ask(self.model, counts, written)
        self.share.add(self.dealer.agreed(time.monotonic() - start))
        self.memory = Memory(self._asked(), before, written)
        self._remember(args, state)

    def _measure(self, args: Any, state: Any, control: Any, needed: bool = False) -> Any:
        """One reading, unless there is one of this step, or no time for it (`needed`: in any case)."""
        memory = self._memory
        if state.global_step == 0 or (memory.readings and memory.readings[-1].step == state.global_step):
            return control
        left = max(1.0, self._readings(args, state) * (1 - state.global_step / max(1, state.max_steps)) + 1)
        fits = self.share.afford(state.global_step - self._first_step, state.max_steps, left)
        fits, self.share.part = self.dealer.agreed((fits, self.share.part))
        if not (fits or needed):
            return control
        start = time.monotonic()
        counts = {name: min(count, self._known_of(name)) for name, count in self.share.counts().items()}
        with unnoticed(self.model):
            answers = self.asker.ask(self.model, counts, memory.written)
        seconds = self.dealer.agreed(time.monotonic() - start)
        self.share.add(seconds, sum(counts.values()), seconds)
        reading = Reading(state.global_step, state.epoch or 0.0, answers, compare(memory.before, answers, self.sets))
        self._hold_to_budget(reading)
        memory.readings.append(reading)
        self._remember(args, state)
        self._tell(reading, args, state, control)
        if self.stop and reading.shown:
            control.should_training_stop = True
            if state.is_world_process_zero:
                self.say(f"stopping at step {state.global_step}: the budget is spent")
        return control

    def _hold_to_budget(self, reading: Reading) -> None:
        number = len(self._memory.readings) + 1
        for each in self.sets:
            if each.name in self.budget:
                limit, before, after = self.budget[each.name], self._memory.before, reading.answers
                if spent(before, after, each) > limit:
                    reading.over.append(each.name)
                if beyond_noise(evidence(before, after, each, limit), number, len(self.budget)):
                    reading.shown.append(each.name)

    def _tell(self, reading: Reading, args: Any, state: Any, control: Any) -> None:
        figures = {f"forgetting/{name}": value for name, value in reading.figures.items()}
        log(self, figures | {"forgetting/seconds": self.share.spent}, args, state, control)
        if state.is_world_process_zero:
            self.say(show.line(reading, self.budget))

    # -- when and what -------------------------------------------------------------------------------------------------

    def _at_evaluations(self, args: Any) -> bool:
        return self.keep_best or (self.every is None and _strategy(args.eval_strategy) != "no")

    def _interval(self, args: Any, state: Any) -> float:
        """Steps between two readings that no evaluation brings; infinite where all come with one."""
        if self.every is not None:
            return self.every
        return math.inf if self._at_evaluations(args) else max(1, round(state.max_steps / 10))

    def _readings(self, args: Any, state: Any) -> float:
        """About how many readings the whole run will have."""
        if not self._at_evaluations(args) or self.every is not None:
            return state.max_steps / self._interval(args, state)
        if _strategy(args.eval_strategy) == "steps":
            return state.max_steps / max(1, state.eval_steps or args.eval_steps or 1)
        return max(1.0, float(args.num_train_epochs))

    def _known_of(self, name: str) -> int:
        before = self._memory.before
        if name == WRITTEN:
            return len(self._memory.written.ids)
        return len(before.chosen.get(name) or before.nll[name])

    def _tokens_in(self, counts: Mapping[str, int]) -> int:
        encode = self.asker.tokenizer
        texts = [
            f"{row['question']} {' '.join(row['choices'])}" if each.choice else row
            for each in self.sets
            for row in each.items[: counts[each.name]]
        ]
        return sum(len(encode(text, verbose=False)["input_ids"]) for text in texts)

    def _tokenizer(self, processing_class: Any) -> Any:
        """A copy of the tokenizer, so that the trainer's stays as it is."""
        found = self.tokenizer or processing_class
        found = getattr(found, "tokenizer", found)
        if found is None:
            raise ValueError("the trainer has no processing_class: give ForgettingCallback(tokenizer=...)")
        return copy.deepcopy(found)

    def _check(self, args: Any) -> None:
        if not self.keep_best:
            return
        if not args.load_best_model_at_end or not args.metric_for_best_model or _strategy(args.eval_strategy) == "no":
            raise ValueError(
                "keep_best=True works through Trainer's best model: set load_best_model_at_end=True, the same "
                'eval_strategy and save_strategy ("steps" or "epoch"), and metric_for_best_model (default: "loss")'
            )
        if "plateau" in _strategy(args.lr_scheduler_type):
            raise ValueError("keep_best=True changes what reduce_lr_on_plateau reads: choose another lr_scheduler_type")

    # -- memory and report ---------------------------------------------------------------------------------------------

    def _folder(self, args: Any) -> Path:
        return Path(args.output_dir) / "forgetting"

    def _asked(self) -> dict[str, Any]:
        return {"seed": self.seed, "sets": {each.name: len(each.items) for each in self.sets}}

    def _remember(self, args: Any, state: Any) -> None:
        self._memory.part, self._memory.spent, self._memory.each = self.share.part, self.share.spent, self.share.each
        if state.is_world_process_zero:
            self._memory.save(self._folder(args) / FILE)

    def _remembered(self, args: Any, state: Any) -> Memory | None:
        """What the interrupted run knew.

        Raises:
            ValueError: it knew nothing that fits, and the untouched model is gone.
        """
        for folder in resumed_from(state, args):
            found = self.dealer.agreed(Memory.load(folder / FILE, state.global_step))
            if found is not None and found.asked == self._asked():
                return found
        if has_untouched_base(self.model):
            return None
        raise ValueError(
            f"resuming at step {state.global_step}, and neither the checkpoint nor {self._folder(args)} has a {FILE} "
            "with the untouched model's answers to these items: resume a run that had the callback with the same "
            "files and seed, or leave the callback out"
        )

    def _report(self, args: Any, state: Any, kept: Reading) -> None:
        if not (self.page and state.is_world_process_zero):
            return
        about = {
            "model": _described(self.model),
            "settings": {
                "base": "base",
                "trained": f"to step {state.global_step}; figures of step {kept.step}",
                "questions": f"built-in general knowledge ({len(kept.answers.chosen['questions'])})",
                "texts": f"built-in prose ({len(kept.answers.nll[PROSE])}), first tokens of each",
                "time spent measuring": f"{self.share.spent:.1f} s",
            },
            "budget": self.budget,
            "fingerprint": {},
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "seed": self.seed,
        }
        made = show.record(self._memory, kept, self.sets, about)
        self.say(show.write(made, self._folder(args)))


def _strategy(value: Any) -> str:
    return str(getattr(value, "value", value)).lower()


def _described(model: Any) -> dict[str, Any]:
    """As `lfu.evaluation.record.describe_model`, without reading all weights."""
    parameters = list(model.parameters())
    return {
        "name": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "weights": "in training",
    }
