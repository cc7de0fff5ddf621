"""`lfu probe`: records and reports of models whose drift and forgetting are known, and mistakes told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_folder import byte_tokenizer, save_model
from transformers import AutoModelForCausalLM

from lfu import LfUConfig
from lfu.cli import main
from lfu.cli.models import base_and_tuned, labelled
from lfu.cli.output import write_and_show
from lfu.cli.probe import PROBES
from lfu.cli.probes.rows import as_trained
from lfu.data.columns import as_dataset
from lfu.data.learned import tokenised
from lfu.data.templates import to_training_rows
from lfu.evaluation.pieces import answer_pieces
from lfu.report.blocks import Figure, Items, Table, View
from lfu.report.page import view_of
from lfu.support.errors import UserError

pytestmark = pytest.mark.usefixtures("few_pictures")
KINDS = ["forgetting", "drift", "prompts", "noise"]
FILES = {
    "forgetting": ["forgetting.png"],
    "drift": ["hidden-states-by-layer.png", "weights-by-block.png", "weights-by-kind.png"],
    "prompts": ["prompts.png"],
    "noise": ["noise-by-layer.png"],
}
QUICK = {"prompts": ["--max_new_tokens", "3"], "noise": ["--draws", "1"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`; `tuned`, the same with noise; `adapter` on base; `wide` and `other`, which can't be compared with it."""
    root = tmp_path_factory.mktemp("models")
    save_model(root / "base")
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5 * p.std() * torch.randn_like(p) if p.dim() > 1 else 0
    model.save_pretrained(root / "tuned")
    byte_tokenizer().save_pretrained(root / "tuned")
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(root / "base"), LoraConfig(r=2, target_modules=["q_proj"])
    )
    for name, p in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    peft.save_pretrained(root / "adapter")
    config = model.config
    config.intermediate_size = 32
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "wide")
    byte_tokenizer().save_pretrained(root / "wide")
    save_model(root / "other")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["the", "and"])
    tokenizer.save_pretrained(root / "other")
    return root


@pytest.fixture
def here(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, in which the models' names are short."""
    monkeypatch.chdir(tmp_path)
    for folder in folders.iterdir():
        Path(folder.name).symlink_to(folder)
    adapter_config = folders / "adapter" / "adapter_config.json"
    settings = json.loads(adapter_config.read_text()) | {"base_model_name_or_path": str(folders / "base")}
    adapter_config.write_text(json.dumps(settings))
    return tmp_path


def probe(kind: str, *argv: str, limit: int = 4) -> dict[str, Any]:
    """The record of a probe that runs through."""
    command = [
        "probe",
        kind,
        *argv,
        "--limit",
        str(limit),
        "--output_dir",
        "out",
        *([] if "--data" in argv else QUICK.get(kind, [])),
    ]
    assert main(command) == 0
    return json.loads(Path("out/record.json").read_text())


# --- the probes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_two_models_end_to_end(kind, here, capsys):
    record = probe(kind, "base", "tuned")
    out = capsys.readouterr().out
    assert record["kind"] == kind
    assert record["command"].startswith(f"lfu probe {kind} base tuned --limit 4")
    assert list(record["models"]) == ["base", "tuned"]
    assert record["models"]["base"]["weights"] != record["models"]["tuned"]["weights"]
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(
        [*FILES[kind], "index.html", "record.json", "report.md"]
    )
    view = view_of(record)
    assert all(sentence in out for sentence in view.verdict)
    assert "page     out/index.html" in out
    assert any("tuned" in sentence for sentence in view.verdict)
    for block in view.blocks:
        if isinstance(block, Figure):
            assert block.png.startswith(b"\x89PNG")
            assert block.alt


def test_identical_models_forget_nothing(here):
    results = probe("forgetting", "base", "twin=base", limit=20)["results"]
    counts = results["forgetting"]["twin"]
    assert (counts["lost"], counts["gained"], counts["items"], counts["mcnemar_p"]) == (0, 0, 20, 1.0)
    assert results["perplexity"]["twin"]["log_ratio"] == {"value": 0, "low": 0, "high": 0, "level": 0.95}


def test_models_in_different_types_are_told_of(here, capsys):
    AutoModelForCausalLM.from_pretrained("base", dtype=torch.bfloat16).save_pretrained("half")
    byte_tokenizer().save_pretrained("half")
    for dtype, told in (("auto", 1), ("float32", 0)):
        assert main(["probe", "forgetting", "half", "tuned", "--limit", "2", "--dtype", dtype]) == 0
        assert (
            capsys.readouterr().err.count("models were loaded base as bfloat16, tuned as float32: the rounding") == told
        )


def test_what_was_lost_and_gained_can_be_read(here):
    record = probe("forgetting", "base", "tuned", limit=60)
    counts = record["results"]["forgetting"]["tuned"]
    assert counts["lost"] > 0 < counts["gained"]
    lost, gained = (block for block in view_of(record).blocks if isinstance(block, Items))
    assert (len(lost.items), len(gained.items)) == (counts["lost"], counts["gained"])
    for item in lost.items:
        assert item["base chose"] == item["right answer"] != item["tuned chose"]
    for item in gained.items:
        assert item["tuned chose"] == item["right answer"] != item["base chose"]


def test_an_adapter_alone_brings_its_base_and_has_its_distance(here):
    for argv in (["adapter"], ["base", "adapter"]):
        results = probe("drift", *argv)["results"]
        weights = results["weights"]["adapter"]
        assert {part["name"] for part in weights["kinds"] if part["distance"]} == {"self_attn.q_proj"}
        assert len(results["representations"]["adapter"]["layers"]) == 2


def test_identical_models_do_not_drift(here):
    record = probe("drift", "base", "twin=base")
    assert record["results"]["weights"]["twin"]["overall"]["relative"] == 0
    drift = record["results"]["representations"]["twin"]
    assert drift["cka"] == pytest.approx([1, 1])
    assert [cosine["value"] for cosine in drift["cosine"]] == pytest.approx([1, 1])
    assert "bit for bit" in view_of(record).verdict[0]


def test_drift_on_the_answers_of_questions(here):
    rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(3)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    record = probe("drift", "base", "tuned", "--texts", "rows.jsonl")
    assert record["results"]["representations"]["tuned"]["tokens"] == 3 * len(b"#### 1") + 3 * 2  # and the turn's end
    assert record["settings"]["tokens of"] == "rows.jsonl, answers (3)"


SHAPES: list[dict[str, Any]] = [
    {"question": "One?", "answer": "  Yes.\n"},
    {"instruction": "Name it", "input": "the sea", "output": "Sea"},
    {"question": "One?", "answer": "Yes.", "system": "Be short."},
    {"conversations": ["One?", "Yes.", "Two?", "No."]},
    {"prompt": "Say a:", "completion": " b"},
    {"question": "Which?", "choices": ["x", "yy"], "answer": 1},
]


@pytest.mark.parametrize("template", ["auto", "alpaca"])
@pytest.mark.parametrize("row", SHAPES)
def test_a_row_is_read_as_it_is_trained_on(here, row, template, tmp_path):
    """By the probes that score answers: the trainer's tokens, all of them, and the same ones counted."""
    tokenizer, own = byte_tokenizer(), "completion" in row
    template = "auto" if own else template
    dataset = as_dataset([row])
    pairs, render = as_trained(dataset, "data", template, tokenizer)
    (piece,) = answer_pieces(tokenizer, pairs, render=render)
    made = to_training_rows(dataset, template=template, tokenizer=tokenizer)
    (trained,) = tokenised(made, tokenizer, LfUConfig(str(tmp_path), use_cpu=True))
    assert piece.ids == trained["input_ids"]
    learned = [place for place, label in enumerate(trained["labels"]) if label != -100]
    assert [*range(piece.start, len(piece.ids))] == learned[-piece.tokens :]


def test_prompts_that_training_leaves_as_they_are_are_told(here, capsys):
    Path("rows.jsonl").write_text('{"prompt": "Say a:", "completion": " b"}\n' * 2)
    assert probe("prompts", "base", "--data", "rows.jsonl")["results"]["rows"][0] == {
        "question": "Say a:",
        "answer": " b",
    }
    assert "lfu train takes prompt and completion as they are" in capsys.readouterr().err


def test_columns_of_other_sets_are_read_as_questions_and_answers(here, capsys):
    dataset = as_dataset([{"prompt": " Hi?", "response": "Ho. ", "system": "Be short."}])
    pairs, render = as_trained(dataset, "data x", "auto", byte_tokenizer())
    assert pairs == [{"question": " Hi?", "answer": "Ho. "}]
    assert render(byte_tokenizer(), pairs[0])[1] == "Ho. <|im_end|>\n"
    assert "what the columns system hold is left out" in capsys.readouterr().err


def test_no_noise_changes_nothing(here):
    record = probe("noise", "base", "tuned", "--noise_alpha", "0")
    for lines in record["results"]["by_layer"].values():
        assert [layer["value"] for layer in lines] == pytest.approx([1, 1])
    assert record["results"]["difference"]["tuned"]["value"] == pytest.approx(0)


def test_prompts_on_choices_and_on_templates_of_the_users(here):
    rows = [
        {"question": "Up?", "choices": ["yes", "no"], "answerKey": "B"},
        {"question": "Down?", "choices": ["a", "b"]},
    ]
    rows[1]["answerKey"] = "A"
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("mine.yaml").write_text('one: "{question}"\ntwo: "Well, {question}\\n{choices}"\n')
    record = probe("prompts", "base", "--data", "rows.jsonl", "--templates", "mine.yaml", "--metric", "accuracy")
    assert record["settings"]["task"] == "multiple_choice"
    assert list(record["results"]["scores"]["base"]) == ["one", "two"]
    assert record["results"]["metric"] == "accuracy"
    assert record["results"]["scores"]["base"]["one"]["correct"] in (
        [a, b] for a in (True, False) for b in (True, False)
    )


def test_prompts_on_instructions_are_judged_by_nll(here):
    rows = [{"instruction": "Say it", "input": "loud", "output": "it"}] * 2
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    record = probe("prompts", "base", "--data", "rows.jsonl")
    assert record["results"]["metric"] == "nll"
    assert record["results"]["rows"][0] == {"question": "Say it\n\nloud", "answer": "it"}
    assert list(record["results"]["spread"]["base"]) == ["nll"]


def test_the_same_command_measures_the_same(here):
    first, second = (probe("noise", "base", "tuned", "--seed", "3") for _ in range(2))
    assert first["results"] == second["results"]
    assert probe("noise", "base", "tuned", "--seed", "4")["results"] != first["results"]


def test_noise_of_models_of_two_depths(here, folders):
    model = AutoModelForCausalLM.from_pretrained("base", num_hidden_layers=1)
    model.save_pretrained("shallow")
    byte_tokenizer().save_pretrained("shallow")
    record = probe("noise", "base", "shallow")
    assert {label: len(lines) for label, lines in record["results"]["by_layer"].items()} == {"base": 2, "shallow": 1}


# --- names of models -----------------------------------------------------------------------------------------------


def test_labels(here):
    assert base_and_tuned(["smollm2", "runs/sft", "x=runs/lfu"], "drift") == {
        "base": "smollm2", "sft": "runs/sft", "x": "runs/lfu",
    }  # fmt: skip
    assert base_and_tuned(["v=smollm2", "a/b"], "drift") == {"v": "smollm2", "b": "a/b"}
    assert labelled(["org/model", "its name=./odd=path/x"]) == {"model": "org/model", "its name": "./odd=path/x"}
    Path("lr=3").mkdir()
    assert labelled(["lr=3"]) == {"lr=3": "lr=3"}
    assert list(base_and_tuned(["adapter"], "drift")) == ["base", "adapter"]


def test_two_models_of_one_label():
    with pytest.raises(UserError, match="two models are called 'sft': tell them apart, as in one=a/sft"):
        labelled(["a/sft", "b/sft"])


# --- command line --------------------------------------------------------------------------------------------------


def test_help(capsys):
    assert main(["probe", "--help"]) == main(["probe"]) == 0
    out = capsys.readouterr().out
    assert "usage: lfu probe KIND" in out
    assert all(kind in out for kind in PROBES)


@pytest.mark.parametrize("kind", KINDS)
def test_each_probe_has_help(kind, capsys):
    assert main(["probe", kind, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: lfu probe {kind}" in out
    assert "--output_dir" in out


WRONG = [
    (["sizs"], "unknown probe 'sizs'"),
    (["drift"], "required: BASE TUNED"),
    (["drift", "base"], "one model is not enough: lfu probe drift BASE TUNED"),
    (["drift", "base", "nowhere/at/all"], "nowhere/at/all does not exist"),
    (["drift", "base", "wide"], "wide against base: model.layers.0.mlp.gate_proj.weight is 24 x 16 in the base"),
    (["drift", "base", "other"], "other and base have different vocabularies"),
    (["forgetting", "base", "other"], "other and base have different vocabularies"),
    (["forgetting", "base", "tuned", "base=tuned"], "two models are called 'base'"),
    (["forgetting", "base", "tuned", "--data", "pairs.jsonl"], "data pairs.jsonl: row 1: no list of at least two"),
    (["forgetting", "base", "tuned", "--data", "missing.jsonl"], "missing.jsonl: no such file"),
    (["forgetting", "base", "tuned", "--texts", "pairs.jsonl"], "columns question, answer; needed is one called text"),
    (["drift", "base", "tuned", "--texts", "blank.jsonl"], "texts blank.jsonl: row 2 has no text"),
    (["drift", "base", "tuned", "--texts", "short.jsonl"], "text 1 has fewer than three tokens"),
    (["noise", "base", "--data", "blank.jsonl"], "no column of questions among text; accepted: question, prompt"),
    (
        ["noise", "base", "--data", "unanswered.jsonl"],
        "data unanswered.jsonl: 1 of 2 data rows have no answer",
    ),
    (["prompts", "base", "--data", "unanswered.jsonl"], "data unanswered.jsonl, row 2 has no answer"),
    (["noise", "base", "--data", "talk.jsonl", "--template", "alpaca"], "data talk.jsonl has messages: drop it"),
    (["noise", "base", "--noise_alpha", "-1"], "--noise_alpha: must be a finite number from 0"),
    (["noise", "base", "--draws", "0"], "--draws: must be a whole number from 1"),
    (["noise", "base", "--seed", "-1"], "must be a whole number from 0, got '-1'"),
    (["noise", "base", "--limit", "0"], "must be a whole number from 1, got '0'"),
    (["noise", "base", "--batch_size", "many"], "must be a whole number from 1, got 'many'"),
    (["noise", "base", "--output_dir", "pairs.jsonl"], "output folder pairs.jsonl is a file"),
    (["prompts", "base", "--templates", "missing.yaml"], "templates missing.yaml: can't be read"),
    (["prompts", "base", "--templates", "bad.yaml"], "templates bad.yaml: 'two': has no {question} in it"),
    (["prompts", "base", "--data", "pairs.jsonl", "--metric", "accuracy"], "no accuracy: use --metric nll"),
    (["prompts", "base", "--metric", "speed"], "invalid choice: 'speed'"),
    (["prompts", "base", "--max_new_tokens", "0"], "--max_new_tokens: must be a whole number from 1"),
    (["prompts", "base", "--tempaltes", "x"], "unrecognized arguments"),
    # what would do nothing
    (["prompts", "base", "--data", "pairs.jsonl", "--max_new_tokens", "9"], "--max_new_tokens is for answers that end"),
    (["noise", "base", "--data_split", "train"], "--data_split says which part of --data is read"),
    (["noise", "base", "--data", "pairs.jsonl", "--data_split", "train"], "pairs.jsonl is a single file: drop it"),
    (["forgetting", "base", "tuned", "--data_config", "main"], "--data_config says which part of --data is read"),
    (["forgetting", "base", "tuned", "--anew"], "--anew is for a single run"),
    (["drift", "base", "tuned", "--template", "alpaca"], "--template is for questions"),
]


@pytest.mark.parametrize(
    ("argv", "message"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_wrong_inputs(here, argv, message, capsys):
    Path("pairs.jsonl").write_text('{"question": "Hi?", "answer": "Ho."}\n')
    Path("blank.jsonl").write_text('{"text": "some text here"}\n{"text": " "}\n')
    Path("short.jsonl").write_text('{"text": "no"}\n')
    Path("unanswered.jsonl").write_text('{"question": "Hi?", "answer": "Ho."}\n{"question": "Hi?", "answer": ""}\n')
    talk = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]
    Path("talk.jsonl").write_text(json.dumps({"messages": talk}))
    Path("bad.yaml").write_text('one: "{question}"\ntwo: "nothing"\n')
    before = sorted(here.rglob("*"))
    assert main(["probe", *argv]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("lfu probe: base:")]
    assert len([line for line in errors if line.startswith("lfu probe: error:")]) == 1
    assert message in errors[-1]
    assert not any("Traceback" in line for line in errors)
    assert sorted(here.rglob("*")) == before


def test_a_table_that_is_too_wide_for_the_terminal_loses_nothing(tmp_path, monkeypatch, capsys):
    """Labels that differ at their end stay different."""
    labels = ["sharing=0.125", "sharing=0.375"]
    table = Table(["", *["a longish heading"] * 9], [[label, *["0.123456"] * 9] for label in labels])
    view = View("A title", [], [table])
    monkeypatch.setattr("lfu.report.page.write_report", lambda record, folder: view)
    monkeypatch.setenv("COLUMNS", "60")
    write_and_show({}, tmp_path)
    out = capsys.readouterr().out
    assert "…" not in out
    for label in labels:
        assert label in "".join(line.split()[0] for line in out.splitlines() if line.strip() and line[0] != "─")
