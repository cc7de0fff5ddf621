"""The undesirable model: theta plus auxiliary components that were moved the wrong way (Eq. 2)."""

from lfu.support.choices import one_of
from lfu.undesirable.ascent import ascend
from lfu.undesirable.auxiliary import Auxiliary, component_dtype, forward_hooks
from lfu.undesirable.lora import LoRA
from lfu.undesirable.own import Own
from lfu.undesirable.steering import Steering

KINDS: dict[str, type[Auxiliary]] = {"lora": LoRA, "steering": Steering, "own": Own}

__all__ = [
    "KINDS",
    "Auxiliary",
    "LoRA",
    "Own",
    "Steering",
    "ascend",
    "auxiliary_of",
    "component_dtype",
    "forward_hooks",
]


def auxiliary_of(kind: str | Auxiliary) -> Auxiliary:
    """The auxiliary by its name, with its defaults; one that is made already passes through.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(kind, Auxiliary):
        return kind
    one_of("auxiliary", kind, KINDS)
    return KINDS[kind]()
