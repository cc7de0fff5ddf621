"""The command `lfu`: one file a verb, imported when the verb is used, so that `lfu --help` need not wait for torch."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
import warnings

from lfu.support.errors import UserError, did_you_mean, leading, one_line
from lfu.support.extras import COMMANDS, explained, need

# verb -> what it does; the code is `run(argv) -> int` in the file of that name
VERBS = {
    "train": "fine-tune a model with LfU or another method: lfu train --config smollm2",
    "chat": "talk to a model, with the untouched one beside it: lfu chat RUN --beside",
    "compare": "find the best method for your model and data: lfu compare --model M --data D --methods sft,gem,lfu",
    "doctor": "show what is installed, what each command still needs, GPU and memory: lfu doctor",
    "evaluate": "score models on many tasks, and show what they forgot: lfu evaluate runs/mine --data_dir DIR",
    "export": "merge an adapter into its base model: lfu export ADAPTER_DIR OUT_DIR",
    "methods": "list the fine-tuning methods with source and cost, or show one: lfu methods gem",
    "probe": "measure forgetting, drift, prompt wording, noise and more: lfu probe forgetting BASE TUNED",
    "recipes": "list the shipped recipes, or print one: lfu recipes gsm8k",
    "sweep": "find the best strength: lfu sweep --model M --data D --method lfu --param alpha=0.01,0.1",
}
USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
# Of several processes the first tells of a mistake, and the launcher then ends the others. One that alone has met an
# error waits so many seconds before it tells.
FIRST_SPEAKS = 5.0


def main(argv: list[str] | None = None) -> int:
    """Runs one verb.

    Args:
        argv: the arguments after `lfu`; by default the process's own.

    Returns:
        The exit code: 0; 2 for a mistake of the user's or a machine that is full (one line on stderr); 130 after
        Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if leading():
        return _main(argv)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first process has them all
        return _main(argv)


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        from lfu import __version__

        print(f"lfu {__version__}")
        return 0
    verb = argv[0]
    try:
        if verb not in VERBS:
            raise UserError(f"unknown verb {verb!r}: use one of {', '.join(VERBS)}.{did_you_mean(verb, VERBS)}")
        if "--help" not in argv:
            need(f"lfu {verb}", *COMMANDS.get(verb, ()))
        with warnings.catch_warnings():
            # Deprecated names that TRL and PEFT themselves use: nothing the user could act on.
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
            return importlib.import_module(f"lfu.cli.{verb}").run(argv[1:])
    except UserError as error:
        _tell(f"lfu{f' {verb}' if verb in VERBS else ''}: error: {one_line(error)}")
        return USER_ERROR
    except ModuleNotFoundError as error:
        if not (line := explained(f"lfu {verb}", error)):
            raise
        _tell(f"lfu {verb}: error: {line}")
        return USER_ERROR
    except BrokenPipeError:  # `lfu recipes | head`: whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (OSError, MemoryError) as error:
        print(f"lfu {verb}: error: {_of_the_machine(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as stop:
        if leading():
            print(f"lfu {verb}: interrupted. {stop}".rstrip(), file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:  # argparse, after --help
        return stop.code if isinstance(stop.code, int) else 0


def _of_the_machine(error: OSError | MemoryError) -> str:
    """No room, no permission, no memory: what a full disk or another limit of the machine does not let us do."""
    if isinstance(error, MemoryError):
        return f"out of memory. {one_line(error) if str(error) else ''}".rstrip()
    where = f"{error.filename}: " if error.filename else ""
    what = error.strerror or one_line(error)
    return f"{where}{what}: mend that and run the same command again; what was finished is kept"


def _tell(line: str) -> None:
    if not leading():
        time.sleep(FIRST_SPEAKS)
        line = f"[process {os.environ.get('RANK')}] {line}"
    print(line, file=sys.stderr)


def _help() -> str:
    verbs = "\n".join(f"  {verb:<10}{what}" for verb, what in VERBS.items())
    return f"""usage: lfu VERB ...

Learning from the Undesirable: fine-tune a language model without making it forget.

{verbs}

  lfu VERB --help shows more; lfu --version prints the version."""
