"""From one GGUF file to an ordinary float32 model folder, by transformers' own reader."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_float32(file: Path, folder: Path) -> None:
    """Writes config, float32 weights and tokenizer of a GGUF file into `folder`. Raises ValueError: it lacks some."""
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # else it would leave the weights packed where there is a GPU
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _read_once():
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model, told = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"{file} has no weights for {', '.join(missing[:3])}")
    if hasattr(model.config, "quantization_config"):
        model.config.quantization_config = None
        del model.config.quantization_config  # they are no longer quantised
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _read_once() -> Iterator[None]:
    """Within it, a file that transformers asks `gguf` for is parsed once, and without numpy's price for a memmap.

    It would parse it three times: 19 s of processor time for SmolLM2-135M, where it takes 12.
    """
    import gguf
    import numpy as np

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
        yield
    finally:
        gguf.GGUFReader = original
