"""What libraries do again for every tiny training, where it costs more than the training: done once, or not at all.

No result depends on it. Programs that tests start as a user would, with a Python of their own, run without.
"""

from __future__ import annotations

import sys
from functools import cache

import torch


def libraries() -> None:
    """Applies it to the packages that are imported by now; a second time changes nothing."""
    if not torch.cuda.is_available():  # every seed keeps the stack of its caller, for the day that a GPU appears
        for absent in (torch.cuda, torch.xpu, torch.mtia):
            absent.manual_seed_all = _nothing
    imports = sys.modules.get("accelerate.utils.imports")
    if imports and not hasattr(imports._is_package_available, "cache_info"):  # PEFT's metadata, from the disk, per step
        imports._is_package_available = cache(imports._is_package_available)
    if "datasets" in sys.modules:  # pickles rows, tokenizers and functions to name a file that nobody writes
        for module in (sys.modules["datasets.arrow_dataset"], sys.modules["datasets.fingerprint"]):
            module.update_fingerprint = module.generate_fingerprint = _any_name


def _nothing(seed: int) -> None:
    pass


def _any_name(*of: object) -> str:
    from datasets.fingerprint import generate_random_fingerprint

    return generate_random_fingerprint()
