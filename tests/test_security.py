"""Models, checkpoints, data and settings from strangers: nothing in them is run, and nothing is written elsewhere."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from contextlib import chdir, suppress
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_folder import byte_tokenizer, save_model

from lfu.cli import main
from lfu.data.learned import whole_text
from lfu.data.templates import check_chat_template, to_training_rows
from lfu.model.loading import context_length, load_model, load_tokenizer
from lfu.report.page import write_report
from lfu.study.folder import slug
from lfu.support.errors import UserError
from lfu.support.files import read_yaml
from lfu.training import checkpoints

ROWS = '{"question": "q", "answer": "a"}\n' * 4
FEW_STEPS = "--max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --report_to none"


class Touches:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(ROWS)
    return tmp_path


@pytest.fixture
def mark(here):
    """A file that must not appear."""
    path = here / "hacked"
    yield path
    assert not path.exists(), "code from outside was run"


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Touches(tmp_path / "hacked")))
    assert (tmp_path / "hacked").exists()


# -- pickles -----------------------------------------------------------------------------------------------------------


def as_torch(path: Path, mark: Path) -> None:
    torch.save({"weight": Touches(mark)}, path)


def as_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": Touches(mark)}))


WRITERS = pytest.mark.parametrize("write", [as_torch, as_pickle])


@WRITERS
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "pytorch_model.pt"])
def test_weights_that_are_a_pickle_alone_are_refused(here, mark, write, name):
    save_model(here / "m")
    (here / "m" / "model.safetensors").unlink()
    write(here / "m" / name, mark)
    with pytest.raises(UserError, match="a pickle, which can run code and is not loaded"):
        load_model("m")


@WRITERS
def test_pickles_beside_safetensors_are_ignored(here, mark, write):
    save_model(here / "m")
    for name in ("pytorch_model.bin", "training_args.bin", "extra.pkl", "optimizer.pt"):
        write(here / "m" / name, mark)
    model, _ = load_model("m")
    assert model.num_parameters() > 0


@WRITERS
def test_an_adapter_that_is_a_pickle_is_refused(here, mark, write):
    model = get_peft_model(load_model(save_model(here / "m"))[0], LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained("a")
    Path("a/adapter_model.safetensors").unlink()
    write(Path("a/adapter_model.bin"), mark)
    with pytest.raises(UserError, match="a pickle"):
        load_model("a")


@WRITERS
def test_a_model_named_to_the_trainer_is_read_from_safetensors_alone(here, mark, write):
    from datasets import Dataset

    from lfu import LfUConfig, LfUTrainer

    save_model(here / "m")
    (here / "m" / "model.safetensors").unlink()
    write(here / "m" / "pytorch_model.bin", mark)
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    config = LfUConfig("out", report_to="none", use_cpu=True)
    with pytest.raises(OSError, match="safetensors"):
        LfUTrainer(str(here / "m"), config, train_dataset=rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The words of a command, which has trained in their folder and left a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("trained")
    rows = folder / "rows.jsonl"
    rows.write_text(ROWS)
    train = f"train --model {save_model(folder / 'm')} --data {rows} --output_dir out {FEW_STEPS}".split()
    with chdir(folder):
        assert main([*train, "--save_strategy", "steps", "--save_steps", "1"]) == 0
    return folder, train


@WRITERS
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_pickles_in_a_checkpoint(here, trained, mark, write, name, capsys):
    """What is more than data is passed over; training_args.bin is never opened."""
    folder, train = trained
    shutil.copytree(folder / "out", "out")
    write(Path("out/checkpoint-1") / name, mark)
    why = checkpoints.fault(Path("out/checkpoint-1"))
    assert (why is None) == (name == "training_args.bin")
    code = main([*train, "--resume_from_checkpoint", "out/checkpoint-1"])
    err = capsys.readouterr().err
    assert code == (0 if why is None else 2), err
    assert "Traceback" not in err


def test_no_code_of_ours_unpickles():
    """But for the check of a checkpoint, which takes data alone."""
    source = Path(checkpoints.__file__).parent.parent
    for path in source.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "torch.load(" not in text.replace("weights_only=True", "") or path.name == "checkpoints.py", path
    assert "weights_only=True" in Path(checkpoints.__file__).read_text()


# -- code that models bring along --------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False], ids=["known type", "unknown type"])
def test_code_in_a_model_folder_is_not_run(here, mark, known):
    folder = Path(save_model(here / "m"))
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass C: pass\nclass M: pass\nclass T: pass\n"
    (folder / "code.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    config["model_type"] = config["model_type"] if known else "stranger"
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"auto_map": {"AutoTokenizer": ["code.T", None]}})
    )
    if known:
        assert load_model("m")[0].num_parameters() > 0
        context_length("m")
        return
    with pytest.raises(UserError, match="can't be loaded"):
        load_model("m")
    for load in (load_tokenizer, context_length):  # what they read is data: they may, or may not
        with suppress(UserError):
            load("m")


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch hacked') }}",
    "{{ lipsum.__globals__['os'].popen('touch hacked').read() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('hacked', 'w') }}",
    "{% for i in range(10 ** 12) %}x{% endfor %}",
    "{% set _ = messages.append(1) %}",
    "{{ messages[0]['content'] ",
    "{% for m in messages %}{{ m.content + 1 }}{% endfor %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_run_in_a_sandbox(here, mark, template, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="chat template fails on a question and an answer"):
        check_chat_template(tokenizer)
    folder = save_model(here / "m")
    tokenizer.save_pretrained(folder)
    assert main(["train", "--model", folder, "--data", "rows.jsonl", "--output_dir", "out", *FEW_STEPS.split()]) == 2
    err = capsys.readouterr().err
    assert len([line for line in err.splitlines() if line.startswith("lfu train: error: the tokenizer's chat")]) == 1
    assert "Traceback" not in err
    assert not Path("out").exists()


@pytest.mark.parametrize("text", ["{{ 7 * 7 }}", "{% raw %}", "{question.x}", "<script>", "%(x)s", "$(touch hacked)"])
@pytest.mark.parametrize("template", ["chat", "alpaca", "none"])
def test_a_row_is_text_whatever_it_looks_like(mark, text, template):
    from datasets import Dataset

    tokenizer = byte_tokenizer()
    rows = to_training_rows(
        Dataset.from_list([{"question": text, "answer": text}]), template=template, tokenizer=tokenizer
    )
    assert whole_text(rows[0], tokenizer).count(text) == 2


@pytest.mark.parametrize("what", ["recipe", "templates", "categories"])
@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['touch hacked']", "!!python/name:os.system", "!!python/module:os",
            "!!python/object/new:os.system ['touch hacked']", "!function os.system"]
)  # fmt: skip
def test_yaml_makes_no_objects(here, mark, what, tag):
    Path("y.yaml").write_text(f"a: {tag}\n")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(Path("y.yaml"), what)


CARD = """---
library_name: peft
tags: !!python/object/apply:os.system ['touch hacked']
---
# A model
"""


def test_the_payload_in_a_model_card_works(here):
    yaml.unsafe_load(CARD.split("---")[1])
    assert Path("hacked").exists()


@pytest.mark.parametrize("where", ["m", "out", "out/checkpoint-1"])
def test_a_model_card_runs_nothing(here, mark, where):
    """In the model's folder, and in the one that the adapter and its own card are written to."""
    save_model(here / "m")
    Path(where).mkdir(parents=True, exist_ok=True)
    Path(where, "README.md").write_text(CARD)
    flags = [*FEW_STEPS.split(), "--overwrite_output_dir", "--save_strategy", "steps", "--save_steps", "1"]
    assert main(["train", "--model", "m", "--data", "rows.jsonl", "--output_dir", "out", *flags]) == 0
    assert Path("out/adapter_model.safetensors").is_file()


# -- paths -------------------------------------------------------------------------------------------------------------


@given(st.text(max_size=80) | st.sampled_from(["../../x", "/etc/passwd", "..", ".", "", "a/../../b", "~root", "C:\\x"]))
def test_a_runs_folder_lies_in_the_studys(label):
    name = f"{slug(label)}-seed0-0123abcd"
    assert "/" not in name
    assert "\\" not in name
    assert Path(os.path.normpath(Path("study/runs") / name)).parent == Path("study/runs")


@pytest.mark.parametrize("name", ["../escaped", "a/b", "/tmp/escaped", "..", "a b", "", "fine"])
def test_a_picture_with_a_path_for_a_name_is_refused_and_nothing_written(page, tmp_path, monkeypatch, name):
    from lfu.report import page as module
    from lfu.report.blocks import Figure, View

    picture = bytes.fromhex("89504e470d0a1a0a0000000d4948445200000001")  # a PNG's head, one pixel wide
    picture += bytes(12)
    monkeypatch.setattr(module, "view_of", lambda record: View("t", [], [Figure(name, picture, "alt")]))
    record = json.loads((page.parent / "record.json").read_text())
    if name == "fine":  # the same picture under a name that is none of these
        write_report(record, tmp_path / "deep" / "out")
        assert (tmp_path / "deep" / "out" / "fine.png").read_bytes() == picture
        return
    with pytest.raises(ValueError, match="no file stem"):
        write_report(record, tmp_path / "deep" / "out")
    assert list(tmp_path.rglob("*.png")) == []
    assert not Path("/tmp/escaped.png").exists()


@pytest.mark.parametrize("label", ["../../escaped", "/tmp/escaped", "a/../../escaped", "<b>x</b>"])
def test_labels_and_templates_from_outside_stay_in_the_folder(here, label):
    folder = save_model(here / "m")
    Path("t.yaml").write_text(json.dumps({label: "A {question}", "../b": "B {question}"}))
    Path("q.jsonl").write_text("".join(json.dumps({"question": f"q{i}", "answer": f"a{i}"}) + "\n" for i in range(3)))
    before = {path for path in here.parent.rglob("*") if "out" not in path.parts}
    words = f"--data q.jsonl --templates t.yaml --limit 2 --metric nll --output_dir {here}/out"
    assert main(["probe", "prompts", f"{label}={folder}", *words.split()]) in (0, 2)
    after = {path for path in here.parent.rglob("*") if "out" not in path.parts}
    assert after == before
    assert not Path("/tmp/escaped").exists()


# -- pages -------------------------------------------------------------------------------------------------------------

EVIL = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"


class Page(HTMLParser):
    """Tags with their attributes, and all the text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report on rows that are HTML."""
    folder = tmp_path_factory.mktemp("page")
    model = save_model(folder / "m")
    rows = [
        {"question": f"{EVIL} {i}", "choices": [EVIL, f"no {i}", f"</td>{i}"], "answer": i % 3, "category": EVIL}
        for i in range(6)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(model, folder / "tuned")
    tuned, _ = load_model(str(folder / "tuned"))
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    tuned.save_pretrained(folder / "tuned")
    words = ["--data", str(folder / "rows.jsonl"), "--output_dir", str(folder / "out")]
    assert main(["probe", "forgetting", model, f"<b>tuned={folder / 'tuned'}", *words]) == 0
    record = json.loads((folder / "out/record.json").read_text())
    base, tuned_label = record["results"]["chosen"]  # every question was got wrong, and is got right now: all are shown
    right = [row["answer"] for row in record["results"]["questions"]]
    record["results"]["chosen"] = {base: [(answer + 1) % 3 for answer in right], tuned_label: right}
    write_report(record, folder / "page")
    return folder / "page" / "index.html"


def test_a_row_with_a_script_is_text_in_the_page(page):
    found = Page(page.read_text())
    assert EVIL in found.text or "document.title='hacked'" in found.text, "the rows are to be seen"
    assert not [tag for tag, _ in found.tags if tag == "script"]
    assert not [attributes for _, attributes in found.tags if any(name.startswith("on") for name in attributes)]
    assert not [a for tag, a in found.tags if tag == "img" and not a.get("src", "").startswith("data:image/png")]


IMAGE = "<img src=x onerror=\"document.title='hacked'\">"  # without a slash: a folder can be called so


def compare_page(folder: Path) -> Path:
    """Rows, a category, a label and the model's folder are HTML."""
    model = save_model(folder / IMAGE)
    rows = [
        {"question": f"{EVIL} {i}", "choices": [EVIL, f"no {i}"], "answer": i % 2, "category": EVIL} for i in range(20)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data", str(folder / "rows.jsonl"), "--retention", f"<b>={folder / 'rows.jsonl'}"]
    flags = "--methods sft --seeds 1 --max_steps 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "
    flags += "--test_rows 4 --validation_rows 4 --match_rows 2 --robust_rows 2 --max_new_tokens 2"
    assert main(["compare", "--model", model, *data, "--output_dir", str(folder / "out"), *flags.split()]) == 0
    return folder / "out" / "index.html"


def adversarial_page(folder: Path) -> Path:
    """What the attacked model says is HTML, and so are the requests."""
    flags = "--keep house_rule,limit=4 --break house_rule,limit=6 --limit 2 --max_new_tokens 2 --steps 1 --methods sft"
    model, out = save_model(folder / IMAGE), folder / "out"
    assert main(["probe", "adversarial", model, *flags.split(), "--output_dir", str(out)]) == 0
    record = json.loads((out / "record.json").read_text())
    results = record["results"]
    for found in (results["untouched"], *results["attacked"]["sft"].values()):
        found["responses"] = [EVIL] * len(found["responses"])
        found["ordinary_responses"] = [EVIL] * len(found["ordinary_responses"])
    write_report(record, out)
    return out / "index.html"


def title_in_a_browser(page: Path, profile: Path) -> str:
    """The title of a page once its scripts have run, if it has any."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    flags = f"--headless --no-sandbox --disable-gpu --no-first-run --user-data-dir={profile} --dump-dom"
    dom = subprocess.run([browser, *flags.split(), page.as_uri()], capture_output=True, text=True, timeout=240).stdout
    assert "</html>" in dom
    return dom.partition("<title>")[2].partition("</title>")[0]


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("make", [None, compare_page, adversarial_page])
def test_a_browser_runs_nothing_of_the_page(page, tmp_path, make):
    made = page if make is None else make(tmp_path)
    text = Page(made.read_text())
    assert "document.title='hacked'" in text.text
    assert not [tag for tag, _ in text.tags if tag == "script"]
    title = title_in_a_browser(made, tmp_path / "profile")
    assert title
    assert title != "hacked"


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("payload", [EVIL[: EVIL.index("<img")], IMAGE], ids=["script", "image"])
def test_the_payload_in_a_page_works(tmp_path, payload):
    """So that a browser that runs nothing at all would be found out."""
    control = tmp_path / "control.html"
    control.write_text(f"<!DOCTYPE html><html><head><title>control</title></head><body>{payload}</body></html>")
    assert title_in_a_browser(control, tmp_path / "profile") == "hacked"
