"""A judge of the user's own: a function that says whether a response breaks an alignment."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from lfu.support.errors import UserError, one_line


def load_judge(spec: str) -> Any:
    """The function that MODULE:FUNCTION names, wrapped so that its failures are told in one line.

    Raises:
        UserError: no such module or function.
    """
    module, _, name = spec.partition(":")
    if not module or not name:
        raise UserError(f"--judge {spec!r}: write it as MODULE:FUNCTION, as in my_judge:breaks_the_rule")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` has it: a file beside one's data is where a judge is written
    try:
        judge = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's own code raises while it is imported
        raise UserError(f"--judge {spec}: can't be imported ({type(error).__name__}: {one_line(error)})") from error
    if not callable(judge):
        raise UserError(f"--judge {spec}: {name} is not a function")

    def checked(prompt: str, response: str) -> bool:
        try:
            verdict = judge(prompt, response)
        except Exception as error:
            raise UserError(
                f"--judge {spec} failed on a response: {type(error).__name__}: {one_line(error)}"
            ) from error
        if type(verdict).__name__ not in ("bool", "bool_"):  # a text that says "no" would count as yes
            raise UserError(f"--judge {spec} must return True or False, got {verdict!r}")
        return bool(verdict)

    return checked
