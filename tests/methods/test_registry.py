"""The registry, the documentation of every method, and the documented example of adding one."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import types
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import bench
import pytest
from bench import config, forward, step_of, tiny_trainer
from tiny import relative_difference

import lfu.methods
from lfu.methods import REGISTRY, method_class, methods_of, why_not_together, written_out
from lfu.methods.about import measured
from lfu.methods.knobs import knobs_of
from lfu.methods.method import PLACES, Method

DOCS = Path(__file__).parent.parent.parent / "docs" / "methods.md"


@pytest.mark.parametrize("name", REGISTRY)
def test_a_method_says_what_it_is(name):
    method = method_class(name)
    assert method.name == name
    assert method.summary
    assert method.source
    assert method.protects
    assert set(method.places) <= set(PLACES)
    assert method().name == name  # all knobs have defaults


@pytest.mark.parametrize("name", REGISTRY)
def test_the_docs_have_a_section_with_every_knob_and_its_default(name):
    text = DOCS.read_text()
    section = re.search(rf"^### {name}\n(.*?)(?=^##|\Z)", text, re.M | re.S)
    assert section, f"docs/methods.md has no section {name}"
    for f in knobs_of(method_class(name)):
        assert f"`{name}.{f.name}={f.default}`" in section[1], f"{name}.{f.name}={f.default}"


def test_the_docs_table_of_places_is_the_registrys():
    rows = re.findall(r"^\| ([a-z ]+) \(.*?\) \| (.*) \|$", DOCS.read_text(), re.M)
    listed = {place: set(re.findall(r"`(\w+)`", names)) for place, names in rows}
    assert listed == {place: {name for name in REGISTRY if place in method_class(name).places} for place in PLACES}


def test_the_docs_table_of_costs_is_what_was_measured():
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+|refused) \| ([\d.]+|refused) \| (.*?) ?\|$", DOCS.read_text(), re.M)
    cell = lambda ratio: "refused" if ratio is None else f"{ratio:.2f}"
    costs = {name: (cell(one["lora"]), cell(one["full"])) for name, one in measured()["ratio"].items()}
    assert {name: cells for name, *cells, _ in rows} == {name: list(cells) for name, cells in costs.items()}
    for name, *_, once in rows:
        assert once.strip() == method_class(name).once


def test_reasons_are_the_same_both_ways_round():
    for one, two in combinations([method_class(name) for name in REGISTRY], 2):
        assert (why_not_together(one, two) is None) == (why_not_together(two, one) is None)


def test_every_file_with_a_method_is_registered():
    """Asked of the classes themselves, as the registry only looks through the sources."""
    folder = Path(lfu.methods.__file__).parent
    modules = [importlib.import_module(f"lfu.methods.{path.stem}") for path in folder.glob("*.py")]
    classes = {value for m in modules for value in vars(m).values() if isinstance(value, type)}
    named = {c.name: c for c in classes if issubclass(c, Method) and "name" in vars(c)}
    assert {name: method_class(name) for name in named} == named
    assert list(REGISTRY)[:2] == ["sft", "lfu"]


def test_a_name_of_lfus_own_can_not_be_taken():
    with pytest.raises(ValueError, match=r"'gem' is taken by lfu\.methods\.gem:GEM"):
        type("Mine", (Method,), {"name": "gem"})
    assert method_class("gem").__module__ == "lfu.methods.gem"


def test_a_config_copies_with_its_method(tmp_path):
    first = config(tmp_path, "gem+neftune", method_args={"gem.beta": 0.5})
    again = dataclasses.replace(first)
    assert again.method_args == first.method_args
    assert methods_of(again.method, again.method_args) == methods_of(first.method, first.method_args)


@pytest.mark.parametrize("value", ["a.jsonl", "odd, name=x.jsonl"])
def test_method_args_survive_being_written_out(value):
    methods = methods_of("replay+gem", {"replay.data": value, "gem.beta": 0.3})
    assert methods_of("replay+gem", written_out(methods)) == methods


# Methods that never look at whole weights; `l1` and `l2` do for their anchor alone.
SHARDED = {"sft", "lfu", "lfu_reps", "logit_kl", "dft", "im", "l1", "l2", "neftune", "replay", "sdft"}


@pytest.mark.parametrize("name", sorted(REGISTRY.keys() - SHARDED))
@pytest.mark.parametrize("launcher", ["deepspeed", "fsdp"])
def test_a_launch_that_cuts_weights_up_is_refused_with_the_config(name, launcher, monkeypatch):
    args = SimpleNamespace(fsdp=[], deepspeed_plugin=object() if launcher == "deepspeed" else None)
    if launcher == "fsdp":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=f"method '{name}' reads whole weights"):
        methods_of(name, {})[0].check(args)


@pytest.mark.parametrize(("knobs", "refused"), [("anchor=zero", False), ("anchor=start", True)])
def test_a_penalty_on_features_needs_whole_weights_for_its_copy_alone(knobs, refused):
    args = SimpleNamespace(fsdp=["full_shard"], deepspeed_plugin=None)
    (method,) = methods_of("l1", knobs)
    with pytest.raises(ValueError, match="'l1' reads whole weights") if refused else nullcontext():
        method.check(args)


@pytest.mark.parametrize(
    ("method", "knobs", "said"),
    [
        ("l2sp", "weight=0.1,share=0.3", "l2sp.share=0.3 acts only with weight=auto, and weight=0.1 is fixed"),
        ("ewc", "weight=0.1,share=0.3", "ewc.share=0.3 acts only with weight=auto"),
        ("wise", "alpha=0.5,tolerance=0.1", "wise.tolerance=0.1 acts only with alpha=auto, and alpha=0.5 is fixed"),
        ("lines", "alpha=0.5,tolerance=0.1", "lines.tolerance=0.1 acts only with alpha=auto"),
        ("anchor", "texts=2,batch=3", "anchor.batch=3 is more than anchor.texts=2"),
    ],
)
def test_a_knob_that_would_do_nothing_is_refused(method, knobs, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        methods_of(method, knobs)


def test_the_documented_example_works(tmp_path):
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "class Confidence" in block
    )
    module = types.ModuleType("documented_method")
    sys.modules["documented_method"] = module
    try:
        exec(code, module.__dict__)
        assert issubclass(method_class("confidence"), Method)
        t = tiny_trainer("confidence+neftune", tmp_path, method_args="confidence.weight=0.2")
        t.train()
        t = tiny_trainer("confidence", tmp_path, method_args="weight=0.2")
        logits, labels, _ = forward(t.model)
        log_p = logits.log_softmax(-1)
        nll = -log_p[range(len(labels)), labels].mean()
        expected = bench.written_out(t.model, nll + 0.2 * (log_p.exp() * log_p).sum(-1).mean())
        assert relative_difference(step_of(t)[1], expected) < 1e-9
    finally:
        del REGISTRY["confidence"], sys.modules["documented_method"]
