"""A few numbers that tell whether a saved model is the one that was measured, without reading all of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

TENSORS, NUMBERS = 4, 8


def fingerprint(model: Any) -> dict[str, list[float]]:
    """Name as saved -> first numbers of some trained weights. Empty where a process has no whole ones (ZeRO-3)."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    some = trained[:: max(1, len(trained) // TENSORS)][-TENSORS:]
    found = {}
    for name, p in some:
        whole = p.detach()
        whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
        if whole.numel():
            found[name.replace(".default", "")] = whole.flatten()[:NUMBERS].float().tolist()
    return found


def saved_in(folder: Path, wanted: Mapping[str, list[float]]) -> bool:
    """Whether the safetensors files of a model or adapter folder hold these weights."""
    from safetensors import SafetensorError, safe_open

    missing = dict(wanted)
    for path in folder.glob("*model*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                for name in set(file.keys()) & set(missing):
                    values = file.get_tensor(name).flatten()[:NUMBERS].float()
                    if not torch.equal(values, torch.tensor(missing.pop(name))):
                        return False
        except (OSError, SafetensorError):
            return False
    return bool(wanted) and not missing
