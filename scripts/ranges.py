"""Runs the core tests on the versions that the tools people train with ask for.

    python scripts/ranges.py                                     # all sets, one after the other
    python scripts/ranges.py --sets llama-factory-0.9.5 --tests tests/test_trainer.py

A set is an environment of its own (some 170 MB, made on first use and kept) that borrows torch, pytest and whatever
else need not differ from the Python that runs this. pip installs the set's versions, with what they need; then it
installs this package, which must change none of them; then the tests run on that installed copy. A table of all sets
comes last. Exit code 1 if a set fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from dataclasses import dataclass, field
from pathlib import Path

from borrowed import ROOT, ask, clean, environment, install_this, pip_install

# What hangs most on the versions comes first: each method by the command line, rows as TRL writes them, the trainer.
CORE = (
    "tests/cli/test_methods.py",
    "tests/data",
    "tests/cli/test_train.py",
    "tests/test_trainer.py",
    "tests/forgetting",
    "tests/integrations",
    "tests/methods",
    "tests/support/test_versions.py",
    "tests/step/test_step.py",
    "tests/step/test_trim.py",
)
# What takes long and hangs on no version: numbers that settle, most of the resumed runs, a third kind of adapter.
LEFT_OUT = (
    "not (settles or healthy or advice_is_given or auto_lam_holds or training_with_it_learns or dora) "
    "and (not test_resume_is_bit_exact or (independent and lora))"
)
SHOWN = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
# As the packages' metadata asks for; Unsloth gives upper bounds, the newest within them are taken.
SETS = {
    "newest": "",
    "axolotl-0.21": "transformers==5.20.1 trl==1.14.1 peft==0.21.2 accelerate==1.15.0 datasets==5.0.1",
    "axolotl-0.19": "transformers==5.16.1 trl==1.9.0 peft==0.20.0 accelerate==1.13.0 datasets==4.8.4 "
    "huggingface_hub==1.17.0 tokenizers==0.23.1",
    "unsloth-2026.10": "transformers==5.17.0 trl==1.15.0 datasets<5",
    "llama-factory-0.9.5": "transformers==5.6.0 trl==0.24.0 peft==0.18.1 accelerate==1.11.0 datasets==4.0.0",
}


@dataclass
class Result:
    """One set: what was installed, and what became of the tests."""

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


def install(name: str, folder: Path) -> dict[str, str]:
    """The environment of a set, with this package in it; returns the versions there.

    Raises:
        subprocess.CalledProcessError: pip found no such set of versions; it says why.
        RuntimeError: installing this package changed the set.
    """
    python = environment(folder)
    pip_install(python, *(SETS[name].split() or ["--upgrade", *SHOWN[1:]]))
    before = versions_in(python)
    install_this(python, "[train]")
    if (after := versions_in(python)) != before:
        raise RuntimeError(f"installing lfu-tuning changed the set: {before} became {after}")
    return after


def versions_in(python: str) -> dict[str, str]:
    code = "import sys, importlib.metadata as m; print(*(m.version(n) for n in sys.argv[1:]))"
    return dict(zip(SHOWN, ask(python, code, *SHOWN).split(), strict=True))


def run_tests(result: Result, folder: Path, tests: list[str]) -> None:
    """pytest in `folder`'s environment, one process; fills in the counts."""
    report = folder / "junit.xml"
    report.unlink(missing_ok=True)
    variables = clean() | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [environment(folder), "-m", "pytest", "-p", "no:cacheprovider", "-o", "pythonpath=tests"]
    command += ["-k", LEFT_OUT, "--durations=30"]
    with (folder / "pytest.log").open("w") as log:
        done = subprocess.run(
            [*command, f"--junitxml={report}", *tests], cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT
        )
    if not report.exists():
        result.trouble = f"pytest stopped with {done.returncode}, see {folder / 'pytest.log'}"
        return
    suite = next(xml.parse(report).getroot().iter("testsuite"))
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    result.failed, result.skipped = count["failures"] + count["errors"], count["skipped"]
    result.passed = count["tests"] - result.failed - result.skipped
    result.seconds = float(suite.get("time", 0))
    if result.failed:
        broken = [case for case in suite.iter("testcase") if {part.tag for part in case} & {"failure", "error"}]
        names = [f"{case.get('classname')}::{case.get('name')}" for case in broken]
        result.trouble = "\n  ".join([f"failed, see {folder / 'pytest.log'}", *names])


def table(results: list[Result]) -> str:
    """Markdown: a row per set."""
    rows = [["versions of", *SHOWN[1:], "passed, failed, skipped", "seconds"]]
    for each in results:
        counts = f"{each.passed}, {each.failed}, {each.skipped}"
        rows.append([each.name, *(each.versions.get(n, "-") for n in SHOWN[1:]), counts, f"{each.seconds:.0f}"])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), metavar="SET")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "ranges", help="where the environments are kept")
    parser.add_argument("--tests", nargs="+", default=list(CORE), help="default: the core of the suite")
    given = parser.parse_args()
    results = []
    for name in given.sets:
        result, folder = Result(name), given.folder.resolve() / name
        started = time.monotonic()
        try:
            result.versions = install(name, folder)
            print(f"{name}: installed in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            run_tests(result, folder, given.tests)
        except (subprocess.CalledProcessError, RuntimeError) as error:
            result.trouble = f"not installed: {error}"
        results.append(result)
        print(f"{name}: {result.passed} passed, {result.failed} failed", file=sys.stderr, flush=True)
    print(f"Python {sys.version.split()[0]}, torch {results[0].versions.get('torch', '-')}\n\n{table(results)}")
    for result in results:
        if result.trouble:
            print(f"\n{result.name}: {result.trouble}")
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
