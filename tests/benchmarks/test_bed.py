"""The test bed: exact skills, no test row trained on, runs that are LfUTrainer's, a study that goes on when killed."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil

import bed
import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from testbed.bases import Lesson, bases, lessons_of
from testbed.directions import _dot, _times_g, _top, directions
from testbed.gradients import Batch, Gradient
from testbed.llama import Shape, fresh, hidden_states, is_linear, logits
from testbed.material import Bed
from testbed.plan import PLANS
from testbed.setting import Setting
from testbed.skills import FACTS, LETTERS, OTHERS, SKILLS, TARGET, fact, rows, vocabulary
from testbed.theta import AllWeights, norm
from testbed.tokens import numbers, old_rows, test_sets, tokens, training_rows
from testbed.tune import Material, Run, change, drawn_back, scores
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from lfu import LfUConfig, LfUStep, LfUTrainer
from lfu.undesirable import LoRA

test_sets.__test__ = False
SMALL = Shape(len(vocabulary()), width=32, inner=64, layers=2)


# -- skills and rows ---------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(SKILLS)), st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_every_answer_is_the_skills(name, seed):
    """Each skill once more, written another way."""
    row = SKILLS[name].row(random.Random(seed))
    words = 2 if name == TARGET else 1
    command, given_, equals = row.prompt[:words], row.prompt[words:-1], row.prompt[-1]
    *out, end = row.answer
    assert " ".join(command) in SKILLS[name].words
    assert (equals, end) == ("=", "<end>")
    text, answer = "".join(given_), "".join(out)
    turned = str.maketrans(LETTERS, LETTERS[1:] + LETTERS[0])
    expected = {
        "copy": lambda: text,
        "reverse": lambda: "".join(reversed(text)),
        "sort": lambda: "".join(sorted(text)),
        "shift": lambda: text.translate(turned),
        "turn": lambda: "".join(reversed(text)).translate(turned),
        "add": lambda: f"{int(text[:2]) + int(text[3:]):03d}",
        "count": lambda: str(text[3:].count(text[0])),
        "fact": lambda: "".join(fact([fact(n)[0] for n in range(FACTS)].index(list(text)))[1]),
    }
    assert answer == expected[name]()


def test_rows_are_different_repeatable_and_of_the_words_asked_for():
    one = rows("sort", 50, 3, word=1)
    assert one == rows("sort", 50, 3, word=1) != rows("sort", 50, 4, word=1)
    assert len(set(one)) == 50
    assert {row.prompt[0] for row in one} == {SKILLS["sort"].words[1]}
    assert len(rows("fact", FACTS, 0, 0)) == FACTS
    with pytest.raises(ValueError, match="fewer than"):
        rows("fact", FACTS + 1, 0, 0)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_test_row_of_the_target_is_trained_on(seed):
    inputs = {row.prompt[2:] for name in ("target", "reworded") for row in test_sets()[name]}  # whatever the command
    trained = training_rows(64, seed)
    assert len(trained) == 64
    assert not inputs & {row.prompt[2:] for row in trained}
    assert all(row.prompt[:2] == tuple(SKILLS[TARGET].words[0].split()) for row in trained)
    assert training_rows(64, seed) == trained != training_rows(64, seed + 10)
    assert training_rows(16, seed) == trained[:16]
    assert not set(old_rows(200, seed)) & {row for tested in test_sets().values() for row in tested}


def test_what_a_base_learns_from_is_the_stream_and_more_processes_change_nothing():
    one = lessons_of([0, 1], 1, jobs=1)
    assert torch.equal(one, lessons_of([0, 1], 1, jobs=2))
    assert one.shape[:2] == (2, 64)
    words = vocabulary()
    for line in one[0]:
        prompt = [words[i] for i in line[1 : 1 + line[0]]]
        answer = [words[i] for i in line[1 + line[0] :] if i]
        name = next(name for name in OTHERS if prompt[0] in SKILLS[name].words)
        assert (prompt[-1], answer[-1]) == ("=", "<end>")
        assert name != TARGET


# -- the model is transformers' ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch):
    """transformers takes its norms in float32, whatever the model's dtype."""
    norm = lambda module, x: module.weight * torch.nn.functional.rms_norm(x, x.shape[-1:], eps=module.variance_epsilon)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", norm)


def llama(weights) -> LlamaForCausalLM:
    """transformers' model with the weights of one run."""
    config = LlamaConfig(
        vocab_size=SMALL.vocabulary, hidden_size=SMALL.width, intermediate_size=SMALL.inner,
        num_hidden_layers=SMALL.layers, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=32,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model


def doubled(seeds=(0, 1)) -> dict[str, torch.Tensor]:
    """Weights larger than at the start of training, so that attention and gates are at work."""
    return {name: w.double() * (1 if w.dim() == 2 else 4) for name, w in fresh(SMALL, seeds).items()}


def test_hidden_states_and_logits_are_those_of_transformers():
    weights = doubled()
    ids = torch.from_numpy(np.stack([tokens(rows("copy", 5, 0), 16).ids, tokens(rows("add", 5, 0), 16).ids]))
    hidden = hidden_states(weights, ids)
    for run in range(2):
        model = llama({name: w[run] for name, w in weights.items()})
        with torch.no_grad():
            expected = model(ids[run], output_hidden_states=True)
        for mine, theirs in zip(hidden, expected.hidden_states[1:]):
            torch.testing.assert_close(mine[run], theirs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(logits(weights, hidden[-1])[run], expected.logits, rtol=1e-9, atol=1e-9)


def test_scores_are_those_of_greedy_decoding():
    weights = doubled((3,))
    tested = [*rows("copy", 8, 0), *rows("count", 8, 0)]
    nll, right = scores(weights, *map(torch.from_numpy, tokens(tested)))
    model = llama({name: w[0] for name, w in weights.items()})
    for row, value, correct in zip(tested, nll[0], right[0]):
        ids, answer = (torch.from_numpy(t) for t in tokens([row]))
        expected = model(input_ids=ids, labels=ids.masked_fill(~answer, -100)).loss
        torch.testing.assert_close(value.float(), expected.detach().float())
        prompt = ids[:, : len(row.prompt)]
        out = model.generate(prompt, max_new_tokens=len(row.answer), do_sample=False)[0, len(row.prompt) :]
        assert (out.tolist() == [numbers()[w] for w in row.answer]) == bool(correct)


# -- a run is LfUTrainer's ---------------------------------------------------------------------------------------------

ROWS, BATCH, EPOCHS = 8, 4, 2
SHARE = 0.8 * (ROWS // BATCH * EPOCHS / 60) ** 0.5  # the package's, which is said for 60 updates


def fixed_factor(weight: torch.Tensor) -> torch.Tensor:
    """In place of LoRA's random A, the same for both: `(..., 8, in)` for a weight `(..., out, in)`."""
    inner = weight.shape[-1]
    A = torch.sin(torch.arange(8 * inner, dtype=torch.float64)).view(8, inner) / inner**0.5
    return A.expand(*weight.shape[:-2], 8, inner).clone()


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")


def trained_by_the_package(start, folder, monkeypatch, peft_config=None, **options):
    """LfUTrainer's weights, and the order in which it took the rows, `(steps, B)`."""
    made = tokens(training_rows(ROWS, 0))
    data = [
        {"input_ids": ids[ids != 0].tolist(), "labels": [int(i) if a else -100 for i, a in zip(ids, answer) if i]}
        for ids, answer in zip(made.ids, made.answer)
    ]
    number = {tuple(row["input_ids"]): n for n, row in enumerate(data)}
    order: list[list[int]] = []
    step = LfUTrainer.training_step

    def recorded(trainer, model, inputs, *more):
        order.append([number[tuple(i for i in ids if i)] for ids in inputs["input_ids"].tolist()])
        return step(trainer, model, inputs, *more)

    reset = LoRA.reset

    def with_fixed_factors(auxiliary, generators):
        reset(auxiliary, generators)
        for A, B in auxiliary.pairs:
            A.copy_(fixed_factor(torch.empty(len(B), A.shape[1])))

    monkeypatch.setattr(LfUTrainer, "training_step", recorded)
    monkeypatch.setattr(LoRA, "reset", with_fixed_factors)
    config = LfUConfig(
        str(folder), seed=1, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, num_train_epochs=EPOCHS,
        lr_scheduler_type="linear", warmup_steps=0, max_length=32, bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", logging_strategy="no", gradient_checkpointing=False, disable_tqdm=True, advice=False,
        dataloader_pin_memory=False, learning_rate=1e-2, weight_decay=0.0, adam_epsilon=1e-3, **options,
    )  # fmt: skip
    with contextlib.redirect_stderr(io.StringIO()):
        trainer = LfUTrainer(
            llama({name: w[0] for name, w in start.items()}), config, train_dataset=Dataset.from_list(data),
            processing_class=tokenizer(), peft_config=peft_config,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if peft_config is not None:
            for module in trainer.model.modules():
                if hasattr(module, "lora_A"):
                    module.lora_A["default"].weight.data = fixed_factor(module.base_layer.weight)
                    module.lora_B["default"].weight.data = module.lora_B["default"].weight.data.double()
        trainer.train()
    model = trainer.model.merge_and_unload() if peft_config is not None else trainer.model
    return dict(model.state_dict()), torch.tensor(order)


KNOWN = [
    ({}, dict(method="sft")),
    (dict(auxiliary="own"), dict(method="lfu", auxiliary="own", alpha=0.1, lam=5.0)),
    (dict(auxiliary="lora"), dict(method="lfu", alpha=0.1, lam=5.0)),
    (dict(auxiliary="steering"), dict(method="lfu_reps", alpha=0.1, lam=0.1)),
    (dict(auxiliary="own", layers=(1,)), dict(method="lfu", auxiliary="own", alpha=0.1, lam=5.0, layers="1-1")),
    (dict(auxiliary="own", strength=0.5), dict(method="lfu", auxiliary="own", alpha=0.1, lam="auto", strength=0.5)),
    (dict(pull=0.3), dict(method="l2sp", method_args="l2sp.weight=0.3")),
    (dict(share=0.8), dict(method="l2sp", method_args=f"l2sp.weight=auto,l2sp.share={SHARE}")),
    (dict(lora=True, share=0.8), dict(method="l2sp", method_args=f"l2sp.weight=auto,l2sp.share={SHARE}")),
    (
        dict(pull=30.0, pull_kind="decoupled"),
        dict(method="l2sp", method_args="l2sp.weight=30,l2sp.decoupled=true"),
    ),
    (
        dict(share=0.8, pull_kind="decoupled"),
        dict(method="l2sp", method_args="l2sp.weight=auto,l2sp.share=0.8,l2sp.decoupled=true"),
    ),
    (dict(pull=0.3, pull_kind="fading"), dict(method="l2sp", method_args="l2sp.weight=0.3,l2sp.schedule=decay")),
    (dict(rho=0.05), dict(method="sam", method_args="sam.rho=0.05")),
    (dict(kl=0.5), dict(method="kl", method_args="kl.weight=0.5")),
    *[(dict(weighting=name), dict(method=name)) for name in ("dft", "eaft", "talr", "flow")],
    (dict(weighting="stm"), dict(method="stm", method_args="stm.threshold=60")),
    (dict(weighting="psft"), dict(method="psft", method_args="psft.updates=2")),
    (dict(lines=0.4), dict(method="lines", method_args="lines.alpha=0.4")),
    (dict(wise=0.4), dict(method="wise", method_args="wise.alpha=0.4")),
    (dict(lora=True), dict(method="sft")),
    (dict(lora=True, pull=0.3), dict(method="l2sp", method_args="l2sp.weight=0.3")),
    (dict(lora=True, auxiliary="own"), dict(method="lfu", auxiliary="own", alpha=0.1, lam=5.0)),
]


@pytest.mark.parametrize(("options", "of_package"), KNOWN, ids=lambda o: "-".join(map(str, o.values())) or "sft")
def test_a_run_is_that_of_lfutrainer(options, of_package, tmp_path, monkeypatch):
    """The same rows in the same order; the run stands beside another one that starts elsewhere.

    All is float64 but the trainer's loss, which is taken in float32: hence 1e-5 of the way that a tensor has come. An
    epsilon of 1e-3 keeps Adam from blowing that error up where the gradient is next to zero.
    """
    monkeypatch.setattr("testbed.theta.random_factor", fixed_factor)
    monkeypatch.setattr("testbed.gradients.random_factor", fixed_factor)
    monkeypatch.setattr("testbed.tune.PERPLEXITY", 60.0)
    monkeypatch.setattr("testbed.tune.EPSILON", 1e-3)
    monkeypatch.setattr("testbed.tune.OLD", 2)
    start = doubled()
    peft_config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") if options.get("lora") else None
    expected, order = trained_by_the_package(start, tmp_path, monkeypatch, peft_config, **of_package)
    setting = Setting(ROWS, ROWS // BATCH * EPOCHS, 1e-2, batch=BATCH, **options)
    ids, answer = (torch.from_numpy(t).expand(2, -1, -1) for t in tokens(training_rows(ROWS, 0)))
    material = Material(start, ids, answer, order[:, None].expand(-1, 2, -1))
    lam = of_package.get("lam")
    weights = Run(setting, material, None if lam == "auto" else lam).train()
    for name, w in drawn_back(setting, start, weights).items():
        mine = w[0]
        way = float((expected[name] - start[name][0]).norm())
        assert float((mine - expected[name]).norm()) <= 1e-5 * way, name
        assert way > 0 or (setting.lora and not is_linear(name)), name


@pytest.mark.parametrize("auxiliary", ["own", "steering"])
@pytest.mark.parametrize("layers", [(), (1,)])
def test_the_gradient_is_lfusteps(auxiliary, layers):
    """One batch, float64 throughout."""
    start = doubled()
    ids, answer = (torch.from_numpy(t).expand(2, -1, -1) for t in tokens(training_rows(4, 0)))
    theta = AllWeights(start)
    gradient, loss = Gradient(Setting(4, 1, 1e-3, auxiliary=auxiliary, layers=layers), theta, 5.0)(Batch(ids, answer))
    model = llama({name: w[0] for name, w in start.items()})
    step = LfUStep(model, auxiliary=auxiliary, alpha=0.1, lam=5.0, layers="1-1" if layers else "all")
    batch = {"input_ids": ids[0], "attention_mask": (ids[0] != 0).long()}
    record = step(batch | {"labels": ids[0].masked_fill(~answer[0], -100)})
    assert record.sft_loss == pytest.approx(float(loss[0]), rel=1e-6)
    for name, g in zip(theta.names, gradient):
        expected = model.get_parameter(name).grad
        torch.testing.assert_close(g[0], expected, rtol=1e-9, atol=1e-12)


# -- what only the bed has ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Where the base models of all these beds are kept."""
    return tmp_path_factory.mktemp("shelf")


def small_bed(shelf, draws: int = 2) -> Bed:
    return Bed(bases(shelf, 2, 4, SMALL, "cpu"), draws)


def wide_bed(shelf) -> Bed:
    """In float64."""
    bed_ = small_bed(shelf)
    bed_.base = {name: w.double() for name, w in bed_.base.items()}
    return bed_


@pytest.fixture(scope="module")
def plainly_tuned(shelf):
    plain = Setting(8, 4, 1e-3, batch=4)
    return Run(plain, wide_bed(shelf).material(plain)).train()


def test_bases_are_kept_rounded_and_learn(tmp_path):
    first = bases(tmp_path, 2, 4, SMALL, "cpu")
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again = bases(tmp_path, 2, 4, SMALL, "cpu")
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert all(torch.equal(first[name], again[name]) and first[name].dtype == torch.float32 for name in first)
    assert all(torch.equal(w, w.half().float()) for w in first.values())
    training = Lesson(fresh(SMALL, [0]), lessons_of([0], 40, 1), 40)
    losses = []
    for _ in range(40):
        training.update()
        losses.append(float(training.loss))
    assert sum(losses[-5:]) < sum(losses[:5]) - 1.0


@pytest.mark.parametrize(
    "options",
    [
        {}, dict(pull=0.1), dict(share=0.3), dict(share=0.3, pull_kind="current"), dict(pull=0.1, pull_kind="fisher"),
        dict(pull=9.0, pull_kind="decoupled"), dict(pull=0.1, pull_kind="average"),
        dict(pull=0.1, pull_kind="fading"), dict(anchor=1.0), dict(anchor=1.0, anchor_on="hidden"),
        dict(anchor=1.0, anchor_text="old"), dict(replay=0.3), dict(rho=0.1), dict(lora=True, share=0.3),
        dict(auxiliary="own", strength=0.5, positions="prompt"),
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "sft",
)  # fmt: skip
def test_a_run_does_not_depend_on_those_beside_it(options, shelf, plainly_tuned):
    """The same base and draw alone and among others, float64; and its term acts."""
    setting = Setting(8, 4, 1e-3, batch=4, **options)
    torch.manual_seed(0)
    together = wide_bed(shelf).material(setting)
    alone = Material(**{
        name: (
            {n: w[1:2] for n, w in value.items()} if isinstance(value, dict)
            else tuple(t[1:2] for t in value) if isinstance(value, tuple)
            else value if value is None
            else value[:, 1:2] if name == "order"
            else value[1:2]
        )
        for name, value in vars(together).items()
    })  # fmt: skip
    many, one = Run(setting, together), Run(setting, alone)
    if setting.lora:
        for mine, theirs in zip(one.theta.tensors, many.theta.tensors):
            mine.copy_(theirs[1:2])
    tuned, single = many.train(), one.train()
    for name in tuned:
        torch.testing.assert_close(tuned[name][1], single[name][0], rtol=1e-9, atol=1e-12)
    acts = any(not torch.allclose(tuned[name], plainly_tuned[name], rtol=0, atol=1e-7) for name in tuned)
    assert acts == bool(options)


def test_pulls_are_what_they_say(shelf):
    """Beside Adam as decay: exactly. At a share of the gradient: the two norms. Stronger is nearer."""
    bed_ = small_bed(shelf, draws=1)
    start = bed_.material(Setting(8, 1, 1e-3)).start
    far = lambda **options: change(start, bed_.run(Setting(8, 12, 1e-2, **options)), is_linear)["moved"]
    plain = far()
    for kind, weak, strong in [
        ("coupled", 0.03, 0.3), ("decoupled", 10.0, 50.0), ("fisher", 0.03, 0.3), ("fading", 0.03, 0.3)
    ]:  # fmt: skip
        one, two = far(pull=weak, pull_kind=kind), far(pull=strong, pull_kind=kind)
        assert (two < one).all(), kind
        assert (one < plain).all(), kind
    assert (far(share=0.6) < far(share=0.2)).all()
    setting = Setting(8, 3, 1e-2, share=0.4, pull_kind="current")
    run = Run(setting, bed_.material(setting))
    run.update()
    gradient, _ = run.gradient(run._batch())
    pulled = run._drawn(gradient, torch.ones(1))
    length = lambda tensors: torch.stack([t.flatten(1).square().sum(1) for t in tensors]).sum(0).sqrt()
    torch.testing.assert_close(length([p - g for p, g in zip(pulled, gradient)]), 0.4 * length(gradient))


def test_the_effective_rank_of_a_change():
    start = {"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 4, 6)}
    outer, equal = torch.outer(torch.arange(4.0), torch.ones(6)), torch.eye(4, 6)
    found = change(start, {name: torch.stack([outer, equal]) for name in start}, is_linear)
    torch.testing.assert_close(found["rank"], torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(found["moved"], torch.tensor([84.0, 4.0]).sqrt())


def test_anchor_text_of_its_own_ends_and_differs_between_bases(shelf):
    bed_ = small_bed(shelf, draws=1)
    texts = bed_._texts("own")
    assert texts.shape[0] == 2
    assert not torch.equal(texts[0], texts[1])
    for row in texts.flatten(0, 1).tolist():
        if 0 in row:  # padding comes only after an end, or where the model itself wrote padding
            assert not any(row[row.index(0) :])
        assert row[0] > 1


def test_directions_of_g(shelf, monkeypatch):
    """G = J^T J is symmetric; no direction stretches more than its leading eigenvector; LfU's term is G g."""
    monkeypatch.setattr("testbed.directions.STEP", 1e-4)
    bed_ = small_bed(shelf, draws=1)
    bed_.base = {name: w.double() for name, w in bed_.base.items()}
    material = bed_.material(Setting(8, 1, 1e-3))
    theta, batch = AllWeights(material.start), Batch(material.ids, material.answer)
    sft = Gradient(Setting(8, 1, 1.0), theta)(batch)[0]
    one, other = ([torch.randn_like(t) for t in sft] for _ in range(2))
    length = norm(one)[0] / norm(other)[0]
    torch.testing.assert_close(
        _dot(other, _times_g(theta, batch, one))[0] * length, _dot(one, _times_g(theta, batch, other))[0], rtol=1e-2,
        atol=1e-6,
    )  # fmt: skip
    top, values = _top(theta, batch, sft)
    assert (values[0] > _dot(one, _times_g(theta, batch, one)) / norm(one)).all()
    gram = torch.stack([torch.stack([_dot(a, b) for a in top]) for b in top])
    torch.testing.assert_close(gram[:, :, 0], torch.eye(len(top), dtype=torch.float64), atol=1e-6, rtol=0)
    lfu = Gradient(Setting(8, 1, 1.0, auxiliary="own", alpha=1e-4), theta, lam=1.0)(batch)[0]
    term = [t - g for t, g in zip(lfu, sft)]
    cosine = _dot(term, _times_g(theta, batch, sft)) / norm(term) / norm(_times_g(theta, batch, sft))
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-6, atol=0)
    found = directions(bed_, Setting(8, 2, 1e-3))
    assert all(0 <= v <= 1 for name, values_ in found.items() if name.startswith("in the top") for v in values_)
    assert {len(v) for v in found.values()} == {2}


# -- the study ---------------------------------------------------------------------------------------------------------


def test_plans_name_each_setting_once_and_survive_json():
    for plan in PLANS.values():
        made = plan()
        assert len({s.key for s in made}) == len(made)
        assert [Setting.from_json(json.loads(json.dumps(s.changed()))) for s in made] == made
        assert all(s.method and s.place for s in made)


FEW = [Setting(4, 2, 1e-3), Setting(4, 2, 1e-3, wise=0.5), Setting(4, 2, 1e-3, pull=0.1)]


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """The folder of a study of few settings."""
    folder = tmp_path_factory.mktemp("studied")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PLANS, "small", lambda: FEW)
        assert bed.main(words_for(folder)) == 0
    return folder


def words_for(folder) -> list[str]:
    return ["run", "--bases", "2", "--draws", "1", "--base_steps", "2", "--width", "32", "--out", str(folder)]


@pytest.fixture
def study(studied, tmp_path, monkeypatch):
    monkeypatch.setitem(PLANS, "small", lambda: FEW)
    return shutil.copytree(studied, tmp_path / "study")


def test_a_killed_study_goes_on(study):
    path = study / bed.RUNS
    whole = path.read_text().splitlines()
    assert [Setting.from_json(json.loads(line)["setting"]) for line in whole[1:]] == FEW
    path.write_text("\n".join([*whole[:3], whole[3][:40]]) + "\n")  # killed while it wrote
    assert bed.main(words_for(study)) == 0
    found = bed.entries(path)
    assert [json.dumps(entry) for entry in found] == whole[1:]
    tuned, half = (entry["runs"]["moved"] for entry in found[:2])
    assert half == pytest.approx([x / 2 for x in tuned], rel=1e-3)
    before = path.read_text()
    assert bed.main([*words_for(study), "--minutes", "0"]) == 0
    assert path.read_text() == before


def test_runs_of_other_base_models_are_not_mixed(study, capsys):
    """As when a file of runs goes on where its base models have to be trained anew, and come out otherwise."""
    path = study / bed.RUNS
    head, *runs = path.read_text().splitlines()
    bases = json.loads(head)
    for copied, code in ((2.0, 0), (20.0, 2)):
        bases["bases"]["copy"][1] = copied  # these two have learned nothing
        path.write_text("\n".join([json.dumps(bases), *runs]) + "\n")
        before = path.read_text()
        assert bed.main(words_for(study)) == code
        assert path.read_text() == before
    assert f"error: {path} holds runs of other base models" in capsys.readouterr().err


def test_a_report_of_nothing_is_one_line(tmp_path, capsys):
    assert bed.main(["report", str(tmp_path)]) == 2
    assert "first `python benchmarks/bed.py run`" in capsys.readouterr().err


def test_graphs_that_give_something_else_are_left_alone(shelf, monkeypatch):
    """What a CUDA graph gives is held to plain updates before the study begins."""
    bed_ = small_bed(shelf, draws=1)
    monkeypatch.setattr(bed.graphs, "use_graphs", True)
    assert bed.graphs_agree(bed_)
    plain = Bed.run

    def another(made, setting):
        tuned = plain(made, setting)
        return {name: w + 0.01 * bed.graphs.use_graphs for name, w in tuned.items()}

    monkeypatch.setattr(Bed, "run", another)
    assert not bed.graphs_agree(bed_)
