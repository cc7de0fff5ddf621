"""Drift where the answer is known: identical models, known shifts of weights, transforms that CKA must not see."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from tiny import DEVICE, FAMILIES, tiny_model

from lfu.evaluation.hidden import Hidden, hidden_states
from lfu.evaluation.pieces import Piece, answer_pieces, longest_input, text_pieces
from lfu.evaluation.representation_drift import linear_cka, mean_cosine, representation_drift
from lfu.evaluation.weight_drift import effective_weights, keep_weights, weight_drift

PIECES = [Piece([5, 6, 7, 8, 9, 10], 2), Piece([11, 12, 13], 1), Piece(list(range(20, 29)), 5)]


class NoPadding:
    """All that `hidden_states` wants of a tokenizer for pieces that are tokens already."""

    pad_token_id, eos_token_id = 0, 2


def read(model: Any, pieces: list[Piece] = PIECES, **options: Any) -> Hidden:
    return hidden_states(model, NoPadding(), pieces, **options)


def adapted(model: Any, config: Any) -> Any:
    """The model with an adapter that does something."""
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_" in name or "ia3_" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_at_distance_zero(family):
    drift = weight_drift(tiny_model(family), tiny_model(family))
    parts = [drift.overall, *drift.blocks, *drift.kinds, *drift.outside]
    assert {part.distance for part in parts} == {0.0}
    assert {part.relative for part in parts} == {0.0}
    assert [part.name for part in drift.blocks] == ["1", "2", "3", "4"]


def test_groups_share_out_every_parameter_and_the_squares_add_up():
    base, tuned = tiny_model("qwen"), tiny_model("qwen", seed=1)
    drift = weight_drift(base, tuned)
    count = sum(p.numel() for p in base.parameters())
    flat = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (base, tuned)]
    assert drift.overall.parameters == count
    assert drift.overall.norm == pytest.approx(float(flat[0].norm()))
    assert drift.overall.distance == pytest.approx(float((flat[1] - flat[0]).norm()))
    assert drift.overall.relative == pytest.approx(drift.overall.distance / drift.overall.norm)
    for groups in (drift.blocks, drift.kinds):  # the blocks, cut in two ways
        assert sum(part.parameters for part in [*groups, *drift.outside]) == count
        squares = sum(part.distance**2 for part in [*groups, *drift.outside])
        assert squares == pytest.approx(drift.overall.distance**2)


def test_a_known_shift_shows_where_it_is_and_nowhere_else():
    base, tuned = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        weight = tuned.model.layers[2].self_attn.q_proj.weight
        weight *= 1.5
    drift = weight_drift(base, tuned)
    moved = {part.name for part in [*drift.blocks, *drift.kinds, *drift.outside] if part.distance}
    assert moved == {"3", "self_attn.q_proj"}
    half = float(base.model.layers[2].self_attn.q_proj.weight.detach().norm()) * 0.5
    assert drift.blocks[2].distance == pytest.approx(half)
    assert drift.overall.distance == pytest.approx(half)


def test_a_bias_that_leaves_zero_has_no_relative_distance():
    base, tuned = tiny_model("gpt2"), tiny_model("gpt2")
    with torch.no_grad():
        tuned.transformer.ln_f.bias.fill_(1.0)
        tuned.transformer.ln_f.weight.copy_(base.transformer.ln_f.weight.zero_())
    (norm,) = [part for part in weight_drift(base, tuned).outside if part.name == "ln_f"]
    assert (norm.relative, norm.distance) == (None, 4.0)


ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules="all-linear"),
    "dora": LoraConfig(r=2, target_modules="all-linear", use_dora=True),
    "ia3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "saved": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    "embedding": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_counts_as_merged_and_is_left_as_it_was(kind):
    plain = dict(tie_word_embeddings=False)
    model = adapted(tiny_model("llama", **plain), copy.deepcopy(ADAPTERS[kind]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                p += 1.0
    state = {name: p.clone() for name, p in model.state_dict().items()}
    ids = torch.tensor([[5, 3, 4, 8]], device=DEVICE)
    logits = model.eval()(ids).logits
    drift = weight_drift(tiny_model("llama", **plain), model)
    assert drift == weight_drift(None, model)
    assert drift.overall.relative > 0.01
    assert {name: p.equal(state[name]) for name, p in model.state_dict().items()} == dict.fromkeys(state, True)
    assert model(ids).logits.equal(logits)
    assert weight_drift(tiny_model("llama", **plain), model.merge_and_unload()) == drift


@pytest.mark.parametrize("std", [1e-1, 1e-4])
def test_an_adapter_on_16_bit_weights_is_as_far_as_it_acts(std):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(dtype=torch.bfloat16), LoraConfig(r=2, target_modules="all-linear"))
    added = 0.0
    for module in model.modules():
        if lora := getattr(module, "lora_B", None):
            a, b = module.lora_A["default"].weight, torch.nn.init.normal_(lora["default"].weight, std=std)
            added += float((b.double() @ a.double() * module.scaling["default"]).square().sum())
    assert weight_drift(None, model).overall.distance == pytest.approx(added**0.5, rel=1e-3)


def test_a_new_adapter_is_at_distance_zero_and_reading_keeps_grad_mode():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear"))
    assert weight_drift(None, model).overall.distance == 0.0
    next(effective_weights(model))  # not read to its end
    assert torch.is_grad_enabled()


def test_a_head_trained_apart_is_compared_with_the_embedding_it_was_tied_to():
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_model("llama"), config, autocast_adapter_dtype=False)
    drift = weight_drift(tiny_model("llama"), model)
    assert drift.overall.distance == 0.0
    assert {"embed_tokens", "lm_head", "norm"} == {part.name for part in drift.outside}


def test_from_a_file_as_from_memory(tmp_path):
    base, tuned = tiny_model("gpt2").cpu(), tiny_model("gpt2", theta="lora", seed=3).cpu()  # as the file is read
    keep_weights(base, tmp_path / "base.safetensors")
    assert weight_drift(tmp_path / "base.safetensors", tuned) == weight_drift(base, tuned)
    with pytest.raises(ValueError, match="that the base model lacks"):
        weight_drift(tmp_path / "base.safetensors", tiny_model("llama"))


# --- hidden states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_hidden_states_are_transformers_own(family, batch_size):
    model = tiny_model(family, dtype=torch.float32)
    model.train()
    got = read(model, batch_size=batch_size)
    assert model.training
    assert got.counts == [4, 2, 4]
    wanted: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(1, 5)}
    for piece in PIECES:
        with torch.no_grad():
            states = model.eval()(torch.tensor([piece.ids], device=DEVICE), output_hidden_states=True).hidden_states
        for layer in wanted:
            wanted[layer].append(states[layer][0, piece.start - 1 : -1].cpu())
    for layer, parts in wanted.items():
        torch.testing.assert_close(got.layers[layer], torch.cat(parts), rtol=1e-4, atol=1e-4)


def test_pieces_of_texts_and_answers(tokenizer):
    short, long = text_pieces(tokenizer, ["abcd", "abcdefghij"], window=10)
    assert (short.tokens, long.tokens) == (2, 8)
    assert [len(piece.ids) for piece in text_pieces(tokenizer, ["abcdefghij"], window=4)] == [4, 4]  # 2 are too few
    (answer,) = answer_pieces(tokenizer, [{"question": "a", "answer": "bc"}])
    assert tokenizer.decode(answer.ids[answer.start :]) == "bc<|im_end|>\n"
    assert longest_input(tiny_model()) == 64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tok: text_pieces(tok, []), "no texts"),
        (lambda tok: text_pieces(tok, ["abc", "ab"]), "text 2 has fewer than three"),
        (lambda tok: answer_pieces(tok, []), "no rows"),
        (lambda tok: answer_pieces(tok, [{"question": "a", "answer": "b"}], window=9), "more than the 9 that"),
        (lambda tok: answer_pieces(tok, [{}], render=lambda t, row: ("ab", "")), "row 1 has no answer token"),
        (lambda tok: read(tiny_model(), []), "nothing to read"),
    ],
)
def test_pieces_that_can_not_be_read(tokenizer, make, message):
    with pytest.raises(ValueError, match=message):
        make(tokenizer)


# --- similarity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", ["full", "lora"])
def test_identical_models_have_similarity_one(theta):
    one, two = (read(tiny_model("llama", theta=theta)) for _ in range(2))
    drift = representation_drift(one, two)
    assert drift.tokens == 10
    for interval in drift.cosine:
        assert (interval.value, interval.low, interval.high) == pytest.approx((1, 1, 1), abs=1e-12)
    assert drift.cka == pytest.approx([1] * 4, abs=1e-12)


def test_similarity_equals_a_naive_computation():
    one, two = read(tiny_model("llama")), read(tiny_model("llama", seed=1))
    drift = representation_drift(one, two)
    for i, layer in enumerate(drift.layers):
        x, y = one.layers[layer], two.layers[layer]
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(x, y)]
        assert drift.cosine[i].value == pytest.approx(sum(cosines) / len(cosines), rel=1e-12)
        assert drift.cosine[i].low < drift.cosine[i].value < drift.cosine[i].high
        centre = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
        k, m = (centre @ z @ z.T @ centre for z in (x, y))  # the kernel form: HSIC, equation 3 of the paper
        hsic = lambda a, b: float((a @ b).trace())
        assert drift.cka[i] == pytest.approx(hsic(k, m) / (hsic(k, k) * hsic(m, m)) ** 0.5, rel=1e-10)


@given(st.integers(0, 10_000), st.integers(3, 40), st.integers(1, 12), st.integers(1, 12), st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_cka_does_not_see_rotation_scale_and_shift(seed, n, d, e, scale):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, width, generator=g, dtype=torch.float64) for width in (d, e))
    rotation, _ = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))
    moved = scale * x @ rotation + torch.randn(d, generator=g, dtype=torch.float64)
    assert linear_cka(x, moved) == pytest.approx(1, abs=1e-9)
    cka = linear_cka(x, y)
    assert 0 <= cka <= 1 + 1e-12
    assert linear_cka(moved, y) == pytest.approx(cka, abs=1e-9)
    assert linear_cka(y, x) == pytest.approx(cka, abs=1e-12)


def test_cka_sees_what_is_no_rotation():
    x = torch.randn(200, 5, dtype=torch.float64)
    assert linear_cka(x, x * torch.tensor([10.0, 1, 1, 1, 1])) < 0.7
    assert linear_cka(x, torch.randn(200, 5, dtype=torch.float64)) < 0.2


def test_cosine_sees_rotation_and_not_scale():
    x = torch.randn(30, 4, dtype=torch.float64)
    assert mean_cosine(x, 3 * x, [10, 20]).value == pytest.approx(1)
    assert mean_cosine(x, -x, [10, 20]).value == pytest.approx(-1)


def test_each_token_weighs_the_same():
    x = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0]])
    y = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    assert mean_cosine(x, y, [3, 1]).value == pytest.approx(0.75)


def test_a_larger_step_in_the_weights_is_a_larger_drift():
    base = tiny_model("llama")
    shift = [torch.randn_like(p) * p.detach().abs().mean() for p in base.parameters()]
    drifts = []
    for size in (0.01, 0.1, 1.0):
        tuned = tiny_model("llama")
        with torch.no_grad():
            for p, s in zip(tuned.parameters(), shift):
                p += size * s
        drifts.append((weight_drift(base, tuned).overall.relative, representation_drift(read(base), read(tuned))))
    relative = [weights for weights, _ in drifts]
    assert relative == pytest.approx([relative[0] * factor for factor in (1, 10, 100)])
    for measure in (lambda d: [c.value for c in d.cosine], lambda d: d.cka):
        for near, middle, far in zip(*(measure(drift) for _, drift in drifts)):
            assert near > middle > far


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weight_drift(tiny_model("llama"), tiny_model("qwen")), "the base model lacks: model.layers.0"),
        (lambda: weight_drift(tiny_model("qwen"), tiny_model("llama")), "the tuned model lacks: model.layers.0"),
        (lambda: weight_drift(tiny_model(), tiny_model(vocab_size=70)), "is 61 x 16 in the base model and 70 x 16"),
        (lambda: weight_drift(None, tiny_model()), "no PeftModel"),
        (lambda: representation_drift(read(tiny_model()), read(tiny_model(), PIECES[:2])), "not read at the same"),
        (lambda: representation_drift(read(tiny_model()), read(tiny_model(num_hidden_layers=3))), "4 and 3 layers"),
        (lambda: representation_drift(read(tiny_model()), read(tiny_model(hidden_size=24))), "16 and 24 wide"),
        (lambda: linear_cka(torch.ones(1, 2), torch.ones(1, 2)), "two or more tokens"),
        (lambda: linear_cka(torch.ones(3, 2), torch.randn(3, 2)), "CKA is undefined"),
    ],
)
def test_models_that_can_not_be_compared(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_broken_models_and_prompt_tuning_are_named():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="layer 2: hidden states that are not finite"):
        read(model)
    tuned = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for call in (lambda: read(tuned), lambda: list(effective_weights(tuned))):
        with pytest.raises(ValueError, match="prompt tuning"):
            call()
