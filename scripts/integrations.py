"""Trains a tiny model with the tools that this package plugs into, by the files in examples/, on a CPU.

    python scripts/integrations.py                       # all tools; some 10 GB of disk
    python scripts/integrations.py --tools llama-factory

Each tool has an environment of its own, made on first use and kept. It borrows torch from the Python that runs this,
or from one of the version that the tool asks for, which gets a torch of its own (up to 5 GB); a tool whose Python isn't
found is left out, and named. They can't share one: axolotl, LLaMA-Factory and Unsloth ask for other versions of
transformers, TRL, peft, accelerate and datasets. Without a GPU Unsloth trains with a part of its own, not with what it
has for GPUs. Exit code 1 if a tool fails.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from borrowed import ROOT, ask, clean, environment, install_this, packages, pip_install, with_torch

MODEL = "Qwen/Qwen3-0.6B"  # in the examples; the tiny one takes its place


@dataclass(frozen=True)
class Tool:
    """A tool: what to install, what to run, and figures that the run must log."""

    package: str
    command: tuple[str, ...]
    output: str
    logged: tuple[str, ...] = ("forgetting/prose_rise",)
    python: str = ""  # the version that it needs, where the one that runs this may not do


def without_cuda_builds(folder: Path) -> None:
    """PyPI's torchvision and torchaudio are built for CUDA; a CPU build of torch can't load their compiled parts.

    LLaMA-Factory imports torchaudio at once, which does without its compiled part where that isn't there.
    """
    shutil.rmtree(folder / "torchvision", ignore_errors=True)
    for name in ("torchvision", "torchvision.libs"):
        for path in folder.glob(f"{name}-*.dist-info"):
            shutil.rmtree(path)
    for path in (folder / "torchaudio" / "lib").glob("*.so"):
        path.unlink()


AXOLOTL = ("-m", "axolotl.cli.train", "axolotl.yaml"), "runs/axolotl"
LFU = ("forgetting/prose_rise", "lfu/consistency", "lfu/gradient_ratio")
TOOLS = {
    "axolotl-0.21": Tool("axolotl==0.21.0", *AXOLOTL, LFU, python="3.12"),
    "axolotl-0.19": Tool("axolotl==0.19.0", *AXOLOTL, LFU),  # the last for Python 3.11
    "llama-factory": Tool("llamafactory==0.9.5", ("llama_factory.py",), "runs/llama-factory"),
    "unsloth": Tool("unsloth==2026.10.9", ("unsloth_callback.py",), "runs/unsloth"),
}


def run(tool: Tool, lender: str, folder: Path) -> str:
    """Installs the tool and this package, and runs the example; returns what is wrong, or an empty text."""
    python = environment(folder / "venv", lender)
    torch = folder / "torch.txt"
    torch.write_text("torch==" + ask(python, "import importlib.metadata as m; print(m.version('torch'))"))
    pip_install(python, "-c", str(torch), tool.package, "matplotlib")  # which the page asks for
    without_cuda_builds(packages(python))
    before = freeze(python)
    install_this(python)
    if (changed := freeze(python) ^ before) and any(not line.lower().startswith("lfu") for line in changed):
        return f"installing lfu-tuning changed {', '.join(sorted(changed))}"
    here = folder / "examples"
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(ROOT / "examples", here, ignore=shutil.ignore_patterns("runs"))
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_folder import save_model

    save_model(here / "tiny")
    for path in (*here.glob("*.py"), *here.glob("*.yaml")):
        # a random model spends its budget at once, or never: the run is to reach its end
        path.write_text(
            path.read_text()
            .replace(MODEL, str(here / "tiny"))
            .replace("stop: true", "stop: false")
            .replace("stop=True", "stop=False")
        )
    variables = clean() | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    with (folder / "run.log").open("w") as log:
        done = subprocess.run(
            [python, *tool.command], cwd=here, env=variables, stdout=log, stderr=subprocess.STDOUT, timeout=1800
        )
    if done.returncode:
        return f"{' '.join(tool.command)}: exit code {done.returncode}, see {folder / 'run.log'}"
    return missing_in(here / tool.output, tool.logged)


def missing_in(output: Path, wanted: tuple[str, ...]) -> str:
    """What of the figures the trainer's own history does not hold."""
    states = sorted(output.rglob("trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        return f"no trainer_state.json in {output}"
    logged = set().union(*json.loads(states[-1].read_text())["log_history"])
    page = output / "forgetting" / "index.html"
    lacks = [name for name in wanted if name not in logged] + ([] if page.exists() else [str(page)])
    return f"missing: {', '.join(lacks)}; logged: {', '.join(sorted(logged))}" if lacks else ""


def freeze(python: str) -> set[str]:
    """Every distribution with its version."""
    code = "import importlib.metadata as m; print(*{f'{d.name}=={d.version}' for d in m.distributions()}, sep='\\n')"
    return set(ask(python, code).split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS), metavar="TOOL")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "integrations", help="where they are kept")
    given = parser.parse_args()
    failed = False
    for name in given.tools:
        started, folder, tool = time.monotonic(), given.folder.resolve() / name, TOOLS[name]
        folder.mkdir(parents=True, exist_ok=True)
        lender = with_torch(tool.python) if tool.python else sys.executable
        if lender is None:
            print(f"{name}: left out, it needs Python {tool.python}, which is neither on the PATH nor among pyenv's")
            continue
        try:
            wrong = run(tool, lender, folder)
        except subprocess.CalledProcessError as error:
            wrong = f"not installed: {error}"
        failed = failed or bool(wrong)
        print(f"{name} ({tool.package}): {wrong or 'ok'}, {time.monotonic() - started:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
