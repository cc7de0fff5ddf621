"""When a run is measured, by its own settings."""

import math
from dataclasses import dataclass
from typing import Any

TIMES = 10  # a run without evaluation is measured


@dataclass(frozen=True)
class Schedule:
    """When readings are taken."""

    every: int | None  # steps between readings; None: at evaluations, or `TIMES` a run where there are none
    always: bool  # at every evaluation, beside `every`

    def at_evaluations(self, args: Any) -> bool:
        """Whether evaluations bring readings."""
        return self.always or (self.every is None and setting(args.eval_strategy) != "no")

    def interval(self, args: Any, state: Any) -> float:
        """Steps between two readings that no evaluation brings; infinite where all come with one."""
        if self.every is not None:
            return self.every
        return math.inf if self.at_evaluations(args) else max(1, round(state.max_steps / TIMES))

    def still_to_come(self, args: Any, state: Any) -> float:
        """About how many readings the rest of the run would like to have, with the one that is due."""
        interval = self.interval(args, state)
        if not math.isinf(interval):
            whole = state.max_steps / interval
        elif setting(args.eval_strategy) == "steps":
            whole = state.max_steps / max(1, state.eval_steps or 1)
        else:
            whole = max(1.0, float(args.num_train_epochs))
        return max(1.0, whole * (1 - state.global_step / max(1, state.max_steps)) + 1)


def check_best(args: Any) -> None:
    """Raises ValueError unless Trainer keeps a best model by an evaluation metric; the message says what to set."""
    if not args.load_best_model_at_end or not args.metric_for_best_model or setting(args.eval_strategy) == "no":
        raise ValueError(
            "keep_best=True works through Trainer's own best model: set load_best_model_at_end=True and the same "
            'eval_strategy and save_strategy, "steps" or "epoch" (metric_for_best_model is "loss" by default)'
        )
    if "plateau" in setting(args.lr_scheduler_type):
        raise ValueError("keep_best=True changes what reduce_lr_on_plateau reads: choose another lr_scheduler_type")


def metric_of(args: Any) -> str:
    """The evaluation metric by which Trainer chooses the best model, by its name in the metrics."""
    return f"eval_{args.metric_for_best_model.removeprefix('eval_')}"


def would_be_best(args: Any, state: Any, metrics: Any) -> bool:
    """Whether Trainer would choose the model with these metrics over the best so far."""
    value, best = (metrics or {}).get(metric_of(args)), state.best_metric
    if value is None or best is None:
        return value is not None
    return value > best if args.greater_is_better else value < best


def setting(value: Any) -> str:
    """The text of one of transformers' settings, an enumeration or not."""
    return str(getattr(value, "value", value)).lower()
