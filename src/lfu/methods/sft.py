"""Plain supervised fine-tuning: TRL's SFTTrainer, bit for bit. What every other method is measured against."""

from lfu.methods.method import Method


class SFT(Method):
    """`l = - (1/N) sum_t log p(y_t | x, y_<t)` over the N answer tokens (LfU paper, Eq. 1)."""

    name = "sft"
    summary = "plain supervised fine-tuning: TRL's SFTTrainer, bit for bit"
    source = "TRL's SFTTrainer"
    protects = "nothing: the yardstick"
