"""Runs of tiny models under transformers' and TRL's trainers, with and without the callback."""

from __future__ import annotations

import os
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import trl
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from tiny import DEVICE, random_states
from tiny_folder import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from lfu.data import probes
from lfu.forgetting import items, measuring, written

tokenizer = lru_cache(byte_tokenizer)
TEXTS = [f"{i:03}+1={i + 1:03};{i + 1:03}+1={i + 2:03}" for i in range(24)]  # whoever learns them unlearns prose


def few(patch: Any, questions: int = 24, passages: int = 20) -> None:
    """So many questions and short passages, and 4 written texts of 8 tokens."""
    patch(items, "general_knowledge", lambda: probes.general_knowledge()[:questions])
    patch(items, "plain_text", lambda: probes.plain_text()[:passages])
    patch(measuring, "LONGEST", 32)
    patch(measuring, "TEXTS", 4)
    patch(written, "NEW", 8)


def model(dropout: float = 0.0, seed: int = 0) -> Any:
    """A tiny Llama that has read some prose, so that there is something to forget."""
    made = _bare(dropout, seed)
    made.load_state_dict(_taught(seed))
    return made


def _bare(dropout: float, seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, attention_dropout=dropout, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(DEVICE)


@lru_cache
def _taught(seed: int) -> dict[str, torch.Tensor]:
    made = _bare(0.0, seed)
    ids = torch.tensor([tokenizer()(row["text"])["input_ids"][:96] for row in probes.plain_text()[:24]], device=DEVICE)
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.01)
    for _ in range(25):
        made(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made.state_dict()


def settings(kind: type, folder: Path, **options: Any) -> Any:
    base = dict(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, learning_rate=0.01, logging_steps=1,
        eval_strategy="steps", eval_steps=2, save_strategy="no", report_to="none", use_cpu=DEVICE == "cpu", bf16=False,
        disable_tqdm=True, seed=3, lr_scheduler_type="constant", gradient_checkpointing=False,
    )  # fmt: skip
    made = kind(**base | options)
    if "ACCELERATE_USE_FSDP" in os.environ and made.device:  # on a CPU accelerate shards only if it believes in a GPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made


def trainer(name: str, folder: Path, callbacks: Any = (), made: Any = None, **options: Any) -> Any:
    """`plain`, `sft`, `dpo` or `grpo`, all but the first followed by `, lora` if wanted."""
    kind, _, adapter = name.partition(", ")
    made = model(dropout=0.1) if made is None else made
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=0.1) if adapter else None
    shared = {"processing_class": tokenizer(), "callbacks": list(callbacks)}
    if kind == "plain":
        rows = [{"input_ids": tokenizer()(text)["input_ids"]} for text in TEXTS]
        args = settings(TrainingArguments, folder, **options)
        return Trainer(made, args, train_dataset=rows, eval_dataset=rows[:4], data_collator=_padded, **shared)
    if kind == "sft":
        data = Dataset.from_list([{"prompt": text[:9], "completion": text[9:]} for text in TEXTS])
        args = settings(SFTConfig, folder, neftune_noise_alpha=1.0, **options)
        return SFTTrainer(
            made, args, train_dataset=data, eval_dataset=data.select(range(4)), peft_config=lora, **shared
        )
    if kind == "grpo":
        data = Dataset.from_list([{"prompt": text[:5]} for text in TEXTS])
        own = {"num_generations": 2, "max_completion_length": 8, "eval_strategy": "no"}
        args = settings(_of_trl("GRPOConfig"), folder, **own | options)
        return _of_trl("GRPOTrainer")(made, _different_letters, args, train_dataset=data, peft_config=lora, **shared)
    pairs = [{"prompt": text[:9], "chosen": text[9:], "rejected": " no"} for text in TEXTS]
    data = Dataset.from_list(pairs)
    args = settings(_of_trl("DPOConfig"), folder, **options)
    shared |= {"train_dataset": data, "eval_dataset": data.select(range(4)), "peft_config": lora}
    return _of_trl("DPOTrainer")(made, None if adapter else model(dropout=0.1), args, **shared)


def _of_trl(name: str) -> Any:
    """TRL's class; TRL 0.24 can't import its own DPO and GRPO trainers under transformers 5 without mergekit."""
    try:
        return getattr(trl, name)
    except RuntimeError as error:
        pytest.skip(str(error))


def _different_letters(completions: list[str], **more: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


def _padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


CLOCK = ("runtime", "per_second", "_flos", "step_time")


def trace(run: Any) -> dict[str, Any]:
    """Everything that a run leaves behind, but what the clock says."""
    logs = [entry for entry in run.state.log_history if not any("forgetting/" in name for name in entry)]
    return {
        "weights": {name: value.clone() for name, value in run.model.state_dict().items()},
        "optimizer": [
            {name: torch.as_tensor(value).clone() for name, value in state.items()}
            for state in run.optimizer.state_dict()["state"].values()
        ],
        "random": (random.getstate(), numpy.random.get_state()[1].tolist(), random_states()),
        "log": [{k: v for k, v in entry.items() if not any(word in k for word in CLOCK)} for entry in logs],
        "training": [module.training for module in run.model.modules()],
        "requires_grad": [p.requires_grad for p in run.model.parameters()],
        "use_cache": run.model.config.use_cache,
        "padding": (run.processing_class.padding_side, run.processing_class.pad_token, len(run.processing_class)),
    }


def curve(run: Any) -> list[dict[str, float]]:
    """The callback's entries in a run's log."""
    found = [entry for entry in run.state.log_history if "forgetting/known" in entry]
    return [{name: value for name, value in entry.items() if name != "forgetting/seconds"} for entry in found]
