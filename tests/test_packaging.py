"""What is promised to whoever installs the package: its files, its dependency ranges, its types."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from lfu.support import extras

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "lfu"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_file_beside_the_code_is_in_the_wheel():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["lfu"]
    shipped = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    here = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    beside = {path for path in here if path.suffix != ".py"}
    assert {str(path.relative_to(PACKAGE)) for path in beside - shipped} == set()
    assert [pattern for pattern in patterns if not any(PACKAGE.glob(pattern))] == []


def test_every_folder_with_code_is_a_package():
    """setuptools finds no package where `__init__.py` is missing, and the code in it would not be shipped."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


NAME = PROJECT["project"]["name"]
EXTRAS = {extra: [Requirement(line) for line in lines] for extra, lines in
          PROJECT["project"]["optional-dependencies"].items()}  # fmt: skip
CORE = [Requirement(line) for line in PROJECT["project"]["dependencies"]]


@pytest.mark.parametrize("wanted", {str(one): one for one in sum(EXTRAS.values(), CORE) if one.name != NAME}.values())
def test_every_dependency_has_a_lower_bound_that_the_pinned_version_meets(wanted):
    assert any(part.operator == ">=" for part in wanted.specifier)
    pins = dict(row.split("==") for row in (ROOT / "constraints.txt").read_text().splitlines() if "==" in row)
    assert wanted.specifier.contains(pins[wanted.name].strip())


def test_the_core_needs_torch_and_transformers_alone():
    assert {one.name for one in CORE} == {"torch", "transformers"}


def test_what_is_said_to_be_missing_is_what_the_extras_install():
    for extra, modules in extras.EXTRAS.items():
        assert set(modules.values()) <= {one.name for one in EXTRAS[extra]}, extra


# What each tool pins, from the metadata of its package; Unsloth's are its upper bounds.
PINS = {
    "axolotl 0.21": "transformers 5.20.1 trl 1.14.1 peft 0.21.2 accelerate 1.15.0 datasets 5.0.1 numpy 2.1",
    "axolotl 0.19": "transformers 5.16.1 trl 1.9.0 peft 0.20.0 accelerate 1.13.0 datasets 4.8.4 numpy 2.1",
    "LLaMA-Factory 0.9.5": "transformers 5.6.0 trl 0.24.0 peft 0.18.1 accelerate 1.11.0 datasets 4.0.0",
    "Unsloth 2026.10": "transformers 5.17.0 trl 1.15.0 datasets 4.8.5",
}


@pytest.mark.parametrize("tool", PINS)
def test_installing_it_beside_a_tool_changes_none_of_the_tools_versions(tool):
    words = PINS[tool].split()
    for name, version in zip(words[::2], words[1::2]):
        for wanted in CORE + EXTRAS["train"]:
            assert wanted.name != name or wanted.specifier.contains(version), f"{wanted} against {version}"


def test_the_citation_names_software_and_paper():
    """The fields that version 1.2.0 of the format requires, and the paper's as published."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"]
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Nam", "Kim", "Jeong"]
    assert {"type": "other", "value": "arXiv:2511.13052"} in [
        {key: one[key] for key in ("type", "value")} for one in paper["identifiers"]
    ]


@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_a_users_program_is_type_checked(tmp_path, request):
    """tests/typed_program.py, strictly. Its `assert_type` lines fail where a known type has become Any."""
    settings = tmp_path / "mypy.ini"
    settings.write_text(
        "[mypy]\nstrict = True\nwarn_unused_ignores = True\n"
        f"mypy_path = {ROOT / 'src'}\n"
        # the libraries' own types are theirs to check, and reading them takes a minute
        "[mypy-torch.*,transformers.*,trl.*,peft.*,datasets.*,accelerate.*,safetensors.*,numpy.*]\n"
        "follow_imports = skip\n"
        # ours are what `make lint` checks; strictness is asked of the user's file
        "[mypy-lfu.*]\nignore_errors = True\n"
    )
    cache = request.config.cache.mkdir("lfu-mypy")
    command = [sys.executable, "-m", "mypy", "--config-file", settings, "--cache-dir", cache, "typed_program.py"]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
