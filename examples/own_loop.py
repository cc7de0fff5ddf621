"""LfUStep in a training loop of your own: torch and transformers, nothing else."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lfu import LfUStep

MODEL = "Qwen/Qwen3-0.6B"
EPOCHS, BATCH, RATE = 4, 4, 1e-5

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
rows = [json.loads(line) for line in Path("shop.jsonl").read_text().splitlines()]


def collate(rows):
    """Pads on the right, and masks the prompt: only the answer is learned."""
    batch = {"input_ids": [], "labels": []}
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        batch["input_ids"].append(torch.tensor(prompt + answer))
        batch["labels"].append(torch.tensor([-100] * len(prompt) + answer))
    ids = torch.nn.utils.rnn.pad_sequence(batch["input_ids"], batch_first=True, padding_value=tokenizer.eos_token_id)
    labels = torch.nn.utils.rnn.pad_sequence(batch["labels"], batch_first=True, padding_value=-100)
    lengths = torch.tensor([len(row) for row in batch["input_ids"]])
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
    }


optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
step = LfUStep(model, lam="auto")
loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=True, collate_fn=collate)
model.train()
for epoch in range(EPOCHS):
    for batch in loader:
        record = step(batch)  # forward, backward, ascent, perturbed forward, backward: the gradient is in .grad
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(
        f"epoch {epoch + 1}: loss {record.sft_loss:.3f}, consistency {record.consistency:.4f}, lambda {record.lam:.3g}"
    )
model.save_pretrained("runs/own-loop")
tokenizer.save_pretrained("runs/own-loop")
