"""The command `lfu`: one file per verb, imported when the verb is used, so that `lfu --help` need not wait for torch.

What the user can put right is a `UserError`, wherever it is found in this room: before anything is written, if that is
possible. A `KeyboardInterrupt` has the way to go on as its message.
"""

import contextlib
import importlib
import os
import sys
import time
import warnings

from lfu.support.errors import UserError, did_you_mean, leading, one_line
from lfu.support.extras import explained, need
from lfu.support.words import tell

# verb -> what it does, and the extras that it needs; the file of that name has its `run(argv) -> int`
VERBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train": ("fine-tune a model on your rows, and see what it forgets", ("train",)),
    "chat": ("talk to a model, with the untouched one beside it", ("train",)),
    "compare": ("find the best method for your model and rows", ("train", "report")),
    "doctor": ("show versions, GPU, memory, and what each command still needs", ()),
    "evaluate": ("score models on many tasks, and show what they forgot", ("eval", "report")),
    "export": ("merge an adapter into its base model", ("train",)),
    "methods": ("list the fine-tuning methods with source and cost, or show one", ()),
    "probe": ("measure one thing: forgetting, drift, prompts, noise, attacks", ("report",)),
    "recipes": ("list the shipped recipes (files of flags), or print one", ()),
    "sweep": ("find the best strength of a method", ("train", "report")),
}
USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
# With several processes the first one reports a mistake, and the launcher then ends the others. Another one that meets
# an error waits this many seconds before it reports it.
FIRST_SPEAKS = 5.0


def main(argv: list[str] | None = None) -> int:
    """Runs one verb of `argv`, by default the process's own arguments.

    Returns the exit code: 0; 2 for a user's mistake or a full machine (one line on stderr); 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if leading():
        return _main(argv)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first process shows them
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
        asks_for_help = bool({"-h", "--help"} & {*argv})
        if not asks_for_help:
            need(f"lfu {verb}", *VERBS[verb][1])
        with warnings.catch_warnings():
            # Deprecated names that TRL and PEFT themselves use: nothing the user could act on.
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
            file = "train_help" if asks_for_help and verb == "train" else verb  # train's flags take seconds
            return importlib.import_module(f"lfu.cli.{file}").run(argv[1:])
    except UserError as error:
        return _tell(f"lfu{f' {verb}' if verb in VERBS else ''}: error: {one_line(error)}")
    except ModuleNotFoundError as error:
        if not (line := explained(f"lfu {verb}", error)):
            raise
        return _tell(f"lfu {verb}: error: {line}")
    except BrokenPipeError:  # `lfu recipes | head`: whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (OSError, MemoryError) as error:
        return _tell(f"lfu {verb}: error: {_of_the_machine(error)}")
    except KeyboardInterrupt as stop:
        if leading():
            tell(f"lfu {verb}: interrupted. {stop}".rstrip())
        return INTERRUPTED
    except SystemExit as stop:  # argparse, after --help
        return stop.code if isinstance(stop.code, int) else 0


def _of_the_machine(error: OSError | MemoryError) -> str:
    """One line for a full disk, a missing permission, or too little memory."""
    if isinstance(error, MemoryError):
        return f"out of memory. {one_line(error) if str(error) else ''}".rstrip()
    where = f"{error.filename}: " if error.filename else ""
    what = error.strerror or one_line(error)
    return f"{where}{what}: mend that and run the same command again; what was finished is kept"


def _tell(line: str) -> int:
    if not leading():
        time.sleep(FIRST_SPEAKS)
        line = f"[process {os.environ.get('RANK')}] {line}"
    tell(line)
    return USER_ERROR


def _help() -> str:
    verbs = "\n".join(f"  {verb:<10}{what}" for verb, (what, _) in VERBS.items())
    return f"""usage: lfu VERB ...

Fine-tune a language model on little data without making it dumber.

{verbs}

To begin with:

  lfu train --model smollm2 --data my_rows.jsonl --output_dir runs/mine
  lfu chat runs/mine --beside
  lfu compare --model smollm2 --data my_rows.jsonl --methods sft,l2sp

lfu VERB --help shows the flags of a verb; lfu --version prints the version."""
