"""OFT: the weights are rotated, not added to. By PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peft import OFTConfig

from lfu.methods.adapters import refuse_what_is_no_lora
from lfu.methods.method import Method, Preparation, knob
from lfu.methods.weights import refuse_sharded_launch


@dataclass
class OFT(Method):
    """`W R`, R block-diagonal and orthogonal, the identity at the start: lengths and angles of W's rows stay.

    It takes the place of the LoRA adapter, of whose settings only the targeted layers count. R's blocks are Cayley
    transforms of what is trained, approximated by PEFT with a Neumann series of five terms. In PEFT's own comparison
    (MetaMathQA, Llama-3.2-3B) OFT is ahead of LoRA in GSM8K and in what is kept of Wikipedia; it is not our figure.
    """

    name: ClassVar[str] = "oft"
    summary: ClassVar[str] = "orthogonal fine-tuning: rotations of the weights, in place of LoRA"
    source: ClassVar[str] = "Qiu et al., NeurIPS 2023, arXiv 2306.07280 (through PEFT's OFTConfig; block 32)"
    protects: ClassVar[str] = "lengths and angles of the weights' rows"
    places: ClassVar[tuple[str, ...]] = ("adapter",)

    block: int = knob(32, "size of the rotated blocks (PEFT: 32); PEFT takes the nearest that fits a layer", low=2)

    def adapter(self, config: Any, run: Preparation) -> OFTConfig:
        refuse_sharded_launch(run.args, self.name)
        refuse_what_is_no_lora(self.name, config, run.model)
        run.say("oft: takes the place of the LoRA adapter, whose rank, alpha and dropout do not apply")
        return OFTConfig(oft_block_size=self.block, target_modules=config.target_modules, task_type=config.task_type)
