"""The undesirable model: theta plus auxiliary components that were moved the wrong way (Eq. 2)."""

import importlib
import pkgutil

from lfu.support.choices import one_of
from lfu.undesirable.ascent import ascend
from lfu.undesirable.auxiliary import KINDS, Auxiliary, component_dtype, forward_hooks
from lfu.undesirable.lora import LoRA
from lfu.undesirable.own import Own
from lfu.undesirable.steering import Steering

for _file in pkgutil.iter_modules(__path__):  # a new kind needs no line here
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = [
    "KINDS", "Auxiliary", "LoRA", "Own", "Steering", "ascend", "auxiliary_of", "component_dtype", "forward_hooks",
]  # fmt: skip


def auxiliary_of(kind: str | Auxiliary) -> Auxiliary:
    """The auxiliary by its name, with its defaults; one that is made already passes through.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(kind, Auxiliary):
        return kind
    one_of("auxiliary", kind, KINDS)
    return KINDS[kind]()
