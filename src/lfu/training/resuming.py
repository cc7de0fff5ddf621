"""Going on from a checkpoint: the newest that is whole, the methods' state with it, one line for one that misfits."""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lfu.support.errors import one_line
from lfu.support.files import dump_json
from lfu.training.advice import LfUAdvice
from lfu.training.checkpoints import RUN_FILE, STATE_FILE, CheckpointError, is_complete, newest
from lfu.training.saving import SavesWhole

if TYPE_CHECKING:
    from lfu.methods.method import Method

_MISFITS = (
    AssertionError, RuntimeError, ValueError, KeyError, OSError, EOFError, UnpicklingError, SafetensorError
)  # fmt: skip


def newest_checkpoint(args: Any, say: Callable[[str], None]) -> str:
    """The newest checkpoint that is whole; `say` is told of others. Raises CheckpointError: there is none."""
    passed: list[str] = []
    found = newest(Path(args.output_dir), say=passed.append, save_only_model=args.save_only_model)
    if found is None:
        sound, why = ("sound ", f": {'; '.join(passed)}") if passed else ("", "")
        raise CheckpointError(
            f"nothing to resume: {args.output_dir} holds no {sound}checkpoint{why}: start without "
            f"--resume_from_checkpoint{', with --overwrite_output_dir' if passed else ''}"
        )
    for line in passed:
        say(f"{line}; going on from {found}")
    return str(found)


def run_of(checkpoint: Path | str, methods: "Sequence[Method]") -> dict[str, Any]:
    """What a checkpoint says about its run, if anything. Raises CheckpointError: that run has other `methods`."""
    path, ours = Path(checkpoint) / RUN_FILE, "+".join(method.name for method in methods)
    said = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if said and said["method"] != ours:
        raise CheckpointError(
            f"checkpoint {checkpoint} is of method {said['method']!r}, and this run has {ours!r}: resume with the same "
            "method, or start a new run that has the checkpoint as its model"
        )
    return said


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

    def identity(self) -> dict[str, Any]:
        """What a run that goes on from a checkpoint should have in common with it, JSON-ready; `method` is a part."""
        raise NotImplementedError

    def save_beside(self, folder: Path) -> None:
        """The methods' state, and which run it is."""
        state = {f"{m.name}/{key}": value.contiguous() for m in self.methods for key, value in m.state_dict().items()}
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RUN_FILE).write_text(dump_json(self.identity()), encoding="utf-8")
            if state:
                save_file(state, folder / STATE_FILE)

    def _compare_runs(self, checkpoint: str) -> None:
        """Warns in the main process, in one line, of what is not as it was; other methods are refused in all."""
        now = json.loads(dump_json(self.identity()))
        was = {name: value for name, value in run_of(checkpoint, self.methods).items() if value != now.get(name, value)}
        if was and self.args.should_save:
            spelled = lambda values: ", ".join(f"{name} {values[name]}" for name in was)
            line = f"{checkpoint} was trained with {spelled(was)}; from there this run goes on with {spelled(now)}"
            warnings.warn(line, LfUAdvice, stacklevel=3)

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
            self._compare_runs(checkpoint)
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
