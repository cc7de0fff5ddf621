"""LfUTrainer in one process, or in two under DDP or FSDP2 as accelerate makes them, in float64."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, PeftModel
from test_trainer import ROWS, tokenizer
from tiny import Float64Throughout, tiny_model
from transformers import AutoModelForCausalLM

from lfu import LfUConfig, LfUTrainer
from lfu.training.checkpoints import CheckpointError

# of lengths that differ, so that processes have different numbers of answer tokens
DATA = [{"prompt": p, "completion": f" {c}{' e f' * (i % 3)}"} for i, (p, c) in enumerate(ROWS)]
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights="gaussian")
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip


CLIPPED = 0.1  # well below the norm of these gradients
# name -> (wrapper, theta, options)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddp, sft": ("ddp", "full", {"method": "sft"}),
    "ddp, lfu, clipped": ("ddp", "full", {"max_grad_norm": CLIPPED}),
    "ddp, lfu, own, logits": ("ddp", "lora", {"auxiliary": "own", "alpha": 0.01, "consistency": "logit_kl"}),
    "ddp, lfu, independent": ("ddp", "full", {"ascent_batch": "independent"}),
    "ddp, sam": ("ddp", "full", {"method": "sam"}),
    "ddp, gem": ("ddp", "full", {"method": "gem"}),
    "ddp, kl": ("ddp", "full", {"method": "kl", "method_args": "kl.weight=1"}),
    "ddp, l2sp": ("ddp", "lora", {"method": "l2sp"}),
    "ddp, flow": ("ddp", "full", {"method": "flow"}),
    "ddp, stm+psft": ("ddp", "lora", {"method": "stm+psft", "method_args": "stm.threshold=60,psft.clip=0.01"}),
    "ddp, dft+ema": ("ddp", "full", {"method": "dft+ema"}),
    "fsdp2, lfu, clipped": ("fsdp2", "full", {"max_grad_norm": CLIPPED}),
    "fsdp2, lfu, lora": ("fsdp2", "lora", {"layers": "early"}),
    "fsdp2, lfu, clipped, blocks checkpointed": ("fsdp2, checkpointed", "full", {"max_grad_norm": CLIPPED}),
    "fsdp2, steering, checkpointing": ("fsdp2", "full", {"auxiliary": "steering", "gradient_checkpointing": True}),
}
# (wrapper, theta) of the runs that save, are cut off and resumed
CUT = [("ddp", "lora"), ("fsdp2", "lora"), ("fsdp2", "full")]
# a base of 16 bits under a float32 adapter, which is how PEFT makes it
BF16: tuple[str, str, dict[str, Any]] = ("fsdp2", "lora", {"dtype": torch.bfloat16})


def tiny(dtype: torch.dtype = torch.float64) -> Any:
    return tiny_model("llama", dtype=dtype, num_hidden_layers=2)


def launched(wrapper: str | None) -> None:
    """What `accelerate launch` sets."""
    for state in (PartialState, AcceleratorState, GradientState):
        state._shared_state.clear()
    wrapper = wrapper or "none"
    checkpointed = {"FSDP_ACTIVATION_CHECKPOINTING": str("checkpointed" in wrapper).lower()}
    for name, value in (FSDP2 | checkpointed).items():
        os.environ.pop(name, None)
        if wrapper.startswith("fsdp2"):
            os.environ[name] = value


def settings(folder: Path, processes: int, **options: Any) -> LfUConfig:
    base = dict(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2,
        learning_rate=0.05, lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, max_length=32, seed=7, optim="sgd",
        max_grad_norm=0.0, advice=False, train_sampling_strategy="sequential", gradient_checkpointing=False,
        preset="base",  # a fixed lam: the gradient ratio, and so lam="auto", is not that of one process
    )  # fmt: skip
    return LfUConfig(**{**base, **options})


def trainer(
    folder: Path, processes: int, theta: str = "full", dtype: torch.dtype = torch.float64, **options: Any
) -> LfUTrainer:
    model = tiny(dtype)  # first: once it knows of ZeRO-3, transformers draws weights otherwise
    args = settings(folder, processes, **options)
    if "ACCELERATE_USE_FSDP" in os.environ and args.device:  # on a CPU accelerate shards only if it believes in a GPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    made = LfUTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(DATA),
        processing_class=tokenizer(),
        peft_config=LORA if theta == "lora" else None,
    )
    torch.manual_seed(1)
    for name, p in made.model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
            p.data = p.data.double() if dtype == torch.float64 else p.data.float()
    return made


def train(
    folder: Path,
    wrapper: str | None,
    theta: str,
    options: dict[str, Any],
    final: Path | None = None,
    complete: Path | None = None,
    **named: Any,
) -> dict[str, Any]:
    """Weights, log and newest record of two updates of 2 x 4 rows.

    Args:
        final: where the model is saved at the end.
        complete: a checkpoint whose run has ended: its weights are loaded, as `lfu train` does then, and not trained.
        named: for `LfUTrainer.train`.
    """
    launched(wrapper)
    # a recomputed forward does not see the mode
    recomputed = options.get("gradient_checkpointing") or (wrapper or "").endswith("checkpointed")
    with nullcontext() if recomputed or "dtype" in options else Float64Throughout():
        made = trainer(folder, 1 if wrapper is None else 2, theta, **options)
        if complete is None:
            made.train(**named)
        else:
            made._load_from_checkpoint(str(complete))
        if final is not None:
            made.save_model(str(final))
    return {
        "weights": whole(made.model),
        "log": made.state.log_history,
        "record": made.last_record and asdict(made.last_record),
        "wrapper": type(made.model_wrapped).__name__,
    }


def cut(folder: Path, wrapper: str, theta: str, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A run that keeps a checkpoint of each update; one that goes on from its first; its last one, loaded alone.

    The first and the last save a model: in `folder`/final and `folder`/loaded.
    """
    kept = options | {"save_strategy": "steps", "save_steps": 1}
    runs = {"whole": train(folder, wrapper, theta, kept, final=folder / "final")}
    resume = {"resume_from_checkpoint": str(folder / "checkpoint-1")}
    runs["resumed"] = train(folder / "resumed", wrapper, theta, options, **resume)
    last = folder / "checkpoint-2"
    runs["loaded"] = train(folder, wrapper, theta, options, final=folder / "loaded", complete=last)
    return runs


def unresumable(folder: Path) -> str:
    """What resuming says where torch's loader of sharded optimizers asserts: plain SGD has no state."""
    options = {"method": "sft", "save_strategy": "steps", "save_steps": 1}
    train(folder, "fsdp2", "full", options | {"max_steps": 1})
    try:
        train(folder, "fsdp2", "full", options, resume_from_checkpoint=str(folder / "checkpoint-1"))
    except CheckpointError as error:
        return str(error)
    return ""


def saved(folder: Path, theta: str) -> dict[str, torch.Tensor]:
    """The weights in a folder that `save_model` wrote, as one process loads them."""
    if theta == "full":
        return whole(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    return whole(PeftModel.from_pretrained(tiny(), str(folder), autocast_adapter_dtype=False))


def reference(case: str, folder: Path) -> dict[str, Any]:
    """The case in one process."""
    _, theta, options = CASES[case]
    name = f"{theta} {options}"
    if name not in _references:
        _references[name] = train(folder / "one", None, theta, options)
    return _references[name]


_references: dict[str, dict[str, Any]] = {}  # cases that differ in their wrapper alone have one


def refusal(folder: Path, options: dict[str, Any]) -> str:
    launched("fsdp2")
    try:
        trainer(folder, 2, **options)
    except ValueError as error:
        return str(error)
    return ""


def everything(rank: int, folder: Path, bf16: bool) -> dict[str, Any]:
    found: dict[str, Any] = {name: train(folder / "two", *case) for name, case in CASES.items()}
    found["ddp, neftune"] = train(folder / "two", "ddp", "full", {"method": "neftune"})
    auto = {"lam": "auto", "max_steps": 2, "optim": "adamw_torch"}
    for wrapper, theta in CUT:
        found[f"{wrapper}, {theta}, cut"] = cut(folder / f"{wrapper} {theta}", wrapper, theta, auto)
    found["fsdp2, no state"] = unresumable(folder / "no state")
    if bf16:
        found["fsdp2, bf16"] = train(folder / "two", *BF16)
    for name, options in {
        "own": {"auxiliary": "own"},
        "sam": {"method": "sam"},
        "kl": {"method": "kl"},
        "gem": {"method": "gem"},
    }.items():
        found[f"fsdp, {name}"] = refusal(folder / "two", options)
    return found


def whole(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, p in model.named_parameters():
        value = p.detach()
        name = name.replace("_checkpoint_wrapped_module.", "")
        found[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
    return found
