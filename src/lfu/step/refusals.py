"""What the step can't work with, told when it is made; each message names what works."""

from __future__ import annotations

from torch import nn

from lfu.model.anatomy import Anatomy
from lfu.model.representations import Reader
from lfu.step.second_pass import SecondPass
from lfu.step.settings import StepSettings
from lfu.step.term import Term
from lfu.undesirable import Auxiliary


def refuse_compiled(parts: Anatomy, model: nn.Module) -> None:
    """Raises ValueError where torch.compile has a module that a hook goes to."""
    if (place := parts.compiled(model)) is not None:
        raise ValueError(
            f"{f'the module {place!r}' if place else 'the model'} is compiled: LfU attaches and removes hooks "
            "inside it in every step, which would compile it anew each time; give the model as it was before "
            "torch.compile"
        )


def refuse_form(s: StepSettings, second: SecondPass, auxiliary: Auxiliary, term: Term, reader: Reader) -> None:
    """Raises ValueError for an approximate form that does not fit the model or the other settings."""
    compared = len(reader.layers)
    if s.random_layers and term.reads_logits:
        raise ValueError("random_layers chooses among compared layers, and logit_kl compares none: drop one")
    if s.random_layers >= compared and s.random_layers:
        raise ValueError(f"random_layers={s.random_layers} of {compared} compared layers leaves none out: give fewer")
    if s.part < 1 and second.replays_masks:
        raise ValueError(second.part_saves_nothing())
    if not s.stale:
        return
    if s.direction == "clean":
        raise ValueError("stale is the first-order form of direction='perturbed': drop direction='clean'")
    if not auxiliary.can_be_kept:
        raise ValueError(f"stale needs an auxiliary with `kept` and `restore`, and {type(auxiliary).__name__} has none")
    head = term.anatomy.model.get_output_embeddings()
    if term.reads_logits and (not term.head_stays or any(p.requires_grad for p in head.parameters())):
        raise ValueError("stale with logit_kl needs a head that is not trained, as under LoRA: drop one of the two")
