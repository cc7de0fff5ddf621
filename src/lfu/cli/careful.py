"""What `lfu train` chooses where the user gives only a model and a file: what a careful person would.

Studies take length and learning rate from it. Everything chosen is a flag, and is named before training: the user
changes one by giving it.
"""

from collections.abc import Collection, Mapping

from lfu.cli.arguments import DataArguments
from lfu.support.words import counted

# Flags that say what is trained on and what is shown, but not how it is trained: beside these alone, we choose.
NEUTRAL = frozenset(
    {"model_name_or_path", "model_revision", "trust_remote_code", "attn_implementation", "dtype", "use_cpu"}
    | {"data", "data_config", "data_split", "data_limit", "template", "system", "max_length", "seed"}
    | {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "report_to", "logging_steps"}
    | {"eval_data", "eval_split", "eval_limit", "eval_share"}
    | {f"forgetting{name}" for name in ("", "_budget", "_stop", "_keep_best", "_every", "_share", "_files")}
    | {"careful", "dry_run", "verbose", "show_rows", "disable_tqdm", "dataloader_pin_memory"}
)
LENGTH_OR_RATE = frozenset({"num_train_epochs", "max_steps", "learning_rate"})
FEWEST = 20  # rows; with fewer, none is held out, as each is needed to learn from
HELD_OUT, MOST_HELD_OUT = 0.1, 200  # a share of the rows, and the most of them
BATCH, MICRO = 8, 4  # rows per update, and per forward pass
UPDATES, EPOCHS = 60, (3, 15)  # updates to aim at, within so many epochs
# An adapter's learning rate for few rows. SmolLM2-135M learns most of 16 rows at 3e-4, where Gemma 3 270M forgets; at
# the paper's 1e-4 SmolLM2 learns too little in 60 updates (docs/results-models.md).
FEW, RATE = 128, "2e-4"
SHORT = "0.2"  # of a short run's time is for measuring; a twentieth would leave one or two checkpoints to choose from


def wanted(data: DataArguments) -> bool:
    """Whether to choose: the user asks for it, or has given no flag that says how to train."""
    return data.given <= NEUTRAL if data.careful is None else data.careful


def choices(rows: int, given: Collection[str] = (), *, held_out: bool | None = None) -> list[str]:
    """The flags for so many rows, to put in front of the user's, without the `given` ones.

    They hold rows out, measure the loss after each epoch and forgetting as often as a twentieth of the time allows (a
    fifth, with few rows), keep the best checkpoint within the budget, and take some 60 updates of 8 rows by plain
    fine-tuning, which is what docs/results-models.md found best.

    `held_out`: whether the user's own flags hold rows out; None if they don't say.
    """
    flags = {"method": "sft"}
    if "forgetting" not in given:
        flags["forgetting_budget"] = "0.02"
        flags |= {"forgetting_share": SHORT} if rows <= FEW else {}
    if held_out is None and rows >= FEWEST:
        flags["eval_share"] = f"{min(HELD_OUT, MOST_HELD_OUT / rows):.3g}"
    if (held_out or "eval_share" in flags) and not {"eval_strategy", "save_strategy"} & set(given):
        flags |= dict.fromkeys(("eval_strategy", "save_strategy"), "epoch")
        flags |= {"save_total_limit": "1", "load_best_model_at_end": "true"}
        flags |= {"forgetting_keep_best": "true"} if "forgetting_budget" in flags else {}
    return length_and_rate(rows, given) + _words(flags, given)


def length_and_rate(rows: int, given: Collection[str] = ()) -> list[str]:
    """How long to train on so many rows, and how fast: the part of `choices` that `lfu compare` takes."""
    flags = lengths(rows)
    if rows <= FEW and "use_peft" not in given:
        flags["learning_rate"] = RATE
    if "max_steps" in given:
        del flags["num_train_epochs"]
    return _words(flags, given)


def _words(flags: Mapping[str, str], given: Collection[str]) -> list[str]:
    return [word for name, value in flags.items() if name not in given for word in (f"--{name}", value)]


def told(rows: int, chosen: list[str]) -> str:
    """What was chosen; a line is not broken between a flag and its value."""
    flags = [f"{flag}\xa0{value}" for flag, value in zip(chosen[::2], chosen[1::2])]
    how = "your own flags win; --careful\xa0false turns this off"
    return f"chosen for {counted(rows, 'row')} ({how}): {' '.join(flags)}"


def untold(data: DataArguments) -> str | None:
    """Why nothing was chosen, for a user who gave a flag that says how to train, and did not give --careful."""
    said = sorted(data.typed - NEUTRAL)
    if data.careful is not None or not said or data.given - data.typed:
        return None
    return (
        f"note: --{said[0]} says how to train, so nothing is chosen for you: every other setting has its default "
        "(--careful\xa0true chooses the rest, --careful\xa0false drops this note)"
    )


def lengths(rows: int) -> dict[str, str]:
    """How long to train on so many rows: enough updates to learn from few, no more epochs than many rows need."""
    epochs = min(max(round(UPDATES * BATCH / rows), EPOCHS[0]), EPOCHS[1])
    return {
        "num_train_epochs": str(epochs),
        "per_device_train_batch_size": str(MICRO),
        "gradient_accumulation_steps": str(BATCH // MICRO),
    }
