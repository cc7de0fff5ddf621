"""Loading rows: every kind of file, folders, the built-in set, and what is said about broken ones."""

from __future__ import annotations

import json
from decimal import Decimal

import datasets.exceptions
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from lfu.data.load import load_rows
from lfu.data.turns import text_of
from lfu.support.errors import UserError

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]


def write(path, rows=ROWS):
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        path.write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_reads_each_kind_of_file(tmp_path, suffix):
    path = write(tmp_path / f"rows.{suffix}")
    assert load_rows(str(path)).to_list() == ROWS
    assert load_rows(str(path), limit=2).to_list() == ROWS[:2]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, suffix):
    path = write(tmp_path / f"rows.{suffix}")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_rows(str(path)).to_list() == ROWS


@pytest.mark.parametrize(
    "text", ['{"question": "q", "answer": "a"}\n{"question": "r"}\n', '{"data": [{"question": "q"}]}']
)
def test_json_in_its_other_shapes(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert load_rows(str(path))[0]["question"] == "q"


MIXED = [
    {"a": 4, "b": {"x": 1}, "c": "4"},
    {"a": 3.5, "b": {"y": None}, "c": 10**40},
    {"a": "text", "b": [{"x": []}, {"y": "\ud800"}], "c": True},
    {"a": None, "b": "null", "c": 0.12345678901234567},
]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_every_value_is_what_it_is_in_the_file(tmp_path, suffix):
    rows = load_rows(str(write(tmp_path / f"rows.{suffix}", MIXED)))
    for found in (list(rows), [rows[i] for i in range(4)], list(rows.select(range(4)))):
        assert json.dumps(found) == json.dumps(MIXED)  # 4 and 4.0 are alike to ==, and True and 1


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_numbers_are_spelled_as_in_the_file(tmp_path, suffix):
    """Where people read them. Arguments and schemas of tools stay numbers."""
    path = tmp_path / f"rows.{suffix}"
    numbers = ["1.50", "1E5", "0.10000000000000000555", "12345678901234567.5", "2.5", "4", "-3"]
    call = '{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"price": 1.50}}]}'
    path.write_text(f'{{"question": "q", "choices": [{", ".join(numbers)}], "answer": 1.50, "messages": [{call}]}}\n')
    (row,) = load_rows(str(path))
    assert [text_of(value, "") for value in row["choices"]] == numbers
    assert row["answer"] == "1.50"
    assert row["messages"][0]["tool_calls"][0]["arguments"] == {"price": 1.5}


def test_a_file_may_be_one_conversation(tmp_path):
    for name, turn in (
        ("messages", {"role": "user", "content": "q"}),
        ("conversations", {"from": "gpt", "value": "a"}),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({name: [turn, turn]}))
        assert load_rows(str(path))[:] == {name: [[turn, turn]]}


def test_what_arrow_filled_into_a_parquet_file_is_left_out(tmp_path):
    calls = [{"arguments": {"city": "Bergen"}}], [{"arguments": {"a": 2}}]
    path = write(tmp_path / "rows.parquet", [{"calls": call} for call in calls])
    assert load_rows(str(path))["calls"] == list(calls)


def test_numbers_of_parquet_columns_are_spelled_as_they_were(tmp_path):
    """A 32-bit 0.1 is 0.10000000149011612 as a Python number, and Python spells a small decimal 1E-8."""
    narrow, small = pa.array([0.1, 3.0], pa.float32()), pa.array([Decimal("0.00000001"), None], pa.decimal128(20, 8))
    lists = pa.array([[0.1, 2.5], []], pa.list_(pa.float32()))
    wide = pa.array([0.10000000149011612, 0.1])
    table = pa.table({"narrow": narrow, "small": small, "lists": lists, "wide": wide})
    pq.write_table(table, tmp_path / "rows.parquet")
    wanted = {"narrow": 0.1, "small": "0.00000001", "lists": [0.1, 2.5], "wide": 0.10000000149011612}
    assert load_rows(str(tmp_path / "rows.parquet"))[0] == wanted


def test_a_parquet_map_is_an_object(tmp_path):
    column = pa.array([[("enable_thinking", False)], []], pa.map_(pa.string(), pa.bool_()))
    pq.write_table(pa.table({"options": column}), tmp_path / "rows.parquet")
    assert load_rows(str(tmp_path / "rows.parquet"))["options"] == [{"enable_thinking": False}, {}]


def test_a_parquet_column_that_is_there_twice_is_refused(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["answer"] * 2), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet: there are two columns 'answer'"):
        load_rows(str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("more.jsonl.gz", "more.jsonl.gz can't be read"), ("more.jsonl", "more.jsonl is named after no split")],
)
def test_a_file_of_a_folder_that_would_be_left_out_is_refused(tmp_path, name, message):
    write(tmp_path / "train.jsonl")
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert len(load_rows(str(tmp_path))) == 3
    write(tmp_path / name)
    with pytest.raises(UserError, match=message):
        load_rows(str(tmp_path))


def test_files_named_after_no_split_are_the_training_set_beside_a_test_set(tmp_path):
    write(tmp_path / "rows.jsonl", ROWS[:2])
    write(tmp_path / "test.jsonl", ROWS[2:])
    assert load_rows(str(tmp_path)).to_list() == ROWS[:2]
    assert load_rows(str(tmp_path), split="test").to_list() == ROWS[2:]


def test_a_parquet_column_of_bytes_is_text(tmp_path):
    """As writers do that name no type of text; learned would be the Python spelling of the bytes."""
    path = write(tmp_path / "rows.parquet", [{"answer": "é".encode()}, {"answer": b"a\xff"}])
    assert list(load_rows(str(path))) == [{"answer": "é"}, {"answer": "a\udcff"}]  # which is refused where it is used


def test_a_csv_column_without_a_name_is_no_column(tmp_path):
    (tmp_path / "rows.csv").write_text(",question,answer\n0,q,NA\n1,r,3.50\n")
    assert load_rows(str(tmp_path / "rows.csv")).to_list() == [
        {"question": "q", "answer": "NA"}, {"question": "r", "answer": "3.50"}
    ]  # fmt: skip


def test_a_column_that_only_later_rows_have_is_kept(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "q"}, {"question": "r", "answer": "a"}])
    assert load_rows(str(path))["answer"] == [None, "a"]


def test_a_folder_is_read_by_split(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", ROWS[:1])
    write(tmp_path / "train-00001-of-00002.jsonl", ROWS[1:2])
    write(tmp_path / "dev.jsonl", ROWS[2:])
    assert load_rows(str(tmp_path)).to_list() == ROWS[:2]
    assert load_rows(str(tmp_path), split="validation").to_list() == ROWS[2:]
    with pytest.raises(UserError, match=r"no file for split 'test'.*train, validation"):
        load_rows(str(tmp_path), split="test")


def test_a_folder_without_split_names_is_the_training_set(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:1])
    write(tmp_path / "b.csv", ROWS[1:])
    assert load_rows(str(tmp_path)).to_list() == ROWS


def test_the_built_in_set():
    assert len(load_rows("word_problems:7")) == 7
    assert len(load_rows("word_problems:7", limit=3)) == 3
    train, test = load_rows("word_problems:7"), load_rows("word_problems:7", split="test")
    assert not set(train["question"]) & set(test["question"])


BROKEN = {
    "line.jsonl": ('{"a": 1}\n{"a": 2\n', r"line\.jsonl, line 2: not valid JSON"),
    "list.jsonl": ("[1, 2]\n", r"line 1: a row must be an object"),
    "rows.json": ("[{]", r"rows\.json: not valid JSON"),
    "number.json": ("3", "must hold a list of rows"),
    "inner.json": ('[{"a": 1}, 2]', "row 2: must be an object"),
    "short.csv": ("a,b\n1,2\n3\n", r"short\.csv, line 3: .*2 fields"),
    "long.csv": ("a,b\n1,2,3\n", r"long\.csv, line 2: .*2 fields"),
    "quote.csv": ('a,b\n1,"2\n', r"quote\.csv, line \d: not valid CSV"),
    "bad.parquet": ("no parquet", "not a readable parquet file"),
    "twice.jsonl": ('{"a": 1}\n{"a": 1, "a": 2}\n', r"twice\.jsonl, line 2: an object has the key 'a' twice"),
    "inside.json": ('[{"a": {"b": 1, "b": 1}}]', r"inside\.json: an object has the key 'b' twice"),
    "twice.csv": ("a,b,a\n1,2,3\n", r"twice\.csv: the header names column 'a' twice"),
    "unnamed.csv": ("a,b,\n1,2,\n1,2,3\n", r"unnamed\.csv, line 3: .*without a name"),
    "both.csv": (",a,b,\n0,1,2,x\n", r"both\.csv, line 2: .*without a name"),
    "empty.jsonl": ("\n\n", "empty"),
    "empty.json": ("[]", "empty"),
    "empty.csv": ("a,b\n", "empty"),
    "rows.pkl": ("x", r"can't read \.pkl; use \.json"),
    "rows.py": ("x", r"can't read \.py"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_line(tmp_path, name):
    text, message = BROKEN[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_rows(str(tmp_path / name))


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_rows(str(tmp_path / "rows.jsonl"))


def test_a_missing_file_gets_close_names(tmp_path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"no such file.*there is train\.jsonl"):
        load_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match="There is no folder"):
        load_rows(str(tmp_path / "nowhere" / "train.jsonl"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("word_problems:many", {}, "number of rows after the colon"),
        ("word_problems:0", {}, "at least 1"),
        ("word_problems", {"split": "dev"}, "unknown split 'dev'"),
        ("word_problems", {"limit": 0}, "must be at least 1"),
        ("nobody/no-such-set", {}, "from the hub"),
    ],
)
def test_what_else_can_be_wrong(name, options, message):
    with pytest.raises(UserError, match=message):
        load_rows(name, **options)


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="holds no"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize("script", [False, True])
@pytest.mark.parametrize("name", ["DatasetGenerationError", "NonMatchingSplitsSizesError", "NonMatchingChecksumError"])
def test_whatever_goes_wrong_on_the_hub_is_one_line(monkeypatch, name, script):
    def load_dataset(*args, revision=None, **options):
        if script and revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found x.py")
        raise getattr(datasets.exceptions, name)("it went wrong") from KeyError("the cause")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"data a/b: .*(it went wrong|the cause)"):
        load_rows("a/b")


def test_a_hub_set_with_a_script_is_taken_from_its_parquet_copy(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, revision=None):
        asked.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found lima.py")
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_rows("GAIR/lima", limit=2).to_list() == ROWS[:2]
    assert asked == [None, "refs/convert/parquet"]
