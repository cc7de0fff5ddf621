"""Environments that borrow what they don't install from another Python, so that torch is there only once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCHES = ROOT / "runs" / "torch"
VERSIONS = ("3.11", "3.12", "3.13")


def interpreter(version: str) -> str | None:
    """A Python of this version, such as `3.12`: this one, on the PATH, or among pyenv's; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    candidates = [sys.executable, shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python")]
    return next((str(one) for one in candidates if one and ask(one, code, check=False) == version), None)


def ask(python: str | Path, code: str, *words: str, check: bool = True) -> str:
    """What this code prints there, with `words` as its arguments."""
    done = subprocess.run([python, "-c", code, *words], check=check, capture_output=True, text=True, env=clean())
    return done.stdout.strip()


def with_torch(version: str) -> str | None:
    """A Python of this version that has torch and what torch needs; None if no such Python is found.

    It is made on first use (up to 5 GB where PyPI's torch is a CUDA build) and kept in runs/torch.
    """
    base = interpreter(version)
    if base is None:
        return None
    python = environment(TORCHES / version, base, borrow=False)
    if not (packages(python) / "torch").exists():
        pins = (ROOT / "constraints.txt").read_text().split()
        pip_install(python, next(pin for pin in pins if pin.startswith("torch==")))
    return python


def environment(folder: Path, lender: str = sys.executable, borrow: bool = True) -> str:
    """A virtual environment of `lender`'s version in `folder`, made if it isn't there; returns its Python.

    What `lender` can import can be imported there, too, if `borrow`.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        subprocess.run([lender, "-m", "venv", str(folder)], check=True, env=clean())
        if borrow:
            # after its own packages, and without the lender's .pth files: an editable copy of this package stays out
            (packages(python) / "borrowed.pth").write_text(f"{packages(lender)}\n")
    return str(python)


def packages(python: Path | str) -> Path:
    """The folder where an environment keeps its packages."""
    return Path(ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))


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
    # pip takes the same version for the same code: a kept environment would have yesterday's
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "lfu-tuning"], check=True, env=clean())
    pip_install(python, f"{ROOT}{extras}")


def clean() -> dict[str, str]:
    """The variables of this process without what leads Python to other trees."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
