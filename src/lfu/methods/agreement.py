"""Whether a rewritten answer still agrees with the reference answer: SDFT's rule (Yang et al. 2024, Eq. 4)."""

import re

from lfu.evaluation.score import final_number

# What a rewrite says that is about the exercise and answers nothing; the list is that of the authors' code.
ABOUT_THE_EXERCISE = ("reference answer", "your response", "my response", "your own response", "now it's your turn")
SHORT_WORDS, SHORT_LETTERS = 5, 60  # a reference within both counts as a short answer
OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}

_FINAL_LINE = re.compile(r"####[ \t]*(\S.*)\Z")
_FINAL_NUMBER = re.compile(r"####\s*\$?\s*-?\d")
_CHOICE = re.compile(r"\(?([A-Z])(?:[.):](?:\s.*)?)?\Z")  # the whole of a one-line reference: "B", "(B)", "B. text"
_FIRST_CHOICE = re.compile(r"\W*([A-Z])(?:[.):](?!\S)|\s*\Z)")
_SAID_CHOICE = re.compile(r"\b(?:answer|choice|option)\b(?: is|:)*[\s*(]*([A-Z])(?=[.):,*]|\s*$)", re.IGNORECASE | re.M)


def agreed(rewrite: str, reference: str, ended: bool = True) -> tuple[str | None, str]:
    """`(answer to train on in place of the reference, "")`, or `(None, why the reference stays)`.

    A rewrite that is empty, was cut off (not `ended`), or talks about the exercise is never used. What else is asked
    depends on what the reference shows, the first of these:

    - its last line is `#### n`: the rewrite's final number (`final_number`, behind `####` or else its last one) must be
      n. The answer then ends in the reference's last line. A last line `#### text` counts as a short answer.
    - it is one line `B. text`, `(B)` or `B`: the rewrite must name the same letter, at its start, or else where it last
      calls one the answer.
    - it is short (up to 5 words and 60 characters): it must occur in the rewrite as a word or words, case aside, and
      the opposite of yes, no, true and false must not.
    - anything longer has no final answer to compare: the rewrite is taken.
    """
    rewrite, reference = rewrite.strip(), reference.strip()
    if not ended:
        return None, "cut off at max_new_tokens"
    if not rewrite:
        return None, "empty"
    if any(words in rewrite.lower() and words not in reference.lower() for words in ABOUT_THE_EXERCISE):
        return None, "about the exercise"
    if last := _FINAL_LINE.search(reference):
        number = final_number(last[0])
        same = final_number(rewrite, anywhere=True) == number if number is not None else _says(rewrite, last[1])
        answer = _ending_in(rewrite, last[0])
    elif letter := _CHOICE.match(reference):
        same, answer = _choice_of(rewrite) == letter[1], rewrite
    elif len(reference.split()) <= SHORT_WORDS and len(reference) <= SHORT_LETTERS:
        same, answer = _says(rewrite, reference), rewrite
    else:
        same, answer = True, rewrite
    return (answer, "") if same else (None, "another final answer")


def _ending_in(rewrite: str, line: str) -> str:
    """`rewrite` with `line` as its last line."""
    if rewrite.endswith(line):
        return rewrite
    own = _FINAL_NUMBER.search(rewrite)
    head = rewrite[: own.start()].rstrip() if own else rewrite
    return f"{head}\n{line}" if head else line


def _choice_of(rewrite: str) -> str | None:
    if first := _FIRST_CHOICE.match(rewrite):
        return first[1]
    said = _SAID_CHOICE.findall(rewrite)
    return said[-1] if said and said[-1].isupper() else None


def _says(rewrite: str, short: str) -> bool:
    """Whether the short answer occurs in the rewrite, and for yes, no, true, false, the opposite does not."""
    plain = " ".join(rewrite.lower().split())
    wanted = " ".join(short.lower().split()).strip(".,;:!?\"'()[] ") or short.lower()
    opposite = OPPOSITE.get(wanted)
    return _occurs(wanted, plain) and not (opposite and _occurs(opposite, plain))


def _occurs(words: str, text: str) -> bool:
    # as whole words, and 5 is not in 5.5 or 1,5
    return re.search(rf"(?<!\w)(?<!\d[.,]){re.escape(words)}(?!\w)(?![.,]\d)", text) is not None
