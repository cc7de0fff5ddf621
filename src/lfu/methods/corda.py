"""CorDA: an adapter that starts in the directions which matter least to the knowledge that shall stay."""

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import corda as peft_corda
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lfu.evaluation.batching import evaluating
from lfu.evaluation.pieces import longest_input
from lfu.methods.adapters import AdapterMethod
from lfu.methods.knobs import knob
from lfu.methods.run import Preparation, Trainer
from lfu.methods.weights import factors_of
from lfu.model.anatomy import Anatomy

BUILT_IN = "plain_text"
TOKENS_PER_DIMENSION = 128  # peft's rule of thumb: samples = hidden size / tokens a sample * 128


class CorDA(AdapterMethod):
    """`W0 + s (B A - B0 A0)`, (B, A) starting at (B0, A0): the r smallest components of the covariance-aware SVD.

    C = sum x x^T over the inputs x of a layer on texts of the knowledge to keep; `SVD(W0 C) = U S V^T`,
    `W0 = U S V^T C^-1`; the last r components are s B0 A0: the paper's knowledge-preserved mode, computed by PEFT.

    PEFT puts W0 - s B0 A0 in place of the model's weights, so that what it saves fits that changed model alone. Here
    the weights stay and the adapter has rank 2r, [B, -B0] [A; A0], whose second halves are fixed: the same function
    and training, and every checkpoint is an ordinary LoRA adapter of the untouched model.
    """

    name = "corda"
    summary = "LoRA that starts where given knowledge hardly reaches (CorDA, knowledge-preserved)"
    source = "Yang et al. 2024, arXiv 2406.05223 (through PEFT's corda_method='kpm')"
    protects = "the knowledge that the texts in corda.data exercise"
    once = "a forward over the texts, and an SVD of every targeted layer"
    lacks = ("use_dora", "target_parameters", "lora_bias", "layer_replication")
    decomposes = True

    data: str = knob(BUILT_IN, "texts of what to keep: file, folder, hub name; plain_text: 20 built-in passages (ours)")
    samples: int = knob(256, "largest number of windows of text (paper's code: 256)", low=1)
    max_length: int = knob(2048, "longest window, in tokens (paper's code: 2048)", low=2)

    def started(self, config: LoraConfig, run: Preparation) -> PeftConfig:
        """A copy with rank 2r and the same scaling s."""
        if config.init_lora_weights is not True:
            raise self._error(f"decides how LoRA starts: drop init_lora_weights={config.init_lora_weights!r}")
        config, more = copy.deepcopy(config), math.sqrt(2) if config.use_rslora else 2
        config.r *= 2
        config.lora_alpha *= more
        config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
        config.alpha_pattern = {name: more * alpha for name, alpha in config.alpha_pattern.items()}
        return config

    def setup(self, trainer: Trainer) -> None:
        """Writes the start into the adapter and fixes the second halves."""
        anatomy, tokenizer = trainer.anatomy, trainer.processing_class
        layers = {name: layer for name, layer in anatomy.model.named_modules() if isinstance(layer, LoraLayer)}
        ranks = {name: self._rank(anatomy, name, layer) for name, layer in layers.items()}
        windows = self._windows(tokenizer, longest_input(anatomy.model, self.max_length), trainer.say)
        wanted = TOKENS_PER_DIMENSION * anatomy.model.config.get_text_config().hidden_size
        tokens = sum(map(len, windows))
        trainer.say(f"corda: {tokens:,} tokens of {self.data} say what to keep")
        if self.data == BUILT_IN:
            trainer.say("corda: they are half of the built-in prose: what is measured on it is not held out")
        if tokens < wanted:
            trainer.say(f"corda: PEFT advises {wanted:,} tokens or more for this model: give more in corda.data")
        self._fixed: list[tuple[torch.Tensor, tuple[slice, ...]]] = []
        for name, (A0, B0) in _smallest_components(anatomy, ranks, windows).items():
            (adapter,) = layers[name].active_adapters
            A, B = factors_of(layers[name], adapter)
            size = layers[name].scaling[adapter] ** -0.5
            with torch.no_grad():
                A.copy_(size * torch.cat([A0, A0]))
                B.copy_(size * torch.cat([B0, -B0], dim=1))
            second = slice(ranks[name], None)
            self._fixed += [(A, (second,)), (B, (slice(None), second))]
        for factor, half in self._fixed:
            factor.register_hook(partial(_without, half))

    def before_update(self, trainer: Trainer) -> None:
        self._values = [factor.detach()[half].clone() for factor, half in self._fixed]

    @torch.no_grad()
    def after_update(self, trainer: Trainer) -> None:
        for (factor, half), value in zip(self._fixed, self._values):  # weight decay needs no gradient to shrink it
            factor[half] = value

    def _rank(self, anatomy: Anatomy, name: str, layer: Any) -> int:
        """r of one layer, which has an adapter of rank 2r."""
        base, (adapter,) = layer.get_base_layer(), layer.active_adapters
        rank = layer.r[adapter] // 2
        if not isinstance(base, (nn.Linear, Conv1D)):
            raise self._error(f"can't start {name}, which is no linear layer: leave it out")
        if isinstance(base, Conv1D) and not hasattr(peft_corda, "Conv1D"):
            raise self._error(f"needs PEFT 0.19 or newer for {name}, a Conv1D: pip install --upgrade peft")
        if all(base is not module for module in anatomy.decoder.modules()):
            raise self._error(f"reads the inputs of the decoder's layers, and {name} is none: leave it out")
        if rank > min(base.weight.shape):
            raise self._error(f"takes r components of a weight, and {name} has no {rank}: lower the rank")
        return rank

    def _windows(self, tokenizer: Any, size: int, say: Callable[[str], None]) -> list[list[int]]:
        """The texts, a blank line between them, cut into windows; each begins as the tokenizer begins a text."""
        first = tokenizer("")["input_ids"][:1]
        begin = first if first == [tokenizer.bos_token_id] else []
        size -= len(begin)
        plain = lambda text: tokenizer(f"{text}\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        ids = list(islice(chain.from_iterable(map(plain, self._texts(tokenizer, say))), self.samples * size))
        return [begin + ids[start : start + size] for start in range(0, len(ids), size)]

    def _texts(self, tokenizer: Any, say: Callable[[str], None]) -> Iterable[str]:
        from lfu.data.learned import whole_text
        from lfu.data.load import load_rows
        from lfu.data.probes import plain_text
        from lfu.data.templates import to_training_rows

        if self.data == BUILT_IN:  # half of them
            return [row["text"] for row in plain_text()[::2]]
        tell = lambda line: say(f"corda: {self.data}: {line}")
        rows = to_training_rows(load_rows(self.data), tokenizer=tokenizer, tell=tell)
        return (whole_text(row, tokenizer) for row in rows)


@torch.no_grad()
def _smallest_components(
    anatomy: Anatomy, ranks: dict[str, int], windows: list[list[int]]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer name -> sqrt(s) A0 `(r, in)` and sqrt(s) B0 `(out, r)`, by PEFT. The model, a fresh LoRA, stays."""

    def run_model() -> None:
        for window in windows:  # one at a time: PEFT's hook takes no batches
            anatomy.forward(input_ids=torch.tensor([window], device=anatomy.device), use_cache=False)

    inner = {f"{name}.base_layer": rank for name, rank in ranks.items()}
    config = LoraConfig(target_modules=list(inner), rank_pattern=inner, init_lora_weights="corda",
                        corda_config=CordaConfig(corda_method="kpm"))  # fmt: skip
    try:
        with evaluating(anatomy.model):
            peft_corda.preprocess_corda(anatomy.model, config, run_model=run_model)
    except ZeroDivisionError:
        raise ValueError("corda: a targeted layer saw none of the texts: name others in target_modules") from None
    found = {}
    for name in ranks:
        base = anatomy.model.get_submodule(f"{name}.base_layer")
        root = base.eigens.S_WC.sqrt()
        found[name] = (root[:, None] * base.eigens.V_WC.T, base.eigens.U_WC * root)  # V has C^-1 in it
        del base.eigens
    return found


def _without(part: tuple[slice, ...], gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    gradient[part] = 0
    return gradient
