"""The examples run as they are, on a tiny model in place of the one that they name."""

from __future__ import annotations

import json
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


def test_the_notebook_runs(here):
    cells = json.loads((here / "forgetting.ipynb").read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert len(cells) == 10
    assert code.count('MODEL = "smollm2"') == 1
    code = code.replace('MODEL = "smollm2"', 'MODEL = "tiny"').replace("STEPS = 60", "STEPS = 4")
    told = run(code, here)
    assert "l2sp" in told


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
