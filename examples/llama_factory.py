"""See what a run of LLaMA-Factory forgets: its own settings, and the callback beside them."""

from llamafactory.train.tuner import run_exp

from lfu import ForgettingCallback

SETTINGS = {  # as in a YAML file for `llamafactory-cli train`
    "model_name_or_path": "Qwen/Qwen3-0.6B",
    "template": "default",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "dataset_dir": "llama_factory_data",  # its dataset_info.json names the columns of shop.jsonl
    "dataset": "shop",
    "output_dir": "runs/llama-factory",
    "num_train_epochs": 4,
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "logging_steps": 5,
    "report_to": "none",
}

if __name__ == "__main__":
    run_exp(SETTINGS, callbacks=[ForgettingCallback(budget=0.02, stop=True)])
