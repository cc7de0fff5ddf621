"""Runs the core tests at both ends of the dependency ranges that pyproject.toml promises.

    python scripts/ranges.py                           # both ends, one after the other; some 15 GB of disk
    python scripts/ranges.py --ends lowest --torch 2.13.0

`lowest`: every dependency, and all that the extra `test` asks for, at its lower bound; what they depend on as new as
they allow. `newest`: the newest that pip finds within the bounds. One Python: the one that runs this, though
requires-python has no upper end. Each end has a virtual environment of its own, made on first use and kept, the package
is installed without an editable link, and the tests import that copy. Exit code 1 if an end fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import venv
import xml.etree.ElementTree as xml
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = (
    "tests/step/test_step.py",
    "tests/test_trainer.py",
    "tests/model/test_families.py",
    "tests/methods",
    "tests/cli/test_train.py",
    "tests/parallel/test_trainers.py",
)
EXTRA = "test"  # installed beside the package


@dataclass
class End:
    """One end of the ranges: what was installed, and what became of the tests."""

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    trouble: str = ""

    @property
    def good(self) -> bool:
        return not self.trouble and self.failed == 0 and self.passed > 0


def lower_bounds(pyproject: Path) -> dict[str, str]:
    """Dependency -> the version after `>=`, in the order of the file, those of `EXTRA` last.

    Raises:
        SystemExit: a dependency without a lower bound promises versions that nobody has tried.
    """
    bounds = {}
    project = tomllib.loads(pyproject.read_text())["project"]
    for requirement in project["dependencies"] + project["optional-dependencies"][EXTRA]:
        name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
        bound = re.search(r">=\s*([0-9][0-9.]*)", requirement)
        if not bound:
            raise SystemExit(f"pyproject.toml: {requirement!r} has no lower bound: write {name}>=VERSION")
        bounds[name] = bound[1]
    return bounds


def python_of(folder: Path) -> str:
    return str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def install(end: str, folder: Path, pins: dict[str, str]) -> None:
    """A virtual environment with the package, its tests' needs, and `pins` held.

    Raises:
        subprocess.CalledProcessError: pip found no such set of versions; it says why.
    """
    if not Path(python_of(folder)).exists():
        venv.create(folder, with_pip=True)
    held = folder / "pins.txt"
    held.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would add its old files to the wheel
    newer = ["--upgrade", "--upgrade-strategy", "eager"] if end == "newest" else []
    pip = [python_of(folder), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *newer, "-c", str(held), f"{ROOT}[{EXTRA}]"], check=True)
    # pip takes the same version for the same code: a kept environment would test yesterday's
    subprocess.run([*pip, "--force-reinstall", "--no-deps", str(ROOT)], check=True)


def versions_in(folder: Path, names: list[str]) -> dict[str, str]:
    code = "import sys, importlib.metadata as m; print(*(m.version(n) for n in sys.argv[1:]))"
    told = subprocess.run([python_of(folder), "-c", code, *names], check=True, capture_output=True, text=True)
    return dict(zip(names, told.stdout.split(), strict=True))


def run_tests(end: End, folder: Path, tests: list[str]) -> None:
    """pytest in `folder`'s environment, one process; fills in the counts."""
    report = folder / "junit.xml"
    report.unlink(missing_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [python_of(folder), "-m", "pytest", "-o", "pythonpath=tests", f"--junitxml={report}", *tests]
    with (folder / "pytest.log").open("w") as log:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if not report.exists():
        end.trouble = f"pytest stopped with {code}, see {folder / 'pytest.log'}"
        return
    suite = next(xml.parse(report).getroot().iter("testsuite"))
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    end.failed, end.skipped = count["failures"] + count["errors"], count["skipped"]
    end.passed = count["tests"] - end.failed - end.skipped
    end.seconds = float(suite.get("time", 0))
    if end.failed:
        end.trouble = f"see {folder / 'pytest.log'}"


def table(ends: list[End], bounds: dict[str, str]) -> str:
    """Markdown: a row a dependency, a column an end, the tests below."""
    rows = [["", "promised", *(end.name for end in ends)]]
    rows += [[name, f">={low}", *(end.versions.get(name, "-") for end in ends)] for name, low in bounds.items()]
    rows += [["passed, failed, skipped", "", *(f"{e.passed}, {e.failed}, {e.skipped}" for e in ends)]]
    rows += [["seconds", "", *(f"{e.seconds:.0f}" for e in ends)]]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ends", nargs="+", choices=["lowest", "newest"], default=["lowest", "newest"])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "ranges", help="where the environments are kept")
    parser.add_argument("--torch", help="this torch at every end, such as a CPU build: '2.13.0+cpu'")
    parser.add_argument("--tests", nargs="+", default=list(CORE), help="default: the core of the suite")
    given = parser.parse_args()
    bounds = lower_bounds(ROOT / "pyproject.toml")
    os.environ.pop("PYTHONPATH", None)  # pip and the tests must see the installed copy, not somebody's source tree
    ends = []
    for name in given.ends:
        end, folder = End(name), given.folder.resolve() / name
        pins = (bounds if name == "lowest" else {}) | ({"torch": given.torch} if given.torch else {})
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        try:
            install(name, folder, pins)
            end.versions = versions_in(folder, list(bounds))
            print(f"{name}: installed in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            run_tests(end, folder, given.tests)
        except subprocess.CalledProcessError as error:
            end.trouble = f"could not be installed (pip's exit code {error.returncode})"
        ends.append(end)
    print(f"Python {sys.version.split()[0]}\n\n{table(ends, bounds)}")
    for end in ends:
        if end.trouble:
            print(f"\n{end.name}: {end.trouble}")
    return 0 if all(end.good for end in ends) else 1


if __name__ == "__main__":
    sys.exit(main())
