"""`lfu` in several processes: one of them speaks and writes, all end alike."""

from __future__ import annotations

import pytest
from commands import everything
from safetensors import safe_open
from tiny_folder import save_model
from two import both

from lfu.recipes import launches

pytestmark = pytest.mark.timeout(900)  # two processes on a busy machine wait for each other


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def told(folder):
    return both(everything, folder / "told", save_model(folder / "model"), folder)


@pytest.mark.parametrize(("case", "code"), [("mistake", 2), ("help", 0), ("train", 0), ("again", 2)])
def test_one_process_speaks(told, case, code):
    first, second = (one[case] for one in told)
    assert (first[0], second[0]) == (code, code)
    assert second[1] == ""
    if code:  # the second waits for the launcher to end it, and only then tells, with its number
        assert first[2].startswith("lfu train: error: ")
        same = lambda text: text.split(" (")[0]  # of a folder that the first is still filling, each names what it sees
        assert same(second[2]) == f"[process 1] {same(first[2])}"
    else:
        assert "lfu" in first[1]
        assert "lfu" not in second[2]


def test_one_process_writes_a_whole_run(told, folder):
    assert "Trained on 8 rows" in told[0]["train"][1]
    assert {path.name for path in (folder / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    with safe_open(folder / "run" / "adapter_model.safetensors", "pt") as saved:
        assert all("lora_" in name for name in saved.keys())  # noqa: SIM118 (no mapping)


def test_launch_files_are_accelerates():
    from accelerate.commands.config.config_args import ClusterConfig

    for path in launches().values():
        assert ClusterConfig.from_yaml_file(str(path)).num_processes == 2
