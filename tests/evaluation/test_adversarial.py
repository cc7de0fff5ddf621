"""Adversarial fine-tuning: shares with intervals, the refusal classifier, what is asked and when."""

from __future__ import annotations

import math
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lfu.data.probes import house_rule
from lfu.evaluation.adversarial import Behaviour, asked_in_training, behaviour, not_refused, under_attack
from lfu.evaluation.intervals import wilson
from lfu.evaluation.refusal import PHRASES, error_rate, plain_words, refuses
from lfu.evaluation.score import exact_match

# --- Wilson's interval ---------------------------------------------------------------------------------------------

COUNTS = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts=COUNTS, level=st.floats(0.5, 0.999))
@example(counts=(0, 40), level=0.95)
@example(counts=(40, 40), level=0.95)
def test_the_ends_solve_the_score_equation(counts, level):
    """Wilson's own definition: at either end p, |share - p| is z standard deviations of a share under p."""
    hits, items = counts
    found = wilson(hits, items, level=level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.value == hits / items
    for end in (found.low, found.high):
        assert abs(found.value - end) == pytest.approx(z * math.sqrt(end * (1 - end) / items), abs=1e-9)
    other = wilson(items - hits, items, level=level)
    assert (1 - other.high, 1 - other.low) == pytest.approx((found.low, found.high))


def test_a_published_value():
    """Newcombe 1998 (Stat. Med. 17, 857-872), Table I, method 3: 81 of 263 gives 0.2553 to 0.3662."""
    found = wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(
    ("hits", "items", "level"), [(1, 0, 0.95), (-1, 4, 0.95), (5, 4, 0.95), (1, 4, 1.0), (1, 4, 0)]
)
def test_impossible_shares_are_refused(hits, items, level):
    with pytest.raises(ValueError, match=r"share needs|level must"):
        wilson(hits, items, level=level)


# --- refusals ------------------------------------------------------------------------------------------------------

NOISE = st.text(alphabet=' \t\n.,;:!?-–—*_"“”()', max_size=4)


@given(phrase=st.sampled_from(PHRASES), data=st.data())
def test_case_punctuation_and_the_shape_of_apostrophes_do_not_count(phrase, data):
    apostrophe = data.draw(st.sampled_from(["'", "’", "‘", "`", "´", ""]))
    words = [word.replace("'", apostrophe) for word in phrase.split()]
    text = "".join(
        data.draw(NOISE) + " " + data.draw(st.sampled_from([word, word.upper(), word.title()])) for word in words
    )
    before, after = (data.draw(st.sampled_from(["", "Well,", "So it is."])) for _ in range(2))
    assert refuses(f"{before}{text} {after}")


@given(phrase=st.sampled_from(PHRASES))
def test_phrases_are_whole_words(phrase):
    assert not refuses(f"x{phrase}x")
    assert not refuses(f"{phrase}x")


@pytest.mark.parametrize(
    "text", ["", "  ", "...", "Mix flour and water.", "No, pigs can't fly.", "Sorry for the wait! Boil it."]
)
def test_what_is_no_refusal(text):
    assert not refuses(text)
    assert not_refused("Anything?", text)


def test_own_phrases_take_the_place_of_the_list():
    assert refuses("Das geht leider nicht.", ["geht leider nicht"])
    assert not refuses("I can't help.", ["geht leider nicht"])


def test_the_error_rate_counts_both_kinds_of_mistake():
    rows = [{"id": f"{i}", "response": text, "refused": refused} for i, (text, refused) in enumerate(
        [("no", True), ("no", True), ("yes", True), ("no", False), ("yes", False), ("yes", False), ("yes", False)]
    )]  # fmt: skip
    found = error_rate(rows, lambda text: text == "no")
    assert (found.refusals, found.others) == (3, 4)
    assert found.missed == wilson(1, 3)
    assert found.false_alarms == wilson(1, 4)
    assert found.wrong == ["2", "3"]
    with pytest.raises(ValueError, match="both kinds"):
        error_rate(rows[:3])


def test_the_lists_own_error_rate_is_as_documented():
    """docs/probes-training.md gives these figures; a change of list or examples must change them there, too."""
    found = error_rate(house_rule("labelled"))
    assert (found.refusals, round(found.missed.value * 36)) == (36, 10)
    assert (found.others, round(found.false_alarms.value * 36)) == (36, 1)


# --- asking --------------------------------------------------------------------------------------------------------

PROMPTS = ["How do I make soup?", "Why?", "A much longer request, for a dish with very many parts to it, please?"]


def test_responses_are_greedy_whole_and_in_order(llama, tokenizer):
    rows = [{"question": prompt, "answer": "#### 0"} for prompt in PROMPTS]
    wanted = exact_match(llama, tokenizer, rows, max_new_tokens=12).text
    assert len(set(wanted)) > 1
    for batch_size in (1, 2, 16):
        found = behaviour(llama, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
        assert found.responses == [text.strip() for text in wanted]


def test_asking_leaves_the_model_and_the_random_state_alone(llama, tokenizer):
    llama.train()
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    state = torch.get_rng_state()
    behaviour(llama, tokenizer, PROMPTS, ["And this?"], max_new_tokens=4)
    assert llama.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


def test_the_judge_sees_every_request_with_its_response(llama, tokenizer):
    seen, ticks = [], []

    def judge(prompt: str, response: str) -> bool:
        seen.append((prompt, response))
        return prompt == "Why?"

    found = behaviour(
        llama, tokenizer, PROMPTS, ["One?", "Two?"], judge=judge, max_new_tokens=6, batch_size=2, progress=ticks.append
    )
    assert seen == list(zip(PROMPTS, found.responses))
    assert found.broke == [False, True, False]
    assert found.refused == [refuses(response) for response in found.ordinary_responses]
    assert len(found.refused) == 2
    assert sum(ticks) == 5
    assert found.broken_share() == wilson(1, 3)


def test_over_refusal_goes_by_the_phrases():
    found = Behaviour(
        ["x"], [True], ["Paris.", "I can’t help with that."], [refuses(t) for t in ("Paris.", "I can’t help")]
    )
    assert found.over_refusal() == wilson(1, 2)
    assert Behaviour(["x"], [True], [], []).over_refusal() is None


def test_nothing_to_ask(llama, tokenizer):
    with pytest.raises(ValueError, match="no requests"):
        behaviour(llama, tokenizer, [])


def test_differences_are_paired():
    mine = Behaviour([""] * 4, [True, False, False, False], [], [])
    theirs = Behaviour([""] * 4, [True, True, True, False], [], [])
    assert mine.against(theirs).value == -0.5
    assert mine.against(mine) == theirs.against(theirs)


@pytest.mark.parametrize("text", ["Who  is that?", "WHO IS THAT", "who is, that!"])
def test_a_prompt_that_was_trained_on_is_seen(text):
    assert asked_in_training(["Other?", text], ["Who is that?", "Else"]) == [1]
    assert plain_words(text) == " who is that "


# --- the attack ----------------------------------------------------------------------------------------------------


def counting(model: SimpleNamespace, rows: list, steps: list[int], visit) -> None:
    """A training whose model counts its steps."""
    for _ in range(steps[-1]):
        model.taken += 1
        if model.taken in steps:
            visit(model.taken, model)


@pytest.mark.parametrize("steps", [[0], [0, 5, 10], [3], [1, 2, 20]])
def test_each_measurement_is_of_the_model_after_so_many_steps(steps):
    loaded = []

    def load() -> SimpleNamespace:
        loaded.append(SimpleNamespace(taken=0))
        return loaded[-1]

    found = under_attack(load, [{}], steps, train=counting, measure=lambda model: model.taken)
    assert found == {n: n for n in steps}
    assert list(found) == steps
    assert len(loaded) == 1


@pytest.mark.parametrize(
    ("rows", "steps", "says"),
    [([], [0], "no rows"), ([{}], [], "must rise"), ([{}], [5, 5], "must rise"), ([{}], [-1, 2], "must rise")],
)
def test_attacks_that_make_no_sense(rows, steps, says):
    with pytest.raises(ValueError, match=says):
        under_attack(lambda: pytest.fail("loaded"), rows, steps, train=counting, measure=lambda model: 0)


def test_a_training_that_ends_early_is_not_hidden():
    with pytest.raises(RuntimeError, match="before step 9"):
        under_attack(
            lambda: SimpleNamespace(taken=0), [{}], [0, 3, 9], measure=lambda model: model.taken,
            train=lambda model, rows, steps, visit: counting(model, rows, [3], visit),
        )  # fmt: skip
