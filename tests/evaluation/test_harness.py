"""Our figures are the harness's: same prompts from local files, same numbers as its own command, nothing touched."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from harness_data import ITEMS, LAMBADA, MMLU, write_local, write_rows
from peft import LoraConfig, get_peft_model
from tiny_folder import byte_tokenizer, save_model

from lfu.evaluation import suite
from lfu.evaluation.categories import Categories, Entry, load
from lfu.evaluation.harness import Settings, TaskFailed, TaskResult, run_task
from lfu.evaluation.record import weights_hash
from lfu.evaluation.results import LISTED, Outcome, Plan, assemble, given
from lfu.evaluation.score import multiple_choice
from lfu.evaluation.suite import evaluate, plan
from lfu.model.loading import load_model
from lfu.support.errors import UserError

pytest.importorskip("lm_eval")

from lfu.evaluation.tasks import Runnable, find, squad
from lfu.evaluation.tasks.local import LOCAL, harness_folder, own_settings

ONE_BY_ONE = Settings(batch_size=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_local(tmp_path_factory.mktemp("data"), more=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tiny(folder):
    return load_model(folder)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LFU_CACHE", str(tmp_path / "cache"))


def one(name, data, num_fewshot=None):
    return find([name], data_dir=data, num_fewshot=num_fewshot)[0][name]


# --- the definitions -------------------------------------------------------------------------------------------------


def harness_task(yaml, splits, **more):
    """The harness's own definition over rows in the hub's shape; only the place the rows come from is ours."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(harness_folder() / yaml) | more
    config["custom_dataset"] = lambda **metadata: {name: Dataset.from_list(rows) for name, rows in splits.items()}
    for key in ("tag", "group"):
        config.pop(key, None)
    for kind in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(kind) not in splits:
            config[kind] = None
    return ConfigurableTask(config=config)


def seen(task, doc):
    """Everything that the model or the scoring sees of an item."""
    choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else None
    return task.doc_to_text(doc), task.doc_to_target(doc), choices


def rules(task):
    """How it is scored."""
    config = task.config
    return {
        "type": config.output_type, "metrics": config.metric_list, "filters": config.filter_list,
        "generation": config.generation_kwargs, "fewshot": config.num_fewshot, "process": config.process_results,
        "delimiters": (config.target_delimiter, config.fewshot_delimiter), "repeats": config.repeats,
    }  # fmt: skip


@pytest.mark.parametrize("name", ITEMS)
def test_local_rows_give_the_harness_s_prompts_targets_and_choices(name, data):
    ours = one(name, data).task
    split = LOCAL[name].items
    with squad.lent():  # for CoQA
        theirs = harness_task(LOCAL[name].harness, {split: [hub for _, hub in ITEMS[name]]})
    expected = [seen(theirs, doc) for doc in theirs.eval_docs]
    got = [seen(ours, doc) for doc in ours.eval_docs]
    assert got == expected[: len(got)]  # gsm8k/test holds the first two
    assert len(got) >= min(2, len(expected))
    assert rules(ours) == rules(theirs)


def test_a_prompt_written_out(data):
    arc = one("arc_easy", data).task
    assert seen(arc, arc.eval_docs[1]) == ("Question: What flies?\nAnswer:", 1, ["a cow", "a wren", "a very long eel"])
    mathqa = one("mathqa", data).task
    # the harness cuts the hub's string of options at commas: two choices are cut here as they are there
    assert mathqa.doc_to_choice(mathqa.eval_docs[1]) == ["2,500", "1", "5", "rs . 2", "1 , 2"]
    lambada = one("lambada_openai", data).task
    assert seen(lambada, lambada.eval_docs[0]) == ("She took the  key.\n\nThen she opened the", " door", None)


@pytest.mark.parametrize("name", ["arc_easy", "gsm8k"])
def test_worked_examples_are_drawn_alike(name, data):
    ours = one(name, data, num_fewshot=2).task
    splits = {split: [hub for _, hub in ITEMS[name]] for split in LOCAL[name].files if split != "validation"}
    theirs = harness_task(LOCAL[name].harness, splits)
    for task in (ours, theirs):
        task.set_fewshot_seed(1234)
    for _ in range(3):
        contexts = [task.fewshot_context(doc=task.eval_docs[0], num_fewshot=2) for task in (ours, theirs)]
        assert contexts[0] == contexts[1]
        assert contexts[0].count("Question:") == 3


@pytest.mark.parametrize("subject", MMLU)
def test_mmlu_is_the_harness_s_task_of_each_subject(subject, data):
    rows = [hub for _, hub in MMLU[subject]]
    theirs = harness_task(f"mmlu/default/mmlu_{subject}.yaml", {"test": rows[::-1], "dev": rows})
    ours = one("mmlu", data, num_fewshot=2).task
    own = [doc for doc in ours.eval_docs if doc["subject"] == subject]
    assert [seen(ours, doc) for doc in own] == [seen(theirs, doc) for doc in theirs.eval_docs]
    for shots in (0, 2):
        for mine, other in zip(own, theirs.eval_docs):
            prompt = ours.fewshot_context(doc=mine, num_fewshot=shots)
            assert prompt == theirs.fewshot_context(doc=other, num_fewshot=shots)
            assert prompt.startswith(f"The following are multiple choice questions (with answers) about {subject[:5]}")
    assert rules(ours) == rules(theirs)


def test_mmlu_descriptions_of_all_57_subjects():
    """Our one template against the harness's 57 sentences."""
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    files = list((harness_folder() / "mmlu/default").glob("mmlu_*.yaml"))
    assert len(files) == 57
    more = [line for line in LOCAL["mmlu"].more.splitlines() if line.startswith("description")]
    template = json.loads(more[0].partition(": ")[2])
    for file in files:
        subject = load_yaml(file)
        assert apply_template(template, {"subject": subject["dataset_name"]}) == subject["description"]


def test_mmlu_items_take_turns_by_subject(data):
    docs = one("mmlu", data).task.eval_docs
    assert [doc["subject"] for doc in docs] == ["anatomy", "world_religions"] * 3
    assert [doc["question"][-3] for doc in docs] == list("221100")  # each subject's own order is kept


def test_mmlu_without_enough_examples(data, tiny):
    with pytest.raises(TaskFailed, match="4 examples asked for, anatomy has 3"):
        run_task(*tiny, one("mmlu", data, num_fewshot=4))


def test_the_number_of_worked_examples(data):
    """A task keeps its own where the harness fixes it, or would draw from the items without leaving out the one."""
    names = ["gsm8k", "mathqa", "arc_easy", "lambada_openai", "truthfulqa_mc2", "asdiv", "mmlu"]
    own = find(names, data_dir=data)[0]
    assert {name: task.num_fewshot for name, task in own.items()} == dict.fromkeys(names, 0) | {"gsm8k": 5}
    asked, missing = find(names, data_dir=data, num_fewshot=3)
    kept = {"lambada_openai": 0, "truthfulqa_mc2": 0}
    others = {name: 3 for name in names if name not in kept and name != "mathqa"}
    assert {name: task.num_fewshot for name, task in asked.items()} == kept | others
    assert list(missing) == ["mathqa"]  # mathqa/train.jsonl isn't there
    assert "mathqa/train.jsonl is not there" in missing["mathqa"]


# --- files -----------------------------------------------------------------------------------------------------------


def test_missing_files_are_named(tmp_path):
    found, missing = find(["gsm8k", "arc_easy", "piqa"], data_dir=write_local(tmp_path))
    assert list(found) == ["gsm8k", "arc_easy"]
    assert missing == {"piqa": f"{tmp_path}/piqa/validation.jsonl is not there"}
    (tmp_path / "gsm8k/train.jsonl").unlink()
    (tmp_path / "arc_easy/test.jsonl").unlink()
    (tmp_path / "arc_easy/test.txt").write_text("")
    found, missing = find(["gsm8k", "arc_easy"], data_dir=tmp_path)
    assert not found
    assert "gsm8k/train.jsonl is not there, and the prompts take 5 worked examples" in missing["gsm8k"]
    assert (
        missing["arc_easy"] == f"{tmp_path}/arc_easy/test.jsonl is not there"
    )  # and train is never scored in its place


def test_without_a_network_the_hub_s_tasks_are_missing():
    found, missing = find(["arc_easy"])
    assert not found
    assert next(iter(missing.values())).startswith("could not be loaded: ")
    with pytest.raises(UserError, match=r"no task can be run .arc_easy: could not be loaded"):
        plan(Categories("x", "x", {"A": (Entry("arc_easy", ("arc_easy",)),)}))


def test_the_network_is_waited_for_once(monkeypatch):
    """After one task could not reach the hub, the others look into the local cache alone."""
    import datasets

    asked = []

    def load_dataset(path, **options):
        asked.append((path, datasets.config.HF_HUB_OFFLINE))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found, missing = find(["arc_easy", "piqa"])
    assert (found, list(missing.values())) == ({}, ["could not be loaded: no network"] * 2)
    assert asked == [("allenai/ai2_arc", False), ("baber/piqa", True)]
    assert datasets.config.HF_HUB_OFFLINE is False


def test_a_task_of_the_harness_without_a_local_layout(data):
    found, missing = find(["mgsm_direct_de", "gsm8k"], data_dir=data)
    assert list(found) == ["gsm8k"]
    assert missing == {"mgsm_direct_de": "no local layout is known for it"}


BROKEN = {
    "not JSON": ("arc_easy", "{", "line 2: "),
    "no answer": ("arc_easy", '{"question": "a", "choices": ["a", "b"]}', "no column 'answer', which arc_easy needs"),
    "answer beyond the choices": (
        "arc_easy", '{"question": "a", "choices": ["a", "b"], "answer": 2}', "an index into the 2 choices, got 2"),
    "answer as a letter": ("arc_easy", '{"question": "a", "choices": ["a", "b"], "answer": "B"}', "got 'B'"),
    "answer as a truth value": ("arc_easy", '{"question": "a", "choices": ["a", "b"], "answer": true}', "got True"),
    "choices as text": ("arc_easy", '{"question": "a", "choices": "ab", "answer": 0}', "choices must be a list"),
    "four choices": ("mathqa", '{"question": "a", "choices": ["a", "b", "c", "d"], "answer": 0}', "has five choices"),
    "five choices": (
        "mmlu", '{"subject": "s", "question": "a", "choices": ["a", "b", "c", "d", "e"], "answer": 0}', "four choices"),
    "an answer of two words": ("lambada_openai", '{"context": "a", "answer": "b c"}', "must be one word, got 'b c'"),
    "labels too few": (
        "truthfulqa_mc2",
        '{"question": "a", "mc1_choices": ["a"], "mc1_answer": 0, "mc2_choices": ["a", "b"], "mc2_labels": [1]}',
        "a 0 or a 1 for each"),
    "a list": ("gsm8k", "[1]", "line 2: "),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows(case, tmp_path):
    name, line, message = BROKEN[case]
    write_local(tmp_path)
    path = tmp_path / LOCAL[name].files[LOCAL[name].items]
    path.write_text(path.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(UserError) as caught:
        one(name, tmp_path)
    assert f"{path} line 2: " in str(caught.value)
    assert message in str(caught.value)


def test_an_empty_file(tmp_path):
    write_local(tmp_path)
    (tmp_path / "arc_easy/test.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no rows"):
        one("arc_easy", tmp_path)


def test_the_hub_s_own_columns_are_read_too(data, tmp_path):
    for name in ("arc_easy", "mathqa", "lambada_openai", "truthfulqa_mc2"):
        write_rows(tmp_path / LOCAL[name].files[LOCAL[name].items], [hub for _, hub in ITEMS[name]])
        ours, theirs = one(name, data).task, one(name, tmp_path).task
        assert [seen(theirs, d) for d in theirs.eval_docs] == [seen(ours, d) for d in ours.eval_docs]


def test_every_local_task_is_the_harness_s_by_name_and_splits():
    for name, task in LOCAL.items():
        own = own_settings(task)
        assert own.get("task", name) == name
        assert task.items == (own.get("test_split") or own["validation_split"])
        drawn = (own.get(f"{kind}_split") for kind in ("fewshot", "training", "validation"))
        assert next(iter(task.files)) == next(filter(None, drawn), task.items)


# --- the numbers -----------------------------------------------------------------------------------------------------

CLI_TASKS = {
    "arc_easy": {"test": [hub for _, hub in ITEMS["arc_easy"]]},
    "gsm8k": {"train": [hub for _, hub in ITEMS["gsm8k"]], "test": [hub for _, hub in ITEMS["gsm8k"][:2]]},
    "mathqa": {"test": [hub for _, hub in ITEMS["mathqa"]]},
    "lambada_openai": {"test": [hub for _, hub in LAMBADA]},
    "truthfulqa_mc2": {"validation": [hub for _, hub in ITEMS["truthfulqa_mc2"]]},
    **{
        f"mmlu_{subject}": {"test": [hub for _, hub in rows[::-1]], "dev": [hub for _, hub in rows]}
        for subject, rows in MMLU.items()
    },
}

# `python -m lm_eval`, but for the reading of its 14,000 own definitions, which none of these tasks needs, and for the
# 100,000 resamples of an error that nobody reads
COMMAND = """
import functools, lm_eval.api.metrics, lm_eval.tasks
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
lm_eval.api.metrics.bootstrap_stderr = lambda *given, **named: 0.0
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.fixture(scope="module")
def command_line(folder, tmp_path_factory):
    """task -> (its results, its samples) by `python -m lm_eval`, on rows in the hub's shape; none of our code runs."""
    from lm_eval.tasks._yaml_loader import load_yaml

    place = tmp_path_factory.mktemp("harness")
    for name, splits in CLI_TASKS.items():
        yaml = harness_folder() / (LOCAL[name].harness if name in LOCAL else f"mmlu/default/{name}.yaml")
        for split, rows in splits.items():
            write_rows(place / name / f"{split}.jsonl", rows)
        files = {split: str(place / name / f"{split}.jsonl") for split in splits}
        own = load_yaml(yaml, resolve_func=False)
        kinds = [f"{kind}_split" for kind in ("training", "validation", "test", "fewshot")]
        gone = [f"{kind}: null\n" for kind in kinds if own.get(kind) and own[kind] not in splits]
        (place / f"{name}.yaml").write_text(
            f"include: {yaml}\ntask: {name}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {json.dumps({'data_files': files})}\n{''.join(gone)}"
        )
    (place / "command.py").write_text(COMMAND)
    done = forked.run(
        [
            "python", str(place / "command.py"), "--model", "hf", "--device", "cpu", "--batch_size", "1",
            "--model_args", f"pretrained={folder},dtype=float32", "--include_path", str(place),
            "--tasks", ",".join(CLI_TASKS), "--output_path", str(place / "out"), "--log_samples",
        ],
        place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((place / "out").rglob("results_*.json")).read_text())["results"]
    samples = {}
    for name in CLI_TASKS:
        file = next((place / "out").rglob(f"samples_{name}_2*.jsonl"))
        samples[name] = [json.loads(line) for line in file.read_text().splitlines()]
    return results, samples


def logliks(samples):
    return [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]


@pytest.mark.parametrize("name", [name for name in CLI_TASKS if name in LOCAL])
def test_exactly_the_numbers_of_the_harness_s_own_command(name, data, tiny, command_line):
    results, samples = command_line
    ours = run_task(*tiny, one(name, data), ONE_BY_ONE)
    assert ours.scores
    for metric, value in ours.scores.items():
        assert value == results[name][metric]
    first = [sample for sample in samples[name] if sample["filter"] == samples[name][0]["filter"]]
    first.sort(key=lambda sample: sample["doc_id"])
    if name == "gsm8k":
        texts = [sample["resps"][0][0] for sample in first]
        assert [text["generated"].removeprefix("... ") for text in ours.texts] == [text[-1200:] for text in texts]
        assert set(ours.scores) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    else:
        assert [text["loglik"] for text in ours.texts] == logliks(first)
    for metric, values in ours.items.items():
        key, _, filtered = metric.partition(",")
        theirs = [sample[key] for sample in samples[name] if sample["filter"] == filtered]
        assert values == theirs


def test_mmlu_as_one_task_scores_what_its_subjects_score(data, tiny, command_line):
    results, samples = command_line
    ours = run_task(*tiny, one("mmlu", data), ONE_BY_ONE)
    in_turn = [sample for pair in zip(*(samples[f"mmlu_{subject}"] for subject in MMLU)) for sample in pair]
    assert [text["loglik"] for text in ours.texts] == logliks(in_turn)
    assert ours.scores["acc,none"] == pytest.approx(np.mean([results[f"mmlu_{s}"]["acc,none"] for s in MMLU]))


def test_the_batch_size_changes_nothing_but_rounding(data, tiny):
    for name in ("arc_easy", "lambada_openai"):
        alone, together = (run_task(*tiny, one(name, data), Settings(batch_size=size)) for size in (1, 4))
        for a, b in zip(alone.texts, together.texts):
            assert a["loglik"] == pytest.approx(b["loglik"], rel=1e-5)


@pytest.mark.parametrize("shift", [0, 1])
def test_right_answers_by_construction(shift, tmp_path, tiny):
    """The right answers are what the model itself prefers, by our own independent scorer; then all are wrong."""
    questions = [row for row, _ in ITEMS["arc_easy"]]
    own = multiple_choice(*tiny, questions)
    preferred = [
        max(range(len(values)), key=lambda i: values[i] / len(row["choices"][i]))
        for values, row in zip(own.loglik, questions)
    ]
    rows = [q | {"answer": (best + shift) % len(q["choices"])} for q, best in zip(questions, preferred)]
    write_rows(tmp_path / "arc_easy/test.jsonl", rows)
    result = run_task(*tiny, one("arc_easy", tmp_path))
    assert result.items["acc_norm,none"] == [1.0 - shift] * len(rows)
    assert result.scores["acc_norm,none"] == 1 - shift
    for text, values, row, best in zip(result.texts, own.loglik, questions, preferred):
        assert text["loglik"] == pytest.approx(values, rel=1e-4)
        assert given(text, "acc_norm,none") == row["choices"][best]


def test_a_limit_takes_the_first_items(data, tiny):
    whole, two = run_task(*tiny, one("arc_easy", data), ONE_BY_ONE), run_task(
        *tiny, one("arc_easy", data), Settings(limit=2, batch_size=1)
    )  # fmt: skip
    assert two.texts == whole.texts[:2]
    assert two.items == {metric: values[:2] for metric, values in whole.items.items()}


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_is_averaged_as_the_harness_averages_it(by_size, data, tiny):
    """Two tasks of four and two items; `run_task` itself compares with the harness's figure."""
    from lm_eval.api.group import AggMetricConfig, Group

    group = Group("both", aggregate_metric_list=[AggMetricConfig("acc_norm", weight_by_size=by_size)])
    parts = [one(name, data) for name in ("arc_easy", "mathqa")]
    for part in parts:
        group.add(part.task)
    ours = run_task(*tiny, Runnable("both", group, "here"))
    alone = [run_task(*tiny, part) for part in parts]
    assert alone[0].scores["acc_norm,none"] != alone[1].scores["acc_norm,none"]  # else the weights would not matter
    weights = [4 / 6, 2 / 6] if by_size else [1 / 2, 1 / 2]
    expected = sum(w * result.scores["acc_norm,none"] for w, result in zip(weights, alone))
    assert ours.scores["acc_norm,none"] == pytest.approx(expected)
    assert ours.items["acc_norm,none"] == alone[0].items["acc_norm,none"] + alone[1].items["acc_norm,none"]
    assert len(ours.texts) == 6
    if by_size:  # a tag is a list of tasks, which the harness doesn't average: all items count alike
        tag = run_task(*tiny, Runnable("both", [part.task for part in parts], "here"))
        assert (tag.scores, tag.texts) == (ours.scores, ours.texts)


def test_a_figure_that_is_not_the_harness_s_is_refused(data):
    from lfu.evaluation.harness import _check_agreement

    result = TaskResult("t", 0, {"acc,none": 0.5}, {}, [], [])
    _check_agreement(Runnable("t", None, ""), result, {"results": {"t": {"acc,none": 0.5}}})
    with pytest.raises(RuntimeError, match=r"the harness says 0\.25"):
        _check_agreement(Runnable("t", None, ""), result, {"results": {"t": {"acc,none": 0.25}}})


def test_truncated_prompts_are_counted(data, tiny):
    assert run_task(*tiny, one("arc_easy", data), ONE_BY_ONE).truncated == 0
    cut = run_task(*tiny, one("truthfulqa_mc2", data), Settings(batch_size=1, max_length=100))
    assert cut.truncated == 6  # all choices of both items


def test_chat_templates(data, tiny):
    plain = run_task(*tiny, one("arc_easy", data), ONE_BY_ONE)
    chat = run_task(*tiny, one("arc_easy", data), Settings(batch_size=1, apply_chat_template=True))
    assert chat.texts[0]["loglik"] != plain.texts[0]["loglik"]
    with pytest.raises(UserError, match="no chat template"):
        run_task(tiny[0], byte_tokenizer(chat=False), one("arc_easy", data), Settings(apply_chat_template=True))


# --- the model, and what can go wrong with it ------------------------------------------------------------------------


def test_nothing_is_left_changed(data, tiny):
    model, tokenizer = tiny
    model.train()
    model.model.layers[1].eval()  # a mixture that a blunt train() would not bring back
    tokenizer.pad_token = None
    flags = [module.training for module in model.modules()]
    before = weights_hash(model)
    torch.backends.cudnn.benchmark = True
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    for name in ("arc_easy", "gsm8k"):
        run_task(model, tokenizer, one(name, data), Settings(limit=1))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn
    assert [module.training for module in model.modules()] == flags
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, byte_tokenizer().padding_side)
    assert weights_hash(model) == before
    assert torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False


def test_dropout_is_off(data, tiny):
    model, tokenizer = tiny
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert run_task(model, tokenizer, one("arc_easy", data)).texts == run_task(*tiny, one("arc_easy", data)).texts


def test_an_adapter_in_memory(data, tiny):
    model, tokenizer = tiny
    plain = run_task(model, tokenizer, one("arc_easy", data), ONE_BY_ONE)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted = run_task(tuned, tokenizer, one("arc_easy", data), ONE_BY_ONE)
    assert adapted.texts[0]["loglik"] != plain.texts[0]["loglik"]
    with tuned.disable_adapter():
        assert run_task(tuned, tokenizer, one("arc_easy", data), ONE_BY_ONE).texts == plain.texts


def test_a_model_with_broken_weights_gets_no_score(data, tiny):
    """The harness would report the accuracy of always choosing the first."""
    model, tokenizer = tiny
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(TaskFailed, match="not numbers"):
        run_task(model, tokenizer, one("arc_easy", data))


def test_a_model_that_is_too_short_for_the_task(data, tiny):
    with pytest.raises(TaskFailed, match="max tokens to generate"):
        run_task(*tiny, one("gsm8k", data), Settings(limit=1, max_length=200))


def test_progress_counts_every_request(data, tiny):
    heard = []
    run_task(*tiny, one("arc_easy", data), progress=lambda done, total: heard.append((done, total)))
    assert heard == [(i + 1, 14) for i in range(14)]  # 4 + 3 + 5 + 2 choices


# --- several models and tasks ----------------------------------------------------------------------------------------


def result_of(name, values, metric="acc,none", **more):
    texts = [
        {
            "question": f"{name} {i}",
            "expected": "a",
            "choices": ["a", "b"],
            "loglik": [-1.0, -2.0] if v else [-2.0, -1.0],
        }
        for i, v in enumerate(values)
    ]
    mean = sum(values) / len(values)
    return TaskResult(name, 0, {metric: mean}, {metric: [float(v) for v in values]}, [1.0] * len(values), texts, **more)


def assembled(scores, missing=(), base=None, failed=(), metric="acc,none"):
    """`assemble` on made-up items: label -> task -> values."""
    names = {name for tasks in scores.values() for name in tasks}
    outcomes = {
        label: Outcome({}, {name: result_of(name, values, metric) for name, values in tasks.items()},
                       {task: why for one, task, why in failed if one == label})
        for label, tasks in scores.items()
    }  # fmt: skip
    entries = {
        "Math": (Entry("sums", ("sums",)), Entry("proofs", ("proofs",))),
        "Reading": (Entry("both", ("easy", "hard")), Entry("story", ("story",))),
    }
    runnable = {name: Runnable(name, None, f"{name}.jsonl") for name in names}
    return assemble(Plan(Categories("x", "x", entries), runnable, dict(missing)), outcomes, base=base)


FULL = {"sums": [1, 0, 0, 0], "proofs": [1, 1, 1, 0], "easy": [1, 1], "hard": [0, 0, 0, 1], "story": [1, 0]}


def test_averages_by_hand():
    results = assembled({"a": FULL})
    math_, reading = results["categories"]["Math"], results["categories"]["Reading"]
    assert math_["scores"]["a"] == pytest.approx((1 / 4 + 3 / 4) / 2)
    assert reading["scores"]["a"] == pytest.approx(((1 + 1 / 4) / 2 + 1 / 2) / 2)  # the mean of a mean, not of tasks
    assert reading["parts"] == {"both": ["easy", "hard"]}
    assert math_["complete"]
    assert reading["complete"]
    assert results["missing"] == []
    assert results["ranks"] is None  # of one model there is no rank


@pytest.mark.parametrize("gone", ["sums", "hard", "story"])
def test_what_is_missing_is_named_and_never_averaged_away(gone):
    results = assembled({"a": {k: v for k, v in FULL.items() if k != gone}}, {gone: "no file"})
    assert results["missing"] == [{"task": gone, "why": "no file", "label": None}]
    assert gone not in results["tasks"]
    name = "Math" if gone == "sums" else "Reading"
    entry = "both" if gone == "hard" else gone
    category = results["categories"][name]
    assert not category["complete"]
    assert category["missing"] == [entry]  # half of a mean is no mean: the other half counts nowhere
    assert entry not in category["tasks"]
    left = {"sums": 3 / 4, "hard": 1 / 2, "story": (1 + 1 / 4) / 2}[gone]
    assert category["scores"]["a"] == pytest.approx(left)


def test_an_empty_category_has_no_score():
    results = assembled({"a": {"sums": [1]}}, dict.fromkeys(("proofs", "easy", "hard", "story"), "no"))
    assert results["categories"]["Reading"]["scores"] == {"a": None}
    assert results["categories"]["Reading"]["missing"] == ["both", "story"]


def test_a_task_that_one_model_failed_counts_for_none():
    without = {k: v for k, v in FULL.items() if k != "proofs"}
    results = assembled({"a": FULL, "b": without}, failed=[("b", "proofs", "too long")])
    assert results["missing"] == [{"task": "proofs", "why": "too long", "label": "b"}]
    assert results["categories"]["Math"]["tasks"] == ["sums"]
    assert results["categories"]["Math"]["scores"] == {"a": 1 / 4, "b": 1 / 4}
    assert list(results["tasks"]["proofs"]["scores"]) == ["a"]  # what was measured is told


def test_ranks_over_what_all_have():
    worse = {name: [0] * len(values) for name, values in FULL.items()}
    results = assembled({"base": FULL, "a": worse, "b": FULL}, base="base")
    assert results["ranks"] == {"a": 2.0, "b": 1.0}  # the base has no rank, as in the paper
    assert results["ranked_over"] == {"Math": ["sums", "proofs"], "Reading": ["both", "story"]}
    results = assembled({"a": {"sums": [0]}, "b": {"sums": [1]}}, {"story": "no"})
    assert results["ranks"] == {"a": 2.0, "b": 1.0}
    assert results["ranked_over"] == {"Math": ["sums"]}


def test_forgetting_counts_and_lost_items():
    before, after = {"sums": [1, 1, 0, 0, 1]}, {"sums": [1, 0, 1, 0, 0]}
    results = assembled({"old": before, "new": after}, base="old")
    change = results["forgetting"]["new"]["sums"]
    assert {k: change[k] for k in ("items", "kept", "lost", "gained", "never")} == {
        "items": 5, "kept": 1, "lost": 2, "gained": 1, "never": 1,
    }  # fmt: skip
    assert change["net"]["value"] == pytest.approx(-1 / 5)
    assert change["mcnemar_p"] == 1.0
    lost = results["lost"]["new"]["sums"]
    assert lost["count"] == 2
    assert [item["item"] for item in lost["items"]] == [1, 4]
    assert lost["items"][0] == {"item": 1, "question": "sums 1", "expected": "a", "before": "a", "after": "b"}
    assert list(results["forgetting"]) == ["new"]


def test_items_between_right_and_wrong_have_a_net_change_alone():
    before, after = {"story": [0.5, 0.25, 1.0]}, {"story": [0.5, 0.5, 0.5]}
    results = assembled({"old": before, "new": after}, base="old", metric="f1,none")
    change = results["forgetting"]["new"]["story"]
    assert set(change) == {"items", "before", "after", "net"}
    assert change["net"]["value"] == pytest.approx((0.25 - 0.5) / 3)
    assert results["lost"] == {"new": {}}
    assert results["tasks"]["story"]["correct"]["old"] == [0.5, 0.25, 1.0]


def test_a_mean_that_is_no_share_is_not_taken_for_one():
    """The harness's bleu_max goes to 100: as a share it would read 1,250 %."""
    bleu = {"bleu_max,none": [12.5, 0.0], "bleu_acc,none": [1.0, 0.0]}
    zero = bleu | {"bleu_max,none": [0.0, 0.0]}
    entries = Categories("x", "x", {"Helpfulness": (Entry("truthful", ("truthful",)),)})
    todo = Plan(entries, {"truthful": Runnable("truthful", None, "here")}, {})

    def assembled_of(*each):
        of = lambda items: TaskResult(
            "truthful", 0, {m: sum(v) / 2 for m, v in items.items()}, items, [1.0] * 2, [{}] * 2
        )
        return assemble(todo, {str(n): Outcome({}, {"truthful": of(items)}) for n, items in enumerate(each)})

    assert assembled_of(zero, bleu)["tasks"]["truthful"]["metric"] == "bleu_acc,none"
    (missing,) = assembled_of({"bleu_max,none": [12.5, 0.0]})["missing"]
    assert "from 0 to 1" in missing["why"]


def test_a_metric_of_which_less_is_better_is_left_out(data, tiny):
    part = one("arc_easy", data)
    part.task._higher_is_better["acc"] = False
    assert list(run_task(*tiny, part, Settings(limit=1)).scores) == ["acc_norm,none"]


def test_long_lists_of_lost_items_say_how_many():
    results = assembled({"old": {"sums": [1] * 80}, "new": {"sums": [0] * 80}}, base="old")
    assert results["lost"]["new"]["sums"]["count"] == 80
    assert len(results["lost"]["new"]["sums"]["items"]) == LISTED


def test_results_are_json(data, tiny):
    todo = plan(load("paper"), data_dir=data)
    described, results = evaluate({"a": tiny}, todo, settings=Settings(limit=1))
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert described["a"]["weights"] == weights_hash(tiny[0])
    assert set(results["tasks"]) == set(load("paper").tasks)
    assert all(category["complete"] for category in results["categories"].values())
    gsm8k = results["tasks"]["gsm8k"]
    assert (gsm8k["category"], gsm8k["metric"], gsm8k["items"]) == ("Math", "exact_match,strict-match", 1)
    assert (gsm8k["fewshot"], gsm8k["source"]) == (5, "gsm8k/test.jsonl")


# --- the cache -------------------------------------------------------------------------------------------------------

TWO = Categories("x", "x", {"A": (Entry("arc_easy", ("arc_easy",)), Entry("mathqa", ("mathqa",)))})


def test_a_second_run_scores_nothing_anew(data, tiny, monkeypatch):
    todo = plan(TWO, data_dir=data)
    first = evaluate({"a": tiny}, todo)[1]
    monkeypatch.setattr(suite, "run_task", None)
    second = evaluate({"a": tiny}, todo)[1]
    assert second["cached"] == {"a": ["arc_easy", "mathqa"]}
    assert second | {"cached": None} == first | {"cached": None}


def test_an_interrupted_run_keeps_what_is_finished(data, tiny, monkeypatch):
    todo, real, started = plan(TWO, data_dir=data), suite.run_task, []

    def stops_at_the_second(model, tokenizer, task, *args, **options):
        started.append(task.name)
        if len(started) == 2:
            raise KeyboardInterrupt
        return real(model, tokenizer, task, *args, **options)

    monkeypatch.setattr(suite, "run_task", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate({"a": tiny}, todo)
    evaluate({"a": tiny}, todo)
    assert started == ["arc_easy", "mathqa", "mathqa"]


def test_without_the_cache_nothing_is_read_or_kept(data, tiny, tmp_path):
    evaluate({"a": tiny}, plan(TWO, data_dir=data), use_cache=False)
    assert not (tmp_path / "cache").exists()


def test_a_base_that_is_not_there(data, tiny):
    with pytest.raises(UserError, match="base 'b' is not among the models"):
        evaluate({"a": tiny}, plan(TWO, data_dir=data), base="b")


# --- SQuAD's comparison, for CoQA ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "given", "exact", "f1"),
    [
        ("The boat!", "boat", 1, 1.0),
        ("a  white\ncat", "White cat.", 1, 1.0),
        ("big red dog", "red dog runs", 0, 2 / 3),
        ("red", "red red red", 0, 2 / 4),  # a word counts as often as both have it
        ("theatre", "atre", 0, 0.0),  # articles are words of their own
        ("yes", "", 0, 0.0),
        ("the", "...", 1, 1.0),  # both are empty once normalised
    ],
)
def test_squad_by_hand(gold, given, exact, f1):
    assert squad.compute_exact(gold, given) == squad.compute_exact(given, gold) == exact
    assert squad.compute_f1(gold, given) == squad.compute_f1(given, gold) == pytest.approx(f1)


def test_squad_is_lent_and_taken_back():
    with squad.lent():
        import transformers.data.metrics.squad_metrics as found

        assert found.compute_f1("a b", "b") == 1.0
    assert sys.modules.get(squad.PLACE) is not squad


def test_unknown_tasks_are_named_with_what_is_close(data, monkeypatch):
    """The list of all names takes long to read, so here it is short."""
    from lfu.evaluation import tasks

    class Few:
        task_index = all_tasks = ("arc_easy", "gsm8k")

    monkeypatch.setattr(tasks, "_tasks_in", lambda folder=None: Few)
    with pytest.raises(UserError, match=r"unknown task 'arc_eazy'.*Did you mean arc_easy"):
        find(["arc_eazy"], data_dir=Path(data))
