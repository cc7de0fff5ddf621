"""CorDA: an adapter that starts in the directions which matter least to the knowledge that shall stay."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda, target_modules
from peft.tuners.lora.layer import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from lfu.methods.method import Method, Preparation, knob
from lfu.methods.weights import refuse_sharded_launch
from lfu.model.anatomy import anatomy

BUILT_IN = "plain_text"
TOKENS_PER_DIMENSION = 128  # peft's rule of thumb: samples = hidden size / tokens a sample * 128


@dataclass
class CorDA(Method):
    """`W0 + s (B A - B0 A0)`, (B, A) starting at (B0, A0): the r smallest components of the covariance-aware SVD.

    C = sum x x^T over the inputs x of a layer on texts of the knowledge to keep; `SVD(W0 C) = U S V^T`,
    `W0 = U S V^T C^-1`; the last r components are s B0 A0, with B0 = U sqrt(S / s), A0 = sqrt(S / s) V^T C^-1. This is
    the paper's knowledge-preserved mode, computed by PEFT.

    PEFT puts W0 - s B0 A0 in place of the model's weights, so that what it saves fits that changed model alone. Here
    the weights stay and the adapter has rank 2r, [B, -B0] [A; A0], whose second halves are fixed: the same function
    and the same training, and every checkpoint and the result are ordinary LoRA adapters of the untouched model. With
    LoRA dropout the two differ: here the start is W0 for every mask.
    """

    name: ClassVar[str] = "corda"
    summary: ClassVar[str] = "LoRA that starts where given knowledge hardly reaches (CorDA, knowledge-preserved)"
    source: ClassVar[str] = "Yang et al. 2024, arXiv 2406.05223 (through PEFT's corda_method='kpm')"
    protects: ClassVar[str] = "the knowledge that the texts in corda.data exercise"
    once: ClassVar[str] = "a forward over the texts, and an SVD of every targeted layer"
    places: ClassVar[tuple[str, ...]] = ("adapter",)

    data: str = knob(BUILT_IN, "texts of what to keep: file, folder, hub name; plain_text: 20 built-in passages")
    samples: int = knob(256, "at most so many windows of text (paper's code: 256)", low=1)
    max_length: int = knob(2048, "tokens a window, at most (paper's code: 2048)", low=2)

    def adapter(self, config: Any, run: Preparation) -> Any:
        """The LoRA config with twice the rank; what A and B start with is kept for `setup`."""
        refuse_sharded_launch(run.args, self.name)
        _refuse(config, run.model)
        config = _resolved(config, run.model)
        windows = list(islice(self._windows(run), self.samples))
        tokens = sum(len(window) for window in windows)
        run.say(f"corda: {tokens:,} tokens of {self.data} say what to keep")
        wanted = TOKENS_PER_DIMENSION * run.model.config.get_text_config().hidden_size
        if tokens < wanted:
            run.say(f"corda: PEFT advises {wanted:,} tokens or more for this model: give more in corda.data")
        self._components = _smallest_components(run.model, config, windows)
        return _of_twice_the_rank(config)

    def setup(self, trainer: Any) -> None:
        """Writes the start into the adapter and fixes the second halves."""
        self._fixed: list[_Fixed] = []
        for name, layer in trainer.anatomy.model.named_modules():
            if isinstance(layer, LoraLayer):
                if name not in self._components:
                    raise ValueError(f"method 'corda' can't start {name}, which is no linear layer: leave it out")
                (adapter,) = layer.active_adapters
                U, S, V = self._components.pop(name)
                factors = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                self._fixed.append(_Fixed(*factors, U, S / layer.scaling[adapter], V))
        trainer.add_callback(_AtTrainBegin(self._fixed))

    def after_update(self, trainer: Any) -> None:
        for half in self._fixed:  # weight decay shrinks what has no gradient, too
            half.put_back()

    def _windows(self, run: Preparation) -> Iterator[list[int]]:
        """The texts, a blank line between them, cut into windows; each begins as the tokenizer begins a text."""
        tokenizer = run.tokenizer
        limit = getattr(run.model.config.get_text_config(), "max_position_embeddings", None) or self.max_length
        first = tokenizer("")["input_ids"][:1]
        begin = first if first == [tokenizer.bos_token_id] else []
        size = min(self.max_length, limit) - len(begin)
        window: list[int] = []
        for text in self._texts(tokenizer):
            window += tokenizer(f"{text}\n\n", add_special_tokens=False, verbose=False)["input_ids"]
            while len(window) >= size:
                yield begin + window[:size]
                window = window[size:]
        if window:
            yield begin + window

    def _texts(self, tokenizer: Any) -> Iterable[str]:
        from lfu.data.learned import whole_text
        from lfu.data.load import load_rows
        from lfu.data.probes import plain_text
        from lfu.data.templates import to_training_rows

        if self.data == BUILT_IN:  # half of them: the demo measures forgetting on the other half
            return [row["text"] for row in plain_text()[::2]]
        return (whole_text(row, tokenizer) for row in to_training_rows(load_rows(self.data), tokenizer=tokenizer))


class _Fixed:
    """The factors A `(2r, in)` and B `(out, 2r)` of a layer; their second halves take no gradient and no step."""

    def __init__(self, A: torch.Tensor, B: torch.Tensor, U: torch.Tensor, S: torch.Tensor, V: torch.Tensor):
        self.A, self.B, self.rank = A, B, len(S)
        A0, B0 = S.sqrt()[:, None] * V.T, U * S.sqrt()
        with torch.no_grad():
            A.copy_(torch.cat([A0, A0]))
            B.copy_(torch.cat([B0, -B0], dim=1))
        self.read()
        A.register_hook(self._first_rows)
        B.register_hook(self._first_columns)

    def read(self) -> None:
        """Takes the fixed halves as they are in the adapter."""
        self.A0 = self.A.detach()[self.rank :].clone()
        self.minus_B0 = self.B.detach()[:, self.rank :].clone()

    @torch.no_grad()
    def put_back(self) -> None:
        self.A[self.rank :] = self.A0
        self.B[:, self.rank :] = self.minus_B0

    def _first_rows(self, gradient: torch.Tensor) -> torch.Tensor:
        return torch.cat([gradient[: self.rank], torch.zeros_like(gradient[self.rank :])])

    def _first_columns(self, gradient: torch.Tensor) -> torch.Tensor:
        return torch.cat([gradient[:, : self.rank], torch.zeros_like(gradient[:, self.rank :])], dim=1)


class _AtTrainBegin(TrainerCallback):
    """A checkpoint or another method may have put other halves there: the SVD of another machine, WiSE's share."""

    def __init__(self, fixed: list[_Fixed]):
        self.fixed = fixed

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        for half in self.fixed:
            half.read()


# -- before PEFT wraps the model ---------------------------------------------------------------------------------------


def _refuse(config: Any, model: Any) -> None:
    if isinstance(model, PeftModel):
        raise ValueError(
            "method 'corda' starts an adapter, and the model is an adapter already: merge it first (lfu export)"
        )
    if config is None:
        raise ValueError(
            "method 'corda' starts an adapter: train one (--use_peft true, or peft_config=LoraConfig(...))"
        )
    if not isinstance(config, LoraConfig):
        raise ValueError(f"method 'corda' starts a LoRA adapter, got {type(config).__name__}")
    if config.init_lora_weights is not True:
        raise ValueError(f"method 'corda' decides how LoRA starts: drop init_lora_weights={config.init_lora_weights!r}")
    for field in ("use_dora", "target_parameters", "lora_bias", "layer_replication"):
        if getattr(config, field):
            raise ValueError(f"method 'corda' can't start an adapter with {field}={getattr(config, field)!r}: drop it")
    if getattr(model, "quantization_method", None) is not None:
        raise ValueError(
            "method 'corda' decomposes the weights, and those of this model are quantised: load it without"
        )


def _resolved(config: LoraConfig, model: Any) -> LoraConfig:
    """A copy whose `target_modules` are names, as PEFT will resolve them when it wraps the model."""
    config = copy.deepcopy(config)
    if config.target_modules is None:
        config.target_modules = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
        if config.target_modules is None:
            raise ValueError(f"no target_modules are known for {model.config.model_type}: name them, or all-linear")
    elif str(config.target_modules).lower() == "all-linear":
        head, linear = model.get_output_embeddings(), (nn.Linear, Conv1D)
        names = (name for name, module in model.named_modules() if isinstance(module, linear) and module is not head)
        config.target_modules = set(names)
    inside = set(anatomy(model).decoder.modules())
    for name, module in target_modules(model, config):
        if module not in inside:
            raise ValueError(
                f"method 'corda' reads the inputs of the decoder's layers, and {name} is none: leave it out"
            )
        if config.r > min(module.weight.shape):
            raise ValueError(
                f"method 'corda' takes r components of a weight, and {name} has no {config.r}: lower the rank"
            )
    return config


@torch.no_grad()
def _smallest_components(
    model: Any, config: LoraConfig, windows: list[list[int]]
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Layer name -> (U, S, V): `(out, r)`, `(r,)`, and `(in, r)` with C^-1 in it; by PEFT. The model stays as it is."""
    parts = anatomy(model)

    def run_model() -> None:
        for window in windows:  # one at a time: PEFT's hook takes no batches
            parts.decoder(input_ids=torch.tensor([window], device=parts.device), use_cache=False)

    config = copy.deepcopy(config)
    config.init_lora_weights = "corda"
    config.corda_config = CordaConfig(corda_method="kpm")
    training = model.training
    try:
        preprocess_corda(model, config, run_model=run_model)
    except ZeroDivisionError:
        raise ValueError(
            "method 'corda': a targeted layer saw none of the texts: name others in target_modules"
        ) from None
    finally:
        model.train(training)
    found = {}
    for name, module in target_modules(model, config):
        found[name] = (module.eigens.U_WC, module.eigens.S_WC, module.eigens.V_WC)
        del module.eigens
    return found


def _of_twice_the_rank(config: LoraConfig) -> LoraConfig:
    """A copy with rank 2r and the same scaling s."""
    config = copy.deepcopy(config)
    more = math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha *= more
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: more * alpha for name, alpha in config.alpha_pattern.items()}
    return config
