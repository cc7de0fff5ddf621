"""What is measured: right values, in every kind of model that a trainer may hold."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import model, tokenizer
from tiny import DEVICE, random_states
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from lfu.forgetting import items, written
from lfu.forgetting.deal import Dealer
from lfu.forgetting.fingerprint import fingerprint, saved_in
from lfu.forgetting.items import item_sets
from lfu.forgetting.measuring import Measuring
from lfu.forgetting.share import tokens_per_step
from lfu.forgetting.unnoticed import has_untouched_base, unnoticed


def measuring(one, files=()):
    return Measuring(one, tokenizer(), item_sets(files, 0), {}, None, 8, 0)


def begun(one):
    made = measuring(one)
    made.begin(100.0, 0, 10)
    return made


def test_the_more_noise_on_the_weights_the_more_is_forgotten():
    one = model()
    made = begun(one)
    start = copy.deepcopy(one.state_dict())
    readings = []
    for step, scale in enumerate((0.0, 0.03, 0.1, 0.3, 1.0), start=1):
        torch.manual_seed(0)
        one.load_state_dict({name: w + scale * w.std() * torch.randn_like(w) for name, w in start.items()})
        readings.append(made.read(step, 0.0).figures)
    for name in ("kl", "prose_rise"):
        values = [figures[name] for figures in readings]
        assert values[0] == 0
        assert values == sorted(values)
        assert values[-1] > 0.1
    assert readings[0]["lost"] == readings[0]["gained"] == 0
    assert readings[-1]["lost"] + readings[-1]["gained"] > 0


def test_kl_is_the_whole_sum_where_all_tokens_are_kept_and_else_a_lower_bound(monkeypatch):
    one, other = model(), model(seed=1)
    found = {}
    for top in (4, 32, len(tokenizer())):
        monkeypatch.setattr(written, "TOP", top)
        made = begun(one)
        with unnoticed(other):
            found[top] = written.divergence(other, made.memory.written, 4, 2, Dealer())
    ids = made.memory.written.ids.to(DEVICE)
    with torch.no_grad():
        p, q = (
            m.eval()(input_ids=ids).logits[:, written.PROMPT - 1 : -1].double().log_softmax(-1) for m in (one, other)
        )
    wanted = (p.exp() * (p - q)).sum(-1).mean(1).tolist()
    assert found[len(tokenizer())] == pytest.approx(wanted, rel=1e-4)  # float32 in the measure
    for few, more, whole in zip(found[4], found[32], wanted):
        assert 0 < few < more < whole


def test_the_untouched_model_wrote_the_text_itself():
    """Likely under the model that wrote it, unlikely under another."""
    one, other = model(), model(seed=1)
    ids = begun(one).memory.written.ids.to(DEVICE)
    with torch.no_grad():
        losses = [float(m.eval()(input_ids=ids, labels=ids).loss) for m in (one, other)]
    assert losses[0] < losses[1]


def test_with_an_adapter_the_untouched_model_is_the_one_with_it_off():
    base = model()
    wanted = begun(base).memory.before
    peft = get_peft_model(model(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    frozen = [p for name, p in peft.named_parameters() if "layers.0" in name and "lora_A" in name]
    for p in frozen:
        p.requires_grad_(False)
    flags = [p.requires_grad for p in peft.parameters()]
    made = begun(peft)
    assert made.memory.before == wanted
    assert made.read(1, 0.0).figures["kl"] > 0
    assert [p.requires_grad for p in peft.parameters()] == flags
    assert peft.training


@pytest.mark.parametrize(("start", "off"), [(True, True), ("gaussian", True), ("pissa", False), ("olora", False)])
def test_an_adapter_that_rewrites_its_base_is_not_switched_off(start, off):
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=start)
    assert has_untouched_base(get_peft_model(model(), config)) is off
    assert not has_untouched_base(model())


class Silent(nn.Module):
    """Stands in for a patched forward that leaves the logits out, as fused losses do."""

    def __init__(self, forward):
        super().__init__()
        self.inner = forward

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **more):
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        return CausalLMOutputWithPast(logits=None, past_key_values=out.past_key_values)


@pytest.mark.parametrize("cached", [True, False])
def test_a_model_that_returns_no_logits_is_measured_all_the_same(cached):
    one = model()
    sets = item_sets((), 0)
    counts = {each.name: 4 for each in sets}
    made = Measuring(one.eval(), tokenizer(), sets, {}, None, 4, 0)
    made.cached = cached
    wanted = made.ask(counts, None)
    silent = copy.deepcopy(one)
    object.__setattr__(silent, "forward", Silent(one.forward).forward)  # the caught states are those of `one`
    silent.model = one.model
    made.model, made.cached = silent, False
    found = made.ask(counts, None)
    assert found.chosen == wanted.chosen
    assert found.nll["prose"] == pytest.approx(wanted.nll["prose"], rel=1e-5)


def test_nothing_random_is_drawn_and_no_flag_stays():
    one = model(dropout=0.1).train()
    one.model.layers[1].eval()
    made = begun(one)
    states = random.getstate(), random_states()
    training = [module.training for module in one.modules()]
    with unnoticed(one):
        random.random()
        torch.rand(1)
        torch.rand(1, device=DEVICE)
        assert not one.training
    made.read(1, 0.0)
    assert random.getstate() == states[0]
    assert random_states() == states[1]
    assert [module.training for module in one.modules()] == training


# -- how many ----------------------------------------------------------------------------------------------------------


def test_tokens_of_a_step_come_from_the_first_rows():
    class Args:
        per_device_train_batch_size, gradient_accumulation_steps = 4, 2

    class Loader:
        dataset = [{"prompt_ids": [1] * 5, "chosen_ids": [1] * 10}, {"prompt_ids": [1] * 5, "chosen_ids": [1] * 20}]  # noqa: RUF012

    assert tokens_per_step(Args, Loader) == 8 * 20
    assert tokens_per_step(Args, None) == tokens_per_step(Args, type("Loader", (), {"dataset": ["text"]}))


# -- files and fingerprints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.jsonl", '{"text": "fine"}\n{"text": ""}\n', "row 2"),
        ("a.jsonl", '{"text": "fine"}\n{"question": 1\n', "line 2: not valid JSON"),
        ("a.json", "[1, 2", "not valid JSON"),
        ("a.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": 7}\n', "row 1: answer 7"),
        ("a.txt", " \n\n ", "is empty"),
        ("prose.txt", "words", "rename the file"),
    ],
)
def test_a_bad_file_is_one_line_with_its_row(tmp_path, name, text, told):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=told) as error:
        item_sets([path], 0)
    assert "\n" not in str(error.value)


def test_files_become_sets_and_the_order_is_the_seeds(tmp_path):
    (tmp_path / "law.json").write_text(json.dumps([{"question": "q", "choices": ["a", "b"], "answer": "B"}]))
    (tmp_path / "marks.csv").write_text("text\nGood.\n")
    (tmp_path / "letters.txt").write_text("Dear Sir,\n\nI remain.\n")
    first = item_sets([tmp_path / "law.json", tmp_path / "letters.txt"], 0)
    assert [(each.name, each.choice) for each in first[2:]] == [("law", True), ("letters", False)]
    assert item_sets([tmp_path / "marks.csv"], 0)[2].items == ["Good."]
    assert first[2].items[0]["answer"] == 1
    assert sorted(first[3].items) == ["Dear Sir,", "I remain."]
    assert item_sets((), 0) == first[:2]
    assert item_sets((), 1)[0].items != first[0].items
    with pytest.raises(ValueError, match="two sets of items are called 'law'"):
        item_sets([tmp_path / "law.json", tmp_path / "law.json"], 0)
    assert set(items.RESERVED) == {"questions", "prose", "written"}


@pytest.mark.parametrize("adapter", [False, True])
def test_a_fingerprint_knows_its_saved_model(tmp_path, adapter):
    one = model()
    if adapter:
        one = get_peft_model(one, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    found = fingerprint(one)
    one.save_pretrained(tmp_path)
    assert saved_in(tmp_path, found)
    assert not saved_in(tmp_path, {name: [value + 1 for value in values] for name, values in found.items()})
    assert not saved_in(tmp_path, {})
    assert not saved_in(tmp_path / "nowhere", found)
