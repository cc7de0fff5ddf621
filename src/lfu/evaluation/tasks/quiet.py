"""The harness without its progress bars and log lines."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import datasets
import torch
from tqdm import tqdm

Progress = Callable[[int, int], None]  # called with requests done, requests altogether


@contextmanager
def quiet(progress: Progress | None = None) -> Iterator[list[str]]:
    """Inside, lm_eval and datasets say nothing; yields the list of what lm_eval would have warned of.

    What its bar would have shown of a model's requests goes to `progress`.

    Nor does lm_eval look for a git repository and for compilers, which it does after each evaluation: the first writes
    to stderr, the second takes half a second, and records have their own versions. It makes cuDNN deterministic:
    afterwards that is as it was.
    """
    heard: list[str] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    class Silent(tqdm):  # only what counts a model's requests is updated by hand
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n
            if progress:
                progress(self.n, self.total)

    logger, cudnn = logging.getLogger("lm_eval"), torch.backends.cudnn
    flags, bars = (cudnn.deterministic, cudnn.benchmark), datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with (
            mock.patch.object(logger, "propagate", False),
            mock.patch.object(logger, "handlers", [*logger.handlers, Listen(logging.WARNING)]),
            mock.patch("lm_eval.api.task.tqdm", Silent),
            mock.patch("lm_eval.api.model.tqdm", Silent),
            mock.patch("lm_eval.models.huggingface.tqdm", Silent),
            mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None),
            mock.patch("lm_eval.evaluator.add_env_info", return_value=None),
        ):
            yield heard
    finally:
        cudnn.deterministic, cudnn.benchmark = flags
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def offline(on: bool) -> Iterator[None]:
    """If `on`, the hub is not asked inside: data sets come from the local cache, or fail at once and not in 40 s."""
    with ExitStack() as stack:
        if on:
            stack.enter_context(mock.patch("datasets.config.HF_HUB_OFFLINE", True))
            stack.enter_context(mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True))
        yield
