"""Does the wheel work in a fresh environment, without the source tree? Builds it, installs it, uses it.

    python scripts/check_wheel.py                   # every Python from 3.11 to 3.13 that is found
    python scripts/check_wheel.py --pythons 3.12

Each Python gets a torch of its own on first use (up to 5 GB where PyPI's torch is a CUDA build; kept in runs/torch),
and a new virtual environment in a temporary folder that borrows that torch alone. pip installs everything else as it
would for a user, the newest versions that pyproject.toml allows: first the wheel without extras, where the core must be
importable, then with them. Then a user's commands are run: help, doctor, lists, training on four rows, export, a study
and a probe with their reports, which need every kind of file that is shipped beside the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from borrowed import ROOT, VERSIONS, ask, clean, environment, pip_install, with_torch

SHORT = "--max_steps 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1"
# What is typed -> a file that it must leave, or words that it must print.
COMMANDS: list[tuple[str, str]] = [
    ("lfu --help", "compare"),
    ("lfu doctor", "What is installed fits together."),
    ("lfu methods", "lfu_reps"),
    ("lfu methods gem", "2408.16673"),
    ("lfu recipes", "llama-3.1-8b"),
    ("lfu compare --list_presets", "table5"),
    (f"lfu train --config lora --model_name_or_path tiny --data word_problems:4 --output_dir tuned {SHORT}", "tuned/"),
    ("lfu export tuned merged", "merged/model.safetensors"),
    ("lfu probe forgetting tiny merged --limit 4 --output_dir forgetting", "forgetting/index.html"),
    ("lfu probe prompts tiny --limit 1 --max_new_tokens 2 --output_dir prompts", "prompts/index.html"),
    (
        f"lfu compare --preset first3 --model tiny --data word_problems:24 --measures gain --match_rows 0 --seeds 1 "
        f"--learning_rate 1e-3 --output_dir study {SHORT}",
        "study/index.html",
    ),
]
CORE = "import sys; from lfu import LfUStep, ForgettingCallback; print({'trl', 'peft', 'datasets'} & {*sys.modules})"


def build(folder: Path) -> Path:
    """The wheel of the working tree, in `folder`."""
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would add its old files to the wheel
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, lender: str, folder: Path) -> Path:
    """A new environment with the wheel and its extras; returns where its commands are.

    Raises:
        RuntimeError: the core needs more than it says, or comes from elsewhere.
        subprocess.CalledProcessError: pip failed, or the core can't be imported.
    """
    python = environment(folder, lender)
    pip_install(python, str(wheel))
    if (loaded := ask(python, CORE)) != "set()":
        raise RuntimeError(f"the core alone imported {loaded}")
    found = ask(python, "import lfu; print(lfu.__file__)")
    if not Path(found).is_relative_to(folder):
        raise RuntimeError(f"lfu was imported from {found}, not from the wheel")
    pip_install(python, f"{wheel}[train,report]")
    return Path(python).parent


def use(commands: Path, here: Path) -> list[str]:
    """Runs everything in `here`; a line for each thing that failed."""
    variables = clean() | {"HF_HUB_OFFLINE": "1", "LFU_CACHE": str(here / "cache")}
    variables["PATH"] = f"{commands}{os.pathsep}{variables['PATH']}"
    failures = []
    for command, wanted in COMMANDS:
        started = time.monotonic()
        done = subprocess.run(command.split(), cwd=here, env=variables, capture_output=True, text=True)
        good = done.returncode == 0 and (wanted in done.stdout or (here / wanted).exists())
        print(f"  {'ok' if good else 'FAILED':6} {time.monotonic() - started:5.0f} s  {command}", flush=True)
        if not good:
            failures.append(f"{command}: exit code {done.returncode}, no {wanted!r}\n{done.stdout}{done.stderr}")
    return failures


def check(wheel: Path, version: str, folder: Path) -> list[str]:
    """The wheel under one Python; a line for each thing that failed."""
    lender = with_torch(version)
    if lender is None:
        print(f"Python {version}: left out, it is neither on the PATH nor among pyenv's")
        return []
    try:
        commands = install(wheel, lender, folder / version)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        return [f"Python {version}: {error} {getattr(error, 'stderr', '') or ''}"]
    shown = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    code = "import sys, importlib.metadata as m; print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    print(f"Python {version}: {ask(commands / 'python', code, *shown)}", flush=True)
    here = folder / f"elsewhere-{version}"
    shutil.copytree(folder / "models", here)
    return [f"Python {version}: {line}" for line in use(commands, here)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=list(VERSIONS), metavar="VERSION")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_folder import save_model

    with tempfile.TemporaryDirectory(prefix="lfu-wheel-") as name:
        folder = Path(name).resolve()
        wheel = build(folder)
        print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB", flush=True)
        save_model(folder / "models" / "tiny")
        failures = [line for version in given.pythons for line in check(wheel, version, folder)]
    print("\n".join(failures) or "the wheel works without the source tree")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
