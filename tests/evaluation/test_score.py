"""The batched scores against one-by-one arithmetic, at any batch size, and without traces on model and generators."""

from __future__ import annotations

import math
import random
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from questions import CHOICES, QUESTIONS, TEXTS
from tiny import DEVICE, random_states, tiny_model
from tiny_folder import base_tokenizer

from lfu.evaluation import score
from lfu.evaluation.pieces import chat_pair
from lfu.evaluation.score import answer_nll, exact_match, final_number, multiple_choice, perplexity

CLOSE = {"rel": 2e-5, "abs": 2e-4}  # float32, and padding changes the order of its sums


def naive_nll(model: Any, ids: list[int], start: int) -> float:
    """Summed NLL of ids[start:], one row, no padding, no cache."""
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([ids], device=DEVICE)).logits[0].double().log_softmax(-1)
    return -sum(float(logits[t - 1, ids[t]]) for t in range(start, len(ids)))


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answer_nll_equals_one_by_one(model, tokenizer, batch_size):
    got = answer_nll(model, tokenizer, QUESTIONS, batch_size=batch_size)
    for row, nll, tokens in zip(QUESTIONS, got.nll, got.tokens):
        prompt, answer = chat_pair(tokenizer, row)
        ids, start = encode(tokenizer, prompt + answer), len(encode(tokenizer, prompt))
        assert tokens == len(ids) - start
        assert nll == pytest.approx(naive_nll(model, ids, start), **CLOSE)
    assert got.mean == pytest.approx(sum(got.nll) / sum(got.tokens))


def test_answer_ends_with_the_turn_and_begins_behind_the_prompt(tokenizer):
    prompt, answer = chat_pair(tokenizer, QUESTIONS[0])
    assert prompt == "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    assert answer == "2 + 3 = 5\n#### 5<|im_end|>\n"


def test_answer_nll_takes_another_template(llama, tokenizer):
    got = answer_nll(llama, tokenizer, QUESTIONS[:1], render=lambda tok, row: ("Q:", row["answer"]))
    ids = encode(tokenizer, "Q:" + QUESTIONS[0]["answer"])
    assert got.nll[0] == pytest.approx(naive_nll(llama, ids, 2), **CLOSE)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_perplexity_equals_one_by_one(model, tokenizer, batch_size):
    got = perplexity(model, tokenizer, TEXTS, batch_size=batch_size)
    assert got.tokens == [len(encode(tokenizer, text)) - 1 for text in TEXTS]
    assert got.nll == pytest.approx([naive_nll(model, encode(tokenizer, text), 1) for text in TEXTS], **CLOSE)


def test_perplexity_reads_long_texts_in_windows(llama, tokenizer):
    got = perplexity(llama, tokenizer, TEXTS, window=7, batch_size=3)
    for text, nll, tokens in zip(TEXTS, got.nll, got.tokens):
        ids = encode(tokenizer, text)
        windows = [ids[i : i + 7] for i in range(0, len(ids), 7)]
        assert nll == pytest.approx(sum(naive_nll(llama, w, 1) for w in windows if len(w) > 1), **CLOSE)
        assert tokens == sum(len(w) - 1 for w in windows)


@pytest.mark.parametrize("kind", ["Llama 3", "with an end"])
def test_every_window_begins_with_what_the_tokenizer_puts_in_front(kind, llama):
    """Gemma 3 without its first token is wrong by 2 nats per token."""
    base = base_tokenizer(kind)
    start, *ids = base(TEXTS[1], add_special_tokens=True)["input_ids"][: 1 + len(TEXTS[1])]
    windows = [[start, *ids[i : i + 6]] for i in range(0, len(ids), 6)]
    got = perplexity(llama, base, TEXTS[1:2], window=7)
    assert got.tokens == [len(TEXTS[1])]
    assert got.nll[0] == pytest.approx(sum(naive_nll(llama, window, 1) for window in windows), **CLOSE)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_multiple_choice_equals_one_by_one(model, tokenizer, batch_size):
    got = multiple_choice(model, tokenizer, CHOICES, batch_size=batch_size)
    for i, row in enumerate(CHOICES):
        prompt = f"Question: {row['question']}\nAnswer:"
        start = len(encode(tokenizer, prompt))
        naive = [-naive_nll(model, encode(tokenizer, f"{prompt} {choice}"), start) for choice in row["choices"]]
        assert got.loglik[i] == pytest.approx(naive, **CLOSE)
        per_character = [value / len(choice) for value, choice in zip(naive, row["choices"])]
        assert got.correct[i] == (int(np.argmax(per_character)) == row["answer"])
    assert got.accuracy == sum(got.correct) / len(CHOICES)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Lfm2Config", {"num_attention_heads": 4, "num_key_value_heads": 2, "full_attn_idxs": [1]}),
        ("MambaConfig", {"state_size": 4}),
    ],
)
def test_choices_of_a_model_with_more_than_keys_and_values_in_its_cache(name, config, tokenizer):
    torch.manual_seed(0)
    sizes = {"vocab_size": 340, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2} | config
    hybrid = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes)).to(DEVICE)
    got = multiple_choice(hybrid, tokenizer, CHOICES, batch_size=2)
    for row, loglik in zip(CHOICES, got.loglik):
        prompt = f"Question: {row['question']}\nAnswer:"
        ids, start = [encode(tokenizer, f"{prompt} {c}") for c in row["choices"]], len(encode(tokenizer, prompt))
        assert loglik == pytest.approx([-naive_nll(hybrid, each, start) for each in ids], **CLOSE)


def test_tokens_that_merge_over_the_seam_are_scored_with_the_choice(llama, merging_tokenizer):
    seam_moved = False
    got = multiple_choice(llama, merging_tokenizer, CHOICES, batch_size=3)
    for row, loglik in zip(CHOICES, got.loglik):
        prompt = encode(merging_tokenizer, f"Question: {row['question']}\nAnswer:")
        wholes = [encode(merging_tokenizer, f"Question: {row['question']}\nAnswer: {c}") for c in row["choices"]]
        start = min(next((t for t, (a, b) in enumerate(zip(prompt, w)) if a != b), len(prompt)) for w in wholes)
        seam_moved |= start < len(prompt)
        assert loglik == pytest.approx([-naive_nll(llama, whole, start) for whole in wholes], **CLOSE)
    assert seam_moved, "this tokenizer was meant to merge 'Answer:' with what follows"


def test_one_token_choices_need_no_second_pass(llama, tokenizer, monkeypatch):
    calls = []
    forward = score.forward
    monkeypatch.setattr(score, "forward", lambda *a, **kw: calls.append(1) or forward(*a, **kw))
    one_byte = lambda tok, row: (encode(tok, "Q"), [encode(tok, choice) for choice in row["choices"]])
    monkeypatch.setattr(score, "_choice_ids", one_byte)
    got = multiple_choice(llama, tokenizer, [CHOICES[2]])
    assert calls == [1]
    assert got.loglik[0] == pytest.approx(
        [-naive_nll(llama, encode(tokenizer, "Q" + choice), 1) for choice in CHOICES[2]["choices"]], **CLOSE
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_exact_match_equals_greedy_one_by_one(model, tokenizer, batch_size):
    got = exact_match(model, tokenizer, QUESTIONS, max_new_tokens=6, batch_size=batch_size)
    for row, text in zip(QUESTIONS, got.text):
        ids = encode(tokenizer, chat_pair(tokenizer, row)[0])
        start = len(ids)
        for _ in range(6):
            with torch.no_grad():
                ids = [*ids, int(model.eval()(input_ids=torch.tensor([ids], device=DEVICE)).logits[0, -1].argmax())]
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_exact_match_counts_by_the_final_number(llama, tokenizer, monkeypatch):
    said = ["so #### 5", "I say 1193", "#### 4.50", "12", "no idea"]
    monkeypatch.setattr(score, "continuations", lambda model, tok, prompts, *more: [lookup[tuple(p)] for p in prompts])
    lookup = {tuple(encode(tokenizer, chat_pair(tokenizer, row)[0])): text for row, text in zip(QUESTIONS, said)}
    got = exact_match(llama, tokenizer, QUESTIONS, batch_size=2)
    assert got.text == said
    assert got.correct == [True, False, True, False, False]
    assert got.correct_any == [True, True, True, True, False]
    assert got.accuracy == 0.4


@pytest.mark.parametrize(
    ("text", "strict", "loose"),
    [
        ("a 3 b\n#### 1,234", "1234", "1234"),
        ("#### $5", "5", "5"),
        ("#### 5.", "5", "5"),
        ("#### 12/3", None, "3"),  # no number, and never its first part
        ("#### 3:30", None, "30"),
        ("#### -7.50 dollars", "-7.5", "-7.5"),
        ("#### 1e3", "1000", "1000"),
        ("#### 2.5E-1 or so", "0.25", "0.25"),
        ("first #### 4 then #### 9", "4", "4"),
        ("it is 3, no, 4.", None, "4"),
        ("#### none", None, None),
        ("", None, None),
    ],
)
def test_final_number(text, strict, loose):
    as_number = lambda digits: None if digits is None else Decimal(digits)
    assert final_number(text) == as_number(strict)
    assert final_number(text, anywhere=True) == as_number(loose)


# --- nothing is left behind ----------------------------------------------------------------------------------------

ALL = {
    "answer_nll": lambda m, t, p: answer_nll(m, t, QUESTIONS, progress=p, batch_size=2),
    "perplexity": lambda m, t, p: perplexity(m, t, TEXTS, progress=p, batch_size=3, window=9),
    "multiple_choice": lambda m, t, p: multiple_choice(m, t, CHOICES, progress=p, batch_size=3),
    "exact_match": lambda m, t, p: exact_match(m, t, QUESTIONS, progress=p, batch_size=2, max_new_tokens=4),
}
ITEMS = {"answer_nll": 5, "perplexity": 4, "multiple_choice": 4, "exact_match": 5}


@pytest.mark.parametrize("name", ALL)
def test_mode_and_generators_are_as_before_and_every_item_is_announced(model, tokenizer, name):
    model.train()
    next(model.children()).eval()  # a frozen part that somebody keeps in eval mode
    flags = [module.training for module in model.modules()]
    states = (random_states(), np.random.get_state()[1].copy(), random.getstate())
    ticks: list[int] = []
    during: list[bool] = []
    ALL[name](model, tokenizer, lambda n: (ticks.append(n), during.append(model.training)))
    assert sum(ticks) == ITEMS[name]
    assert not any(during)
    assert [module.training for module in model.modules()] == flags
    assert states[0] == random_states()
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ALL)
def test_the_mode_is_restored_after_an_error(llama, tokenizer, name):
    llama.train()

    def stop(n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ALL[name](llama, tokenizer, stop)
    assert llama.training
    assert torch.is_grad_enabled()


def test_a_peft_model_scores_as_its_merged_self(llama, tokenizer):
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    peft = get_peft_model(llama, config, autocast_adapter_dtype=False)
    through = {name: run(peft, tokenizer, None) for name, run in ALL.items()}
    merged = peft.merge_and_unload()
    for name, run in ALL.items():
        one, two = through[name], run(merged, tokenizer, None)
        if name == "exact_match":
            assert one.text == two.text
        elif name == "multiple_choice":
            assert [v for vs in one.loglik for v in vs] == pytest.approx([v for vs in two.loglik for v in vs], **CLOSE)
        else:
            assert one.nll == pytest.approx(two.nll, **CLOSE)


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", PromptTuningConfig), ("gpt2", PromptTuningConfig), ("llama", PromptEncoderConfig),
     ("llama", PrefixTuningConfig)],
)  # fmt: skip
def test_trained_tokens_in_front_of_a_row_are_read_without_padding_or_cache(family, config, tokenizer):
    more = {"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}
    plain = tiny_model(family, dtype=torch.float32, vocab_size=340, **more)
    peft = get_peft_model(plain, config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for p in peft.prompt_encoder.parameters():
        torch.nn.init.normal_(p, std=0.5)

    def naive(prompt: str, rest: str) -> float:
        ids, start = encode(tokenizer, prompt + rest), len(encode(tokenizer, prompt))
        with torch.no_grad():
            logits = peft.eval()(input_ids=torch.tensor([ids], device=DEVICE)).logits[0, -len(ids) :]
        chances = logits.double().log_softmax(-1)
        return -sum(float(chances[t - 1, ids[t]]) for t in range(start, len(ids)))

    answers = answer_nll(peft, tokenizer, QUESTIONS)
    assert answers.nll == pytest.approx([naive(*chat_pair(tokenizer, row)) for row in QUESTIONS], **CLOSE)
    for row, loglik in zip(CHOICES, multiple_choice(peft, tokenizer, CHOICES).loglik):
        wanted = [-naive(f"Question: {row['question']}\nAnswer:", f" {choice}") for choice in row["choices"]]
        assert loglik == pytest.approx(wanted, **CLOSE)
    together = exact_match(peft, tokenizer, QUESTIONS, max_new_tokens=4)
    assert together.text == [exact_match(peft, tokenizer, [row], max_new_tokens=4).text[0] for row in QUESTIONS]


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [answer_nll, perplexity, multiple_choice, exact_match])
def test_nothing_to_score(llama, tokenizer, run):
    with pytest.raises(ValueError, match="to score"):
        run(llama, tokenizer, [])


def test_mistakes_are_named(llama, tokenizer, merging_tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        answer_nll(llama, merging_tokenizer, QUESTIONS)
    with pytest.raises(ValueError, match="fewer than two tokens"):
        perplexity(llama, tokenizer, ["fine", "x"])
    with pytest.raises(ValueError, match="no index"):
        multiple_choice(llama, tokenizer, [{"question": "?", "choices": ["a"], "answer": 1}])
    with pytest.raises(ValueError, match="reference answer 1"):
        exact_match(llama, tokenizer, [QUESTIONS[0], {"question": "?", "answer": "seven"}])
    with pytest.raises(ValueError, match="batch_size"):
        perplexity(llama, tokenizer, TEXTS, batch_size=0)


def test_a_row_that_is_longer_than_the_table_of_positions_is_told(tokenizer):
    short = tiny_model("gpt2", dtype=torch.float32, vocab_size=340, n_positions=32)
    with pytest.raises(ValueError, match="longer than the model's table of positions"):
        answer_nll(short, tokenizer, QUESTIONS)


def test_a_broken_model_takes_no_choice(llama, tokenizer):
    with torch.no_grad():
        llama.model.norm.weight.fill_(torch.nan)
    got = multiple_choice(llama, tokenizer, CHOICES)
    assert (got.chosen, got.accuracy) == ([-1] * len(CHOICES), 0)


def test_perplexity_of_an_indifferent_model_is_its_vocabulary(llama, tokenizer):
    with torch.no_grad():
        llama.get_output_embeddings().weight.zero_()
    assert math.exp(perplexity(llama, tokenizer, TEXTS).mean) == pytest.approx(340, rel=1e-5)
