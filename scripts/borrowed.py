"""Environments that borrow what they don't install from the Python that runs this, so that torch is there only once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(folder: Path) -> str:
    """A virtual environment in `folder`, made if it isn't there; returns its Python."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
        # after its own packages, and without this Python's .pth files: an editable copy of this package stays out
        (packages(python) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(python)


def packages(python: Path | str) -> Path:
    """The folder where an environment keeps its packages."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())


def pip_install(python: str, *wanted: str) -> None:
    """Installs packages.

    Raises:
        subprocess.CalledProcessError: pip found no such set of versions; it says why.
    """
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *wanted], check=True, env=clean())


def install_this(python: str, extras: str = "") -> None:
    """Installs a copy of this package as its tree is now."""
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would add its old files to the wheel
    pip_install(python, f"{ROOT}{extras}")
    # pip takes the same version for the same code: a kept environment would have yesterday's
    pip_install(python, "--force-reinstall", "--no-deps", str(ROOT))


def clean() -> dict[str, str]:
    """The variables of this process without what leads Python to other trees."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
