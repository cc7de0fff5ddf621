"""`lfu` in several processes: one of them speaks and writes, all end alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import everything
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_folder import save_model
from two import both

import lfu
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


def launch(folder: Path, launcher: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`lfu train` in processes of their own, as docs/several-gpus.md has it; the trained model is saved in out."""
    model = folder / "m" if (folder / "m").exists() else save_model(folder / "m")
    words = (
        f"-m {launcher} -m lfu.cli train --model {model} --data word_problems:8 --output_dir {folder / 'out'} "
        "--max_steps 2 --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --logging_steps 1 "
        "--report_to none"
    )
    source = str(Path(lfu.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, *words.split(), *flags], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": source} | environment,
    )  # fmt: skip


def assert_trained(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Trained on 8 rows") == 1
    tensors = load_file(folder / "out" / "adapter_model.safetensors")
    assert all(bool(value.isfinite().all()) for value in tensors.values())
    assert any(bool(value.any()) for name, value in tensors.items() if "lora_B" in name)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_torchrun_starts_the_command_line(tmp_path):
    start = lambda: launch(
        tmp_path, "torch.distributed.run --nproc_per_node 2", "--use_cpu", "true", ACCELERATE_USE_CPU="true"
    )
    assert_trained(start(), tmp_path)
    again = start()  # into the same folder
    assert again.returncode == 1  # the launcher's
    told = [line for line in again.stderr.splitlines() if "lfu train: error: output folder" in line]
    assert sum(line.startswith("lfu train: error: ") for line in told) == 1  # the second process tells with its number


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["accelerate/deepspeed-zero2", "accelerate/deepspeed-zero3"])
def test_lfu_runs_under_the_launch_files_for_deepspeed(tmp_path, name):
    """One process of gloo on a CPU: accelerate starts several under DeepSpeed for GPUs alone."""
    pytest.importorskip("deepspeed")
    launcher = f"accelerate.commands.launch --config_file {launches()[name]} --num_processes 1"
    start = lambda *flags: launch(
        tmp_path, launcher, "--use_cpu", "true", "--bf16", "true", *flags, DS_ACCELERATOR="cpu"
    )
    saving = ("--save_strategy", "steps", "--save_steps", "1")
    assert_trained(start(*saving), tmp_path)
    complete = start(*saving, "--resume_from_checkpoint", "true")
    assert "is complete, and DeepSpeed has a model only to train it: to save it, " in complete.stderr
    refused = start("--method", "sam", "--overwrite_output_dir")
    assert refused.returncode == 1
    assert "method 'sam' reads whole weights, and FSDP and DeepSpeed cut them up" in refused.stderr
    disagrees = start("--overwrite_output_dir", "--bf16", "false")
    assert "the launch file and the flags disagree: " in disagrees.stderr
    assert "Traceback" not in disagrees.stderr.split("lfu train: error")[0]


def test_launch_files_are_accelerates():
    from accelerate.commands.config.config_args import ClusterConfig

    for path in launches().values():
        assert ClusterConfig.from_yaml_file(str(path)).num_processes == 2
