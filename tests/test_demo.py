"""The demo from end to end on a tiny random model, and what its table, sentences and page make of given numbers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_folder import save_model

from lfu import demo
from lfu.report import demo_summary
from lfu.report.demo_page import page
from lfu.report.demo_summary import closing, knowledge_transitions, summarise, verdict

MEASURES = ("answers", "match", "knowledge", "prose")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """The folder of one finished quick run; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    assert demo.main(["--quick", "--model", tiny, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(out, tmp_path / "demo"))


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text(encoding="utf-8"))


# --- from end to end -----------------------------------------------------------------------------------------------


def test_everything_is_measured_and_written(out, tiny):
    record = record_of(out)
    for who in ("base", "sft", "lfu"):
        assert set(record["measures"][who]) == set(MEASURES)
        sizes = {name: len(next(iter(record["measures"][who][name].values()))) for name in MEASURES}
        assert sizes == {"answers": 4, "match": 3, "knowledge": 6, "prose": 3}
    assert [entry["phase"] for entry in record["times"]] == list(demo.PHASES)[:-1]  # the page is still being written
    assert record["settings"]["model"] == tiny
    assert "torch" in record["versions"]
    assert len(record["training"]["sft"]) == len(record["training"]["lfu"]) == 2
    assert record["training"]["lfu"][0]["lfu/gradient_ratio"] > 0
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["demo.png", "index.html", "phases", "record.json"]


def test_the_three_models_are_the_untouched_one_and_two_different_trained_ones(out, tiny):
    from lfu.data.word_problems import word_problems
    from lfu.evaluation.score import answer_nll
    from lfu.model.loading import load_model

    nll = {who: record_of(out)["measures"][who]["answers"]["nll"] for who in ("base", "sft", "lfu")}
    assert nll["base"] == pytest.approx(answer_nll(*load_model(tiny), word_problems("test", 4, 42)).nll)
    assert len({tuple(values) for values in nll.values()}) == 3


def test_both_methods_start_from_the_same_batch(out):
    training = record_of(out)["training"]
    assert training["sft"][0]["loss"] == pytest.approx(training["lfu"][0]["lfu/sft_loss"], rel=1e-5)


def test_the_page_is_one_file(out):
    html = (out / "index.html").read_text(encoding="utf-8")
    assert html.count('<img src="data:image/svg+xml;base64,') == 7
    assert not re.findall(r'(?:src|href)="(?!data:|https://arxiv\.org/)', html)
    assert "<script" not in html
    assert record_of(out)["verdict"][-1] in html.replace("&#39;", "'")


# --- stop and go on ------------------------------------------------------------------------------------------------


def must_not_run(*args: Any) -> None:
    raise AssertionError("this phase was finished")


def run_again(tiny: str, folder: Path, *more: str) -> list[str]:
    """The phases that a second run did itself."""
    assert demo.main(["--quick", "--model", tiny, "--out", str(folder), *more]) == 0
    return [entry["phase"] for entry in record_of(folder)["times"] if not entry["reused"]]


def test_a_second_run_trains_and_measures_nothing(copy, tiny, monkeypatch):
    monkeypatch.setattr(demo.Bench, "_train", must_not_run)
    monkeypatch.setattr(demo.Bench, "_measure", must_not_run)
    before = record_of(copy)
    assert run_again(tiny, copy) == ["load", "data", "compare"]
    assert record_of(copy)["summary"] == before["summary"]


def test_an_interrupted_run_goes_on_where_it_stopped(copy, tiny, monkeypatch, capsys):
    before = record_of(copy)["measures"]
    for name in ("measure-sft", "train-lfu", "measure-lfu"):  # as if stopped while measuring SFT: its weights are gone
        (copy / "phases" / f"{name}.json").unlink()
    with monkeypatch.context() as patch:

        def stop(self: Any, advance: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(demo.Bench, "_measure", stop)
        assert demo.main(["--quick", "--model", tiny, "--out", str(copy)]) == 130
    assert "run the same command" in capsys.readouterr().err
    assert (copy / "weights" / "sft").is_dir()
    with monkeypatch.context() as patch:
        train = demo.Bench._train
        patch.setattr(
            demo.Bench, "_train", lambda self, method, advance: {"lfu": train}[method](self, method, advance)
        )  # SFT's weights are there: training it again would be a KeyError
        assert run_again(tiny, copy) == ["load", "data", "measure-sft", "train-lfu", "measure-lfu", "compare"]
    after = record_of(copy)["measures"]
    for who in ("base", "sft", "lfu"):
        assert after[who]["answers"]["nll"] == pytest.approx(before[who]["answers"]["nll"], rel=1e-6)
        assert after[who]["match"] == before[who]["match"]
    assert not (copy / "weights").exists()


def test_a_damaged_phase_and_other_settings_are_done_anew(copy, tiny):
    (copy / "phases" / "measure-base.json").write_text('{"key": "cut of', encoding="utf-8")
    assert run_again(tiny, copy) == ["load", "data", "measure-base", "compare"]
    bench = demo.Bench(demo.Settings(model=tiny, seed=1, **demo.QUICK), copy)
    assert bench._saved("measure-base") is None


def test_fresh_does_everything_anew(copy, tiny, monkeypatch):
    monkeypatch.setattr(demo, "check_writable", lambda *a: None)
    monkeypatch.setattr(demo.Bench, "measure_all", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert demo.main(["--quick", "--model", tiny, "--out", str(copy), "--fresh"]) == 130
    assert not (copy / "phases").exists()


# --- mistakes ------------------------------------------------------------------------------------------------------


def one_line_of(capsys: Any) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_folder_that_cannot_be_written(tmp_path, tiny, capsys):
    (tmp_path / "file").write_text("")
    assert demo.main(["--quick", "--model", tiny, "--out", str(tmp_path / "file" / "demo")]) == 2
    assert "choose another --out" in one_line_of(capsys)


def test_a_missing_package(tmp_path, monkeypatch, capsys):
    find = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "jinja2" else find(name))
    assert demo.main(["--out", str(tmp_path)]) == 2
    assert one_line_of(capsys) == "error: the demo needs jinja2: pip install jinja2"


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert demo.main(["--model", str(tmp_path / "none"), "--out", str(tmp_path / "demo")]) == 2
    assert "does not exist" in one_line_of(capsys)


# --- table and sentences -------------------------------------------------------------------------------------------


def scores(answers: float = 1.0, match: int = 10, knowledge: int = 30, prose: float = 3.0) -> dict[str, Any]:
    """40 items each; NLL per token and how many are right."""
    tokens = [10 + i % 5 for i in range(40)]
    nll = lambda level: {"nll": [t * (level + 0.01 * (i % 7)) for i, t in enumerate(tokens)], "tokens": tokens}
    right = lambda n: {
        "correct": [i < n for i in range(40)],
        "correct_any": [i < n for i in range(40)],
        "text": ["x"] * 40,
    }
    return {"answers": nll(answers), "match": right(match), "knowledge": right(knowledge), "prose": nll(prose)}


def test_differences_are_in_the_units_that_the_table_names():
    rows = {row["key"]: row for row in summarise({"base": scores(), "sft": scores(0.5, 30, 10, 3.1), "lfu": scores()})}
    change = {key: row["differences"]["sft-base"] for key, row in rows.items()}
    assert change["answers"]["value"] == pytest.approx(-0.5)
    assert change["match"]["value"] == pytest.approx(50)
    assert change["knowledge"]["value"] == pytest.approx(-50)
    assert change["prose"]["value"] == pytest.approx(100 * (2.718281828**0.1 - 1))
    assert [change[key]["better"] for key in MEASURES] == [1, 1, -1, -1]
    for row in rows.values():
        for cell in (*row["values"].values(), *row["differences"].values()):
            assert cell["low"] <= cell["value"] + 1e-9
            assert cell["value"] <= cell["high"] + 1e-9


@pytest.mark.parametrize(
    ("sft", "lfu", "sentence"),
    [
        (scores(), scores(), "Plain SFT forgot nothing that these probes can see, so there was nothing to save. "
         "Compared with it, LfU kept as much, within the noise and learned as much, within the noise."),
        (scores(0.5, 30, 10, 3.5), scores(0.5, 30, 10, 3.1), "Plain SFT measurably forgot (general knowledge and "
         "plain-prose perplexity). Compared with it, LfU kept more (plain-prose perplexity) and learned as much, "
         "within the noise."),
        (scores(0.5, 30, 30, 3.1), scores(0.8, 10, 30, 3.4), "Plain SFT measurably forgot (plain-prose perplexity). "
         "Compared with it, LfU kept less (plain-prose perplexity) and learned less (held-out answer loss and held-out "
         "exact match)."),
        (scores(0.5, 10, 20, 3.1), scores(0.8, 30, 30, 3.1), "Plain SFT measurably forgot (general knowledge and "
         "plain-prose perplexity). Compared with it, LfU kept more (general knowledge) and learned more by one measure "
         "(held-out exact match) but less by another (held-out answer loss)."),
    ],
)  # fmt: skip
def test_the_closing_sentence_follows_the_intervals(sft, lfu, sentence):
    rows = summarise({"base": scores(), "sft": sft, "lfu": lfu})
    assert closing(rows) == sentence
    assert verdict(rows)[-1] == sentence


def test_a_difference_within_the_noise_is_called_that():
    one, two = scores(), scores()
    two["knowledge"]["correct"] = [i < 30 for i in range(1, 40)] + [True]  # one lost, one gained
    row = {row["key"]: row for row in summarise({"base": one, "sft": two, "lfu": one})}["knowledge"]
    assert row["differences"]["sft-base"]["better"] == 0
    assert knowledge_transitions({"base": one, "sft": two, "lfu": one})["sft"] == {
        "kept": 29, "lost": 1, "gained": 1, "never": 9,
    }  # fmt: skip


def test_zero_has_no_sign():
    assert demo_summary._show("{:+.1f}", -0.01) == "0.0"
    assert demo_summary._show("{:+.1f}", 0.26) == "+0.3"


def test_what_a_model_writes_is_escaped(out):
    record = record_of(out)
    record["measures"]["lfu"]["match"]["text"][0] = '<script>alert("x")</script> & <b>5</b>'
    html = page(record)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
