"""Configurations and data of every wrong kind: a result or one UserError, never another exception."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_folder import byte_tokenizer
from trl import SFTConfig

from lfu import recipes
from lfu.cli import arguments
from lfu.cli.arguments import parse
from lfu.data.duplicates import repeated, shared
from lfu.data.learned import tokenised
from lfu.data.load import load_rows
from lfu.data.templates import TEMPLATES, to_training_rows
from lfu.evaluation.prompts import read_templates
from lfu.support.errors import UserError, one_line
from lfu.support.files import read_yaml

FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
SFT = SFTConfig("out", report_to="none", bf16=False, use_cpu=True)
SFT.assistant_only_loss = None  # as lfu train has it: the answers
TOKENIZERS = [byte_tokenizer(), byte_tokenizer(chat=False)]

WRONG = ["", " ", "abc", "nan", "inf", "-inf", "-1", "0", "1e999", "1.5", "true", "null", "None", "[]", "{}", "{",
         "[1,",
         '{"a": 1}', "[[[[", "../../x", "/dev/null", "a\nb", "\x00", "ü\U0001f600", "\ud800", "9" * 5000, "x" * 10_000,
         "!!python/object:os.system", "{{ 7 * 7 }}", "%s%n", "--data", "-"]  # fmt: skip


def fine_or_one_line(call) -> str | None:
    """None if `call` works, else the message of its UserError."""
    try:
        call()
    except UserError as error:
        return one_line(error)
    return None


# -- configurations ----------------------------------------------------------------------------------------------------


def every_flag() -> list[str]:
    parser = arguments.TrainParser((arguments.LfUConfig, arguments.ModelArguments, arguments.DataArguments))
    return sorted(set(parser.flags().values()))


FLAGS = every_flag()
ENOUGH = ["--model", "m", "--data", "d", "--output_dir", "out"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def a_flag(flag: str, value: str) -> str | None:
    return fine_or_one_line(lambda: parse([*ENOUGH, f"--{flag}={value}"]))


@pytest.mark.parametrize("text", ["3", "[]", "null", '{"zero_optimization": 2}'])
@pytest.mark.parametrize("in_a_file", [False, True])
def test_json_that_is_no_configuration_of_deepspeeds(text, in_a_file):
    if in_a_file:
        Path("ds.json").write_text(text)
    assert "give a JSON file with DeepSpeed's configuration" in (
        a_flag("deepspeed", "ds.json" if in_a_file else text) or ""
    )


def test_there_are_flags_to_try():
    assert len(FLAGS) > 150
    assert {"alpha", "lam", "learning_rate", "data", "model_name_or_path"} <= set(FLAGS)
    assert a_flag("alpha", "0.1") is None
    assert "alpha" in (a_flag("alpha", "nan") or "")


@FEW
@given(st.sampled_from(FLAGS), st.sampled_from(WRONG))
def test_a_flag_with_a_wrong_value(flag, value):
    a_flag(flag, value)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_every_flag_with_every_wrong_value(capsys):
    for flag in FLAGS:
        for value in WRONG:
            a_flag(flag, value)
    with capsys.disabled():
        print(f"\n{len(FLAGS)} flags with {len(WRONG)} values each")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(WRONG),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def a_recipe(settings_: dict) -> None:
    Path("r.yaml").write_text(json.dumps(settings_), encoding="utf-8")  # JSON is YAML
    fine_or_one_line(lambda: parse(["--config", "r.yaml", *ENOUGH]))


RECIPES = st.dictionaries(st.sampled_from(FLAGS) | st.text(max_size=8), VALUES, max_size=3)


@FEW
@given(RECIPES)
@example({"help": []})
def test_a_recipe_of_anything(settings_):
    a_recipe(settings_)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@MANY
@given(RECIPES)
def test_many_recipes_of_anything(settings_):
    a_recipe(settings_)


def yaml_text(text: bytes) -> None:
    path = Path("y.yaml")
    path.write_bytes(text)
    fine_or_one_line(lambda: recipes.parts("y.yaml"))
    try:
        fine_or_one_line(lambda: read_templates(path))
    except ValueError as error:  # the probe's own word for a template that is none
        if not str(error).startswith(f"templates {path}: "):
            raise


YAMLISH = st.text(alphabet="ab1:-[]{}&*!|>#'\"\\\n\t ,?%@.", max_size=60).map(str.encode) | st.binary(max_size=60)


@FEW
@given(YAMLISH)
def test_yaml_of_any_bytes(text):
    yaml_text(text)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@MANY
@given(YAMLISH)
def test_yaml_of_many_bytes(text):
    yaml_text(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alpha: 1\n  lam: 2\n", "line 2"),
        ("a: [1, 2\nb: 3\n", "line 2"),
        ("a: 2001-99-99\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['touch hacked']\n", "python/object"),
        ("a: " + "[" * 3000, "not valid YAML"),
        ("- alpha\n", "must be a mapping"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(8)
        ), "aliases"),
        ("a: &a [*a]\n", "aliases"),
    ],
    ids=["indent", "bracket", "date", "object", "deep", "list", "bomb", "endless"],
)  # fmt: skip
def test_what_yaml_can_be(text, says):
    Path("y.yaml").write_text(text)
    assert says in (fine_or_one_line(lambda: recipes.parts("y.yaml")) or "")
    assert not Path("hacked").exists()


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "utf-32"])
def test_yaml_in_another_encoding(encoding):
    Path("y.yaml").write_text("alpha: ü\n", encoding=encoding)
    message = fine_or_one_line(lambda: read_yaml(Path("y.yaml"), "recipe")) or ""
    assert "save it as UTF-8" in message
    assert {"utf-16": "UTF-16", "latin-1": "Latin-1", "utf-32": "UTF-32"}[encoding] in message


def test_a_byte_order_mark_in_yaml():
    Path("y.yaml").write_text("alpha: 1\n", encoding="utf-8-sig")
    assert recipes.read(Path("y.yaml")) == {"alpha": 1}


# -- rows --------------------------------------------------------------------------------------------------------------

NAMES = ["question", "answer", "answerKey", "choices", "instruction", "input", "context", "output", "response",
         "messages",
         "prompt", "completion", "conversations", "text", "tools", "chat_template_kwargs", "questoin"]  # fmt: skip
TURNS = st.lists(
    st.fixed_dictionaries({}, optional={"role": VALUES | st.just("user") | st.just("assistant"), "content": VALUES,
                                        "from": VALUES | st.just("human"), "value": VALUES}), max_size=3,
)  # fmt: skip
CELLS = VALUES | TURNS | st.text(min_size=1, max_size=20)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), CELLS, max_size=4), max_size=4
) | st.integers(0, len(NAMES) - 1).flatmap(
    lambda i: st.lists(st.fixed_dictionaries({NAMES[i]: CELLS, NAMES[i - 1]: CELLS}), min_size=1, max_size=3)
)


def rows_of_anything(rows: list[dict], template: str) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("rows.json").write_text(json.dumps(rows), encoding="utf-8")
    fine_or_one_line(lambda: load_rows("rows.json"))

    def as_train_does() -> None:
        found = load_rows("rows.jsonl")
        for tokenizer in TOKENIZERS:
            made = to_training_rows(found, template=template, tokenizer=tokenizer)
            assert len(made) == len(found), "rows may not get lost"
            assert len(tokenised(made, tokenizer, SFT)) == len(made)
            repeated(made), shared(made, made)

    fine_or_one_line(as_train_does)


@FEW
@given(ROWS, st.sampled_from(TEMPLATES))
@example([{"conversations": {"": None}}], "auto")
def test_rows_of_anything(rows, template):
    rows_of_anything(rows, template)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@MANY
@given(ROWS, st.sampled_from(TEMPLATES))
def test_many_rows_of_anything(rows, template):
    rows_of_anything(rows, template)


JSONISH = st.binary(max_size=80) | st.text(alphabet='{}[]":,\\eE+-.0123456789tfnaul\n ', max_size=80).map(str.encode)


def bytes_as(suffix: str, content: bytes) -> None:
    Path(f"f{suffix}").write_bytes(content)
    fine_or_one_line(lambda: load_rows(f"f{suffix}"))


@FEW
@given(st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]), JSONISH)
def test_files_of_any_bytes(suffix, content):
    bytes_as(suffix, content)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@MANY
@given(st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]), JSONISH)
def test_many_files_of_any_bytes(suffix, content):
    bytes_as(suffix, content)


GOOD = {"question": "What is 1 + 1?", "answer": "2, é"}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-32", "utf-8-sig", "utf-8"])
def test_encodings(suffix, encoding):
    text = {
        ".csv": 'question,answer\nWhat is 1 + 1?,"2, é"\n',
        ".json": json.dumps([GOOD], ensure_ascii=False),
        ".jsonl": json.dumps(GOOD, ensure_ascii=False) + "\n",
    }[suffix]
    Path(f"f{suffix}").write_text(text, encoding=encoding)
    if encoding.startswith("utf-8"):
        assert load_rows(f"f{suffix}")[0] == GOOD
        return
    message = fine_or_one_line(lambda: load_rows(f"f{suffix}")) or ""
    assert "save it as UTF-8" in message
    assert {"latin-1": "Latin-1"}.get(encoding, encoding.upper()) in message


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_one_line_in_another_encoding_is_named(suffix):
    """Far behind what a decoder takes at a time."""
    whole = {
        ".csv": ["question,answer", *['q,"é"'] * 5000],
        ".jsonl": [json.dumps(GOOD, ensure_ascii=False)] * 5001,
        ".json": ["[", *[json.dumps(GOOD, ensure_ascii=False) + ","] * 4999, json.dumps(GOOD), "]"],
    }[suffix]
    lines = [line.encode("latin-1" if number == 4321 else "utf-8") for number, line in enumerate(whole, 1)]
    Path(f"f{suffix}").write_bytes(b"\n".join(lines))
    byte = whole[4320].index("é") + 1
    message = fine_or_one_line(lambda: load_rows(f"f{suffix}")) or ""
    assert f"not UTF-8 text (line 4321, byte {byte}; Latin-1 or Windows-1252, perhaps)" in message


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_a_truncated_file_is_told_or_read_up_to_its_last_whole_row(suffix):
    """Cut anywhere: never a traceback, never half a row."""
    rows = Dataset.from_list([{"question": f"q{i}", "answer": "a" * i} for i in range(1, 5)])
    name = f"f{suffix}"
    if suffix == ".parquet":
        rows.to_parquet(name)
    elif suffix == ".csv":
        rows.to_csv(name)
    else:
        rows.to_json(name, lines=suffix == ".jsonl")
    whole = Path(name).read_bytes()
    for end in range(0, len(whole), max(1, len(whole) // 60)):
        Path(name).write_bytes(whole[:end])
        message = fine_or_one_line(lambda: load_rows(name))
        if message is None and suffix != ".csv":  # a CSV field that is cut is a field
            assert all(row in rows.to_list() for row in load_rows(name).to_list())


def test_a_folder_where_a_file_should_be():
    Path("rows.jsonl").mkdir()
    assert "holds no .json" in (fine_or_one_line(lambda: load_rows("rows.jsonl")) or "")
    Path("r.yaml").mkdir()
    assert "no such file" in (fine_or_one_line(lambda: parse(["--config", "r.yaml", *ENOUGH])) or "")


def test_duplicates_are_counted():
    rows = [{"prompt": "a", "completion": "1"}, {"prompt": "a", "completion": "1"}, {"prompt": "b", "completion": "2"}]
    assert repeated(rows) == 1
    assert shared([{"prompt": "a", "completion": "another"}, {"prompt": "c", "completion": "1"}], rows) == 1
    assert shared([{"text": "x"}, {"text": "y"}], [{"text": "y"}]) == 1


@FEW
@given(st.lists(st.sampled_from(string.ascii_lowercase), max_size=30))
def test_repeated_counts_what_a_set_loses(letters):
    assert repeated({"text": letter} for letter in letters) == len(letters) - len(set(letters))
