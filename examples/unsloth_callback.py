"""See what a run of Unsloth forgets, while it runs."""

from unsloth import FastLanguageModel  # isort: skip  (first: it patches transformers and TRL)

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from lfu import ForgettingCallback

MODEL = "Qwen/Qwen3-0.6B"

if __name__ == "__main__":
    model, tokenizer = FastLanguageModel.from_pretrained(MODEL, max_seq_length=512, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(
            "runs/unsloth", num_train_epochs=4, learning_rate=2e-4, per_device_train_batch_size=4, logging_steps=5
        ),
        train_dataset=load_dataset("json", data_files="shop.jsonl", split="train"),
        callbacks=[ForgettingCallback(budget=0.02, stop=True)],
    )
    trainer.train()
    trainer.save_model()
