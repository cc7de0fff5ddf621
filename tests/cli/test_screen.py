"""What `lfu train` shows: the five lines, one line per logging step, nothing of the libraries' own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from lfu.cli import main
from lfu.cli.screen import Screen, _kept
from lfu.training.checkpoints import RUN_FILE

FAST = ["--per_device_train_batch_size=2", "--gradient_accumulation_steps=1", "--report_to=none", "--save_strategy=no",
        "--gradient_checkpointing=false"]  # fmt: skip


def train(model, *flags):
    words = [word for flag in flags for word in flag.split()]
    return main(["train", "--model", model, "--data", "rows.jsonl", "--output_dir", "out", *FAST, *words])


def test_five_lines_then_one_per_step_in_80_columns(here, model, capsys):
    assert train(model, "--max_steps 3 --eval_data word_problems:4 --eval_strategy steps --eval_steps 2") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["Rows", "Tokens", "Trains", "Method", "Needs"]
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/3", "2/3", "3/3"]
    assert all(len(line) <= 80 for line in steps)
    assert "held-out -" in steps[0]
    assert re.search(r"held-out \d\.\d{3}", steps[-1])
    assert "%|" not in out + err
    assert "{'" not in out + err


@pytest.mark.parametrize(("steps", "each"), [(60, 60.0), (1000, 9.0), (99_999, 3600.0)])
def test_a_line_fits_80_columns_however_long_the_run(monkeypatch, steps, each):
    screen = object.__new__(Screen)
    screen.awaited, screen.started, screen.first_step = {"eval_loss"}, 0.0, 0
    screen.shown = {"loss": 1.372, "eval_loss": 12.379, "forgetting/net_lost": -0.123, "learning_rate": 3.3e-5}
    monkeypatch.setattr("lfu.cli.screen.time.monotonic", lambda: 3 * each)
    line = screen.line(3, steps)
    assert len(line) <= 80
    assert "held-out 12.379" in line
    assert line.endswith(" left")


@pytest.mark.parametrize(
    ("budgeted", "best", "said"),
    [
        (True, 1, "step 1, the best on the held-out rows (loss 1.000) of those measured and within the budget of "
         "forgetting; step 3 had 0.300"),
        (True, 3, "step 3, the best on the held-out rows"),
        (False, 1, "step 1, the best on the held-out rows"),
    ],
)  # fmt: skip
def test_which_weights_are_saved_is_said(budgeted, best, said):
    history = [{"step": step, "eval_loss": loss} for step, loss in ((1, 1.0), (2, 0.5), (3, 0.3), (4, 0.4))]
    state = SimpleNamespace(best_global_step=best, global_step=4, log_history=history)
    callbacks = SimpleNamespace(callbacks=[SimpleNamespace(keep_best=budgeted), object()])
    args = SimpleNamespace(load_best_model_at_end=True)
    trainer = SimpleNamespace(state=state, args=args, callback_handler=callbacks)
    assert _kept(trainer) == f": the weights of {said}"


def test_every_figure_goes_to_a_file(here, model):
    assert train(model, "--max_steps 2") == 0
    entries = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "loss" in e] == [1, 2]
    assert "lfu/gradient_ratio" in entries[0]


def test_logging_steps_of_the_users_are_kept(here, model, capsys):
    assert train(model, "--max_steps 4 --logging_steps 2") == 0
    assert re.findall(r"^step (\d)/4", capsys.readouterr().out, re.M) == ["2", "4"]


def test_verbose_brings_the_libraries_back(here, model, capsys):
    assert train(model, "--max_steps 1 --verbose true") == 0
    out, err = capsys.readouterr()
    assert "%|" in err
    assert "'train_loss'" in out + err


def test_a_dry_run_describes_and_trains_nothing(here, model, capsys):
    assert train(model, "--max_steps 2 --dry_run true") == 0
    out = capsys.readouterr().out
    assert out.startswith("Rows ")
    assert "Trained" not in out
    assert not Path("out").exists()


def test_the_summary_is_of_all_steps_of_this_command_and_of_no_other(here, model, capsys):
    """The last step is not logged; a checkpoint of LfU that doesn't say so, as TRL's own, is gone on with plainly."""
    rows = [{"question": f"{i}?", "answer": f"{i}."} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saving = "--save_strategy steps --save_steps 4 --logging_steps 3"
    assert train(model, saving, "--method lfu --max_steps 4") == 0
    out = capsys.readouterr().out
    tokens = int(re.search(r"([\d,]+) per epoch", out)[1].replace(",", ""))  # 8 rows: 4 steps of 2
    assert f" {tokens:,} tokens, 4 steps" in out
    assert "consistency" in out
    Path("out/checkpoint-4", RUN_FILE).unlink()
    assert train(model, saving, "--method sft --max_steps 8 --resume_from_checkpoint true") == 0
    out = capsys.readouterr().out
    assert f" {tokens:,} tokens, steps 5 to 8" in out
    assert "consistency" not in out


@pytest.mark.parametrize(("steps", "told"), [(1, "Trained on 2 of "), (20, "Trained on 12 rows")])
def test_no_more_rows_are_claimed_than_were_seen(here, model, capsys, steps, told):
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}?", "answer": f"{i}."}) + "\n" for i in range(12))
    )
    assert train(model, f"--max_steps {steps}") == 0
    assert told in capsys.readouterr().out
