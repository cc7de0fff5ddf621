"""What an older TRL lacks, supplied here, so that the rest of the code is written for the newest."""

import copy
import importlib
import json
from functools import partial, wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class AnyDevice:
    """TRL 1.15's kernel for the loss, which is Triton's alone, with a plain form where there is no GPU.

    Without it `SFTTrainer` of TRL 1.15 can't take a step on a CPU.
    """

    kernel: Any = None

    @classmethod
    def apply(cls, hidden: torch.Tensor, *rest: Any) -> tuple[torch.Tensor | None, ...]:
        """The kernel's own results; on a CPU in one piece, by autograd."""
        plain = cls.kernel is None or hidden.device.type == "cpu"
        return _log_probs(hidden, *rest) if plain else cls.kernel.apply(hidden, *rest)


def _log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, temperature: float,
    chunk_size: int, softcap: float | None = None, logit_scale: float = 1.0, outputs: tuple[str, ...] = OUTPUTS,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """Log-probability of each of the n targets, and those of `OUTPUTS` that are asked for, `(n,)`, float32 or wider.

    `hidden` is (n, d), `weight` (vocabulary, d); `chunk_size` is the kernel's and not used.
    """
    logits = nn.functional.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    log_p = logits.log_softmax(-1)
    found = {
        "entropy": lambda: -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": lambda: (2 * log_p).logsumexp(-1),
        "mean_logits": lambda: logits.mean(-1),
        "is_top1": lambda: logits.argmax(-1) == targets,
    }
    return log_p.gather(-1, targets[:, None]).squeeze(-1), *(found[n]() if n in outputs else None for n in OUTPUTS)


def _begin(manager: Any) -> Any:
    """Entering TRL's activation offloading drops what a pass without a backward left, as newer TRL does itself."""
    for stash in ("tracker", "fwd_stash", "bwd_tensor_stash", "bwd_ev_stash"):
        getattr(manager, stash, {}).clear()
    manager.is_first_forward_call = True
    return torch.autograd.graph.saved_tensors_hooks.__enter__(manager)


def _ids(tokenizer: Any, *args: Any, tools: Any = None, **options: Any) -> Any:
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return tokenizer.apply_chat_template(*args, tools=tools, **{"return_dict": False} | options)


def _has_labels(dataset: Any) -> bool:
    return "labels" in (getattr(dataset, "column_names", None) or ())


def _with_ids(prepare: Any) -> Any:
    """`SFTTrainer._prepare_dataset` of TRL 0.24, with a tokenizer that writes a conversation as a list of ids.

    Transformers 5 gives a dictionary unless it is told otherwise. TRL 0.24 takes its length, 2, for the prompt's, and
    would have most of the prompt learned. Labels that rows bring are kept when rows are packed, and rows whose whole
    answer was cut off are left out, as newer TRL does.
    """

    @wraps(prepare)
    def prepared(self: Any, dataset: Any, processing_class: Any, args: Any, packing: bool, *more: Any) -> Any:
        if not getattr(self, "_is_vlm", False):
            writer = copy.copy(processing_class)
            writer.apply_chat_template = partial(_ids, processing_class)
            processing_class = writer
        given, labelled = copy.copy(args), _has_labels(dataset) and not (packing and args.max_length is None)
        if labelled:
            given.use_liger_kernel, given.max_length = False, None if packing else args.max_length
        made = prepare(self, dataset, processing_class, given, packing and not labelled, *more)
        if _has_labels(made):
            made = made.filter(lambda row: any(label != -100 for label in row["labels"]))
        if labelled and packing:
            pack = importlib.import_module("trl.data_utils").pack_dataset
            made = pack(made.select_columns(["input_ids", "labels"]), args.max_length, args.packing_strategy)
        return made

    return prepared


def mend_trl() -> None:
    """Lets TRL 1.15 train without a GPU, and older ones forget a dropped graph and tell a prompt from its answer.

    The newest is left alone.
    """
    utils: Any = importlib.import_module("trl.trainer.utils")
    # before 1.15 there is no such kernel, after it the kernel has a plain form
    kernel = getattr(utils, "_ChunkedLogProbFunction", AnyDevice)
    if kernel is not AnyDevice and not hasattr(utils, "_use_triton"):
        AnyDevice.kernel, utils._ChunkedLogProbFunction = kernel, AnyDevice
    offloading = importlib.import_module("trl.models.activation_offloading").OffloadActivations
    if "__enter__" not in vars(offloading):
        offloading.__enter__ = _begin
    if find_spec("trl.chat_template_utils") is None:  # TRL 0.24
        trainer: Any = importlib.import_module("trl").SFTTrainer
        if not hasattr(trainer._prepare_dataset, "__wrapped__"):
            trainer._prepare_dataset = _with_ids(trainer._prepare_dataset)
