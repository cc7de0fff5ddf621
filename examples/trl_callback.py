"""See what a run of TRL's SFTTrainer forgets, while it runs, and stop when it is too much."""

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from lfu import ForgettingCallback

MODEL = "Qwen/Qwen3-0.6B"
rows = load_dataset("json", data_files="shop.jsonl", split="train")

trainer = SFTTrainer(
    model=MODEL,
    args=SFTConfig(
        "runs/trl",
        num_train_epochs=4,
        learning_rate=2e-4,
        per_device_train_batch_size=4,
        logging_steps=5,
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=rows,
    peft_config=LoraConfig(r=16, target_modules="all-linear"),
    # at most 2 % of what the model knew, and 0.02 nats per token on plain prose
    callbacks=[ForgettingCallback(budget=0.02, stop=True)],
)
trainer.train()
trainer.save_model()
