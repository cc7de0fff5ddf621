"""Going on from a checkpoint: the newest that is whole, the methods' state with it, one line for one that misfits."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lfu.support.errors import one_line
from lfu.training.advice import LfUAdvice
from lfu.training.checkpoints import STATE_FILE, CheckpointError, is_complete, newest
from lfu.training.saving import SavesWhole

if TYPE_CHECKING:
    from lfu.methods.method import Method

_MISFITS = (
    AssertionError, RuntimeError, ValueError, KeyError, OSError, EOFError, UnpicklingError, SafetensorError
)  # fmt: skip


def newest_checkpoint(args: Any) -> str:
    """The newest checkpoint that is whole; others are warned of. Raises CheckpointError: there is none."""
    passed: list[str] = []
    found = newest(Path(args.output_dir), say=passed.append, save_only_model=args.save_only_model)
    for line in passed if found else ():
        warnings.warn(line, LfUAdvice, stacklevel=3)
    if found is None:
        raise CheckpointError("; ".join(passed) or f"nothing to resume: {args.output_dir} has no checkpoint")
    return str(found)


@contextmanager
def fits(checkpoint: Any) -> Iterator[None]:
    """Turns what loading a broken checkpoint, or one of another model or optimizer, raises into a CheckpointError.

    FSDP2's loaders assert: of an optimizer without state (plain SGD), for one.
    """
    try:
        yield
    except CheckpointError:
        raise
    except _MISFITS as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} does not fit this model and these settings: {one_line(error, 300)}"
        ) from error


class Resumes(SavesWhole):
    """Checkpoints with the state of `methods` in them, and a CheckpointError for whatever misfits."""

    methods: "list[Method]"

    def save_beside(self, folder: Path) -> None:
        """The methods' state."""
        state = {f"{m.name}/{key}": value.contiguous() for m in self.methods for key, value in m.state_dict().items()}
        if state and self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / STATE_FILE)

    def train_on(self, checkpoint: Path | str | None) -> None:
        """Trains, from a checkpoint if one is given; of one that has no step left, its weights are the result."""
        if checkpoint and is_complete(checkpoint, self.args):
            self._load_from_checkpoint(str(checkpoint))  # Trainer would take one step too many
            self.finish()
        else:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def finish(self) -> None:
        """What the methods do to the weights once training is over (`Method.finish`)."""
        for method in self.methods:
            method.finish(self)

    def load_methods(self, checkpoint: str) -> None:
        """Gives the methods what a checkpoint has of theirs."""
        path = Path(checkpoint) / STATE_FILE
        with fits(checkpoint):
            saved = load_file(path) if path.exists() else {}
        for method in self.methods:
            mark = f"{method.name}/"
            state = {key.removeprefix(mark): value for key, value in saved.items() if key.startswith(mark)}
            if state:
                method.load_state_dict(state)
            elif method.misses_its_state:
                line = f"{path} holds nothing of method {method.name!r}: its running estimate starts anew"
                warnings.warn(line, LfUAdvice, stacklevel=2)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        # where DeepSpeed has the model, which loads weights and optimizer here
        loading = self.is_deepspeed_enabled and resume_from_checkpoint is not None
        with fits(resume_from_checkpoint) if loading else nullcontext():
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with fits(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_methods(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.is_deepspeed_enabled:  # which has loaded the weights in its own way
            self.load_methods(checkpoint)
        with fits(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with fits(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with fits(checkpoint):
            super()._load_scaler(checkpoint)
