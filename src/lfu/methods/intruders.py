"""Intruder dimensions: after training, new large singular directions of the weights are made smaller. By PEFT."""

import re
from typing import Any

import torch
from peft import PeftType
from peft.tuners.lora.layer import LoraLayer

from lfu.methods.method import Method, knob
from lfu.methods.run import Trainer
from lfu.methods.weights import factors_of, form_of, lora_pairs

try:
    from peft.tuners.lora.intruders import reduce_intruder_dimension
except ImportError:  # PEFT 0.18
    reduce_intruder_dimension = None

REDUCED = "intruder_reduced"


class Intruders(Method):
    """`W0 + dW + (strength - 1) sum_i s_i u_i v_i^T` over the intruders i, for each layer.

    `SVD(W0 + dW) = U S V^T`; u_i is an intruder if it is among the first `top_k` and its cosine to every left singular
    vector of W0 is below `threshold`. LoRA makes such directions, full fine-tuning hardly does. PEFT keeps the best
    approximation of the adapter's rank, as a second adapter; here it becomes the adapter.
    """

    name = "intruders"
    summary = "after training, LoRA's intruder dimensions made smaller"
    source = "Shuttleworth et al. 2024, arXiv 2410.21228 (through PEFT's reduce_intruder_dimension)"
    protects = "what the untouched model's singular directions carry"
    once = "three SVDs of every layer's weight"
    places = ("final weights",)
    whole_weights = True
    never_with = {  # noqa: RUF012 (declared in Method)
        "osf": "it works on LoRA's factors, and osf has none",
        "corda": "its result would not fit into the adapter beside corda's fixed half",
    }

    strength: float = knob(0.75, "share of an intruder that is left (PEFT's mitigation_lambda: 0.75)", low=0, below=1)
    top_k: int = knob(10, "how many singular directions are looked at (PEFT: 10)", low=1)
    threshold: float = knob(0.5, "an intruder has a lower cosine to each old direction (PEFT: 0.5)", above=0, high=1)

    def check_adapter(self, config: Any, *, further: bool = False) -> None:
        if reduce_intruder_dimension is None:
            raise ValueError("method 'intruders' needs PEFT 0.20 or newer: pip install --upgrade peft")
        if config is None or config.peft_type != PeftType.LORA:
            raise ValueError("method 'intruders' mends LoRA adapters: train one (--use_peft true)")
        self._refuse(form_of(config))

    def _refuse(self, variant: str | None) -> None:
        if variant is not None:
            raise ValueError(f"method 'intruders' mends plain LoRA, not {variant}: train plain LoRA")

    def setup(self, trainer: Trainer) -> None:
        self.check_adapter(getattr(trainer.model, "active_peft_config", None))
        inner = trainer.anatomy.model
        if getattr(inner, "quantization_method", None) is not None:
            raise ValueError("method 'intruders' decomposes weights, and these are quantised: load the model without")
        for pair in lora_pairs(trainer.anatomy):
            self._refuse(pair.variant)
            if inner.get_submodule(pair.name).fan_in_fan_out:
                raise ValueError(f"method 'intruders': PEFT can't mend {pair.name}, which holds its weight transposed")

    @torch.no_grad()
    def finish(self, trainer: Trainer) -> None:
        model = trainer.model
        told: list[str] = []
        (kept,) = model.active_adapters
        reduce_intruder_dimension(
            model, kept, REDUCED, top_k=self.top_k, threshold_epsilon=self.threshold, mitigation_lambda=self.strength,
            logging_sink=told.append,
        )  # fmt: skip
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                for old, new in zip(factors_of(layer, kept), factors_of(layer, REDUCED)):
                    old.copy_(new)
        model.set_adapter(kept)
        model.delete_adapter(REDUCED)
        found = [int(m[1]) for line in told if (m := re.search(r"Intruders: (\d+)$", line))]
        many = f"{sum(found)} found in {len(found)} layers, kept at {self.strength:g} of their size"
        trainer.say(f"intruders: {many if found else 'none found, the adapter stays as it was trained'}")
