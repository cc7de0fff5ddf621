"""The libraries' own bars and notes off, where a command has its own."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """The libraries' own bars and notes are off inside; errors still come through."""
    import datasets
    from transformers.utils import logging as notes

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    trl = logging.getLogger("trl")
    shown, levels = notes.is_progress_bar_enabled(), (notes.get_verbosity(), trl.level)
    datasets.disable_progress_bars()
    notes.disable_progress_bar()
    notes.set_verbosity_error()
    trl.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        datasets.enable_progress_bars()
        notes.set_verbosity(levels[0])
        trl.setLevel(levels[1])
        if shown:
            notes.enable_progress_bar()
