"""OFT: the weights are rotated, not added to. By PEFT."""

from peft import LoraConfig, OFTConfig, PeftConfig

from lfu.methods.adapters import AdapterMethod, replaced
from lfu.methods.knobs import knob
from lfu.methods.run import Preparation


class OFT(AdapterMethod):
    """`W R`, R block-diagonal and orthogonal, the identity at the start: lengths and angles of W's rows stay.

    It takes the place of the LoRA adapter, of whose settings only the targeted layers count. In PEFT's own comparison
    (MetaMathQA, Llama-3.2-3B) it is ahead of LoRA in GSM8K and in what is kept of Wikipedia.
    """

    name = "oft"
    summary = "orthogonal fine-tuning: rotations of the weights, in place of LoRA"
    source = "Qiu et al., NeurIPS 2023, arXiv 2306.07280 (through PEFT's OFTConfig; block 32)"
    protects = "lengths and angles of the weights' rows"

    block: int = knob(32, "size of the rotated blocks (PEFT: 32); PEFT takes the nearest that fits a layer", low=2)

    def started(self, config: LoraConfig, run: Preparation) -> PeftConfig:
        return replaced(config, OFTConfig, run, self.name, oft_block_size=self.block)
