"""Tiny random models built from configs, and batches for them: everything in the suite runs on these."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
import transformers
from peft import LoraConfig, get_peft_model

VOCAB = 61
DEVICE = os.environ.get("LFU_TEST_DEVICE", "cpu")  # pytest --device sets it
_SMALL = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=64, tie_word_embeddings=True,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda **kw: transformers.LlamaConfig(**_SMALL | kw),
    "qwen": lambda **kw: transformers.Qwen3Config(**_SMALL | kw),
    "mistral": lambda **kw: transformers.MistralConfig(**_SMALL | dict(tie_word_embeddings=False) | kw),
    "gemma": lambda **kw: transformers.Gemma2Config(**_SMALL | dict(query_pre_attn_scalar=4) | kw),
    "gpt2": lambda **kw: transformers.GPT2Config(
        **dict(vocab_size=VOCAB, n_embd=16, n_layer=4, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
               resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) | kw
    ),
}  # fmt: skip
FAMILIES = list(CONFIGS)
CONFIGS["mixtral"] = lambda **kw: transformers.MixtralConfig(  # for the few tests that are about fused experts
    **_SMALL
    | dict(tie_word_embeddings=False, num_local_experts=4, num_experts_per_tok=2)
    | dict(experts_implementation="eager")  # grouped products know no float64 on a CPU
    | kw
)


def tiny_model(family: str = "llama", *, theta: str = "full", dtype=torch.float64, seed: int = 0, **config: Any) -> Any:
    """A random model, d = 16, 4 layers unless `config` says otherwise.

    `theta`: full, lora, dora, or subset (the attention of the upper half).
    """
    model, state = _made(family, theta, dtype, seed, **config)
    torch.manual_seed(seed)
    torch.set_rng_state(state)  # as if it had been made now
    return copy.deepcopy(model).to(DEVICE).train()


@lru_cache(maxsize=8)  # an adapter takes ten times as long to put in as a model with one to copy
def _made(family: str, theta: str, dtype: torch.dtype, seed: int, **config: Any) -> tuple[Any, torch.Tensor]:
    """The model on the CPU, and the random state afterwards."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](**config)).to(dtype)
    for p in model.parameters():  # the default initialisation is so small that all layers look alike
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    if theta in ("lora", "dora"):
        targets = "all-linear" if family != "gpt2" else ["c_attn", "c_proj", "c_fc"]
        config_ = LoraConfig(
            r=2, lora_alpha=4, target_modules=targets, use_dora=theta == "dora", fan_in_fan_out=family == "gpt2"
        )
        model = get_peft_model(model, config_, autocast_adapter_dtype=False)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)  # as after some training: theta is not at its own zero
        model = model.to(dtype)
    elif theta == "subset":
        layers = model.config.num_hidden_layers
        for name, p in model.named_parameters():
            p.requires_grad_(any(f".{i}." in name for i in range(layers // 2, layers)) and "attn" in name)
    return model, torch.get_rng_state()


def tiny_batch(seed: int = 0, rows: int = 3, length: int = 10) -> dict[str, torch.Tensor]:
    """Right-padded rows of different lengths; the prompt's and the padding's labels are -100."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=g)
    mask, labels = torch.ones_like(ids), ids.clone()
    for i in range(rows):
        end = length - i
        ids[i, end:], mask[i, end:], labels[i, end:] = 0, 0, -100
        labels[i, : 3 + i % 2] = -100
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE), "labels": labels.to(DEVICE)}


@contextmanager
def Float64Throughout() -> Iterator[None]:
    """Models compute norms, softmaxes and rotary tables in float32 whatever their dtype; within this, in float64.

    Without it two orders of the same arithmetic differ by 1e-7 and the oracle could not be asked for 1e-10. Patched are
    the four functions by which models and TRL ask for float32: a mode that sees every function takes a third longer.
    """
    wide = lambda value: torch.float64 if value is torch.float32 else value
    widened = lambda function: (
        lambda *args, **named: function(*map(wide, args), **{name: wide(value) for name, value in named.items()})
    )
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double), ExitStack() as stack:
        for owner, name in ((torch.Tensor, "to"), (torch.nn.functional, "softmax"), (torch, "zeros")):
            stack.enter_context(mock.patch.object(owner, name, widened(getattr(owner, name))))
        yield


def random_states() -> list[list[int]]:
    """PyTorch's generators: the CPU's, then each GPU's."""
    return [state.tolist() for state in (torch.get_rng_state(), *torch.cuda.get_rng_state_all())]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """name -> gradient (zeros where there is none) of each trainable parameter."""
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """max over parameters of max|a - b|, over the largest entry of b."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a) / max(float(b[n].abs().max()) for n in b)
