"""Checkpoints and models on disk that are whole or not there, whenever the process is killed or the disk is full."""

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints
from trl import SFTTrainer

from lfu.support.files import WRITING, moved_in, os_errors_only, remove_folder, swap_in
from lfu.training.checkpoints import checkpoints

# without these a folder of weights is no model
MARKS = re.compile(r"(adapter_)?config\.json|.*\.safetensors\.index\.json")


def refuse_two_wrappers(model: Any) -> None:
    """Raises ValueError for an adapter that trains the tokens of tied embeddings and the whole head as well.

    TRL asks for both where a chat template brings new tokens. PEFT then wraps the head twice: TRL's loss can't read it,
    and the merged model can't be saved.
    """
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper) and isinstance(head.original_module, ModulesToSaveWrapper):
        raise ValueError(
            "the tokenizer of chat_template_path brings new tokens, and an adapter can't train them in a model whose "
            "embeddings are tied to its head: train all weights (--use_peft false), or give the template alone, as a "
            ".jinja file"
        )


class SavesWhole(SFTTrainer):
    """`SFTTrainer` that writes beside the place and renames.

    A checkpoint comes to be by one rename, complete. A model is saved file by file, its configuration last. Until then
    everything is in a folder whose name begins with `.writing-`. Raises OSError, with the folder, if saving fails.
    """

    _writing: Path | None = None  # stands for the output folder while a checkpoint is written
    _to_push: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._writing is None else str(self._writing)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        writing = run / f"{WRITING}{name}"  # every process finds it by its name
        self._main_process(lambda: shutil.rmtree(writing, ignore_errors=True))
        try:
            with os_errors_only(run):
                self._writing = writing
                self.save_beside(writing / name)
                super()._save_checkpoint(model, trial)
                self._writing = None
                self._main_process(lambda: self._complete(writing / name, run / name))
        finally:
            self._writing, push = None, self._to_push
            self._to_push = None
            if self.args.should_save:
                shutil.rmtree(writing, ignore_errors=True)
        if push is not None:
            super()._push_from_checkpoint(str(run / name))
        if self.args.should_save and (self.args.save_total_limit or 0) > 0:
            self._remove_all_but(run / name, run, self.args.save_total_limit)

    def _remove_all_but(self, kept: Path, run: Path, limit: int) -> None:
        """Deletes the oldest checkpoints beyond `limit`; `kept` and the best one stay.

        As transformers' `rotate_checkpoints`, which deletes them in place: a kill would leave half of one.
        """
        stay = {kept.name, Path(self.state.best_model_checkpoint or kept).name}
        named = {path.name for path in checkpoints(run)}  # a folder of another name is not ours
        found = [name for name in (Path(p).name for p in sort_checkpoints(str(run), use_mtime=True)) if name in named]
        spare = [name for name in found if name not in stay]
        for name in spare[: max(len(found) - max(limit, len(stay)), 0)]:
            with suppress(OSError):  # what can't be deleted is in nobody's way
                remove_folder(run / name)

    def _finalize_training(self, trial: Any, *positional: Any) -> Any:
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            self._remove_all_but(Path(best), Path(self._get_output_dir(trial)), 1)  # Trainer would, in place
        return super()._finalize_training(trial, *positional)

    def save_beside(self, folder: Path) -> None:
        """Adds files of one's own to a checkpoint that is being written to `folder`."""

    def _complete(self, written: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        swap_in(written, final)

    def _main_process(self, do: Callable[[], None]) -> None:
        """`do`, in the process that saves, before and after which all wait for each other."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            do()
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._writing is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._to_push = checkpoint_folder  # once it has its name

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self._writing is not None or not self.args.should_save:
            super()._save(str(folder), state_dict)
            return
        with os_errors_only(folder), moved_in(folder, last=MARKS) as work:
            if (folder / "README.md").is_file():  # PEFT adds to the model card that is there
                shutil.copy(folder / "README.md", work)
            super()._save(str(work), state_dict)
            self.complete_card(work / "README.md", folder)

    def complete_card(self, card: Path, folder: Path) -> None:
        """Adds to the model card that is being written, if there is one, and will be in `folder`."""

    def create_model_card(self, *positional: Any, **named: Any) -> None:
        """TRL's, written whole."""
        if not self.is_world_process_zero():
            return
        folder = self.args.output_dir
        with moved_in(Path(folder), last=MARKS) as work:
            self.args.output_dir = str(work)
            try:
                super().create_model_card(*positional, **named)
                self.complete_card(work / "README.md", Path(folder))
            finally:
                self.args.output_dir = folder
