"""Runs the notebooks in examples/ as they are, and keeps what they printed and drew in them.

    python scripts/notebooks.py

It takes the model that the notebook names, and prints how many seconds each took. A fingerprint of the code that ran
goes into the notebook: a test compares it with the cells, and runs their code on a tiny model.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Leaves out what differs from run to run without saying anything: progress bars and warnings."""
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                lines = [line for line in output.text.splitlines() if "\r" not in line and "%|" not in line]
                if output.name == "stderr":  # a warning is a line with its place, and an indented one of source
                    lines = [line for line in lines if "Warning" not in line and line.strip() == line.rstrip()]
                output.text = "\n".join(lines).strip("\n")
        if "outputs" in cell:
            cell.outputs = [one for one in cell.outputs if one.output_type != "stream" or one.text]


def main() -> int:
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        started = time.monotonic()
        notebook = nbformat.read(path, as_version=4)
        try:
            NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
        except CellExecutionError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            return 1
        tidy(notebook)
        code = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
        notebook.metadata["executed"] = hashlib.sha256(code.encode()).hexdigest()
        nbformat.write(notebook, path)
        print(f"{path.name}: ok, {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
