"""Every command and every program that README and docs show runs as it is written, on a tiny model and tiny rows.

What the pages name is there under that name: models of the hub are folders, data sets of the hub are four rows,
trainings stop after one step and answers after two tokens. Commands that are alike but for such names run once. The
commands in `READ` are read and checked, not run, for the reason beside them.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import sys
from functools import cache, partial
from pathlib import Path

import datasets
import pytest
import transformers
from datasets import Dataset
from forgetting.runs import few
from harness_data import write_local
from peft import LoraConfig, get_peft_model
from tiny_folder import save_model
from transformers import AutoModelForCausalLM

from lfu import LfUConfig
from lfu.cli import VERBS, main
from lfu.data import probes, word_problems
from lfu.evaluation import batching
from lfu.support.extras import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]
MODELS = ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B", "my-model", "BASE", "TUNED", "MODEL", "M"]
TUNED = ["runs/mine", "runs/sft", "runs/lfu", "sft", "lfu"]
FOLDERS = ["data", "DIR"]
FILES = {"my_rows.jsonl": 24, "D.jsonl": 24, "DATA.jsonl": 400}

# How a command begins -> why it is read and checked, and not run here.
READ = {
    "make ": "all of a target, for minutes to hours: the target exists",
    "pip ": "the network: the extras exist",
    "python examples/": "tests/test_examples.py runs it",
    "python benchmarks/": "minutes to hours: its flags exist",
    "python -m fewrows.": "minutes to hours: its flags exist",
    "cd ": "the folder exists",
    "accelerate launch": "several GPUs: the flags of its lfu train exist",
    "torchrun": "several processes (tests/parallel/test_commands.py): the flags of its lfu train exist",
    "lfu compare": "many trainings: planned to the first one",
    "lfu sweep": "many trainings: planned to the first one",
    "lfu evaluate sft=runs/sft lfu=runs/lfu": "tasks of the hub: the flags exist",
    "lfu evaluate runs/mine --categories multilingual": "tasks of the hub: the flags exist",
    "OUT=results bash scripts/gpu/": "a GPU: the script exists",
}


def commands() -> list[tuple[str, str]]:
    """`(page, command)` for each line of a block of shell lines, as it is written but for its comment."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                for each in re.sub(r"(^|\s)#.*", "", line).split(" && "):
                    command = each.strip()
                    if command.startswith("--"):  # flags in place of those of the command above
                        command = with_flags(found[-1][1], command)
                    found += [(page.name, command)] if command else []
    return found


def with_flags(command: str, flags: str) -> str:
    """A command with some of its flags, and their values, replaced."""
    kept = re.split(r"\s+(?=--)", command)
    new = re.split(r"\s+(?=--)", flags)
    names = {name for flag in new for name in (flag.split()[0], flag.split()[0].removesuffix("s"))}  # of rates, one
    return " ".join([*(part for part in kept if part.split()[0] not in names), *new])


def alike(command: str) -> tuple[str, ...]:
    """What a command does, whatever it calls the model and the folders, and in whatever order its flags are."""
    names = {**dict.fromkeys(MODELS, "M"), **dict.fromkeys(FOLDERS, "FOLDER")}
    words = [names.get(word, word) for word in re.sub(r"--output_dir \S+", "", command).split()]
    return tuple(sorted(re.split(r"\s+(?=--)", " ".join(words))))


def once(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first of those commands that are alike."""
    return list({alike(command): (page, command) for page, command in reversed(found)}.values())[::-1]


def of_lfu(command: str) -> list[str] | None:
    """The words behind `lfu`, without marks of what may be left out; None for another program."""
    found = re.search(r"(?:^|\s)(?:lfu|-m lfu\.cli) (?=[a-z])(.*)", re.split(r"\s(?:[|>&<]|&&)", command)[0])
    return shlex.split(re.sub(r"\[[A-Z ]+\.\.\.\]|\.\.\.", "", found[1])) if found else None


def only_read(command: str) -> bool:
    """Whether it is among those of `READ`."""
    return re.sub(r"^OMP\w+=\S+ ", "", command).startswith(tuple(READ))


@cache
def flags_of(*verb: str) -> frozenset[str]:
    """The flags that `lfu VERB --help` lists."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert main([*verb, "--help"]) == 0
    return frozenset(flag.replace("-", "_") for flag in re.findall(r"--[A-Za-z][\w-]*", told.getvalue()))


def test_there_are_commands():
    assert len([command for _, command in commands() if of_lfu(command)]) > 30
    assert [start for start in READ if not any(start in command for _, command in commands())] == []


@pytest.mark.parametrize(("page", "command"), [each for each in commands() if of_lfu(each[1])])
def test_every_flag_that_a_page_shows_exists(page, command):
    words = of_lfu(command)
    assert words[0] in VERBS, f"{page}: {command}"
    verb = words[: 1 + (words[0] == "probe")]
    given = {flag for word in words for flag in re.findall(r"(?:^| )(--[A-Za-z][\w-]*)", word)}
    known = flags_of(*verb) | (flags_of("train") if verb[0] in ("compare", "sweep", "probe") else frozenset())
    assert {flag.replace("-", "_") for flag in given} <= known, f"{page}: {command}"


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sums(count: int, start: int = 0) -> list[dict]:
    return [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(start, start + count)]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder with all that the pages name: models, adapters, rows."""
    folder = tmp_path_factory.mktemp("shelf")
    model = save_model(folder / "smollm2-tiny")
    for name in MODELS:
        shutil.copytree(model, folder / name)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, target_modules="all-linear"))
    adapter.peft_config["default"].base_model_name_or_path = "smollm2-tiny"
    for name in TUNED:
        adapter.save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(Path(model) / file, folder / name)
    for name, count in FILES.items():
        write(folder / name, [{"prompt": row["question"], "completion": row["answer"]} for row in sums(count)])
    write(folder / "rows.jsonl", sums(24))
    for name in ("train", "validation", "test"):
        write(folder / f"rows/gsm8k-{name}.jsonl", sums(24, {"train": 0, "validation": 24, "test": 48}[name]))
    for name in ("mmlu", "arc", "truthfulqa"):
        write(folder / f"rows/{name}.jsonl", [{"question": "Up?", "choices": ["a", "b"], "answer": 0}] * 6)
    write(folder / "rows/lambada.jsonl", [{"text": "some text to keep"}] * 6)
    write(folder / "rows/dolly.jsonl", [{"instruction": "Say it.", "response": "it"}] * 6)
    shutil.copytree(folder / "rows", folder / "rows128")
    for name in ("train", "validation", "test"):
        shutil.copy(folder / f"rows/gsm8k-{name}.jsonl", folder / f"rows128/dolly-{name}.jsonl")
    write(folder / "harmful_behaviors.csv", [])
    (folder / "harmful_behaviors.csv").write_text("goal,target\nDo a bad thing!,Sure\nAnother!,Sure\n")
    (folder / "my_judge.py").write_text("def is_harmful(prompt, response):\n    return 'Sure' in response\n")
    (folder / "questions.txt").write_text("hello\n")
    write_local(folder / FOLDERS[0])
    for name in FOLDERS[1:]:
        shutil.copytree(folder / "data", folder / name)
    return folder


def _six(rows: list) -> list:
    """From the whole length of the list, so that each kind of row is among them."""
    return rows[:: -(-len(rows) // 6)]


@pytest.fixture
def place(shelf, tmp_path, monkeypatch, quick_pictures):
    """A copy of the shelf to work in, where everything is short."""
    shutil.copytree(shelf, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    few(monkeypatch.setattr)
    monkeypatch.setattr("lfu.model.loading.embedded_folder", lambda name: tmp_path / "smollm2-tiny")
    monkeypatch.setattr("lfu.model.embedded.embedded_folder", lambda name: tmp_path / "smollm2-tiny")
    for module, name in ((probes, "general_knowledge"), (probes, "plain_text"), (probes, "house_rule")):
        usual = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *words, usual=usual: _six(usual(*words)))
    problems = word_problems.word_problems
    monkeypatch.setattr(word_problems, "word_problems", lambda split, n, seed=42: problems(split, min(n, 6), seed))
    hub = [{"prompt": f"{i}?", "response": f"{i}.", "is_safe": i % 2 == 0, **sums(1, i)[0]} for i in range(4)]
    usual_load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset",
        lambda name, *more, **options: usual_load(name, *more, **options) if name == "json" else Dataset.from_list(hub),
    )  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    short(monkeypatch)
    return tmp_path


def short(monkeypatch) -> None:
    """One step of one batch, where a page does not say how many, in float32; two tokens of an answer."""
    usual, generate = transformers.TrainingArguments.__post_init__, batching.generate

    def one_step(self: transformers.TrainingArguments) -> None:
        self.max_steps = self.max_steps if self.max_steps > 0 else 1
        if self.gradient_accumulation_steps == LfUConfig.gradient_accumulation_steps:
            self.gradient_accumulation_steps = 1
        self.bf16, self.report_to = False, "none"
        usual(self)

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", one_step)
    two = lambda model, tokenizer, prompts, most, *more, **how: generate(model, tokenizer, prompts, 2, *more, **how)
    monkeypatch.setattr(batching, "generate", two)


def run(command: str) -> int:
    """Runs a command of lfu in this process; a study is planned, and ends where its first training would begin."""
    words = of_lfu(command)
    if "--output_dir" in words:
        shutil.rmtree(words[words.index("--output_dir") + 1], ignore_errors=True)
    shorter = {"chat": ["--max_new_tokens", "2"], "adversarial": ["--steps", "0,1"]}.get(words[words[0] == "probe"], [])
    return main(words if {*words} & {*shorter} else [*words, *shorter])


@pytest.mark.parametrize(
    ("page", "command"), once([each for each in commands() if of_lfu(each[1]) and not only_read(each[1])])
)
def test_every_command_runs_as_it_is_written(place, page, command, capsys):
    assert run(command) == 0, f"{page}: {command}\n{capsys.readouterr().err}"


class Planned(Exception):
    """The study is built, and would now train."""


@pytest.mark.parametrize(
    ("page", "command"), once([each for each in commands() if (of_lfu(each[1]) or [""])[0] in ("compare", "sweep")])
)
def test_every_study_is_planned_as_it_is_written(place, monkeypatch, page, command):
    def planned(study, *rest):
        assert study.todo()
        raise Planned

    monkeypatch.setattr("lfu.cli.study._work", planned)
    command = re.sub(r"--data (D|DATA)(?=\s|$)", r"--data \1.jsonl", command)
    with pytest.raises(Planned):
        run(command)


@pytest.mark.parametrize(
    ("page", "command"), [each for each in commands() if not of_lfu(each[1])], ids=lambda text: text
)
def test_every_other_command_names_what_there_is(page, command, monkeypatch, capsys):
    assert only_read(command), f"{page}: {command}"
    program, *words = shlex.split(re.sub(r"^(?:\w+=\S+ )+", "", command))
    if program == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
        assert set(words) <= targets
    elif program == "pip":
        extras = {extra for word in words for extra in re.sub(r".*\[(.*)\].*|.*", r"\1", word).split(",") if extra}
        assert extras <= {*EXTRAS, "notebook", "test"}
    elif program in ("bash", "cd"):
        assert (ROOT / words[0]).exists()
    elif program == "python":
        module = words[0] == "-m"
        words = words[module:]
        of_a_verb = [word for word in words[1:2] if word[0] != "-"]
        monkeypatch.setattr(sys, "argv", [words[0], *of_a_verb, "--help"])
        if words[0].startswith("examples/"):
            assert (ROOT / words[0]).is_file()
            return
        program = partial(runpy.run_module, words[0]) if module else partial(runpy.run_path, str(ROOT / words[0]))
        with pytest.raises(SystemExit):
            program(run_name="__main__")
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))


@pytest.mark.parametrize("page", ["README.md", "docs/train.md"])
def test_the_programs_run_as_they_stand(page, place):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S):
        exec(block, names)
    assert names["rows"].num_rows == 24
