"""One fine-tuning run of the test bed, and its exact scores."""

from __future__ import annotations

import contextlib
import io
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lfu.study.rows import write_rows
from lfu.study.testbed.model import make_model, make_tokenizer, scores, token_row
from lfu.study.testbed.settings import EPOCHS, LEARNING_RATE, Setting
from lfu.study.testbed.skills import FACTS, OTHERS, SKILLS, TARGET, Row, rows, stream

BATCH = 16
TEST_ROWS = 300
OLD = 10_000  # seeds of what is replayed: others than the base model's


def test_sets() -> dict[str, list[Any]]:
    """The rows that every model is scored on: name -> rows, none of them trained on in fine-tuning.

    `target` asks for the fine-tuned skill as in training; `reworded` by its two other commands.
    """
    sets = {"target": rows(TARGET, TEST_ROWS, "test", 0)}
    sets["reworded"] = [*rows(TARGET, TEST_ROWS // 2, "test", 1), *rows(TARGET, TEST_ROWS // 2, "test", 2)]
    for name in OTHERS:
        sets[name] = rows(name, FACTS if name == "fact" else TEST_ROWS, "test")
    return sets


def measure(model: Any) -> dict[str, dict[str, float]]:
    """Set -> `nll` (nats a token, mean over rows) and `accuracy` (exact answers, share)."""
    found = {}
    for name, test_rows in test_sets().items():
        nll, right = scores(model, test_rows)
        found[name] = {"nll": sum(nll) / len(nll), "accuracy": sum(right) / len(right)}
    others = [found[name] for name in OTHERS]
    found["others"] = {key: sum(scored[key] for scored in others) / len(others) for key in ("nll", "accuracy")}
    return found


def training_rows(count: int, seed: int) -> list[Row]:
    """`count` rows of the target skill, all asked for by its first word, none of them in a test set."""
    given = lambda row: row.prompt[len(SKILLS[TARGET].words[0].split()) :]  # without its command
    tested = {given(row) for name in ("target", "reworded") for row in test_sets()[name]}
    drawn = [row for row in rows(TARGET, 3 * count, f"train {seed}", 0) if given(row) not in tested]
    return drawn[:count]


def old_rows(count: int, seed: int) -> list[Row]:
    """`count` rows of the skills that the base model knows, none of them in a test set: for replay."""
    tested = {row for test_rows in test_sets().values() for row in test_rows}
    return list(islice((row for row in stream(OLD + seed) if row not in tested), count))


def text_row(row: Row) -> dict[str, str]:
    """The row as texts, which give the tokens of `token_row`: for methods that label or mix rows themselves."""
    return {"prompt": " ".join(row.prompt), "completion": " " + " ".join(row.answer[:-1])}  # TRL adds the end


def options_of(setting: Setting) -> dict[str, Any]:
    """What a setting's run has of `LfUConfig`'s fields beside those that all runs share."""
    return {"num_train_epochs": EPOCHS, "learning_rate": LEARNING_RATE} | setting.options


def fine_tune(start: dict[str, torch.Tensor], setting: Setting, count: int, seed: int) -> Any:
    """The base model with weights `start`, fine-tuned on `count` rows as `setting` says."""
    from datasets import Dataset
    from transformers import PrinterCallback

    from lfu import LfUConfig, LfUTrainer

    model = make_model(seed)
    model.load_state_dict(start)
    options = options_of(setting)
    shaped = text_row if setting.method in ("im", "replay") else token_row
    with tempfile.TemporaryDirectory() as folder:
        if setting.method == "replay":
            general = Path(folder, "old.jsonl")
            write_rows([text_row(row) for row in old_rows(1000, seed)], general)
            options["method_args"] += f",replay.data={general}"
        config = LfUConfig(
            folder, method=setting.method, seed=seed, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1,
            lr_scheduler_type="linear", warmup_steps=0, max_length=32, bf16=False, use_cpu=True, report_to="none",
            save_strategy="no", logging_strategy="no", gradient_checkpointing=False, disable_tqdm=True, advice=False,
            dataloader_pin_memory=False, **options,
        )  # fmt: skip
        with contextlib.redirect_stderr(io.StringIO()):
            trainer = LfUTrainer(
                model,
                config,
                train_dataset=Dataset.from_list([shaped(row) for row in training_rows(count, seed)]),
                processing_class=make_tokenizer(),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    return trainer.model
