"""Categories: the shipped files, one's own, and every way to write one wrongly."""

from __future__ import annotations

import pytest

from lfu.evaluation.categories import OTHER, Entry, load, main_metric, select, shipped
from lfu.support.errors import UserError


def test_the_papers_eleven_tasks_in_its_four_categories():
    paper = load("paper")
    assert {name: [entry.name for entry in entries] for name, entries in paper.entries.items()} == {
        "Math": ["gsm8k", "mathqa", "asdiv"],
        "Knowledge": ["mmlu", "piqa", "hellaswag", "lambada_openai"],
        "Reasoning": ["arc", "coqa"],
        "Helpfulness": ["toxigen", "truthfulqa_mc2"],
    }
    assert paper.entries["Reasoning"][0].tasks == ("arc_easy", "arc_challenge")
    assert len(paper.tasks) == len(set(paper.tasks)) == 12


@pytest.mark.parametrize("name", shipped())
def test_all_shipped_names_are_the_harness_s(name):
    pytest.importorskip("lm_eval")
    from lfu.evaluation.tasks import _manager

    def no_slow_search(text):
        raise AssertionError(text)

    for task in load(name).tasks:
        assert task in _manager(task, no_slow_search).task_index


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "categories:\n  Sums: [gsm8k, {task: mathqa, metric: acc}]\n"
        "  All else: [{name: both, tasks: [arc_easy, piqa], metric: acc}]\n"
    )
    mine = load(str(path))
    assert (mine.name, mine.about) == ("mine", "mine")
    assert mine.entries["Sums"] == (Entry("gsm8k", ("gsm8k",)), Entry("mathqa", ("mathqa",), "acc"))
    assert mine.entries["All else"] == (Entry("both", ("arc_easy", "piqa"), "acc"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("categories: [a", "not valid YAML"),
        ("- gsm8k", "must be a mapping with `categories:`"),
        ("categories: {}", "must be a mapping with `categories:`"),
        ("Math: [gsm8k]", "must be a mapping with `categories:`"),
        ("categorys: {}\ncategories: {A: [x]}", "unknown key 'categorys' at the top. Did you mean categories?"),
        ("categories: {Math: gsm8k}", "category 'Math' must be a list of tasks"),
        ("categories: {Math: []}", "category 'Math' must be a list of tasks"),
        ("categories: {Math: [3]}", "category 'Math': 3 is neither a task's name nor a mapping"),
        ("categories: {Math: [{tsk: a}]}", "unknown key 'tsk' in category 'Math'. Did you mean task"),
        ("categories: {Math: [{task: a, tasks: [b]}]}", "give either task or tasks"),
        ("categories: {Math: [{name: a}]}", "give either task or tasks"),
        ("categories: {Math: [{name: a, tasks: b}]}", "tasks must be a list of names"),
        ("categories: {Math: [{name: a, tasks: []}]}", "tasks must be a list of names"),
        ("categories: {Math: [{tasks: [a, b]}]}", "the mean of a, b needs a name"),
        ("categories: {Math: [{task: a, metric: 3}]}", "name and metric must be text"),
        ("categories: {Math: [a, a]}", "task 'a' is listed twice"),
        ("categories: {Math: [a], More: [{name: x, tasks: [a]}]}", "task 'a' is listed twice"),
        ("categories: {Math: [{task: a, name: x}], More: [{task: b, name: x}]}", "entry 'x' is listed twice"),
    ],
)
def test_malformed(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_yaml_runs_nothing(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"categories: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    with pytest.raises(UserError, match="not valid YAML"):
        load(str(path))
    assert not (tmp_path / "made").exists()


def test_no_such_file():
    with pytest.raises(UserError, match="Did you mean paper"):
        load("papper")


def test_select():
    paper = load("paper")
    chosen = select(paper, ["gsm8k", "arc", "Helpfulness", "piqa", "mgsm_direct_de"])
    assert {name: [entry.name for entry in entries] for name, entries in chosen.entries.items()} == {
        "Math": ["gsm8k"],
        "Knowledge": ["piqa"],
        "Reasoning": ["arc"],
        "Helpfulness": ["toxigen", "truthfulqa_mc2"],
        OTHER: ["mgsm_direct_de"],
    }
    assert chosen.entries["Math"][0].metric == paper.entries["Math"][0].metric
    # what was not asked for is known, so that a part of a category isn't taken for the whole
    assert chosen.left_out["Math"] == ("mathqa", "asdiv")
    assert chosen.left_out["Helpfulness"] == ()


def test_select_a_part_of_a_mean():
    chosen = select(load("paper"), ["arc_challenge"])
    assert chosen.entries == {"Reasoning": (Entry("arc_challenge", ("arc_challenge",)),)}
    assert chosen.left_out == {"Reasoning": ("arc", "coqa")}


@pytest.mark.parametrize(("wanted", "message"), [([], "at least one"), (["arc", "arc"], "arc is named twice")])
def test_select_mistakes(wanted, message):
    with pytest.raises(UserError, match=message):
        select(load("paper"), wanted)


@pytest.mark.parametrize(
    ("available", "wanted", "metric"),
    [
        (["acc,none", "acc_norm,none"], None, "acc_norm,none"),
        (["perplexity,none", "acc,none"], None, "acc,none"),
        (["exact_match,strict-match", "exact_match,flexible-extract"], None, "exact_match,strict-match"),
        (["exact_match,strict-match", "exact_match,flexible-extract"], "exact_match,flexible-extract",
         "exact_match,flexible-extract"),
        (["em,none", "f1,none"], None, "f1,none"),
        (["em,none", "f1,none"], "em", "em,none"),
        (["bleu_max,none", "rouge1_max,none"], None, "bleu_max,none"),
    ],
)  # fmt: skip
def test_main_metric(available, wanted, metric):
    assert main_metric(available, wanted) == metric


def test_main_metric_mistakes():
    with pytest.raises(ValueError, match="no metric 'f1': choose one of acc,none"):
        main_metric(["acc,none"], "f1")
    with pytest.raises(ValueError, match="no metric that is a mean"):
        main_metric([])
