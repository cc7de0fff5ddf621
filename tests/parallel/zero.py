"""LfUTrainer in two processes under DeepSpeed, in float32: its optimizer has no other full precision."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from trainers import CLIPPED, launched, trainer, whole
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lfu.training.checkpoints import CheckpointError

# name -> (stage, theta, options)
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "2, full, sft": (2, "full", {"method": "sft"}),
    "1, full": (1, "full", {}),
    "2, full, clipped": (2, "full", {"max_grad_norm": CLIPPED}),
    "2, lora, three updates": (2, "lora", {"max_steps": 3, "gradient_accumulation_steps": 1}),
    "2, full, independent, early": (2, "full", {"ascent_batch": "independent", "layers": "early"}),
    "2, full, logits": (2, "full", {"consistency": "logit_kl"}),
    "3, full, clipped": (3, "full", {"max_grad_norm": CLIPPED}),
    "3, lora, three updates": (3, "lora", {"max_steps": 3, "gradient_accumulation_steps": 1}),
    "3, full, two steps, early": (3, "full", {"ascent_steps": 2, "layers": "early"}),
    "3, lora, independent": (3, "lora", {"ascent_batch": "independent"}),
    "3, full, steering, checkpointing": (3, "full", {"auxiliary": "steering", "gradient_checkpointing": True}),
    "3, full, clean, every": (3, "full", {"direction": "clean", "every": 2, "max_steps": 3}),
}
CUT = [(2, "lora"), (2, "full"), (3, "lora"), (3, "full")]


def config(stage: int, bf16: bool) -> dict[str, Any]:
    """As accelerate makes it of a launch file; everything is cut up, however small."""
    return {
        "zero_optimization": {
            "stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True,
        },
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
    }  # fmt: skip


def made(folder: Path, stage: int, theta: str, options: dict[str, Any]) -> Any:
    launched(None)
    unset_hf_deepspeed_config()  # the last run's ZeRO-3 would still cut up what is made
    # accelerate asks for DeepSpeed where it looks for a GPU, and without one takes a single process for granted
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false"}
    PartialState(backend="gloo")
    deepspeed = {"deepspeed": config(stage, options.get("bf16", False))}
    configured = {"accelerator_config": {"use_configured_state": True}}
    return trainer(folder, 2, theta, **({"dtype": torch.float32} | configured | deepspeed | options))


def train(
    folder: Path, stage: int, theta: str, options: dict[str, Any], final: Path | None = None, **named: Any
) -> dict[str, Any]:
    """Weights, log and newest record of two updates of 2 x 4 rows; `final` is where the model is saved at the end."""
    trained = made(folder, stage, theta, options)
    trained.train(**named)
    if final is not None:
        trained.save_model(str(final))
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(trained.model.parameters()), enabled=stage == 3):
        weights = whole(trained.model)
    return {
        "weights": weights,
        "log": trained.state.log_history,
        "record": trained.last_record and asdict(trained.last_record),
        "wrapper": type(trained.model_wrapped).__name__,
    }


def cut(folder: Path, stage: int, theta: str) -> dict[str, dict[str, Any]]:
    """A run in one go; the same one stopped after its first update and resumed, which saves a model in `final`."""
    options = {"lam": "auto", "optim": "adamw_torch"}
    kept = options | {"save_strategy": "steps", "save_steps": 1}
    runs = {"whole": train(folder / "whole", stage, theta, options)}
    train(folder, stage, theta, kept | {"max_steps": 1})
    resume = {"resume_from_checkpoint": str(folder / "checkpoint-1")}
    runs["resumed"] = train(folder, stage, theta, kept, final=folder / "final", **resume)
    return runs


# which micro-batches have a loss that is not a number: the last of an update, the first of a later one, all of one
POISONED = {"last": {1}, "first": {2}, "all": {2, 3}}


def poison(trained: Any, bad: set[int]) -> None:
    plain, calls = trained._training_loss, [0]

    def loss(*given: Any) -> torch.Tensor:
        calls[0] += 1
        return plain(*given) * (torch.nan if calls[0] - 1 in bad else 1.0)

    trained._training_loss = loss


def poisoned(rank: int, folder: Path, stage: int, bad: set[int]) -> dict[str, Any]:
    """Three updates of two micro-batches; what is bad is so in one of the two processes."""
    trained = made(folder, stage, "full", {"max_steps": 3})
    poison(trained, bad if rank == 1 else set())
    trained.train()
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(trained.model.parameters()), enabled=stage == 3):
        return {"weights": whole(trained.model), "log": trained.state.log_history}


def refusal(folder: Path, stage: int, options: dict[str, Any]) -> str:
    theta = "lora" if "peft" in options else "full"
    try:
        made(folder, stage, theta, {name: value for name, value in options.items() if name != "peft"})
    except ValueError as error:
        return str(error)
    return ""


REFUSED = {
    "own": (2, {"auxiliary": "own"}, "auxiliary='lora'"),
    "logits": (3, {"consistency": "logit_kl"}, "'mse'"),
    "stale": (2, {"stale": 2}, "every"),
    "sam": (2, {"method": "sam"}, "use DDP"),
    "kl": (3, {"method": "kl"}, "use DDP"),
    "corda": (3, {"method": "corda", "peft": True}, "use DDP"),
    "osf": (2, {"method": "osf", "peft": True}, "use DDP"),
}


def misfit(folder: Path, checkpoint: Path) -> str:
    """What resuming from a checkpoint of one process, without DeepSpeed, says."""
    try:
        train(folder, 2, "lora", {"max_steps": 3}, resume_from_checkpoint=str(checkpoint))
    except CheckpointError as error:
        return str(error)
    return ""


def everything(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: train(folder / "two", *case) for name, case in CASES.items()}
    for stage, theta in CUT:
        found[f"{stage}, {theta}, cut"] = cut(folder / f"{stage} {theta}", stage, theta)
    for stage in (2, 3):
        found |= {
            f"{stage}, {where} bad": poisoned(rank, folder / "two", stage, bad) for where, bad in POISONED.items()
        }
        found[f"{stage}, bf16"] = train(folder / "two", stage, "lora", {"bf16": True, "learning_rate": 0.5})
    found["refused"] = {name: refusal(folder / "two", stage, options) for name, (stage, options, _) in REFUSED.items()}
    found["misfit"] = misfit(folder / "two", folder / "one process" / "checkpoint-1")
    return found
