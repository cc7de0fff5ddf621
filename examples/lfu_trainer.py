"""LfUTrainer in place of SFTTrainer: any method of the package, by name (`lfu methods` lists them)."""

from datasets import load_dataset
from peft import LoraConfig

from lfu import ForgettingCallback, LfUConfig, LfUTrainer

MODEL = "Qwen/Qwen3-0.6B"
METHOD = "l2sp"  # pulls the weights back to where they were; "lfu" is Learning from the Undesirable, "sft" plain
rows = load_dataset("json", data_files="shop.jsonl", split="train")

trainer = LfUTrainer(
    model=MODEL,
    args=LfUConfig("runs/l2sp", method=METHOD, num_train_epochs=4, learning_rate=2e-4, logging_steps=5),
    train_dataset=rows,
    peft_config=LoraConfig(r=16, target_modules="all-linear"),
    callbacks=[ForgettingCallback()],
)
trainer.train()
trainer.save_model()
