"""Ctrl-C while training: the step under way is finished and saved. A second Ctrl-C stops at once."""

import signal
import threading
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # SIGTERM: a cluster wants its machine back


class Stop(TrainerCallback):
    """Within it, the first SIGINT or SIGTERM makes `trainer` save a checkpoint after the step, and stop.

    Afterwards the trainer's `interrupted` says whether it did. With several processes signals act as usual: processes
    that stop after different steps would wait for each other for ever.
    """

    def __init__(self, trainer: Any, say: Callable[[str], None]):
        self.trainer, self.say = trainer, say
        self.before: dict[int, Any] = {}
        trainer.add_callback(self)

    def __enter__(self) -> None:
        alone = self.trainer.accelerator.num_processes == 1
        if alone and threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._asked) for number in SIGNALS}

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: Any) -> None:
        if self.trainer.interrupted or not self.trainer.is_in_train:
            raise KeyboardInterrupt
        self.trainer.interrupted = True
        self.say("stopping after this step, with a checkpoint (again to stop at once)")

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.trainer.interrupted:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.trainer.interrupted:
            control.should_save = control.should_evaluate = False  # done at the end of the step

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.trainer.interrupted and state.global_step >= state.max_steps:  # in the last step, or its evaluation
            self.trainer.interrupted = False
            self.say("that was the last step: the run is complete")
