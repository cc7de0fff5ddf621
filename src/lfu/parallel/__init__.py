"""The step in several processes: DDP, FSDP2, DeepSpeed ZeRO."""
