"""Noise on the input: none changes nothing, more changes more, and it is the same for every model of one shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from questions import QUESTIONS
from tiny import tiny_model

from lfu.evaluation.noise import noise_similarity
from lfu.evaluation.pieces import chat_pair
from lfu.evaluation.score import answer_nll

ROWS = [{"question": f"What is {a} + {b}?", "answer": f"#### {a + b}"} for a in (1, 2) for b in (3, 4, 50)]


def tiny(family: str = "llama", **options: Any) -> Any:
    more = {"attn_pdrop": 0.2, "n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}
    return tiny_model(family, **{"dtype": torch.float32, "vocab_size": 340} | more | options)


@pytest.fixture(scope="module")
def learned(tokenizer: Any) -> dict[str, torch.Tensor]:
    """Weights of a model that knows ROWS by heart."""
    model = tiny()
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    texts = ["".join(chat_pair(tokenizer, row)) for row in ROWS]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_no_noise_changes_nothing(family, tokenizer):
    scores = noise_similarity(tiny(family), tokenizer, QUESTIONS, alpha=0.0, draws=2, batch_size=2)
    assert [v for values in scores.cosine for v in values] == pytest.approx([1.0] * 20, abs=1e-12)
    assert scores.layers == [1, 2, 3, 4]
    assert scores.noisy == pytest.approx(scores.clean, rel=1e-6)
    assert scores.nll_rise().value == pytest.approx(0, abs=1e-6)
    plain = answer_nll(tiny(family), tokenizer, QUESTIONS)
    assert scores.tokens == plain.tokens
    assert scores.clean == pytest.approx(plain.nll, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_more_noise_is_less_alike_in_every_layer(family, tokenizer):
    means = []
    for alpha in (0.5, 5.0, 50.0):
        scores = noise_similarity(tiny(family), tokenizer, QUESTIONS, alpha=alpha, draws=3)
        means.append([interval.value for interval in scores.by_layer()])
    for weak, medium, strong in zip(*means):
        assert 1 > weak > medium > strong


def test_more_noise_in_the_input_or_in_the_weights_costs_more_on_what_is_known(learned, tokenizer):
    model = tiny()
    rises = []
    for alpha in (0.0, 5.0, 50.0, 200.0):
        model.load_state_dict(learned)
        rises.append(noise_similarity(model, tokenizer, ROWS, alpha=alpha).nll_rise().value)
    assert rises == sorted(rises)
    assert rises[-1] > 1
    clean = []
    for size in (0.0, 0.1, 0.3, 1.0):
        model.load_state_dict(learned)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p += size * p.std() * torch.randn_like(p) if p.dim() > 1 else 0
        clean.append(sum(noise_similarity(model, tokenizer, ROWS, alpha=0.0, draws=1).clean))
    assert clean == sorted(clean)
    assert clean[-1] > clean[0] + 1


def test_noise_is_neftunes_and_on_the_real_tokens_alone(tokenizer, monkeypatch):
    model, seen = tiny(), []
    add = lambda module, args, output: seen.append(output.clone())
    model.get_input_embeddings().register_forward_hook(add)  # before the noise: what it is added to
    noisy: list[torch.Tensor] = []
    inside = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: noisy.append((args[0] if args else kwargs["hidden_states"]).clone()),
        with_kwargs=True,
    )
    noise_similarity(model, tokenizer, QUESTIONS[:2], alpha=3.0, draws=1, batch_size=2)
    inside.remove()
    noise = noisy[1] - seen[1]
    lengths = [len(tokenizer("".join(chat_pair(tokenizer, row)))["input_ids"]) for row in QUESTIONS[:2]]
    for row, length in zip(noise, sorted(lengths, reverse=True)):  # the longest row comes first
        bound = 3.0 / (length * 16) ** 0.5
        assert bool((row[length:] == 0).all())
        assert float(row[:length].abs().max()) <= bound * 1.001
        assert float(row[:length].std()) == pytest.approx(bound / 3**0.5, rel=0.1)  # uniform on (-bound, bound)
        assert float(row[:length].mean()) == pytest.approx(0, abs=bound / 10)
    assert torch.equal(noisy[0], seen[0])


def test_the_same_noise_for_two_models_at_any_batch_size_and_another_for_another_seed(tokenizer):
    first = noise_similarity(tiny(), tokenizer, QUESTIONS, seed=3, batch_size=1)
    again = noise_similarity(tiny(), tokenizer, QUESTIONS, seed=3, batch_size=5)
    other = noise_similarity(tiny(), tokenizer, QUESTIONS, seed=4)
    for one, two, three in zip(first.cosine, again.cosine, other.cosine):
        assert one == pytest.approx(two, abs=1e-4)
        assert one != pytest.approx(three, abs=1e-4)
    assert again.against(first).value == pytest.approx(0, abs=1e-4)


def test_draws_are_averaged(tokenizer):
    # float32 sums differ with the batch: one row at a time
    first, second = (noise_similarity(tiny(), tokenizer, ROWS[:1], draws=n) for n in (1, 2))
    assert first.cosine != second.cosine
    assert noise_similarity(tiny(), tokenizer, ROWS[:1], draws=2) == second


def test_an_adapter_is_read_as_the_model_that_it_makes(tokenizer):
    peft = tiny(theta="lora")
    through = noise_similarity(peft, tokenizer, QUESTIONS)
    merged = noise_similarity(peft.merge_and_unload(), tokenizer, QUESTIONS)
    for one, two in zip(through.cosine, merged.cosine):
        assert one == pytest.approx(two, abs=1e-4)


def test_nothing_is_left_behind(tokenizer):
    model = tiny("gpt2").train()
    state = torch.get_rng_state()
    ticks: list[int] = []
    noise_similarity(model, tokenizer, QUESTIONS, progress=ticks.append, batch_size=2)
    assert sum(ticks) == len(QUESTIONS)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"draws": 0}, "draws"),
        ({"rows": []}, "no rows"),
        ({"rows": [{"question": "long " * 60, "answer": "x"}]}, "row 1 has .* more than the 256"),
    ],
)
def test_mistakes(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        noise_similarity(tiny(), tokenizer, **{"rows": ROWS} | options)


def test_two_models_on_other_rows_can_not_be_compared(tokenizer):
    one, two = (noise_similarity(tiny(), tokenizer, rows, draws=1) for rows in (ROWS[:2], ROWS[:3]))
    with pytest.raises(ValueError, match="same tokens"):
        one.against(two)
