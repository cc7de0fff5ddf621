"""`lfu probe sizes` from end to end on a tiny random model: what is trained, what is kept, what is refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from tiny_folder import save_model

from lfu.cli import main
from lfu.cli.probes import training
from lfu.data.probes import general_knowledge, plain_text
from lfu.data.word_problems import word_problems
from lfu.evaluation.score import answer_nll
from lfu.evaluation.sizes import nested
from lfu.model.loading import load_model
from lfu.report.blocks import Figure
from lfu.report.sizes_view import view

FAST = "--epochs 1 --limit 3 --train '--learning_rate 1e-2 --gradient_accumulation_steps 1' --train 'lfu:--lam auto'"
ONE_ROW = "--train '--per_device_train_batch_size 1 --gradient_accumulation_steps 1'"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny") / "base")


def probe(*words: str) -> int:
    return main(["probe", "sizes", *words])


def record_in(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny) -> tuple[Path, dict]:
    """The folder and the record of one run."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert probe(*shlex.split(f"{tiny} --sizes 8,16 {FAST} --seed 5 --output_dir"), str(out)) == 0
    return out, record_in(out)


@pytest.fixture
def trainings(monkeypatch) -> list[tuple[str, int, int]]:
    """(method, rows, seed) of every training that is really done."""
    done: list[tuple[str, int, int]] = []
    real = training.fit

    def fit(model, tokenizer, rows, config, *more):
        done.append((config.method, len(rows), config.seed))
        return real(model, tokenizer, rows, config, *more)

    monkeypatch.setattr(training, "fit", fit)
    return done


def test_everything_is_measured(run, tiny):
    out, record = run
    results = record["results"]
    assert sorted(path.name for path in out.iterdir()) == [
        "answers-by-size.png", "cells", "index.html", "knowledge-by-size.png", "prose-by-size.png", "record.json",
        "report.md",
    ]  # fmt: skip
    assert [(row["method"], row["size"], row["seeds"]) for row in results["summary"]] == [
        ("sft", 8, 1), ("lfu", 8, 1), ("sft", 16, 1), ("lfu", 16, 1),
    ]  # fmt: skip
    assert results["items"] == {"answers": 3, "knowledge": 3, "prose": 3}
    held_out = word_problems("test", 3)
    base = answer_nll(*load_model(tiny), held_out)
    assert results["base scores"]["answers"] == {"nll": pytest.approx(base.nll), "tokens": base.tokens}
    nll = [tuple(cell["scores"]["answers"]["nll"]) for cell in results["cells"]]
    assert len({*nll, tuple(base.nll)}) == 5
    assert [len(cell["scores"]["log"]) for cell in results["cells"]] == [2, 2, 4, 4]
    assert record["settings"]["equal"] == "1 epochs"
    assert len(general_knowledge()) > 3 < len(plain_text())
    assert "made only 2 optimizer steps" in (out / "report.md").read_text(encoding="utf-8")


def test_models_are_trained_on_the_rows_that_are_promised(tiny, tmp_path, monkeypatch):
    seen = {}
    real = training.training_rows

    def rows(chosen, *more):
        seen[len(chosen)] = list(chosen)
        return real(chosen, *more)

    monkeypatch.setattr(training, "training_rows", rows)
    words = f"{tiny} --methods sft --sizes 2,4 {FAST.split(' --train')[0]} --seed 1 --output_dir {tmp_path / 'out'}"
    assert probe(*shlex.split(words)) == 0
    pool = word_problems("train", 512)
    assert seen == {2: nested(pool, 2, 1), 4: nested(pool, 4, 1)}
    assert seen[4][:2] == seen[2]


def test_what_is_finished_is_not_done_again(run, tiny, tmp_path, trainings, capsys):
    import shutil

    out = Path(shutil.copytree(run[0], tmp_path / "out"))
    words = shlex.split(f"{tiny} --sizes 8,16 {FAST} --seed 5 --output_dir {out}")
    assert probe(*words) == 0
    assert trainings == []
    assert "lfu, 16 rows, seed 5: kept from an earlier run" in capsys.readouterr().err
    assert record_in(out)["results"] == run[1]["results"]
    # one more size, and other settings for one method: the rest stays
    assert probe(*words, "--sizes", "8,16,20", "--train", "lfu:--strength 0.4") == 0
    assert sorted(trainings) == [("lfu", 8, 5), ("lfu", 16, 5), ("lfu", 20, 5), ("sft", 20, 5)]


def test_a_stopped_sweep_goes_on(tiny, tmp_path, monkeypatch, capsys):
    words = shlex.split(f"{tiny} --sizes 2,4 --methods sft {FAST.split(' --train')[0]} --output_dir {tmp_path / 'out'}")
    real = training.fit

    def stops(model, tokenizer, rows, *more):
        if len(rows) == 4:
            raise KeyboardInterrupt
        return real(model, tokenizer, rows, *more)

    monkeypatch.setattr(training, "fit", stops)
    assert probe(*words) == 130
    monkeypatch.setattr(training, "fit", real)
    capsys.readouterr()
    assert probe(*words) == 0
    assert "sft, 2 rows, seed 0: kept" in capsys.readouterr().err


def test_equal_steps_and_several_seeds(tiny, tmp_path, trainings):
    words = f"{tiny} --methods sft --sizes 2,9 --seeds 2 --equal steps --steps 3 --limit 2 --seed 7 {ONE_ROW}"
    assert probe(*shlex.split(words), "--output_dir", str(tmp_path / "out")) == 0
    record = record_in(tmp_path / "out")
    assert trainings == [("sft", 2, 7), ("sft", 2, 8), ("sft", 9, 7), ("sft", 9, 8)]
    assert [len(cell["scores"]["log"]) for cell in record["results"]["cells"]] == [3, 3, 3, 3]
    assert record["settings"]["equal"] == "3 steps"
    assert [len(row["answers"]["by_seed"]) for row in record["results"]["summary"]] == [2, 2]
    assert "over seeds" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_own_rows(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text(
        "\n".join(json.dumps({"instruction": f"Say {i}.", "output": f"{i}"}) for i in range(5))
    )
    Path("held.jsonl").write_text('{"question": "Say 3.", "answer": "3"}\n{"question": "Say 77.", "answer": "77"}\n')
    words = (
        f"{tiny} --methods sft --sizes 5 --epochs 1 --limit 2 --data mine.jsonl --eval_data held.jsonl --output_dir out"
    )
    assert probe(*shlex.split(words)) == 0
    record = record_in(Path("out"))
    assert record["settings"]["data"] == "mine.jsonl (5)"
    assert record["results"]["asked in training"] == 1
    assert "1 of the held-out questions are also among the training rows" in Path("out/report.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--sizes 8,x", "must be whole numbers from 1"),
        ("--sizes 0,8", "must be whole numbers from 1"),
        ("--seeds 0", "--seeds must be above 0, got 0"),
        ("--epochs 0", "--epochs must be above 0"),
        ("--epochs nan", "--epochs must be above 0"),
        ("--equal steps --steps 0", "--steps must be above 0"),
        ("--methods ''", "no method to train by"),
        ("--methods nothing", "unknown method 'nothing'"),
        ("--train '--max_steps 3'", "--max_steps is the probe's own business"),
        ("--train '--num_train_epochs 3'", "--num_train_epochs is the probe's own business"),
        ("--train '--alpha x'", "--train for method sft"),
        ("--data mine.jsonl --eval_data mine.jsonl", "5 rows, and --sizes wants 512: give smaller sizes"),
        ("--data mine.jsonl --sizes 4", "is one file, which is trained on: give held-out rows with --eval_data"),
        ("--data nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("--data texts.jsonl --sizes 1 --eval_data mine.jsonl", "columns text; needed are"),
    ],
)
def test_wrong_inputs_are_one_line_and_write_nothing(tiny, tmp_path, monkeypatch, words, says, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("\n".join(json.dumps({"question": f"{i}?", "answer": f"{i}"}) for i in range(5)))
    Path("texts.jsonl").write_text('{"text": "x"}\n')
    before = sorted(tmp_path.rglob("*"))
    assert probe(tiny, *shlex.split(words), "--output_dir", "out") == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1, told
    assert says in told[0]
    assert sorted(tmp_path.rglob("*")) == before


# --- what the report says ------------------------------------------------------------------------------------------


def interval(value: float, half: float = 0.01) -> dict:
    return {"value": value, "low": value - half, "high": value + half, "level": 0.95}


def row(method: str, size: int, against: dict[str, float] | None = None, **change: float) -> dict:
    """A row of the summary: changes against the base, and differences to the first method."""
    found: dict = {"method": method, "size": size, "seeds": 1}
    for metric in ("answers", "knowledge", "prose"):
        found[metric] = {
            "value": interval(1.0), "change": interval(change.get(metric, 0.0)), "by_seed": [1.0],
            "against": None if against is None else interval(against.get(metric, 0.0)),
        }  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("summary", "says"),
    [
        ([row("sft", 8, answers=-0.3)],
         ["sft changed the loss on held-out answers by -0.300 [-0.310, -0.290] nats with 8 rows",
          "It forgot nothing that these probes can see."]),
        ([row("sft", 8, prose=0.3), row("sft", 32, prose=0.3, knowledge=-0.2)],
         ["It forgot measurably: general knowledge with 32 rows and prose perplexity with 8 and 32 rows."]),
        ([row("sft", 8), row("lfu", 8, {})],
         ["lfu does not differ from sft beyond the noise, on any measure at any size."]),
        ([row("sft", 8), row("lfu", 8, {"prose": -0.2, "answers": 0.2})],
         ["lfu is worse than sft on the loss on held-out answers with 8 rows and better than sft on prose perplexity"]),
        ([row("sft", 8), row("lfu", 8, {"knowledge": 0.2})], ["better than sft on general knowledge with 8 rows"]),
    ],
)  # fmt: skip
def test_sentences_follow_from_the_intervals(run, summary, says):
    record = json.loads(json.dumps(run[1]))
    record["results"]["summary"] = summary
    shown = view(record)
    for words in says:
        assert any(words in sentence for sentence in shown.verdict), shown.verdict
    assert len([block for block in shown.blocks if isinstance(block, Figure)]) == 3
