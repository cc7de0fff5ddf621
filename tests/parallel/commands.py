"""The command line in each of two processes, as the launcher starts it."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import lfu.cli

ROWS = "word_problems:8"


def spoken(argv: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one call."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = lfu.cli.main(argv)
    return code, out.getvalue(), err.getvalue()


def everything(rank: int, model: str, folder: Path) -> dict[str, tuple[int, str, str]]:
    lfu.cli.FIRST_SPEAKS = 0.0  # no launcher ends the second process meanwhile
    train = [
        "train", "--model", model, "--data", ROWS, "--output_dir", str(folder / "run"), "--use_cpu", "true",
        "--max_steps", "2", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2",
        "--report_to", "none", "--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "1",
    ]  # fmt: skip
    return {
        "mistake": spoken(["train", "--model", model, "--data", ROWS, "--bogus", "1"]),
        "help": spoken(["--help"]),
        "train": spoken(train),
        "again": spoken(train),
    }
