"""What a model is examined on: what it learned, what it kept, how steady it is. Every score per item.

The parts are measured one by one, each kept as soon as it is done.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from lfu.data.columns import as_dataset
from lfu.data.duplicates import row_text
from lfu.data.templates import to_training_rows
from lfu.evaluation import prompts
from lfu.evaluation.noise import noise_similarity
from lfu.evaluation.pieces import Asked, Render, answer_pieces, longest_input
from lfu.evaluation.score import answer_nll, exact_match, final_number, multiple_choice, perplexity
from lfu.study.options import Options
from lfu.study.rows import BESIDE, Kept, Split, pair_of, questions

Progress = Callable[[int], None]  # called with the number of items just scored


@dataclass(frozen=True)
class Exam:
    """The same for every model of a study."""

    validation: Sequence[Mapping[str, Any]]  # in one of TRL's shapes, as `test`
    test: Sequence[Mapping[str, Any]]
    asked: Sequence[Mapping[str, Any]] | None  # test rows to be put into other words, where they can be
    kept: Sequence[Kept]  # what should not become worse
    measures: Sequence[str]  # those wanted of `lfu.study.options.MEASURES`
    matched: bool  # answers end in '#### n': what a model writes can be judged
    match_rows: int  # how many test rows are answered in the model's own words
    robust_rows: int  # how many are reworded and disturbed
    max_new_tokens: int
    template: str  # what is put round a question, as in training; `system` too
    system: str | None
    batch_size: int
    left_out: Mapping[str, str] = field(default_factory=dict)  # measures that the rows don't allow -> why


def make_exam(
    split: Split, shaped: Mapping[str, Any], kept: Sequence[Kept], tokenizer: Any, options: Options, **more: Any
) -> Exam:
    """An exam on the rows of a `Split`; what they don't allow to measure is left out, with the reason.

    `shaped`: the same in TRL's shapes; `more`: further fields of `Exam`. Raises ValueError: a chat template in which
    answers can't be told apart.
    """
    validation, test = list(shaped["validation"]), list(shaped["test"])
    left_out: dict[str, str] = {}
    matched, asked = False, None
    if "text" in test[0]:
        left_out = dict.fromkeys(("prompts", "noise"), "the rows are plain texts")
    else:
        answers = [pair_of(tokenizer, row)[1] for row in [*test, *validation]]
        matched = all(final_number(answer) is not None for answer in answers[: len(test)])
        asked = questions(split.test)
        if asked is None:
            left_out["prompts"] = "the rows have no question that could be put into other words"
    return Exam(
        validation, test, asked, kept, [name for name in options.measures if name not in left_out], matched,
        options.match_rows, options.robust_rows, options.max_new_tokens, **more,
        left_out={name: why for name, why in left_out.items() if name in options.measures},
    )  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One measurement: how many items it has, and what does it, of model, tokenizer and `progress`."""

    items: int
    measure: Callable[..., Any]


def parts_of(exam: Exam) -> dict[str, Part]:
    """Name -> what measures it, in a fixed order. `distance` is not among them: it needs the untouched weights."""
    how: dict[str, Any] = {"render": pair_of, "batch_size": exam.batch_size}
    robust = min(exam.robust_rows, len(exam.test))
    parts = {"validation": Part(len(exam.validation), partial(_loss, exam, exam.validation))}
    if "gain" in exam.measures:
        parts["gain"] = Part(len(exam.test), partial(_loss, exam, exam.test))
        if exam.matched and exam.match_rows:
            solved = exam.test[: exam.match_rows]
            match = partial(exact_match, rows=solved, max_new_tokens=exam.max_new_tokens, **how)
            parts["match"] = Part(len(solved), match)
    if "forgetting" in exam.measures:
        parts["kept"] = Part(sum(len(each.rows) for each in exam.kept), partial(_kept, exam))
    if "prompts" in exam.measures and robust:
        asked = list(exam.asked or ())[:robust]
        templates = prompts.shipped_templates(prompts.task_of(asked))
        parts["prompts"] = Part(robust * len(templates), partial(_prompts, exam, asked, templates))
    if "noise" in exam.measures and robust:
        parts["noise"] = Part(robust, partial(_noise, exam.test[:robust], how))
    return parts


def _loss(exam: Exam, rows: Sequence[Any], model: Any, tokenizer: Any, progress: Progress) -> dict[str, Any]:
    """NLL of the answers, or of whole texts."""
    if isinstance(rows[0], str) or "text" in rows[0]:
        end = tokenizer.eos_token or ""  # training puts it behind a row
        texts = [row if isinstance(row, str) else row["text"].removesuffix(end) + end for row in rows]
        return asdict(perplexity(model, tokenizer, texts, batch_size=exam.batch_size, progress=progress))
    return asdict(answer_nll(model, tokenizer, rows, render=pair_of, batch_size=exam.batch_size, progress=progress))


def _kept(exam: Exam, model: Any, tokenizer: Any, progress: Progress) -> dict[str, Any]:
    """Set -> its kind and its scores."""
    found: dict[str, Any] = {}
    for each in exam.kept:
        if each.kind == "choice":
            scores = multiple_choice(model, tokenizer, each.rows, batch_size=exam.batch_size, progress=progress)
            found[each.name] = {"kind": each.kind, "correct": scores.correct}
        else:
            found[each.name] = {"kind": each.kind, **_loss(exam, each.rows, model, tokenizer, progress)}
    return found


def _noise(rows: Sequence[Any], how: Mapping[str, Any], model: Any, tokenizer: Any, progress: Progress) -> Any:
    """Of the rows that the model can read, and not only begin."""
    longest, pieces = longest_input(model, most=2**20), answer_pieces(tokenizer, rows, render=pair_of)
    fit = [row for row, piece in zip(rows, pieces) if len(piece.ids) <= longest]
    return noise_similarity(model, tokenizer, fit or rows, progress=progress, **how)


def _prompts(
    exam: Exam, rows: Sequence[Mapping[str, Any]], templates: Mapping[str, str], model: Any, tokenizer: Any,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Template -> scores, as `lfu probe prompts` has them."""
    worded = [dict(row) | {"question": prompts.fill(t, row)} for t in templates.values() for row in rows]
    scores = prompts.prompt_scores(
        model, tokenizer, rows, templates, batch_size=exam.batch_size, max_new_tokens=exam.max_new_tokens,
        wrap=_wrap(worded, tokenizer, exam), progress=progress,
    )  # fmt: skip
    return {name: {"nll": s.nll, "tokens": s.tokens, "correct": s.correct} for name, s in scores.items()}


def _wrap(worded: Sequence[Mapping[str, Any]], tokenizer: Any, exam: Exam) -> Render:
    """(tokenizer, question and answer) -> (prompt, answer), as a training row of one of the questions would be."""
    question = lambda row: {name: row[name] for name in ("question", *BESIDE) if name in row}
    plain = as_dataset([question(row) | {"answer": "a"} for row in worded])
    made = to_training_rows(plain, template=exam.template, tokenizer=tokenizer, system=exam.system)
    known = {row_text(question(row)): one for row, one in zip(worded, made)}

    def wrap(tokenizer: Any, row: Mapping[str, Any]) -> tuple[str, str] | Asked:
        found, answer = known[row_text(question(row))], row["answer"]
        turn = [{"role": "assistant", "content": answer}]
        return pair_of(tokenizer, found | {"completion": turn if isinstance(found["prompt"], list) else answer})

    return wrap
