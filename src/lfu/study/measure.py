"""What a model is examined on: what it learned, what it kept, how steady it is. Every score per item.

The parts are measured one by one, each kept as soon as it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lfu.study.rows import Kept, pair_of

Progress = Callable[[int], None]  # called with the number of items just scored

MEASURES = ("gain", "forgetting", "prompts", "noise", "distance")


@dataclass(frozen=True)
class Exam:
    """The same for every model of a study.

    Attributes:
        validation, test: rows in one of TRL's shapes.
        asked: test rows as questions, to be put into other words; None where they can't be.
        kept: what should not become worse.
        measures: which of `MEASURES` are wanted.
        matched: whether the answers end in '#### n', so that what a model writes can be judged.
        template, system: what is put round a question, as in training.
        match_rows, robust_rows: how many test rows are answered in the model's own words; reworded and disturbed.
    """

    validation: Sequence[Mapping[str, Any]]
    test: Sequence[Mapping[str, Any]]
    asked: Sequence[Mapping[str, Any]] | None
    kept: Sequence[Kept]
    measures: Sequence[str]
    matched: bool
    template: str = "auto"
    system: str | None = None
    match_rows: int = 100
    robust_rows: int = 32
    max_new_tokens: int = 256
    batch_size: int = 8
    left_out: Mapping[str, str] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """All of it, for the key of a run."""
        return asdict(self)


def make_exam(
    split: Any, shaped: Mapping[str, Any], kept: Sequence[Kept], measures: Sequence[str], tokenizer: Any, **options: Any
) -> Exam:
    """An exam on the rows of a `Split`; what they don't allow to measure is left out, with the reason.

    Args:
        shaped: `validation` and `test` in one of TRL's shapes.
        options: further fields of `Exam`.

    Raises:
        ValueError: a chat template that answers can't be told apart in.
    """
    from lfu.evaluation.score import final_number
    from lfu.study.rows import questions

    validation, test = list(shaped["validation"]), list(shaped["test"])
    left_out: dict[str, str] = {}
    text = "text" in test[0]
    asked = None
    matched = False
    if text:
        left_out |= {"prompts": "the rows are plain texts", "noise": "the rows are plain texts"}
    else:
        pairs = [pair_of(tokenizer, row) for row in [*test, *validation]]
        matched = all(final_number(answer) is not None for _, answer in pairs[: len(test)])
        asked = questions(split.test, tokenizer)
        if asked is None:
            left_out["prompts"] = "the rows have no question that could be put into other words"
    wanted = [name for name in measures if name not in left_out]
    said = {name: why for name, why in left_out.items() if name in measures}
    return Exam(validation, test, asked, kept, wanted, matched, left_out=said, **options)


# --- the parts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One measurement: how many items it has, and what does it, JSON-ready."""

    items: int
    measure: Callable[[Any, Any, Progress], Any]  # of (model, tokenizer, progress)


def parts_of(exam: Exam) -> dict[str, Part]:
    """Name -> what measures it, in a fixed order. `distance` is not among them: it needs the untouched weights."""
    test, robust = len(exam.test), min(exam.robust_rows, len(exam.test))
    parts = {"validation": Part(len(exam.validation), lambda m, t, p: _loss(m, t, exam.validation, exam, p))}
    if "gain" in exam.measures:
        parts["gain"] = Part(test, lambda m, t, p: _loss(m, t, exam.test, exam, p))
        if exam.matched and exam.match_rows:
            parts["match"] = Part(min(exam.match_rows, test), lambda m, t, p: _match(m, t, exam, p))
    if "forgetting" in exam.measures:
        items = sum(len(each.rows) for each in exam.kept)
        parts["kept"] = Part(items, lambda m, t, p: {each.name: _kept(m, t, each, exam, p) for each in exam.kept})
    if "prompts" in exam.measures and robust:
        from lfu.evaluation import prompts

        assert exam.asked is not None
        templates = prompts.shipped_templates(prompts.task_of(exam.asked[:robust]))
        parts["prompts"] = Part(robust * len(templates), lambda m, t, p: _prompts(m, t, exam, templates, p))
    if "noise" in exam.measures and robust:
        parts["noise"] = Part(robust, lambda m, t, p: _noise(m, t, exam, p))
    return parts


def _loss(
    model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], exam: Exam, progress: Progress
) -> dict[str, Any]:
    from lfu.evaluation.score import answer_nll, perplexity

    options: dict[str, Any] = {"batch_size": exam.batch_size, "progress": progress}
    if "text" in rows[0]:
        return asdict(perplexity(model, tokenizer, [row["text"] for row in rows], **options))
    return asdict(answer_nll(model, tokenizer, rows, render=pair_of, **options))


def _match(model: Any, tokenizer: Any, exam: Exam, progress: Progress) -> dict[str, Any]:
    from lfu.evaluation.score import exact_match

    return asdict(exact_match(
        model, tokenizer, exam.test[: exam.match_rows], max_new_tokens=exam.max_new_tokens,
        batch_size=exam.batch_size, render=pair_of, progress=progress,
    ))  # fmt: skip


def _kept(model: Any, tokenizer: Any, each: Kept, exam: Exam, progress: Progress) -> dict[str, Any]:
    from lfu.evaluation.score import answer_nll, multiple_choice, perplexity

    options: dict[str, Any] = {"batch_size": exam.batch_size, "progress": progress}
    if each.kind == "choice":
        scores = multiple_choice(model, tokenizer, each.rows, **options)
        return {"kind": "choice", "correct": scores.correct}
    if each.kind == "text":
        return {"kind": "text", **asdict(perplexity(model, tokenizer, each.rows, **options))}
    return {"kind": "answer", **asdict(answer_nll(model, tokenizer, each.rows, render=pair_of, **options))}


def _prompts(
    model: Any, tokenizer: Any, exam: Exam, templates: Mapping[str, str], progress: Progress
) -> dict[str, Any]:
    """Template -> scores, as `lfu probe prompts` has them."""
    from lfu.evaluation import prompts

    assert exam.asked is not None
    rows = exam.asked[: exam.robust_rows]
    worded = [prompts.fill(template, row) for template in templates.values() for row in rows]
    scores = prompts.prompt_scores(
        model, tokenizer, rows, templates, batch_size=exam.batch_size, max_new_tokens=exam.max_new_tokens,
        wrap=_wrap(worded, tokenizer, exam), progress=progress,
    )  # fmt: skip
    return {name: {"nll": s.nll, "tokens": s.tokens, "correct": s.correct} for name, s in scores.items()}


def _wrap(questions: Sequence[str], tokenizer: Any, exam: Exam) -> Callable[[Any, Mapping[str, Any]], tuple[str, str]]:
    """(tokenizer, question and answer) -> (prompt, answer), as a training row of one of the questions would be."""
    from datasets import Dataset

    from lfu.data.templates import to_training_rows

    plain = Dataset.from_list([{"question": question, "answer": "a"} for question in questions])
    made = to_training_rows(plain, template=exam.template, tokenizer=tokenizer, system=exam.system)
    known = {question: row["prompt"] for question, row in zip(questions, made)}

    def wrap(tokenizer: Any, row: Mapping[str, Any]) -> tuple[str, str]:
        prompt, answer = known[row["question"]], row["answer"]
        turn = [{"role": "assistant", "content": answer}]
        return pair_of(tokenizer, {"prompt": prompt, "completion": turn if isinstance(prompt, list) else answer})

    return wrap


def _noise(model: Any, tokenizer: Any, exam: Exam, progress: Progress) -> dict[str, Any]:
    from lfu.evaluation.noise import noise_similarity

    rows = exam.test[: exam.robust_rows]
    scores = noise_similarity(model, tokenizer, rows, batch_size=exam.batch_size, render=pair_of, progress=progress)
    return {"layers": scores.layers, "cosine": scores.cosine, "tokens": scores.tokens}
