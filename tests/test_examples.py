"""The examples run as they are, on a tiny model in place of the one that they name."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import forked
import pytest
from tiny_folder import save_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MODEL = '"Qwen/Qwen3-0.6B"'


@pytest.fixture
def here(tmp_path, monkeypatch):
    folder = tmp_path / "examples"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("runs"))
    save_model(folder / "tiny")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return folder


def run(code: str, here: Path) -> str:
    (here / "program.py").write_text(code)
    done = forked.run(["python", "program.py"], here)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("script", "told", "left"),
    [
        ("trl_callback.py", "forgetting: the untouched model knows", "runs/trl/forgetting/index.html"),
        ("lfu_trainer.py", "forgetting: the untouched model knows", "runs/l2sp/adapter_model.safetensors"),
        ("own_loop.py", "epoch 2: loss", "runs/own-loop/model.safetensors"),
    ],
)
def test_a_script_runs(here, script, told, left):
    code = (here / script).read_text()
    assert code.count(MODEL) == 1
    code = code.replace(MODEL, '"tiny"').replace("EPOCHS, BATCH, RATE = 4", "EPOCHS, BATCH, RATE = 2")
    assert told in run(code.replace("num_train_epochs=4", "max_steps=2"), here)
    assert (here / left).is_file()


@pytest.fixture
def notebook():
    return json.loads((EXAMPLES / "forgetting.ipynb").read_text())


def code_of(notebook) -> str:
    return "\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")


def test_the_notebook_runs(here, notebook):
    code = code_of(notebook)
    assert len(notebook["cells"]) == 10
    assert code.count('MODEL = "smollm2"') == 1
    code = code.replace('MODEL = "smollm2"', 'MODEL = "tiny"').replace("STEPS = 24", "STEPS = 6")
    told = run(code, here)
    assert "l2sp" in told


def test_the_notebook_holds_what_its_cells_printed_and_drew(notebook):
    """`make notebooks` writes a fingerprint of the code that ran: cells that have changed since must be run again."""
    assert notebook["metadata"]["executed"] == hashlib.sha256(code_of(notebook).encode()).hexdigest()
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = json.dumps(outputs)
    assert len(text) < 200_000
    assert not re.search(r"/(home|root|tmp|work|Users|usr)/", text)


def test_every_row_of_the_examples_is_whole():
    rows = [json.loads(line) for line in (EXAMPLES / "shop.jsonl").read_text().splitlines()]
    assert all(row.keys() == {"prompt", "completion"} and all(row.values()) for row in rows)
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_the_examples_for_other_tools_name_settings_that_exist():
    """What can be checked without the tools; `make integrations` runs them."""
    yaml = pytest.importorskip("yaml")
    from lfu import ForgettingCallback
    from lfu.integrations.any_trainer import check_settings

    settings = yaml.safe_load((EXAMPLES / "axolotl.yaml").read_text())
    assert settings["plugins"] == ["lfu.integrations.axolotl.LfUPlugin"]
    check_settings(settings["lfu"])
    ForgettingCallback(**settings["forgetting"])
    for name in ("llama_factory.py", "unsloth_callback.py"):
        compile((EXAMPLES / name).read_text(), name, "exec")
