"""The section of the model card on what was gained and forgotten."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from peft import LoraConfig
from test_trainer import DATA, settings
from tiny import tiny_model
from tiny_folder import byte_tokenizer

from lfu import ForgettingCallback, LfUConfig, LfUTrainer
from lfu.training.model_card import BEGIN, add_to_card, name_the_base, of_kept, section

READING = {
    "forgetting/known": 150, "forgetting/items": 307, "forgetting/lost": 5, "forgetting/gained": 2,
    "forgetting/prose_loss": 3.05, "forgetting/prose_rise": 0.04, "step": 60,
}  # fmt: skip


def test_it_tells_what_was_measured():
    history = [{"eval_loss": 2.5, "step": 15}, {"loss": 2.0, "step": 20}, READING, {"eval_loss": 1.25, "step": 60}]
    told = section(history, "l2sp")
    assert "`l2sp`" in told
    assert "| loss on the evaluation rows, nats per token | 2.500 (step 15) | 1.250 |" in told
    assert "| built-in questions answered rightly | 150 of 307 | 147 (5 lost, 2 gained) |" in told
    assert "| loss on plain prose, nats per token | 3.010 | 3.050 (+0.040) |" in told
    assert "not measured" not in told


def test_it_says_that_nothing_was_measured():
    assert "What the model forgot was not measured" in section([{"loss": 2.0, "step": 20}], "sft")


def test_a_newer_section_takes_the_place_of_the_older(tmp_path):
    card = tmp_path / "README.md"
    add_to_card(card, [], "sft")
    assert not card.exists()
    card.write_text("---\nlicense: mit\n---\n# A model\n")
    add_to_card(card, [], "sft")
    card.write_text(card.read_text() + "\n## Added by hand\n")
    add_to_card(card, [READING], "sft")
    told = card.read_text()
    assert told.startswith("---\nlicense: mit\n---\n# A model\n")
    assert told.count(BEGIN) == 1
    assert "150 of 307" in told
    assert told.rstrip().endswith("## Added by hand")


@pytest.mark.parametrize("local", [True, False])
def test_a_model_of_a_folder_has_its_name_and_no_path(tmp_path, local):
    base = tmp_path / "my-base" if local else "hub/my-base"
    if local:
        base.mkdir()
    card, named = tmp_path / "README.md", None if local else base
    card.write_text(
        f"---\nbase_model: {base}\ntags:\n- base_model:adapter:{base}\n- lora\n---\n"
        f"This model is a fine-tuned version of [{named}](https://huggingface.co/{named}).\n"
        'pipeline("text-generation", model="None")\n'
    )
    name_the_base(card, str(base), "run-1")
    told = card.read_text()
    assert 'model="run-1"' in told
    assert "None" not in told
    assert (str(base) in told) != local
    assert ("fine-tuned version of `my-base`." in told) == local
    assert "- lora\n" in told


def test_the_figures_are_those_of_the_weights_that_are_kept():
    """Of step 1, which is the best; and of what is measured after training, when its weights are back."""
    log = [{"eval_loss": 0.5, "step": 1}, {"eval_loss": 0.9, "step": 2}, {"train_runtime": 1.0, "step": 2}]
    assert "0.500" in section(of_kept(log, 1), "sft")
    assert "0.900" not in section(of_kept(log, 1), "sft")
    assert "150 of 307" in section(of_kept([*log, READING | {"step": 2}], 1), "sft")


def test_what_was_measured_of_other_weights_than_the_method_left_is_no_figure_of_the_model(tmp_path):
    more = {"method_args": "wise.alpha=0.5", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    tokenizer, rows = byte_tokenizer(), Dataset.from_list(DATA["prompt_completion"])
    card = {}
    for method in ("sft", "wise"):
        options = more if method == "wise" else more | {"method_args": None}
        t = LfUTrainer(
            model=tiny_model("llama", dtype=None, vocab_size=len(tokenizer)), train_dataset=rows, eval_dataset=rows,
            args=settings(tmp_path, LfUConfig, method=method, **options), processing_class=tokenizer,
            peft_config=LoraConfig(target_modules=["q_proj"]), callbacks=[ForgettingCallback(page=False)],
        )  # fmt: skip
        t.train()
        t.save_model(str(tmp_path / method))
        card[method] = (tmp_path / method / "README.md").read_text()
    assert "loss on the evaluation rows" in card["sft"]
    assert "built-in questions" in card["sft"]
    assert "loss on the evaluation rows" not in card["wise"]
    assert "not measured" in card["wise"]


@pytest.mark.parametrize("method", ["sft", "lfu"])
def test_a_saved_model_has_it(tmp_path, method):
    config = settings(tmp_path, LfUConfig, method=method, max_steps=2)
    tokenizer = byte_tokenizer()
    t = LfUTrainer(
        model=tiny_model("llama", dtype=None, vocab_size=len(tokenizer)), args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_list(DATA["prompt_completion"]), peft_config=LoraConfig(target_modules=["q_proj"]),
        callbacks=[ForgettingCallback(page=False)],
    )  # fmt: skip
    t.train()
    t.save_model(str(tmp_path / "saved"))
    t.create_model_card()
    for card in (tmp_path / "saved" / "README.md", tmp_path / "README.md"):
        assert "None" not in card.read_text()
        assert "built-in questions answered rightly" in card.read_text(), json.dumps(t.state.log_history)
        assert ("\n- lfu\n" in card.read_text()) == (method == "lfu")
    assert ("Learning from the Undesirable" in card.read_text()) == (method == "lfu")
