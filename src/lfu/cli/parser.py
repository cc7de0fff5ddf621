"""An argument parser whose errors are one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lfu.support.errors import UserError, one_line


class LineParser(argparse.ArgumentParser):
    """argparse, but a mistake is a `UserError` instead of usage lines and an exit. Flags can't be abbreviated."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{one_line(message)} (see: {self.prog} --help)")
