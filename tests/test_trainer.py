"""LfUTrainer as a TRL user meets it: SFTTrainer when off, every data format, checkpoints, resume, metrics, refusals."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig
from safetensors.torch import load_file
from tiny import DEVICE, relative_difference, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.models.activation_offloading import OffloadActivations
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lfu import LfUConfig, LfUStep, LfUTrainer
from lfu.data.columns import as_dataset
from lfu.data.templates import to_training_rows
from lfu.parallel.refusals import refuse_launch
from lfu.step.cheaper import Cheaper
from lfu.trainer import _load_as_sft_trainer_does
from lfu.training.advice import LfUAdvice
from lfu.training.checkpoints import RUN_FILE, STATE_FILE

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", *"abcdefghijklmnopqrstuvwxyz", *"0123456789"]
CHAT = (
    "{% for m in messages %}{{ m['role'] + ' ' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + ' </s> ' }}{% endgeneration %}{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def tokenizer():
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = CHAT
    return made


ROWS = [(f"{'abcdefgh'[i]} plus {i} a b", f"{i} c d {'xyz'[i % 3]}") for i in range(8)]
DATA = {
    "prompt_completion": [{"prompt": p, "completion": " " + c} for p, c in ROWS],
    "conversational": [
        {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": c}]}
        for p, c in ROWS
    ],
    "messages": [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]} for p, c in ROWS],
    "text": [{"text": f"{p} {c}"} for p, c in ROWS],
    "uneven": [{"prompt": p, "completion": " " + c + " e" * i} for i, (p, c) in enumerate(ROWS)],
}
LORA = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=0.1)
PART = {"part": 0.5, "same_dropout": False}  # with that adapter's dropout it is refused otherwise


def settings(folder, kind=LfUConfig, **options):
    base = dict(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=DEVICE == "cpu", bf16=False, disable_tqdm=True, max_length=32, seed=7,
        gradient_checkpointing=False,
    )  # fmt: skip
    if kind is LfUConfig:
        base["advice"] = False
    return kind(**{**base, **options})


def tiny(**config):
    """Two layers: the equations are tried on four, in tests/step."""
    return tiny_model("llama", dtype=torch.float32, **{"num_hidden_layers": 2, **config})


def trainer(
    folder, *, kind=LfUTrainer, data="prompt_completion", model=None, peft=None, callbacks=None, rows=None, tell=None,
    **options
):  # fmt: skip
    config = settings(folder, SFTConfig if kind is SFTTrainer else LfUConfig, **options)
    return kind(
        model=tiny() if model is None else model,
        args=config,
        train_dataset=Dataset.from_list(DATA[data]) if isinstance(data, str) else data,
        eval_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=tokenizer(),
        peft_config=peft,
        callbacks=callbacks,
        **({"tell": tell} if tell else {}),
    )


def weights(t):
    return {k: v.cpu().clone() for k, v in t.model.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, different


# -- off is off --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [None, LORA])
def test_lam_zero_is_sft_trainer_bit_for_bit(tmp_path, peft):
    plain = trainer(tmp_path / "sft", kind=SFTTrainer, peft=peft, neftune_noise_alpha=5)
    plain.train()
    losses = lambda t: [entry.get("loss") for entry in t.state.log_history]
    for off in ({"lam": 0}, {"method": "sft"}):
        t = trainer(tmp_path / "off", peft=peft, neftune_noise_alpha=5, **off)
        t.train()
        assert_equal(weights(plain), weights(t))
        assert losses(plain) == losses(t)
        assert t.step is None


@pytest.mark.parametrize("auxiliary", ["lora", "steering", "own"])
def test_the_sft_part_is_sft_trainers(tmp_path, auxiliary):
    """First update: the logged sft_loss of an LfU run is the loss of the plain run (same data, dropout, noise)."""
    plain = trainer(tmp_path / "sft", kind=SFTTrainer, peft=LORA, max_steps=1)
    plain.train()
    lfu = trainer(tmp_path / "lfu", peft=LORA, max_steps=1, auxiliary=auxiliary)
    lfu.train()
    assert lfu.state.log_history[0]["lfu/sft_loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-5)
    assert lfu.state.log_history[0]["mean_token_accuracy"] == plain.state.log_history[0]["mean_token_accuracy"]


def test_the_trainer_and_the_plain_step_leave_the_same_gradients(tmp_path):
    """One update of 2 x 2 rows: what Trainer hands to the optimizer is what LfUStep leaves, with TRL's own loss."""
    caught = {}

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            caught.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    t = trainer(tmp_path, max_steps=1, callbacks=[Catch()], max_grad_norm=0.0, lam=5.0)
    twin = tiny()
    twin.load_state_dict(weights(t))
    batches = list(t.get_train_dataloader())[:2]
    t.train()
    step = LfUStep(twin, seed=7)
    items = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    for batch in batches:
        step(batch, num_items=items)
    assert caught
    for name, p in twin.named_parameters():
        torch.testing.assert_close(caught[name], p.grad, rtol=1e-4, atol=1e-6)


# -- what TRL users know -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("prompt_completion", {}),
        ("prompt_completion", {"completion_only_loss": False}),
        ("conversational", {}),
        ("messages", {"assistant_only_loss": True}),
        ("text", {}),
        ("text", {"packing": True, "max_length": 24}),
        ("prompt_completion", {"padding_free": True, "max_length": None}),
        ("prompt_completion", {"loss_type": "dft"}),
        ("prompt_completion", {"neftune_noise_alpha": 5.0}),
        ("prompt_completion", {"gradient_checkpointing": True}),
        ("prompt_completion", {"bf16": True}),
        ("prompt_completion", {"label_smoothing_factor": 0.1, "loss_type": "nll"}),
        ("prompt_completion", {"ascent_batch": "independent"}),
        ("prompt_completion", {"ascent_steps": 2}),
        ("prompt_completion", {"auxiliary": "steering", "steering_norm": True}),
        ("prompt_completion", {"auxiliary": "own", "consistency": "logit_kl"}),
        ("prompt_completion", {"direction": "clean", "consistency": "contrastive", "layers": "early"}),
        ("prompt_completion", {"method": "lfu_reps", "lam": "auto"}),
        ("prompt_completion", {"every": 2, "random_layers": 1, "lam": "auto", **PART}),
        ("text", {"packing": True, "max_length": 24, "stale": 2}),
        ("prompt_completion", {"budget": 1.3}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_trains_on_every_format_and_option(tmp_path, data, options):
    t = trainer(tmp_path, data=data, peft=LORA, max_steps=2, **options)
    before = weights(t)
    t.train()
    logs = t.state.log_history[0]
    for key in ("lfu/sft_loss", "lfu/consistency", "lfu/gradient_ratio", "lfu/displacement", "lfu/ascent_grad_norm"):
        assert logs[key] > 0, key
    assert logs["lfu/skipped"] == 0
    assert -1 <= logs["lfu/gradient_cosine"] <= 1
    after = weights(t)
    assert any(not torch.equal(before[k], after[k]) for k in after if "lora" in k)
    assert all(torch.isfinite(v).all() for v in after.values() if v.is_floating_point())


@pytest.mark.parametrize(("processes", "picked"), [(1, {"stale": 4}), (2, {"every": 2})])
def test_a_budget_picks_what_runs_in_several_processes(tmp_path, monkeypatch, processes, picked):
    """The trainer knows of them before the model is in its wrapper."""
    monkeypatch.setattr("lfu.methods.lfu.several", lambda trainer: processes > 1)
    form = trainer(tmp_path, budget=1.7, per_device_train_batch_size=1).step.cheaper
    assert form == Cheaper(**picked)


@pytest.mark.parametrize("consistency", ["mse", "logit_kl"])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_perturbed_pass_runs_in_the_models_precision(tmp_path, mixed, consistency):
    """With a move too small to act, h' is h bit for bit: the pass round the model's wrappers is under its autocast."""
    t = trainer(tmp_path, peft=LORA, bf16=mixed, alpha=1e-30, max_steps=1, consistency=consistency)
    t.train()
    assert all(v == 0 for v in t.last_record.displacement.values())
    assert t.last_record.consistency == 0


@pytest.mark.parametrize("options", [{"stale": 2}, {"every": 2}, PART, {"random_layers": 1}], ids=str)
def test_an_approximate_run_says_so(tmp_path, options):
    t = trainer(tmp_path, peft=LORA, lam=5.0, **options)
    t.train()
    assert len(t.notes) == 1
    assert "approximate" in t.notes[0]
    assert t.last_record.approximate in t.notes[0]
    assert all(entry["lfu/approximate"] == 1 for entry in t.state.log_history if "lfu/lam" in entry)
    lams = [entry["lfu/lam"] for entry in t.state.log_history if "lfu/lam" in entry]
    assert sum(lams) / len(lams) == 5.0  # `every` weighs the updates that act by k


def test_layers_are_logged_on_request(tmp_path):
    t = trainer(tmp_path, model=tiny(num_hidden_layers=4), max_steps=1, log_layers=True, layers="2-3")
    t.train()
    logged = {k for k in t.state.log_history[0] if k.startswith("lfu/") and k[-1].isdigit()}
    assert logged == {f"lfu/{name}/{layer}" for name in ("consistency", "displacement") for layer in ("02", "03")}


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {},
        {"auxiliary": "steering", "steering_norm": True},
        {"auxiliary": "own", "consistency": "logit_kl", "ascent_steps": 2, "gradient_checkpointing": True},
        {"direction": "clean", "consistency": "contrastive", "gradient_checkpointing": True},
        {"stale": 2},
    ],
    ids=str,
)
def test_trls_activation_offloading_changes_no_number(tmp_path, monkeypatch, options):
    """TRL's own manager; without a GPU, this CPU is the accelerator that tensors leave. One loss is NaN."""

    def offload(**_):
        with monkeypatch.context() as patch:
            if DEVICE == "cpu":
                patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
                patch.setattr(torch.cuda, "default_stream", lambda: None)  # which TRL before 1.14 asks for at once
            return OffloadActivations(use_pin_memory=False, use_streams=False, min_offload_size=0)

    monkeypatch.setattr("trl.models.activation_offloading.OffloadActivations", offload)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)  # called where bitsandbytes was imported
    # gradient descent: Adam would make an update of full size out of a gradient that is nothing but rounding
    options = {"optim": "sgd", **options}
    found = []
    for on in (False, True):
        t = trainer(tmp_path / str(on), activation_offloading=on, max_steps=3, **options)
        start = weights(t)
        _poison_one_loss(t)
        t.train()
        found.append(weights(t))
    offloading = t.maybe_activation_offload_context
    assert offloading.tensor_id > 0
    assert len(offloading.tracker) < 10  # what the dropped graph left is gone
    assert t.last_record.skipped is None
    # What has been away comes back contiguous, also a slice of a wider product. A GPU then may multiply it in another
    # order (torch 2.7 on a CPU too): sums of up to 64 terms in each of 4 blocks, and the gradient of LfU takes the
    # difference of two hidden states, a tenth of their size.
    if DEVICE == "cuda" or torch.__version__.startswith("2.7."):
        moved = [{name: value - start[name] for name, value in after.items()} for after in found]
        assert relative_difference(*moved) < torch.finfo(torch.float32).eps * 64 * 4 * 10
    else:
        assert_equal(*found)


def test_dropout_masks_are_shared_unless_asked_otherwise(tmp_path):
    moved = {}
    for shared in (True, False):
        heavy = LoraConfig(r=2, lora_alpha=64, target_modules="all-linear", lora_dropout=0.5)
        model = tiny()
        t = trainer(tmp_path / str(shared), model=model, peft=heavy, alpha=1e-30, same_dropout=shared, max_steps=3)
        t.train()
        moved[shared] = max(t.last_record.displacement.values())
    assert moved[True] == 0
    assert moved[False] > 1e-3


def test_evaluation_is_sft_trainers(tmp_path):
    t = trainer(tmp_path, max_steps=1, rows=DATA["prompt_completion"])
    t.train()
    t.model.eval()
    loss = t.evaluate()["eval_loss"]
    plain = trainer(tmp_path / "sft", kind=SFTTrainer, model=t.model, rows=DATA["prompt_completion"])
    assert plain.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)


def test_the_first_pass_after_an_evaluation_has_dropout_masks(tmp_path):
    """`stale` begins with the perturbed pass: with a move too small to act, h' is h, also after an evaluation."""
    heavy = LoraConfig(r=2, lora_alpha=64, target_modules="all-linear", lora_dropout=0.5)
    moved = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            moved.append(max(t.last_record.displacement.values()))

    t = trainer(tmp_path, peft=heavy, alpha=1e-30, stale=2, gradient_accumulation_steps=1, callbacks=[Watch()])
    t.eval_dataset, t.args.eval_strategy, t.args.eval_steps = t.train_dataset, "steps", 1
    t.train()
    assert t.last_record.form == "first-order"
    assert moved == [0, 0, 0, 0]


def test_an_independent_ascent_batch_meets_the_collator_as_training_does(tmp_path):
    """A collator of the user's is given the columns that it is given in training."""
    rows = [{"prompt": p, "completion": " " + c, "source": [1] * i} for i, (p, c) in enumerate(ROWS)]

    class Collator(DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            seen.append({name for row in examples for name in row})
            return super().torch_call(examples)

    seen = []
    t = trainer(tmp_path, ascent_batch="independent")
    t = LfUTrainer(
        tiny(), t.args, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(), data_collator=Collator(pad_token_id=0),
    )  # fmt: skip
    t.train()
    assert len(seen) >= 2 * 4 * 2
    assert all(columns == seen[0] for columns in seen)
    assert "source" not in seen[0]


@pytest.mark.parametrize("options", [{"ascent_steps": 2}, {"ascent_batch": "independent"}], ids=str)
def test_a_loss_function_of_the_users_gets_a_count_of_tokens(tmp_path, options):
    """In every pass a tensor, of the update's labelled tokens, as Trainer gives it."""
    counts = []

    def loss(outputs, labels, num_items_in_batch):
        counts.append(num_items_in_batch)
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    t = trainer(tmp_path, max_steps=2, loss_type="nll", **options)  # the default since TRL 1.15
    t.compute_loss_func = loss
    t.train()
    assert len(counts) >= 4
    assert all(isinstance(n, torch.Tensor) for n in counts)
    assert len({int(n) for n in counts}) <= 2  # one a update


def test_labels_that_the_loss_takes_out_of_the_batch_are_left_to_a_method(tmp_path, monkeypatch):
    """As transformers 5.6 does for a loss function of its own; TRL 0.24's dft is one, and asft adds a KL to it."""
    usual = SFTTrainer.compute_loss

    def taking(self, model, inputs, *args, **named):
        labels = inputs.pop("labels")
        return usual(self, model, {**inputs, "labels": labels}, *args, **named)

    monkeypatch.setattr(SFTTrainer, "compute_loss", taking)
    t = trainer(tmp_path, max_steps=1, method="kl")
    t.train()
    assert "kl/value" in t.state.log_history[0]


def test_a_loss_that_is_a_mean_over_the_micro_batch(tmp_path):
    """`loss_is_scaled_for_ga = False`: Trainer divides it by the accumulation steps, and LfU weighs its term alike."""

    class Mean(LfUTrainer):
        loss_is_scaled_for_ga = False

        def _training_loss(self, model, inputs, num_items):
            return super()._training_loss(model, inputs, None)

    t = trainer(tmp_path, kind=Mean, max_steps=1, ascent_steps=2, lam=5.0, data="uneven")
    if not hasattr(SFTTrainer, "loss_is_scaled_for_ga"):  # before transformers 5.20 Trainer is told so
        t.model_accepts_loss_kwargs = False
    caught = {}

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            caught.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    t.add_callback(Catch())
    twin = tiny()
    twin.load_state_dict(weights(t))
    batches = list(t.get_train_dataloader())[:2]
    t.args.max_grad_norm = 0.0
    t.train()
    step = LfUStep(twin, seed=7, ascent_steps=2)
    for batch in batches:
        step(batch, num_items=2 * int((batch["labels"][:, 1:] != -100).sum()))
    for name, p in twin.named_parameters():
        torch.testing.assert_close(caught[name], p.grad, rtol=1e-4, atol=1e-6)


def test_a_search_for_the_batch_size_begins_again_with_the_first_micro_batch(tmp_path):
    """`auto_find_batch_size`, out of memory once in the second micro-batch: its random numbers do not go on."""
    calls = []
    t = trainer(tmp_path, auto_find_batch_size=True, max_steps=1)
    once = t.step

    def step(*args, **more):
        calls.append(more["index"])
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return once(*args, **more)

    t.step = t.methods[0].step = step
    step.processes = once.processes
    t.train()
    assert calls[:3] == [0, 1, 0]


@pytest.mark.parametrize("distributed", ["NO", "MULTI_GPU", "DEEPSPEED"])
def test_a_model_by_name_is_loaded_as_sft_trainer_loads_it(monkeypatch, distributed):
    """Also where a method needs it before: on no device map in several processes, both of the revision asked for."""
    asked = {}
    model = SimpleNamespace(config=SimpleNamespace(_name_or_path="some/model"))
    monkeypatch.setattr("lfu.trainer.create_model_from_path", lambda name, **more: asked.update(more) or model)
    monkeypatch.setattr(
        "lfu.trainer.AutoProcessor",
        SimpleNamespace(from_pretrained=lambda name, **more: asked.update(tokenizer=more["revision"])),
    )
    args = SimpleNamespace(
        seed=0, trust_remote_code=False, model_init_kwargs={"revision": "v2"},
        distributed_state=SimpleNamespace(distributed_type=distributed),
    )  # fmt: skip
    _load_as_sft_trainer_does({"model": "some/model", "args": args})
    assert (asked["revision"], asked["tokenizer"]) == ("v2", "v2")
    assert asked.get("device_map", "unset") == ("unset" if distributed == "NO" else None)


def test_fp8_is_refused(tmp_path):
    t = trainer(tmp_path)
    t.accelerator.state._mixed_precision = "fp8"
    try:
        with pytest.raises(ValueError, match="fp8 replaces the layers"):
            t.methods[0].setup(t)
    finally:
        t.accelerator.state._mixed_precision = "no"


# -- what is said about the rows ---------------------------------------------------------------------------------------


def test_a_script_hears_what_is_cut_left_out_or_learned_otherwise(tmp_path, capsys):
    """Of rows in TRL's shapes and of those of `to_training_rows`; once, and nothing of rows that are as they say."""
    heard = lambda: [line for line in capsys.readouterr().err.splitlines() if line.startswith("lfu: ")]
    trainer(tmp_path, data="uneven", max_length=10, rows=DATA["uneven"])
    assert heard() == [
        "lfu: warning: 7 of 8 rows are longer than max_length 10 and are cut there",
        "lfu: warning: 7 of 8 evaluation rows are longer than max_length 10 and are cut there",
    ]
    odd = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "mood": "c"}]}]
    shaped = to_training_rows(as_dataset(odd), tokenizer=tokenizer())
    trainer(tmp_path, data=shaped, rows=shaped, assistant_only_loss=None)
    assert heard() == [
        f"lfu: warning: the chat template does not use the key 'mood' of messages in 1 {kind}row (first: row 1)"
        for kind in ("", "evaluation ")
    ]
    told = []
    trainer(tmp_path, data="prompt_completion", tell=told.append)
    trainer(tmp_path, data="messages", assistant_only_loss=True, tell=told.append)
    assert told == []
    trainer(tmp_path, data="messages", tell=told.append)
    assert told == [
        "note: the loss is on every turn of the conversations, with their markers (assistant_only_loss is false)"
    ]
    assert heard() == []


def test_rows_that_are_cut_are_the_rows_that_trl_cuts(tmp_path):
    for packing in (False, True):
        options = dict(data="uneven", max_length=8, packing=packing, padding_free=False)
        one, other = (trainer(tmp_path, kind=kind, **options).train_dataset for kind in (SFTTrainer, LfUTrainer))
        assert one[:] == other[:]


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peft", "options"),
    [
        (None, {}),
        (None, {"lam": 5.0}),
        (None, {"stale": 3, "auxiliary": "own"}),
        (LORA, {"gradient_checkpointing": True}),
        (LORA, {"ascent_batch": "independent"}),
        (LORA, {"auxiliary": "own"}),
        (LORA, {"every": 2, "random_layers": 1, **PART}),
    ],
    ids=lambda given: "lora" if given is LORA else str(given or "full"),
)
def test_resume_is_bit_exact(tmp_path, peft, options):
    """From the checkpoint after 2 of 4 updates, against uninterrupted; with dropout in the adapter. No warning."""
    whole = trainer(tmp_path / "whole", peft=peft, save_strategy="steps", save_steps=2, **options)
    whole.train()
    rest = trainer(tmp_path / "rest", peft=peft, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LfUAdvice)
        rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(weights(whole), weights(rest))
    assert whole.last_record == rest.last_record


def test_checkpoints_hold_no_auxiliary(tmp_path):
    for name, peft in (("full", None), ("lora", LORA)):
        t = trainer(tmp_path / name, peft=peft, save_strategy="steps", max_steps=1, lam=5.0)
        t.train()
        plain = trainer(tmp_path / f"{name}-sft", kind=SFTTrainer, peft=peft, save_strategy="steps", max_steps=1)
        plain.train()
        ours = {p.name for p in (tmp_path / name / "checkpoint-1").iterdir()}
        theirs = {p.name for p in (tmp_path / f"{name}-sft" / "checkpoint-1").iterdir()}
        assert ours - theirs == {STATE_FILE, RUN_FILE}
        own = {"calls", "random", "auxiliary/groups", "alpha/mean_log", "alpha/weight", "alpha/wanted"}
        assert set(load_file(tmp_path / name / "checkpoint-1" / STATE_FILE)) == {f"lfu/{part}" for part in own}
        base = tiny()
        loaded = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoint-1")
            if peft is None
            else PeftModel.from_pretrained(base, tmp_path / name / "checkpoint-1")
        )
        assert_equal(weights(t), {name: value.cpu() for name, value in loaded.state_dict().items()})


# -- lam = auto and the advice -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("auxiliary", "alpha"), [("lora", 0.1), ("lora", 0.001), ("steering", 0.01), ("own", 0.01)])
def test_auto_lam_holds_the_gradient_ratio(tmp_path, auxiliary, alpha):
    """Whatever the auxiliary and alpha, after a few updates the ratio is near the target."""
    options = dict(auxiliary=auxiliary, alpha=alpha, learning_rate=1e-3, gradient_accumulation_steps=1)
    t = trainer(tmp_path, lam="auto", strength=0.3, max_steps=12, **options)
    t.train()
    ratios = [entry["lfu/gradient_ratio"] for entry in t.state.log_history if "lfu/gradient_ratio" in entry]
    assert sum(ratios[4:]) / len(ratios[4:]) == pytest.approx(0.3, rel=0.35)


@pytest.mark.parametrize("method", ["lfu", "lfu_reps"])
def test_the_default_settles_within_the_first_tenth_of_thirty_updates(tmp_path, method):
    """lam "auto": it begins too weak to act, is right after three updates, and then does not swing."""
    t = trainer(tmp_path, method=method, max_steps=30, gradient_accumulation_steps=1, learning_rate=1e-3)
    t.train()
    logs = [entry for entry in t.state.log_history if "lfu/lam" in entry]
    lams, ratios = ([entry[f"lfu/{name}"] for entry in logs] for name in ("lam", "gradient_ratio"))
    assert ratios[0] < 0.01
    assert math.exp(fmean(map(math.log, ratios[3:]))) == pytest.approx(0.5, rel=0.2)
    assert max(ratios) < 3  # a batch's own ratio; the advice calls a median above 3 dominating
    assert max(max(a / b, b / a) for a, b in pairwise(lams[3:])) < 1.5


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"lam": 1e-6}, "almost nothing"),
        ({"lam": 1e4}, "dominates"),
        ({"alpha": 30.0, "lam": 1e-3}, "too large"),
    ],
    ids=str,
)
def test_advice_is_given_once_with_numbers(tmp_path, options, kind):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, max_steps=18, gradient_accumulation_steps=1, advice=True, **options).train()
    messages = [str(w.message) for w in caught if issubclass(w.category, LfUAdvice)]
    matching = [m for m in messages if kind in m]
    assert len(matching) == 1
    assert any(c.isdigit() for c in matching[0])
    assert len(set(messages)) == len(messages)


def test_a_healthy_run_gets_no_advice(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t = trainer(
            tmp_path, max_steps=20, gradient_accumulation_steps=1, advice=True, lam="auto", alpha=0.01,
            learning_rate=1e-4,
        )  # fmt: skip
        t.train()
    assert [str(w.message) for w in caught if issubclass(w.category, LfUAdvice)] == []


# -- bad batches -------------------------------------------------------------------------------------------------------


def _poison_one_loss(t):
    """NaN in the third training forward: the clean pass of the second micro-batch."""
    calls = 0

    def poison(module, args, output):
        nonlocal calls
        if module.training and torch.is_grad_enabled():
            calls += 1
            return output * float("nan") if calls == 3 else None
        return None

    t.model.model.norm.register_forward_hook(poison)


def test_a_nan_in_the_loss_never_reaches_the_weights(tmp_path):
    """One micro-batch whose loss is NaN: recorded, skipped, and the run goes on."""

    t = trainer(tmp_path)
    _poison_one_loss(t)
    t.train()
    assert all(torch.isfinite(v).all() for v in weights(t).values())
    skipped = [entry["lfu/skipped"] for entry in t.state.log_history if "lfu/skipped" in entry]
    assert sum(skipped) == 0.5  # one of the two micro-batches of one update


def test_rows_without_a_labelled_token_are_skipped(tmp_path):
    t = trainer(tmp_path, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=1)
    batch = {
        "input_ids": torch.tensor([[4, 5, 6]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
        "labels": torch.full((1, 3), -100),
    }
    t.create_optimizer_and_scheduler(1)
    loss = t.training_step(t.model, batch, num_items_in_batch=1)
    assert float(loss) == 0
    assert t.last_record.skipped == "no labelled token"
    assert all(p.grad is None or not p.grad.any() for p in t.model.parameters())


# -- refused at construction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "2-9"}, "layers 1-2"),
        ({"layers": "first"}, "use all, early"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ({"torch_compile": True}, "torch_compile"),
        ({"optim": "lomo"}, "backward pass"),
        ({"aux_targets": "nonsense"}, "no linear layer is called nonsense"),
    ],
    ids=str,
)
def test_refusals_name_the_reason(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_one_process_on_several_gpus_is_refused():
    with pytest.raises(ValueError, match="accelerate launch, or on one GPU by CUDA_VISIBLE_DEVICES"):
        refuse_launch(SimpleNamespace(args=SimpleNamespace(method="lfu", n_gpu=2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"lam": -1}, "lam"),
        ({"lam": "much"}, "lam"),
        ({"method": "magic"}, "unknown method 'magic': use one of"),
        ({"auxiliary": "magic"}, "unknown auxiliary"),
        ({"preset": "magic"}, "unknown preset"),
        ({"consistency": "magic"}, "unknown consistency"),
        ({"positions": "magic"}, "unknown positions"),
        ({"ascent_steps": 0}, "ascent_steps"),
        ({"method": "sft", "lam": 1.0}, "means lam=0"),
        ({"method": "lfu_reps", "auxiliary": "lora"}, "steering"),
        ({"strength": 0.0}, "strength"),
        ({"strength": 1.0, "preset": "instruct"}, "lam=500 is fixed"),
        ({"every": 0}, "every must be"),
        ({"part": 2.0}, "part must be"),
        ({"part": 0.5, "packing": True}, "a packed micro-batch is one row"),
        ({"part": 0.5, "per_device_train_batch_size": 1}, "use every=k"),
        ({"stale": 2, "every": 2}, "several updates old"),
        ({"budget": 0.9}, "budget must be"),
        ({"budget": 1.3, "every": 2}, "drop every=2"),
        ({"every": 2, "lam": 0}, "lam=0 has none"),
        ({"aux_rank": 0}, "aux_rank must be at least 1"),
        ({"aux_scaling": -1.0}, "aux_scaling must be a finite number > 0"),
        ({"consistency": "contrastive", "temperature": 0.0}, "temperature must be a finite number > 0"),
        ({"mse_reduction": "magic"}, "unknown mse_reduction"),
        # what nothing reads
        ({"auxiliary": "steering", "aux_rank": 4}, "aux_rank=4 would do nothing, as auxiliary='steering' does not use"),
        ({"method": "lfu_reps", "aux_targets": "q_proj"}, "aux_targets='q_proj' would do nothing"),
        ({"method": "logit_kl", "layers": "early"}, "layers='early' would do nothing, as consistency='logit_kl'"),
        ({"auxiliary": "own", "steering_norm": True}, "steering_norm=True would do nothing, as auxiliary='own'"),
        ({"temperature": 0.5}, "temperature=0.5 would do nothing, as consistency='mse' does not use it: drop it"),
        ({"consistency": "cosine", "mse_reduction": "sum"}, "mse_reduction='sum' would do nothing"),
        ({"method": "sft", "alpha": 0.3}, "alpha=0.3 would do nothing, as method='sft' takes no LfU step: drop it"),
        ({"method": "kl", "layers": "early"}, "layers='early' would do nothing"),
        ({"method": "gem", "consistency": "cosine"}, "consistency='cosine' would do nothing"),
    ],
    ids=str,
)
def test_config_refuses(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **options)


def test_a_recipes_preset_goes_with_every_method_and_a_config_can_be_copied(tmp_path):
    for options in (
        {"method": "sft", "preset": "reps"},
        {"method": "sam", "ascent_scope": "local"},
        {"preset": "reps"},
    ):
        given = settings(tmp_path, **options)
        assert replace(given) == given


def test_presets_are_the_papers_and_explicit_values_win(tmp_path):
    pick = lambda **o: (settings(tmp_path, **o).alpha, settings(tmp_path, **o).lam)
    assert pick() == pick(method="lfu_reps") == pick(auxiliary="steering") == ("auto", "auto")
    assert pick(preset="base") == (0.1, 5.0)
    assert pick(preset="instruct") == (0.001, 500.0)
    assert pick(method="lfu_reps", preset="reps") == pick(preset="reps") == (0.1, 0.1)
    assert pick(preset="base", lam="auto", alpha=1) == (1.0, "auto")
    assert settings(tmp_path, preset="reps").auxiliary == "steering"
    assert pick(preset="instruct", lam=1) == (0.001, 1.0)


def test_part_is_refused_beside_noise_in_the_embeddings(tmp_path):
    with pytest.raises(ValueError, match=r"part=0\.5 with dropout or embedding noise saves nothing"):
        trainer(tmp_path, part=0.5, method="lfu+neftune")


def test_prompt_tuning_is_refused(tmp_path):
    with pytest.raises(ValueError, match="virtual tokens"):
        trainer(tmp_path, peft=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_plain_sft_config_is_refused(tmp_path):
    with pytest.raises(TypeError, match="LfUConfig"):
        LfUTrainer(model=tiny_model("llama"), args=settings(tmp_path, SFTConfig))
