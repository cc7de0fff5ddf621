"""The command itself: help, version, exit codes, and the list of recipes."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import lfu
from lfu.cli import VERBS, main
from lfu.recipes import shipped


def test_help_and_version(capsys):
    assert main(["--help"]) == main([]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lfu {lfu.__version__}\n"


QUICK = {
    "help": ["--help"],
    "version": ["--version"],
    "methods": ["methods"],
    "a method": ["methods", "lfu_reps"],
    "recipes": ["recipes"],
    "a recipe": ["recipes", "gsm8k"],
    "unknown verb": ["trian"],
    "unknown method": ["methods", "gme"],
    "unknown recipe": ["recipes", "gsm9k"],
    "unknown probe": ["probe", "dirft"],
    "missing arguments": ["export"],
    "unknown flag": ["evaluate", "--modle", "x"],
    "probes": ["probe", "--help"],
    "a probe's help": ["probe", "drift", "--help"],
    **{f"help of {verb}": [verb, "--help"] for verb in VERBS if verb != "train"},  # train's flags are TRL's dataclasses
}


def test_what_needs_no_torch_does_not_wait_for_it():
    code = f"""
import sys
from lfu.cli import main
heavy = {{"torch", "transformers", "trl", "datasets", "peft", "numpy"}}
for name, words in {QUICK!r}.items():
    main(words)
    if found := heavy & set(sys.modules):
        sys.exit(f"{{name}} imports {{sorted(found)}}")
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    assert time.monotonic() - start < 30  # all of them: 0.3 s on an idle machine; this bound is for a busy one


def test_help_takes_less_than_a_second_of_processor_time():
    code = "import time; from lfu.cli import main; main(['--help']); main(['methods']); print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert float(done.stdout.split()[-1]) < 1.0  # 0.2 s; importing torch alone takes more than a second


def test_torch_comes_with_the_config_and_datasets_only_with_the_rows():
    code = """
import sys
sys.modules["bitsandbytes"] = None  # PEFT imports it where it is installed, which takes two seconds
import lfu
assert "torch" not in sys.modules
from lfu import LfUConfig
import lfu.cli.arguments
assert "torch" in sys.modules and not {"datasets", "pandas"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_m():
    done = subprocess.run([sys.executable, "-m", "lfu.cli", "trian"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"lfu: error: unknown verb 'trian': use one of {', '.join(VERBS)}. Did you mean train?"
    ]


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert f"usage: lfu {verb}" in capsys.readouterr().out


def test_train_help_shows_every_field_and_is_quick_the_second_time(capsys, tmp_path, monkeypatch):
    from dataclasses import fields

    from lfu.config import LfUConfig

    monkeypatch.setenv("LFU_CACHE", str(tmp_path))
    main(["train", "--help"])
    out = capsys.readouterr().out
    assert [field.name for field in fields(LfUConfig) if field.init and f"--{field.name}" not in out] == []
    code = "from lfu.cli import main; main(['train', '--help']); import sys, time; sys.exit(time.process_time() > 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == out
    assert done.returncode == 0  # 0.1 s


def test_recipes(capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in shipped())
    assert main(["recipes", "gsm8k"]) == 0
    assert capsys.readouterr().out.strip() == shipped()["gsm8k"].read_text().strip()
    assert main(["recipes", "gsm9k"]) == 2
    assert "Did you mean gsm8k?" in capsys.readouterr().err


def test_ctrl_c(monkeypatch, capsys):
    def stop(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("lfu.cli.recipes.run", stop)
    assert main(["recipes"]) == 130
    assert capsys.readouterr().err == "lfu recipes: interrupted.\n"
