"""What is measured: a random Llama of some size, theta, and one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

_SMOLLM = {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
_OURS = {"vocab_size": 32000, "max_position_embeddings": 8192, "tie_word_embeddings": True}


def _shape(hidden: int, inner: int, layers: int, heads: int, kv: int, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, **more,
    }  # fmt: skip


# Name -> shape. Time and memory do not depend on what the weights are.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": _shape(32, 64, 3, 4, 2, _OURS | {"vocab_size": 320, "max_position_embeddings": 512}),
    "30m": _shape(384, 1024, 12, 6, 2, _OURS),
    "70m": _shape(512, 1536, 18, 8, 2, _OURS),
    "135m": _shape(576, 1536, 30, 9, 3, _SMOLLM),  # SmolLM2-135M
    "360m": _shape(960, 2560, 32, 15, 5, _SMOLLM),  # SmolLM2-360M
    "500m": _shape(896, 4864, 24, 14, 2, _OURS | {"vocab_size": 151936}),  # Qwen2.5-0.5B without its biases
    "1.7b": _shape(2048, 8192, 24, 32, 32, _SMOLLM),  # SmolLM2-1.7B
    "8b": _shape(4096, 14336, 32, 32, 8, _OURS | {"vocab_size": 128256, "tie_word_embeddings": False}),  # Llama 3.1
}
# The axes of a curve -> how a value is written on the command line.
AXES: dict[str, type] = {"batch": int, "length": int, "size": str, "layers": int, "rank": int}


@dataclass(frozen=True)
class Case:
    """One setting.

    Attributes:
        theta: `lora` (rank `rank`, all linear layers) or `full`.
        size: a name in `SIZES`.
        batch, length: rows of the micro-batch and tokens per row, padding included.
        layers: blocks; None: the size's own.
        rank: of theta's LoRA.
        dtype: of the weights, a torch dtype's name.
        device: `cpu`, `cuda`, or `meta` (to count without memory).
    """

    theta: str = "lora"
    size: str = "135m"
    batch: int = 4
    length: int = 128
    layers: int | None = None
    rank: int = 8
    dtype: str = "float32"
    device: str = "cpu"

    def along(self, axis: str, value: Any) -> Case:
        """The same case with another value on one axis."""
        return replace(self, **{axis: value})

    @property
    def shape(self) -> dict[str, Any]:
        own = SIZES[self.size]
        return own if self.layers is None else own | {"num_hidden_layers": self.layers}

    def __str__(self) -> str:
        layers = "" if self.layers is None else f", {self.layers} layers"
        rank = f" r {self.rank}" if self.theta == "lora" else ""
        return f"{self.theta}{rank}, {self.size}{layers}, {self.batch} x {self.length}"


def make_model(case: Case, attention: str = "sdpa") -> Any:
    """A random Llama of the case, on its device, in training mode; with a LoRA adapter for theta `lora`. Seed 0."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**case.shape, attn_implementation=attention)
    with torch.device(case.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
        if case.theta == "lora":
            adapter = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules="all-linear")
            model = get_peft_model(model, adapter)
    return model.train()


def make_batch(rows: int, length: int, vocabulary: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Right-padded rows of 70 to 100 % of the length, a prompt of a third, as fine-tuning data are. Seed 0.

    Returns:
        `input_ids`, `attention_mask`, `labels`, each `(rows, length)`, int64.
    """
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), ids.clone()
    for i in range(rows):
        end = int(length * (1 - 0.3 * i / max(rows - 1, 1)))
        mask[i, end:], labels[i, end:], labels[i, : length // 3] = 0, -100, -100
    return {name: t.to(device) for name, t in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def needed_lengths(labels: torch.Tensor) -> list[int]:
    """Tokens of each row that the second pass must run: those up to the position that predicts the last label."""
    places = torch.arange(labels.shape[1], device=labels.device)
    return torch.where(labels != -100, places, 0).amax(1).tolist()
