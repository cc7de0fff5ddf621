"""What `lfu train` chooses where the user gives only a model and a file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from forgetting.runs import few

from lfu.cli import main
from lfu.cli.arguments import parse
from lfu.cli.careful import EPOCHS, FEW, choices, lengths, told, untold, wanted
from lfu.cli.forgetting import ForgettingArguments

pytestmark = pytest.mark.usefixtures("quick_pictures")


def given(*flags: str):
    return parse(["--model", "m", "--data", "rows.jsonl", *flags], ForgettingArguments)[2]


def write(count: int) -> None:
    rows = ({"question": f"What is {i} + {i}?", "answer": f"{2 * i}."} for i in range(count))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "flags", [(), ("--output_dir", "x", "--seed", "1"), ("--careful", "true", "--learning_rate", "1")]
)
def test_chosen_where_the_user_has_not(flags):
    assert wanted(given(*flags))
    chosen = choices(40, given(*flags).given)
    assert chosen[chosen.index("--eval_share") + 1] == "0.1"
    assert chosen[chosen.index("--forgetting_budget") + 1] == "0.02"
    assert ("--learning_rate" in chosen) == ("--learning_rate" not in flags)


@pytest.mark.parametrize(
    "flags", ["--eval_data e.jsonl", "--eval_share 0.3", "--forgetting_share 0.3 --forgetting_stop true"]
)
def test_still_chosen_where_flags_say_only_what_is_measured(flags):
    """They are what `lfu train` itself tells the user to add."""
    data = given(*flags.split())
    assert wanted(data)
    chosen = choices(12, data.given, held_out=data.holds_out())
    assert "--method" in chosen
    assert ("--load_best_model_at_end" in chosen) == ("eval" in flags)
    assert not {word for word in flags.split() if word.startswith("--")} & {*chosen}


def test_no_rows_are_held_out_against_the_users_word():
    data = given("--eval_share", "0")
    assert not {"--eval_share", "--eval_strategy", "--forgetting_keep_best"} & {
        *choices(40, data.given, held_out=data.holds_out())
    }


@pytest.mark.parametrize(
    ("flags", "noted"),
    [("--learning_rate 1e-3", True), ("--careful false --method lfu", False), ("", False), ("--config smollm2", False)],
)
def test_it_says_that_nothing_is_chosen(flags, noted):
    assert bool(untold(given(*flags.split()))) == noted


@pytest.mark.parametrize("flags", ["--careful false", "--learning_rate 1e-3", "--method lfu", "--max_steps 3"])
def test_nothing_is_chosen_once_the_user_begins_to(flags):
    assert not wanted(given(*flags.split()))


def test_the_users_flag_wins():
    assert not {"--method", "--num_train_epochs"} & set(choices(40, {"method", "max_steps"}))


def test_the_rate_is_that_of_an_adapter_on_few_rows():
    assert "--learning_rate" in choices(FEW)
    assert "--learning_rate" not in choices(FEW + 1)
    assert "--learning_rate" not in choices(FEW, {"use_peft"})  # all weights want another


def test_a_short_run_has_time_to_measure_more_than_one_checkpoint():
    chosen = choices(FEW)
    assert chosen[chosen.index("--forgetting_share") + 1] == "0.2"
    assert "--forgetting_share" not in choices(FEW + 1)
    assert "--forgetting_share" not in choices(FEW, {"forgetting_share"})


@pytest.mark.parametrize("flag", ["eval_strategy", "save_strategy"])
def test_who_says_when_to_save_or_evaluate_chooses_the_checkpoint(flag):
    """The two strategies must be alike, or there is no best checkpoint to go back to."""
    chosen = {*choices(40, {flag})}
    assert "--eval_share" in chosen
    assert not {"--eval_strategy", "--save_strategy", "--load_best_model_at_end", "--forgetting_keep_best"} & chosen


def test_one_row_is_one_row():
    assert told(1, []).startswith("chosen for 1 row (")
    assert told(2, []).startswith("chosen for 2 rows (")


def test_nothing_is_measured_against_the_users_word():
    assert not [word for word in choices(40, {"forgetting"}) if word.startswith("--forgetting")]
    chosen = choices(40, {"eval_data"}, held_out=True)
    assert "--eval_share" not in chosen
    assert "--forgetting_keep_best" in chosen


def test_of_few_rows_none_is_held_out():
    chosen = choices(12)
    assert "--eval_share" not in chosen
    assert "--forgetting_keep_best" not in chosen
    assert "--method" in chosen


@pytest.mark.parametrize("rows", [1, 4, 40, 200, 1000, 100_000])
def test_lengths_are_within_their_limits(rows):
    epochs = int(lengths(rows)["num_train_epochs"])
    assert EPOCHS[0] <= epochs <= EPOCHS[1]


def test_a_run_from_model_and_file_alone(here, model, capsys, monkeypatch):
    """It says what it chose, holds rows out, shows what is forgotten, and leaves the best checkpoint's weights."""
    few(monkeypatch.setattr)
    write(24)
    assert main(["train", "--model", model, "--data", "rows.jsonl", "--output_dir", "out", "--report_to", "none"]) == 0
    out, err = capsys.readouterr()
    assert "nothing is chosen" not in err.replace("\n", " ")
    assert "chosen for 24 rows (your own flags win; --careful false turns this off):" in " ".join(err.split())
    assert "--num_train_epochs 15" in err
    assert "Rows     22 to train on from rows.jsonl, 2 held out" in out
    last = [line for line in out.splitlines() if re.match(r"step +\d+/", line)][-1]
    assert "held-out" in last
    assert "forgotten" in last
    assert len(last) <= 80
    assert Path("out/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--eval_share 1.5", "eval_share must be a share"),
        ("--eval_share 0.5 --eval_data rows.jsonl", "give one of them"),
        ("--eval_share 0.01", "leaves none on one side"),
    ],
)
def test_wrong_shares_are_one_line(here, model, capsys, flags, told):
    write(8)
    assert main(["train", "--model", model, "--data", "rows.jsonl", *flags.split()]) == 2
    assert told in capsys.readouterr().err
