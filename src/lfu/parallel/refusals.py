"""Ways to run several processes that LfU can't work under; each message names what works."""

from typing import Any


def refuse_data_parallel(args: Any, who: str) -> None:
    """Raises ValueError for one process on several GPUs; under a launcher each has one."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{who} can't run under nn.DataParallel, which one process on {args.n_gpu} GPUs means: start it by "
            "accelerate launch, or on one GPU by CUDA_VISIBLE_DEVICES=0"
        )


def refuse_launch(trainer: Any) -> None:
    """Raises ValueError for ways to run several processes that LfU and SAM can't work under.

    DataParallel, FSDP 1, tensor, context or sequence parallelism, a model sharded while it was loaded.
    """
    method, works = trainer.args.method, "use DDP, or FSDP with fsdp_version 2"
    refuse_data_parallel(trainer.args, f"method {method!r}")
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(f"method {method!r} can't run round the flat parameters of FSDP 1: set fsdp_version: 2")
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ValueError(f"method {method!r} needs accelerate to shard the model, not a distributed_config: {works}")
    if (
        trainer.accelerator.num_processes > 1
        and max(trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()) > 1
    ):
        raise ValueError(f"method {method!r} splits batches over processes, not layers or sequences: {works}")


def refuse_in_several(own: bool, reads_logits: bool, stale: int, by: str = "") -> None:
    """Raises ValueError for a step that several processes can't take; `by`: who cuts up weights and gradients, if any.

    The one backward of the first-order form (`stale`) would have to be agreed on.
    """
    if stale:
        raise ValueError(
            f"stale={stale} runs in one process: under DDP, FSDP and DeepSpeed use every, part or random_layers"
        )
    if by and own:
        raise ValueError(
            f"auxiliary='own' moves whole weights by whole gradients, and {by} cuts them up: use auxiliary='lora' or "
            "'steering', or DDP"
        )
    if by and reads_logits:
        raise ValueError(
            f"consistency='logit_kl' runs the head by itself, whose weight {by} cuts up: use 'mse', 'cosine' or "
            "'contrastive', or DDP"
        )


def refuse_zero(trainer: Any, own: bool, reads_logits: bool, stale: int, fused_experts: bool) -> None:
    """Raises ValueError for what LfU can't do under DeepSpeed, before DeepSpeed has the model.

    That is fp16, whose loss scale DeepSpeed keeps to itself, and what reads whole weights.
    """
    if trainer.accelerator.mixed_precision == "fp16":
        raise ValueError("DeepSpeed's fp16 scales the loss out of LfU's sight: use bf16, or DDP or FSDP")
    sharded = trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    refuse_in_several(own, sharded and reads_logits, stale, "DeepSpeed")
    if sharded and fused_experts:
        raise ValueError("ZeRO-3 cuts up fused experts, which auxiliary='lora' reads whole: use auxiliary='steering'")
