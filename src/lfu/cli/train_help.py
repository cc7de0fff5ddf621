"""The help of `lfu train`, kept as text: its flags are dataclasses of TRL's, and importing them takes seconds."""

import hashlib
import os
import shutil
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import lfu
from lfu.model.embedded import cache_folder
from lfu.support.files import write_text

SOURCES = ("trl", "transformers", "torch", "accelerate", "peft")  # whose versions change the flags or their defaults


def run(argv: list[str]) -> int:
    """Prints the help that was kept for these versions, this source and this width, or makes it. Returns 0."""
    sources = sorted((str(path), path.stat().st_mtime_ns) for path in Path(lfu.__file__).parent.rglob("*.py"))
    around = shutil.get_terminal_size().columns, os.environ.get("CUDA_VISIBLE_DEVICES")
    key = hashlib.sha256(repr((sources, [version(name) for name in SOURCES], around)).encode()).hexdigest()[:16]
    kept = cache_folder() / f"train-help-{key}.txt"
    try:
        text = kept.read_text(encoding="utf-8")
    except OSError:
        from lfu.cli.arguments import make_parser
        from lfu.cli.forgetting import ForgettingArguments

        text = make_parser(ForgettingArguments).format_help()
        with suppress(OSError):  # no place to keep it: made anew each time
            for old in kept.parent.glob("train-help-*.txt"):
                old.unlink(missing_ok=True)
            write_text(kept, text)
    sys.stdout.write(text)
    return 0
