"""The cache: what must give another key does, what must not does not, and a broken file is no result."""

from __future__ import annotations

import copy
import json

import pytest
from harness_data import ARC, write_local, write_rows
from peft import LoraConfig, get_peft_model
from tiny_folder import byte_tokenizer

from lfu.evaluation import cache
from lfu.evaluation.record import weights_hash
from lfu.support.errors import UserError

pytest.importorskip("lm_eval")

from lfu.evaluation.tasks import find


def fingerprint(model, tokenizer):
    return cache.model_fingerprint(weights_hash(model), model, tokenizer)


def test_key_changes_with_everything_that_decides_a_result(monkeypatch):
    settings = {"limit": 5, "batch_size": 8}
    first = cache.key("m", "t", settings)
    assert cache.key("m", "t", dict(reversed(settings.items()))) == first
    others = [
        cache.key("n", "t", settings),
        cache.key("m", "u", settings),
        cache.key("m", "t", settings | {"limit": 6}),
    ]
    monkeypatch.setattr(cache, "versions", lambda packages: dict.fromkeys(packages, "99"))
    others.append(cache.key("m", "t", settings))
    assert len({first, *others}) == 5


def test_what_was_kept_comes_back(tmp_path):
    result = {"scores": {"acc,none": 1 / 3}, "texts": [{"question": "¿?"}]}
    cache.save("k", result, tmp_path)
    assert cache.load("k", tmp_path) == result
    assert cache.load("other", tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": "other", "result": {}}', '{"result": {}}', "null"])
def test_a_broken_file_is_no_result(tmp_path, content):
    (tmp_path / "k.json").write_text(content)
    assert cache.load("k", tmp_path) is None


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="LFU_CACHE"):
        cache.save("k", {}, tmp_path / "file")


def test_the_default_folder_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LFU_CACHE", str(tmp_path))
    cache.save("k", {"a": 1})
    assert json.loads((tmp_path / "lfu" / "evaluations" / "k.json").read_text())["result"] == {"a": 1}


# --- models ----------------------------------------------------------------------------------------------------------


def test_the_same_model_twice(llama, tokenizer):
    assert fingerprint(llama, tokenizer) == fingerprint(copy.deepcopy(llama).train(), byte_tokenizer())


def test_another_number_in_the_weights(llama, tokenizer):
    first = fingerprint(llama, tokenizer)
    llama.get_input_embeddings().weight.data[3, 2] += 1e-6
    assert fingerprint(llama, tokenizer) != first


def test_another_configuration_with_the_same_weights(llama, tokenizer):
    other = copy.deepcopy(llama)
    other.config.rms_norm_eps *= 2
    assert weights_hash(other) == weights_hash(llama)
    assert fingerprint(other, tokenizer) != fingerprint(llama, tokenizer)
    other = copy.deepcopy(llama)
    other.config._name_or_path = "elsewhere"  # the same model in another folder is the same
    assert fingerprint(other, tokenizer) == fingerprint(llama, tokenizer)


def test_another_scaling_of_the_same_adapter(llama, tokenizer):
    def adapted(alpha):
        model = get_peft_model(copy.deepcopy(llama), LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.fill_(0.1)
        return model

    assert weights_hash(adapted(2)) == weights_hash(adapted(4))
    assert len({fingerprint(model, tokenizer) for model in (llama, adapted(2), adapted(4))}) == 3


def test_another_tokenizer(llama, tokenizer):
    other = byte_tokenizer(chat=False)
    assert fingerprint(llama, other) != fingerprint(llama, tokenizer)


# --- tasks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    return write_local(tmp_path / "data")


def of_task(data, name="arc_easy", limit=None, num_fewshot=None):
    task = find([name], data_dir=data, num_fewshot=num_fewshot)[0][name]
    return cache.task_fingerprint(task.leaves, limit=limit, num_fewshot=task.num_fewshot)


def local(pairs):
    return [row for row, _ in pairs]


def test_the_same_task_twice_and_elsewhere(data, tmp_path):
    assert of_task(data) == of_task(data) == of_task(write_local(tmp_path / "other"))


def test_each_task_has_its_own(data):
    names = ["arc_easy", "arc_challenge", "gsm8k", "mmlu", "truthfulqa_mc1", "truthfulqa_mc2", "mathqa"]
    assert len({of_task(data, name) for name in names}) == len(names)


def test_items_count_up_to_the_limit(data):
    whole, two = of_task(data), of_task(data, limit=2)
    assert whole != two
    changed = [*local(ARC)[:3], local(ARC)[3] | {"question": "Snow is not"}]
    write_rows(data / "arc_easy/test.jsonl", changed)
    assert of_task(data) != whole
    assert of_task(data, limit=2) == two


def test_worked_examples_count_where_there_are_any(data):
    none, two = of_task(data), of_task(data, num_fewshot=2)
    assert none != two
    write_rows(data / "arc_easy/train.jsonl", local(ARC)[::-1])
    assert of_task(data) == none
    assert of_task(data, num_fewshot=2) != two
