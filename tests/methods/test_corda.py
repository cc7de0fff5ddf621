"""CorDA against its equation and PEFT's own form of it; what is saved is an ordinary adapter of the untouched model."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from bench import logits, small_model, step_of, tiny_trainer
from packaging.version import Version
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from tiny import DEVICE, tiny_batch
from tiny_folder import byte_tokenizer
from torch.nn.functional import cross_entropy

from lfu.data.probes import plain_text
from lfu.methods import methods_of
from lfu.support.errors import UserError

LORA = dict(r=2, lora_alpha=6, target_modules="all-linear")
TEXTS = ["the quick brown fox", "jumps over", "a lazy dog, and then some more of the same", "0123456789"]


def model(family="llama", **options):
    return small_model(family, **{"dtype": torch.float32, "vocab_size": 300, **options})


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def trainer(folder, texts, base=None, *, lora=LORA, method="corda", more="", **options):
    base = model() if base is None else base
    args = f"corda.data={texts},corda.max_length=16{more}"
    return tiny_trainer(method, folder, model=base, peft_config=LoraConfig(**lora), method_args=args, **options)


def windows(texts, size=16):
    """As the docs say: texts with a blank line after each, in windows of `size` tokens."""
    ids = byte_tokenizer()("".join(f"{text}\n\n" for text in texts), add_special_tokens=False)["input_ids"]
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def equation(base, name, r):
    """s B0 A0 of one layer, written from the paper (with the authors' scaling of inputs and their damping of C)."""
    module, seen = base.get_submodule(name), []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(args[0][0].detach().double()))
    for window in windows(TEXTS):
        base(input_ids=torch.tensor([window], device=DEVICE))
    handle.remove()
    C = sum((x / x.max().abs()).T @ (x / x.max().abs()) for x in seen) / len(seen)
    C += 0.01 * C.diag().mean() * torch.eye(len(C)).to(C)
    weight = module.weight.detach().double()
    U, S, Vt = torch.linalg.svd((weight if name.count("proj") and base.config.model_type != "gpt2" else weight.T) @ C)
    k = len(S)
    return U[:, k - r : k] @ torch.diag(S[k - r :]) @ Vt[k - r : k] @ C.inverse()


@pytest.mark.parametrize("rslora", [False, True])
def test_the_start_is_the_equations(tmp_path, texts, rslora):
    t = trainer(tmp_path, texts, lora=LORA | dict(use_rslora=rslora))
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"):
        layer = t.anatomy.model.get_submodule(name)
        A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        assert layer.scaling["default"] == pytest.approx(6 / 2**0.5 if rslora else 3)
        expected = equation(model(), name, 2)
        found = layer.scaling["default"] * B[:, :2] @ A[:2]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
        assert torch.equal(A[2:], A[:2])
        assert torch.equal(B[:, 2:], -B[:, :2])


@pytest.mark.parametrize(
    ("family", "targets"), [("llama", "all-linear"), ("llama", None), ("gpt2", ["c_attn", "c_fc"])]
)
def test_it_starts_as_the_untouched_model(tmp_path, texts, family, targets):
    untouched, base = model(family), model(family)
    lora = LORA | dict(target_modules=targets, fan_in_fan_out=family == "gpt2")
    if family == "gpt2" and Version(peft.__version__) < Version("0.19"):
        with pytest.raises(ValueError, match=r"needs PEFT 0\.19 or newer for transformer\.h\.0\.attn\.c_attn"):
            trainer(tmp_path, texts, base, lora=lora)
        return
    t = trainer(tmp_path, texts, base, lora=lora)
    torch.testing.assert_close(logits(t.model), logits(untouched), rtol=1e-5, atol=1e-5)
    weights = {name.replace(".base_layer", ""): p for name, p in t.anatomy.model.named_parameters()}
    assert all(torch.equal(weights[name], p) for name, p in untouched.named_parameters())
    t.train()
    assert not torch.allclose(logits(t.model), logits(untouched), atol=1e-2)


def test_calibration_leaves_the_model_as_it_was(tmp_path, texts):
    given = LoraConfig(**LORA)
    t = tiny_trainer("corda", tmp_path, model=model(), peft_config=given, method_args={"data": texts})
    assert (given.r, given.lora_alpha, given.target_modules) == (2, 6, "all-linear")
    found = t.model.active_peft_config
    assert (found.r, found.lora_alpha, found.init_lora_weights) == (4, 12, True)
    plain = tiny_trainer("sft", tmp_path, model=model(), peft_config=LoraConfig(**LORA | dict(r=4, lora_alpha=12)))
    for (name, one), (_, two) in zip(t.model.named_parameters(), plain.model.named_parameters()):
        assert "lora_" in name or torch.equal(one, two), name
    for one, two in zip(t.model.modules(), plain.model.modules()):
        assert vars(one).keys() == vars(two).keys()
        assert one.training == two.training
        assert len(one._forward_hooks) == len(two._forward_hooks)


def pefts_own(texts):
    """PEFT's CorDA, which changes the base weights."""
    base = model()
    names = [n for n, module in base.named_modules() if isinstance(module, torch.nn.Linear) and n != "lm_head"]
    config = LoraConfig(
        **LORA | dict(target_modules=names, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    )
    run = lambda: [base(input_ids=torch.tensor([w], device=DEVICE)) for w in windows(texts)]
    preprocess_corda(base, config, run_model=run)
    return get_peft_model(base, config).train()


def test_it_trains_as_pefts_form_does(tmp_path, texts):
    t, batch = trainer(tmp_path, texts), tiny_batch()
    ours, theirs = t.model, pefts_own(TEXTS)
    optimizers = {}
    for m in (ours, theirs):  # weight decay reaches the trained halves alike, and the fixed ones not at all
        theta = [p for p in m.parameters() if p.requires_grad]
        optimizers[m] = torch.optim.AdamW(theta, lr=1e-2, weight_decay=0.5)
    for _ in range(5):
        t.methods[0].before_update(t)
        for m, optimizer in optimizers.items():
            optimizer.zero_grad()
            z = m(input_ids=batch["input_ids"]).logits[:, :-1]
            cross_entropy(z.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
            optimizer.step()
        t.methods[0].after_update(t)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(ours), logits(model()), atol=0.1)


def test_the_fixed_halves_stay(tmp_path, texts):
    t = trainer(tmp_path, texts, weight_decay=0.5, max_steps=4)
    layer = t.anatomy.model.get_submodule("model.layers.1.mlp.gate_proj")
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    before = A.detach().clone(), B.detach().clone()
    t.train()
    assert torch.equal(A[2:], before[0][2:])
    assert torch.equal(B[:, 2:], before[1][:, 2:])
    assert (A[:2] != before[0][:2]).all()
    assert (B[:, :2] != before[1][:, :2]).all()


def test_the_fixed_halves_take_no_gradient(tmp_path, texts):
    t = trainer(tmp_path, texts, model(dtype=torch.float64))
    _, found = step_of(t)
    for name, gradient in found.items():
        trained, fixed = gradient.chunk(2, dim=0 if "lora_A" in name else 1)
        assert trained.abs().max() > 0
        assert fixed.abs().max() == 0


def test_what_is_saved_fits_the_untouched_model_and_merges(tmp_path, texts):
    t = trainer(tmp_path, texts, save_strategy="steps", save_steps=3)
    t.train()
    t.save_model(str(tmp_path / "saved"))
    for folder in ("saved", "checkpoint-3"):
        loaded = PeftModel.from_pretrained(model(), str(tmp_path / folder))
        assert torch.equal(logits(loaded), logits(t.model))
    merged = loaded.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), logits(t.model), rtol=1e-4, atol=1e-4)


def test_resume_ends_where_the_whole_run_ends(tmp_path, texts):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, weight_decay=0.1)
    whole = trainer(tmp_path / "whole", texts, **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", texts, **options)
    with torch.no_grad():  # as another machine's SVD might have it
        for factor, _ in resumed.methods[0]._fixed:
            factor.mul_(-1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), (_, two) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        assert torch.equal(one, two), name


def test_with_wise_the_weights_lie_between(tmp_path, texts):
    tuned = trainer(tmp_path, texts)
    tuned.train()
    t = trainer(tmp_path, texts, method="corda+wise", more=",wise.alpha=0.25")
    t.train()
    for name, module in model().named_modules():
        if name.endswith("_proj"):
            full, part = (m.anatomy.model.get_submodule(name).get_delta_weight("default") for m in (tuned, t))
            torch.testing.assert_close(part, 0.25 * full, rtol=1e-4, atol=1e-5)
            assert full.abs().max() > 1e-2 * module.weight.abs().max()
    B = t.anatomy.model.get_submodule("model.layers.1.mlp.gate_proj").lora_B["default"].weight
    scaled = B.detach()[:, 2:].clone()
    t.methods.pop()  # trained further, without WiSE-FT, it goes on from there
    t.train()
    assert torch.equal(B[:, 2:], scaled)


# -- the texts ---------------------------------------------------------------------------------------------------------


def cut(knobs, tokenizer=None, say=print):
    (method,) = methods_of("corda", knobs)
    return list(method._windows(tokenizer or byte_tokenizer(), method.max_length, say))


def test_windows_hold_all_texts_in_turn(texts):
    assert cut({"data": texts, "max_length": 16}) == windows(TEXTS, 16)
    assert [len(w) for w in cut({"data": texts, "max_length": 10})][:-1] == [10] * (len(windows(TEXTS, 10)) - 1)


def test_a_window_is_never_longer_than_the_model_takes(tmp_path, texts):
    base, seen = model(max_position_embeddings=20), []
    base.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    tiny_trainer("corda", tmp_path, model=base, peft_config=LoraConfig(**LORA), method_args={"data": texts})
    assert set(seen[:-1]) == {20}


def test_a_window_begins_as_the_tokenizer_begins_a_text(texts):
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, start)]
    )
    found = cut({"data": texts, "max_length": 16}, tokenizer)
    assert all(window[0] == start and start not in window[1:] for window in found)
    assert [i for window in found for i in window[1:]] == [i for window in windows(TEXTS) for i in window]
    assert {len(window) for window in found[:-1]} == {16}


def test_the_built_in_texts_are_half_of_those_that_come_along():
    text = byte_tokenizer().decode([i for window in cut({}) for i in window])
    for number, row in enumerate(plain_text()):
        assert (row["text"] in text) == (number % 2 == 0)


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]},
    {"prompt": "why?", "completion": "because"},
    {"question": "why?", "answer": "because"},
])  # fmt: skip
def test_texts_in_every_shape(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    text = byte_tokenizer().decode([i for window in cut({"data": str(path)}) for i in window])
    assert "why?" in text
    assert "because" in text
    path.write_text(json.dumps(row | {"junk": 1}) + "\n")
    cut({"data": str(path)}, say=(said := []).append)
    assert f"corda: {path}: note: column 'junk' of the data is left out" in said


def test_it_says_how_much_text_there_was_and_how_little_that_is(tmp_path, texts):
    t = trainer(tmp_path, texts, more=",corda.samples=3")
    assert t.notes[0] == f"corda: 48 tokens of {texts} say what to keep"
    assert "2,048 tokens or more" in t.notes[1]  # 128 * 16
    built_in = trainer(tmp_path / "built-in", "plain_text", more=",corda.samples=3")
    assert built_in.notes[1].endswith("half of the built-in prose: what is measured on it is not held out")


# -- refusals ----------------------------------------------------------------------------------------------------------


# TRL 0.24 leaves it to us; 1.9 and 1.14 refuse it, and so do newer ones in other words
LM_HEAD = "lm_head is none|when `lm_head` is wrapped by a PEFT adapter|to `lm_head` is not supported"


@pytest.mark.parametrize(("lora", "message"), [
    ({"init_lora_weights": "pissa"}, "drop init_lora_weights='pissa'"),
    ({"use_dora": True}, "use_dora=True"),
    ({"lora_bias": True}, "lora_bias=True"),
    ({"r": 9}, "k_proj has no 9"),
    ({"target_modules": ["lm_head", "q_proj"]}, LM_HEAD),
    ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens, which is no linear layer"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapters_that_it_cannot_start(tmp_path, texts, lora, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, texts, lora=LORA | lora)


def test_other_thetas_are_refused(tmp_path, texts):
    with pytest.raises(ValueError, match="use_peft true"):
        tiny_trainer("corda", tmp_path)
    with pytest.raises(ValueError, match="an adapter already"):
        tiny_trainer("corda", tmp_path, theta="lora")
    with pytest.raises(ValueError, match="got IA3Config"):
        tiny_trainer("corda", tmp_path, peft_config=IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    quantised = model()
    quantised.quantization_method = "bitsandbytes"
    with pytest.raises(ValueError, match="quantised"):
        trainer(tmp_path, texts, quantised)


def test_texts_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nothing.jsonl: no such file"):
        trainer(tmp_path, str(tmp_path / "nothing.jsonl"))
