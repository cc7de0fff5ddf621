"""Does the wheel work where there is no source tree? Builds it, installs it elsewhere, uses it.

    python scripts/check_wheel.py

The wheel goes into a fresh virtual environment in a temporary folder, which borrows the libraries of the Python that
runs this (torch need not be fetched again), but not its lfu. There a user's commands are run: help, lists, training,
export, a study and a probe with their reports, which need every kind of file that is shipped beside the code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from borrowed import ROOT, clean, environment, pip_install

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


def build(folder: Path) -> Path:
    """The wheel of the working tree, in `folder`."""
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would add its old files to the wheel
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """A new environment with the wheel, and this Python's other libraries; returns where its commands are."""
    python = environment(folder)
    pip_install(python, "--no-deps", str(wheel))
    return Path(python).parent


def use(commands: Path, here: Path) -> list[str]:
    """Runs everything in `here`; a line for each thing that failed."""
    variables = clean() | {"HF_HUB_OFFLINE": "1", "LFU_CACHE": str(here / "cache")}
    variables["PATH"] = f"{commands}{os.pathsep}{variables['PATH']}"
    where = [str(commands / "python"), "-c", "import lfu; print(lfu.__file__)"]
    found = subprocess.run(where, cwd=here, env=variables, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(found).is_relative_to(commands.parent):
        return [f"lfu was imported from {found}, not from the wheel"]
    failures = []
    for command, wanted in COMMANDS:
        started = time.monotonic()
        done = subprocess.run(command.split(), cwd=here, env=variables, capture_output=True, text=True)
        good = done.returncode == 0 and (wanted in done.stdout or (here / wanted).exists())
        print(f"{'ok' if good else 'FAILED':6} {time.monotonic() - started:5.0f} s  {command}", flush=True)
        if not good:
            failures.append(f"{command}: exit code {done.returncode}, no {wanted!r}\n{done.stdout}{done.stderr}")
    return failures


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="lfu-wheel-") as name:
        folder = Path(name).resolve()
        wheel = build(folder)
        print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB", flush=True)
        commands = install(wheel, folder / "venv")
        here = folder / "elsewhere"
        here.mkdir()
        sys.path.insert(0, str(ROOT / "tests"))
        from tiny_folder import save_model

        save_model(here / "tiny")
        failures = use(commands, here)
    print("\n".join(failures) or "the wheel works without the source tree")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
