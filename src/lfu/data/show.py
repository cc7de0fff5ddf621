"""What reaches the model, as a reader sees it: the text of a row with its special tokens, the learned part marked."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

COLOUR, PLAIN = ("\033[1;32m", "\033[0m"), ("[[", "]]")


def shown(trainer: Any, count: int, *, colour: bool) -> Iterator[str]:
    """The first `count` training rows as collated, a heading above each; what is learned in `colour`, or in [[ ]]."""
    rows = trainer.train_dataset
    for number in range(min(count, len(rows))):
        batch = trainer.data_collator([rows[number]])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        learned = [label != -100 for label in labels]
        yield f"--- row {number + 1}: {len(ids)} tokens, {sum(learned)} of them learned ---"
        yield marked(trainer.processing_class, ids, learned, COLOUR if colour else PLAIN)


def marked(tokenizer: Any, ids: list[int], learned: list[bool], marks: tuple[str, str]) -> str:
    """The tokens as text, with the marks round each run of those that are learned."""
    text, done, end = "", "", 0
    for is_learned, run in groupby(learned):
        end += len(list(run))
        upto = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)  # a run alone may lose its first space
        piece = upto[len(done) :] if upto.startswith(done) else tokenizer.decode(ids[end - 1 : end])
        text += f"{marks[0]}{piece}{marks[1]}" if is_learned else piece
        done = upto
    return text


def rule(row: Mapping[str, Any], args: Any) -> str:
    """In one line, where the loss is."""
    if "messages" in row:
        if args.assistant_only_loss is False:
            return "the loss is on every turn of the conversations, with their markers (assistant_only_loss is false)"
        return "the loss is on the answers: every assistant turn (--assistant_only_loss false: every turn)"
    if "completion" in row:
        if args.completion_only_loss is False:
            return "the loss is on prompts and answers (completion_only_loss is false)"
        return "the loss is on the answers only"
    return "the loss is on all of each text"
