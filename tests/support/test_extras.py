"""The core without any optional package, and what is said where one is missing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lfu import cli
from lfu.support import extras

# Hides packages as if they were not installed, from everybody: transformers looks for some of them itself.
HIDE = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)
HIDDEN = set(sys.argv[1].split(","))
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
# a fresh interpreter: what earlier tests imported must not help
STEP = """
import torch, transformers
from lfu import ForgettingCallback, LfUStep
small = dict(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
ids = torch.arange(12).view(2, 6)
record = LfUStep(model, alpha=0.1, lam=1.0)({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
assert record.skipped is None and record.consistency > 0
ForgettingCallback(budget=0.02)
optional = HIDDEN & {name.split(".")[0] for name in sys.modules}
assert not optional, f"imported: {optional}"
try:
    from lfu import LfUTrainer
except ImportError as error:
    print(error)
"""
OPTIONAL = ",".join(module for modules in extras.EXTRAS.values() for module in modules)


def python(code, *words):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)


def test_the_core_takes_a_step_with_torch_and_transformers_alone():
    done = python(HIDE + STEP, OPTIONAL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "lfu.LfUTrainer needs datasets: pip install 'lfu-tuning[train]'"


@pytest.mark.parametrize(
    ("hidden", "command", "line"),
    [
        ("trl,peft", "train", "lfu train needs trl and peft: pip install 'lfu-tuning[train]'"),
        ("matplotlib", "probe forgetting a b", "lfu probe needs matplotlib: pip install 'lfu-tuning[report]'"),
        ("trl,jinja2", "compare", "lfu compare needs trl and jinja2: pip install 'lfu-tuning[train,report]'"),
        ("lm_eval", "evaluate a", "lfu evaluate needs lm-eval: pip install 'lfu-tuning[eval]'"),
        ("rich", "methods", "lfu methods needs rich: pip install 'lfu-tuning[train]'"),  # met on the way
    ],
)
def test_a_missing_extra_is_one_line(hidden, command, line):
    done = python(HIDE + "import lfu.cli; sys.exit(lfu.cli.main(sys.argv[2:]))", hidden, *command.split())
    assert done.returncode == cli.USER_ERROR
    assert done.stderr.strip() == f"lfu {command.split()[0]}: error: {line}"


def test_a_module_of_ones_own_that_is_missing_stays_an_import_error():
    assert extras.explained("lfu", ModuleNotFoundError(name="lfu.nowhere")) is None
    assert extras.explained("lfu", ModuleNotFoundError("no name")) is None


def test_what_a_command_needs_exists():
    assert {extra for _, needed in cli.VERBS.values() for extra in needed} <= set(extras.EXTRAS)
