"""Where things are in a causal language model: the decoder, its blocks, their linear layers, the head."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

try:
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
except ImportError:  # an extra: theta may be anything
    BaseTuner = BaseTunerLayer = ModulesToSaveWrapper = ()

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class FusedExperts:
    """Experts held as one parameter, `(experts, out, in)`; `(experts, in, out)` where their module says transposed."""

    module: nn.Module
    name: str

    def is_one(self, weight: torch.Tensor) -> bool:
        """Whether this parameter is such a tensor, in a dtype that can be computed in."""
        count, shape = getattr(self.module, "num_experts", None), whole_shape(weight)
        computes = weight.is_floating_point() and weight.dtype.itemsize > 1
        return len(shape) == 3 and shape[0] == count and computes

    @property
    def weight(self) -> torch.Tensor:
        return self.module.get_parameter(self.name)

    @property
    def transposed(self) -> bool:
        return bool(getattr(self.module, "is_transposed", False))

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(experts, in_features, out_features)`."""
        count, first, second = self.weight.shape
        return (count, first, second) if self.transposed else (count, second, first)


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal language model that LfU touches. `K = len(blocks)`."""

    model: Any  # the causal language model itself, PEFT's wrapper taken off (adapters stay in place inside)
    decoder: Any  # without the head; its `last_hidden_state` is hidden_states[K], after the final norm
    blocks: list[nn.Module]  # the K transformer blocks, in order
    wrapper: Any = None  # PEFT's, where its forward steers the adapter (aLoRA, Poly), so that no call may go past it

    def forward(self, **inputs: Any) -> Any:
        """One forward of the decoder, without the head; of the whole model where it has a `wrapper`."""
        if self.wrapper is None:
            return self.decoder(**inputs)
        return type(self.wrapper).forward(self.wrapper, **inputs)  # DDP may have put another forward on the instance

    def linears(self) -> Iterable[tuple[str, nn.Module]]:
        """`(name, module)` of every linear layer of every block, each once, a PEFT-wrapped one as its wrapper."""
        found: dict[int, tuple[str, nn.Module]] = {}
        for number, block in enumerate(self.blocks, start=1):
            for name, module in _linears_below(block):
                found.setdefault(id(module), (f"{number}.{name}", module))
        return found.values()

    def experts(self) -> Iterable[tuple[str, FusedExperts]]:
        """`(name, experts)` of every fused expert tensor of every block, each once."""
        found: dict[int, tuple[str, FusedExperts]] = {}
        for number, block in enumerate(self.blocks, start=1):
            for path, weight in block.named_parameters():
                owner, _, name = path.rpartition(".")
                fused = FusedExperts(block.get_submodule(owner), name)
                if not is_idle(owner) and fused.is_one(weight):
                    found.setdefault(id(weight), (f"{number}.{path}".replace("base_layer.", ""), fused))
        return found.values()

    def theta(self) -> list[nn.Parameter]:
        """The parameters being fine-tuned: all that require a gradient, each once."""
        found = {id(p): p for m in self._owners for p in m._parameters.values() if p is not None and p.requires_grad}
        return list(found.values())

    @cached_property
    def _owners(self) -> list[nn.Module]:
        """The modules that hold parameters: a walk through all and their names would show in small models."""
        return [module for module in self.model.modules() if module._parameters]

    @cached_property
    def multiplies_in(self) -> set[torch.dtype]:
        """The dtypes in which quantised layers multiply, whatever comes in; some know them after a forward only."""
        found = (getattr(base_of(linear), "compute_dtype", None) for _, linear in self.linears())
        return {dtype for dtype in found if isinstance(dtype, torch.dtype)}

    def refuse_compiled(self, model: nn.Module) -> None:
        """Raises ValueError where torch.compile has a module, of `model`, that holds a place of a hook."""
        places = {id(module) for module in (*self.blocks, *(linear for _, linear in self.linears()))}
        for name, module in model.named_modules():
            compiled = module._compiled_call_impl is not None or "_orig_mod" in module._modules
            if compiled and any(id(inner) in places for inner in module.modules()):
                raise ValueError(
                    f"{f'the module {name!r}' if name else 'the model'} is compiled: LfU attaches and removes hooks "
                    "inside it in every step, which would compile it anew each time; give the model as it was before "
                    "torch.compile"
                )

    @property
    def final(self) -> nn.Module:
        """The module whose output is the last hidden state after the final norm, and which every forward runs.

        The decoder, or the text model inside it: OPT's head goes round the outer one, a vision model's has it inside.
        """
        text = self.model.get_decoder() if hasattr(self.model, "get_decoder") else None
        return self.decoder if text is None or text is self.model else text

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def devices(self) -> set[torch.device]:
        """All that the model lies on: a block is on one."""
        return {next(part.parameters()).device for part in (self.model, *self.blocks)}

    def logits(self, hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """The head applied to hidden states after the final norm: `(N, d) -> (N, V)`; `head` stands in for it.

        Follows the families that scale or cap their logits (Cohere, Granite, Gemma 2, Falcon-H1, HyperCLOVA X).
        """
        config = self.model.config.get_text_config()
        logits = (head or self.model.get_output_embeddings())(hidden)
        for name in ("logit_scale", "lm_head_multiplier"):
            if getattr(config, name, None) is not None:
                logits = logits * getattr(config, name)
        if getattr(config, "logits_scaling", None) is not None:
            multiplies = config.model_type == "hyperclovax"
            logits = logits * config.logits_scaling if multiplies else logits / config.logits_scaling
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)


def anatomy(model: nn.Module, blocks: str | None = None) -> Anatomy:
    """The parts of a transformers causal language model, or of a `PeftModel` around one, found by structure.

    `blocks` is the dotted path, inside the decoder, of the `nn.ModuleList`, `Sequential` or `ModuleDict` of blocks, for
    an architecture that is laid out in an unusual way. Default: the `nn.ModuleList` of `config.num_hidden_layers`
    modules that holds the most weights.

    Raises ValueError: an encoder-decoder, a model without `config`, one whose blocks cannot be found, or that runs one
    block as several layers.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config = getattr(base, "config", None)
    if config is None or not hasattr(base, "base_model"):
        raise ValueError(f"{type(base).__name__} is not a transformers model: LfU needs its `config` and `base_model`")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(base).__name__} is an encoder-decoder: LfU compares layers of a decoder-only model")
    decoder = base.base_model
    if decoder is base or base.get_output_embeddings() is None:
        raise ValueError(f"{type(base).__name__} has no language-model head: load it with AutoModelForCausalLM")
    found = _named_blocks(decoder, blocks) if blocks is not None else _find_blocks(base, decoder)
    if len({id(block) for block in found}) < len(found):
        raise ValueError(
            f"{type(decoder).__name__} runs one block as several layers: LfU tells layers apart by their modules, and "
            "can't compare this model's"
        )
    return Anatomy(base, decoder, found, model if _steers_its_adapter(model) else None)


def _steers_its_adapter(model: Any) -> bool:
    """Whether the forward of PEFT's wrapper tells the adapter what to do, as aLoRA's and Poly's does."""
    tuner = getattr(model, "base_model", None)
    if not (isinstance(tuner, BaseTuner) and hasattr(model, "active_peft_config")):
        return False
    config = model.active_peft_config
    if config.peft_type == "XLORA":
        raise ValueError("X-LoRA runs every layer twice in one forward, and LfU reads a layer once: use LoRA or DoRA")
    return bool(getattr(config, "alora_invocation_tokens", None)) or type(tuner).forward is not BaseTuner.forward


def is_idle(path: str) -> bool:
    """Whether a module or parameter of this name only rests: what PEFT's `modules_to_save` keeps of the original."""
    return "original_module" in path.split(".")


def _named_blocks(decoder: Any, path: str) -> list[nn.Module]:
    try:
        found = decoder.get_submodule(path)
    except AttributeError:
        lists = [n for n, m in decoder.named_modules() if isinstance(m, _CONTAINERS) and ".lora_" not in n]
        raise ValueError(
            f"blocks={path!r}: {type(decoder).__name__} has no such module; its lists of modules are "
            f"{', '.join(lists[:8]) or 'none'}"
        ) from None
    if not isinstance(found, _CONTAINERS):
        raise ValueError(f"blocks={path!r} is a {type(found).__name__}, not an nn.ModuleList (Sequential, ModuleDict)")
    if not len(found):
        raise ValueError(f"blocks={path!r} is empty")
    return list(found.children())


def _find_blocks(base: Any, decoder: Any) -> list[nn.Module]:
    """The list of `num_hidden_layers` modules that holds the most weights: not a list of norms or of embeddings."""
    config = base.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    text = getattr(base, "get_decoder", lambda: None)() or decoder  # not the vision tower of a VLM
    lists = [module for module in text.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        raise ValueError(
            f"no list of {count or 'num_hidden_layers'} blocks found in {type(decoder).__name__}: name it with the "
            "argument `blocks`, for example blocks='layers'"
        )
    largest: nn.ModuleList = max(lists, key=lambda found: sum(whole_shape(p).numel() for p in found.parameters()))
    return list(largest)


def _linears_below(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if is_linear(child):
            yield path, child
        elif isinstance(child, BaseTunerLayer):  # an adapter on something else, such as fused experts
            yield from _linears_below(child.get_base_layer(), f"{path}.")
        elif isinstance(child, ModulesToSaveWrapper):  # the copy that is trained, not the original beside it
            copy = child.modules_to_save[child.active_adapters[0]]
            yield from [(path, copy)] if is_linear(copy) else _linears_below(copy, f"{path}.")
        else:
            yield from _linears_below(child, f"{path}.")


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and its quantised subclasses, GPT-2's Conv1D, or PEFT's wrapper around one of them."""
    if isinstance(module, BaseTunerLayer):
        return is_linear(module.get_base_layer())
    return isinstance(module, (nn.Linear, Conv1D))


def base_of(module: nn.Module) -> Any:
    """The layer inside PEFT's wrapper, or the layer itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """`(in_features, out_features)` of a layer that `is_linear`."""
    base = base_of(module)
    return (base.nx, base.nf) if isinstance(base, Conv1D) else (base.in_features, base.out_features)


def whole_shape(weight: torch.Tensor) -> torch.Size:
    """The shape of a weight, also of one that ZeRO-3 has cut up (FSDP2's tell theirs themselves)."""
    return getattr(weight, "ds_shape", weight.shape)


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a layer that `is_linear` (of a quantised one: its packed storage)."""
    return base_of(module).weight


def layer_range(layers: str, depth: int) -> list[int]:
    """The compared layers, numbered 1..K as the paper does (hidden_states[l] of transformers), K being the `depth`.

    `layers` is `all`, `early`, `middle`, `late` (thirds; 1-11, 12-22, 23-32 of 32), a range `"5-12"`, or one `"7"`.
    Raises ValueError: anything else, or a range outside 1..K.
    """
    first, second = math.ceil(depth / 3), math.ceil(2 * depth / 3)
    named = {"all": (1, depth), "early": (1, first), "middle": (first + 1, second), "late": (second + 1, depth)}
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(layers).strip())
    if not (layers in named or match):
        raise ValueError(f"layers={layers!r}: use all, early, middle, late, or a range such as '5-12'")
    low, high = (int(match[1]), int(match[2] or match[1])) if match else named[layers]
    if low > high and match:
        raise ValueError(f"layers={layers!r} runs backwards: give the lower layer first")
    if low > high:
        raise ValueError(f"layers={layers!r}: a model of {depth} layers has no {layers} third")
    if not 1 <= low <= high <= depth:
        raise ValueError(f"layers={layers!r} is outside this model: it has layers 1-{depth}")
    return list(range(low, high + 1))
