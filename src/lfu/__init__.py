"""Learning from the Undesirable: fine-tune a language model on little data without making it dumber.

`LfUStep` is the method in plain PyTorch, for any training loop; `LfUConfig` and `LfUTrainer` bring it to TRL.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from lfu.config import LfUConfig as LfUConfig
    from lfu.forgetting.callback import ForgettingCallback as ForgettingCallback
    from lfu.step.record import Record as Record
    from lfu.step.step import LfUStep as LfUStep
    from lfu.trainer import LfUTrainer as LfUTrainer

# Imported on first use: `import lfu` and `lfu --help` must not wait for torch, transformers and trl.
_HOME = {
    "ForgettingCallback": "lfu.forgetting.callback",
    "LfUConfig": "lfu.config",
    "LfUStep": "lfu.step.step",
    "LfUTrainer": "lfu.trainer",
    "Record": "lfu.step.record",
}
__all__ = ["ForgettingCallback", "LfUConfig", "LfUStep", "LfUTrainer", "Record", "__version__"]


if not TYPE_CHECKING:  # a type checker would take any misspelt name for an Any

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module 'lfu' has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(_HOME[name]), name)
        except ModuleNotFoundError as error:
            from lfu.support.extras import explained

            if line := explained(f"lfu.{name}", error):
                raise ImportError(line, name=error.name) from None
            raise


def __dir__() -> list[str]:
    return sorted(__all__)
