"""From one GGUF file to an ordinary float32 model folder. The file is read once.

transformers can load such a file too, and does for Gemma 3; but it parses the 100,000 strings of the vocabulary three
times, builds the table of tensor names once for each module of the model, and holds the weights several times: 19 s of
processor time for SmolLM2-135M, where this takes 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch


def write_float32(file: Path, folder: Path) -> None:
    """Writes config, float32 weights and tokenizer of a GGUF file into `folder`.

    Raises:
        ValueError: the file holds an architecture that is not known here, or other tensors than a Llama has.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": file.name}
    with _read_once() as reader:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        config = AutoConfig.from_pretrained(file.parent, **options)
        if config.model_type not in ("llama", "gemma3_text"):
            raise ValueError(f"{file}: architecture {config.model_type}: only llama and gemma3 are unpacked here")
        config.dtype = torch.float32
        with torch.device("meta"):  # no weights yet: those of the file take their places
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if config.model_type == "llama":
            weights = _weights(reader(str(file)), model)
        else:
            if hasattr(transformers, "GgufConfig"):  # else it would leave them packed where there is a GPU
                options["quantization_config"] = transformers.GgufConfig(dequantize=True)
            read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
            weights = {name: value.float() for name, value in read.state_dict().items()}
            config.quantization_config = None
            del config.quantization_config  # they are no longer quantised
        model.load_state_dict(weights, assign=True)
    model.tie_weights()
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _read_once() -> Iterator[Any]:
    """Within it, a file that transformers asks `gguf` for is parsed once, and without numpy's price for a memmap."""
    import gguf

    original = gguf.GGUFReader
    files: dict[str, Any] = {}

    class Plain(original):  # type: ignore[misc, valid-type]
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, value: Any) -> None:
            self._plain = np.asarray(value)  # 5 million slices of it are taken; a memmap does its own books for each

    def read(path: Any, *more: Any) -> Any:
        if str(path) not in files:
            files[str(path)] = Plain(path, *more)
        return files[str(path)]

    gguf.GGUFReader = read
    try:
        yield read
    finally:
        gguf.GGUFReader = original


def _weights(reader: Any, model: Any) -> dict[str, torch.Tensor]:
    """Parameter -> float32 tensor, dequantised, for each of the model's; a tied head is its embedding."""
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map

    config, names = model.config, get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    there = {tensor.name: tensor for tensor in reader.tensors}
    weights: dict[str, torch.Tensor] = {}
    used = {"rope_freqs.weight"}  # a table that transformers makes itself
    for name, parameter in model.state_dict().items():
        source = f"{names.get_name(name.removesuffix('.weight'))}.weight"
        if name == "lm_head.weight" and config.tie_word_embeddings:
            source = "token_embd.weight"
        if source not in there:
            raise ValueError(f"the GGUF file has no tensor {source} for {name}")
        used.add(source)
        values = dequantize(there[source].data, there[source].tensor_type).astype(np.float32, copy=False)
        if name.endswith("q_proj.weight"):
            values = _unpermuted(values, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            values = _unpermuted(values, config.num_key_value_heads)
        if values.shape != tuple(parameter.shape):
            raise ValueError(f"tensor {source} is {values.shape}, and {name} wants {tuple(parameter.shape)}")
        weights[name] = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if left := sorted(set(there) - used):
        raise ValueError(f"the GGUF file holds tensors that a Llama has no place for: {', '.join(left[:3])}")
    return weights


def _unpermuted(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the rotary halves of q and k `(heads * d, in)` interleaved, transformers one after the other."""
    pairs = values.shape[0] // heads // 2
    return values.reshape(heads, pairs, 2, *values.shape[1:]).swapaxes(2, 1).reshape(values.shape)
