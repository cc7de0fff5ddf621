"""`lfu train` killed, out of disk, or given broken checkpoints: what is on disk is whole, and the end is the same."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir, suppress
from pathlib import Path

import forked
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_folder import save_model
from tiny_study import write_questions

from lfu.cli import main
from lfu.support import files
from lfu.support.errors import UserError
from lfu.support.files import WRITING
from lfu.training import checkpoints

STEPS, EVERY = 8, 2
FAST = (
    f"--max_steps {STEPS} --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --report_to none "
    f"--disable_tqdm true --save_strategy steps --save_steps {EVERY} --logging_steps 1 --lam auto --lora_dropout 0.1 "
    "--learning_rate 1e-2 --neftune_noise_alpha 1"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_questions(Path("rows.jsonl"), 12)
    return tmp_path


def words(model: str, *flags: str, out: str = "out") -> list[str]:
    more = [word for flag in flags for word in flag.split()]
    fast = FAST.replace("--lora_dropout 0.1", "") if "--use_peft" in more else FAST  # without an adapter it is refused
    return ["train", "--model", model, "--data", "rows.jsonl", "--output_dir", out, *fast.split(), *more]


def train(model: str, *flags: str, out: str = "out") -> int:
    return main(words(model, *flags, out=out))


def adapter(out: str = "out") -> dict[str, torch.Tensor]:
    return load_file(f"{out}/adapter_model.safetensors")


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def look_at(folder: Path) -> int:
    """Reads every file that a reader may take for finished; returns how many. Raises where one is not whole."""
    count = 0
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(WRITING) for part in path.relative_to(folder).parts) or not path.is_file():
            continue
        count += 1
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert list(file.keys())
        elif path.suffix in (".yaml", ".yml"):
            yaml.safe_load(path.read_text())
        elif path.suffix in (".pt", ".pth"):
            assert path.read_bytes()[:2] == b"PK"
        elif path.name == "README.md":
            assert path.read_text().startswith("---")
    for checkpoint in checkpoints.checkpoints(folder):
        assert checkpoints.fault(checkpoint) is None, checkpoint
    return count


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    """The output folder of a run that nothing disturbed, with its four checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    write_questions(folder / "rows.jsonl", 12)
    with chdir(folder):
        assert train(model) == 0
    return folder / "out"


def begun(finished: Path, *steps: int) -> None:
    """`out` as a run has left it that is so far: its beginning need not run again."""
    for step in steps:
        shutil.copytree(finished / f"checkpoint-{step}", Path("out") / f"checkpoint-{step}")


def go_on(model: str, *flags: str) -> int:
    return train(model, "--resume_from_checkpoint true", *flags)


# -- kill -9 -----------------------------------------------------------------------------------------------------------


def run_and_kill(arguments: list[str], after: float | None = None) -> int:
    """The exit code of a training in its own process; that of SIGKILL if it was not over after so many seconds."""
    run = forked.Popen(["python", "-m", "lfu.cli", *arguments])
    if run.wait(after) is None:
        run.kill()
    return run.wait()


def last_saved(out: Path) -> int:
    newest = checkpoints.newest(out)
    return checkpoints.steps_of(newest) if newest else 0


def killed_and_resumed(model: str, delays: list[float], whole: dict) -> dict[str, int]:
    """One run to its end, killed after so many seconds, again and again; what was seen on the way."""
    out = Path("out")
    shutil.rmtree(out, ignore_errors=True)
    seen = {"kills": 0, "files": 0, "resumed": 0, "unfinished": 0}
    while True:
        before = last_saved(out)
        resume = ["--resume_from_checkpoint true"] if before else ["--overwrite_output_dir"]
        code = run_and_kill(words(model, "--save_total_limit 2", *resume), delays.pop() if delays else None)
        seen["files"] += look_at(out) if out.exists() else 0
        seen["unfinished"] += any(out.glob(f"{WRITING}*"))
        assert last_saved(out) >= before, "a checkpoint got lost"
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        seen["kills"] += 1
        seen["resumed"] += last_saved(out) > 0
    assert_same(adapter(), whole)
    assert not list(out.glob(f"{WRITING}*")), "what a killed run left unfinished is cleared by the next"
    return seen


def kill_many(model: str, whole: dict[str, torch.Tensor], wanted: int, kills: int, seed: int) -> dict[str, int]:
    """Runs until so many of them were killed; each may be killed so often."""
    draw, total = random.Random(seed), {"runs": 0}
    run_and_kill(["--help"])  # the first process waits for the imports
    start = time.monotonic()
    assert run_and_kill(words(model, out="timed")) == 0
    seconds = time.monotonic() - start
    assert_same(adapter("timed"), whole)
    while total["runs"] < wanted:
        delays = [draw.uniform(0.02, 0.95) * seconds for _ in range(kills)]
        found = killed_and_resumed(model, delays, whole)
        total["runs"] += found["kills"] > 0  # on a machine that has become faster it was over before
        for name, value in found.items():
            total[name] = total.get(name, 0) + value
    return total


def test_killed_at_random_moments(here, finished, model):
    found = kill_many(model, adapter(str(finished)), 1, 2, seed=3)
    assert found["kills"] >= 1
    assert found["files"] > 10


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_fifty_runs_killed_at_random_moments(here, finished, model, capsys):
    found = kill_many(model, adapter(str(finished)), 50, 1, seed=0)
    with capsys.disabled():
        print(f"\n{found}")
    assert found["kills"] == found["runs"] == 50
    assert found["resumed"] >= 10, "most were killed before their first checkpoint"


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("place", ["rename", "state", "weights", "rotation", "final"])
def test_killed_while_it_saves(here, finished, model, monkeypatch, place):
    """The process ends (here: an exception that nobody catches) at the worst moments: the checkpoint before stays."""
    begun(finished, *((4, 6) if place == "final" else (2, 4)))  # with the next one, the first of them is to go

    def killed(*args, **kwargs):
        raise Killed

    import lfu.training.saving
    from lfu import LfUTrainer

    with monkeypatch.context() as patch:
        if place == "rename":
            patch.setattr(lfu.training.saving, "swap_in", killed)
        elif place == "state":
            from transformers.trainer_callback import TrainerState

            patch.setattr(TrainerState, "save_to_json", killed)
        elif place == "weights":
            patch.setattr(LfUTrainer, "_save_optimizer_and_scheduler", killed)
        elif place == "rotation":
            patch.setattr(
                shutil, "rmtree", killed_in_the_middle(shutil.rmtree, re.compile(r".*(?<!writing-)checkpoint-2"))
            )
        else:
            patch.setattr("lfu.cli.screen.summary", killed)
            replace = os.replace

            def fail_on_the_config(a, b):
                if Path(b).name == "adapter_config.json" and Path(b).parent == Path("out"):
                    killed()
                replace(a, b)

            patch.setattr(os, "replace", fail_on_the_config)
        with pytest.raises(Killed):
            go_on(model, "--save_total_limit 2")
    look_at(Path("out"))
    assert not Path("out/adapter_config.json").exists(), "weights without it are no model"
    assert last_saved(Path("out")) == {"final": 8, "rotation": 6}.get(place, 4)
    if place in ("state", "weights"):  # as for a rename that was not reached
        return
    assert go_on(model, "--save_total_limit 2") == 0
    assert not list(Path("out").glob(f"{WRITING}*"))
    assert [checkpoints.steps_of(path) for path in checkpoints.checkpoints(Path("out"))] == [6, 8]
    assert_same(adapter(), adapter(str(finished)))


def killed_in_the_middle(rmtree, names: re.Pattern[str]):
    """`shutil.rmtree`, of which a kill leaves half for a folder of such a name."""

    def call(path, *args, **kwargs):
        if names.fullmatch(Path(path).name) and Path(path).is_dir():
            min(file for file in Path(path).rglob("*") if file.is_file()).unlink()
            raise Killed
        rmtree(path, *args, **kwargs)

    return call


def two_files(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a", "b"):
        (folder / name).write_text(text)
    return folder


def new_one(folder: Path) -> None:
    with files.new_folder(folder / "checkpoint-6") as work:
        two_files(work, "new")


class Life:
    """Of a process that is killed after so many calls."""

    def __init__(self, length: int):
        self.length, self.calls = length, 0

    def ends(self, original):
        deletes = original is shutil.rmtree  # now, before it is patched

        def call(path, *rest, **named):
            self.calls += 1
            if self.calls == self.length + 1 and deletes and Path(path).is_dir():
                for file in [file for file in Path(path).rglob("*") if file.is_file()][:1]:
                    os.remove(file)
            if self.calls > self.length:
                raise Killed
            return original(path, *rest, **named)

        return call


CHANGES = {
    "replaced": lambda folder: files.swap_in(
        two_files(folder / f"{WRITING}checkpoint-6", "new"), folder / "checkpoint-6"
    ),
    "made anew": new_one,
    "deleted": lambda folder: files.remove_folder(folder / "checkpoint-6"),
    "a file": lambda folder: files.write_text(folder / "checkpoint-6" / "a", "old"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_is_never_half_there_nor_lost(tmp_path, monkeypatch, change):
    """Killed before each renaming and in each deletion: from then on nothing is done, no clearing up either."""
    for moment in range(10):
        folder = tmp_path / str(moment)
        two_files(folder / "checkpoint-6", "old")
        life = Life(moment)
        with monkeypatch.context() as patch:
            for module, name in ((os, "replace"), (shutil, "rmtree"), (Path, "unlink")):
                patch.setattr(module, name, life.ends(getattr(module, name)))
            with suppress(Killed):
                CHANGES[change](folder)
        assert checkpoints.newest(folder) is None  # these are no checkpoints, but what is hidden comes back
        there = {path.name: path.read_text() for path in (folder / "checkpoint-6").glob("[ab]")}
        whole = [{"a": text, "b": text} for text in ("old", "new")]
        assert there in whole or (change == "deleted" and not there), moment
        files.remove_unfinished(folder)
        files.remove_unfinished(folder / "checkpoint-6")
        assert not list(folder.rglob(f"{WRITING}*"))
        if life.calls <= moment:
            return
    raise AssertionError("there are more moments")


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_end_is_the_same(here, finished, model, monkeypatch, capsys, number):
    from lfu import LfUTrainer

    original = LfUTrainer.training_step

    def signalled(self, *args, **kwargs):
        if self.state.global_step == 4:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    begun(finished, 4)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(LfUTrainer, "training_step", signalled)
        patch.setattr("lfu.cli.stop.Stop._asked", _once(__import__("lfu.cli.stop", fromlist=["Stop"]).Stop._asked))
        assert go_on(model) == 130
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    err = capsys.readouterr().err
    assert "stopping after this step" in err
    assert "Stopped after step 5; go on from out/checkpoint-5" in err
    assert "Traceback" not in err
    assert not Path("out/adapter_model.safetensors").exists()
    look_at(Path("out"))
    if number == signal.SIGINT:  # the other one took the same way
        assert go_on(model) == 0
        assert_same(adapter(), adapter(str(finished)))


def test_ctrl_c_in_the_last_evaluation_does_not_lose_the_model(here, finished, model, monkeypatch, capsys):
    from lfu import LfUTrainer

    evaluate = LfUTrainer.evaluate

    def signalled(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(LfUTrainer, "evaluate", signalled)
    flags = f"--save_strategy no --eval_data rows.jsonl --eval_strategy steps --eval_steps {STEPS}"
    begun(finished, 6)
    assert go_on(model, flags) == 0
    assert "that was the last step: the run is complete" in capsys.readouterr().err
    assert_same(adapter(), adapter(str(finished)))


def _once(asked):
    """Two micro-batches of the update send the signal; the second would stop at once."""
    return lambda self, *rest: None if self.trainer.interrupted else asked(self, *rest)


def test_a_second_ctrl_c_stops_at_once(here, model, monkeypatch, capsys):
    from lfu import LfUTrainer

    original = LfUTrainer.training_step

    def signalled(self, *args, **kwargs):
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LfUTrainer, "training_step", signalled)  # once for each of the update's two micro-batches
    assert train(model) == 130
    assert "Stopped after step 3; go on from out/checkpoint-2" in capsys.readouterr().err


# -- checkpoints that are broken ---------------------------------------------------------------------------------------


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def two_random_states(checkpoint: Path) -> None:
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")


def fsdp(checkpoint: Path) -> None:
    """Laid out as two processes of FSDP leave it."""
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "adapter_model.safetensors").unlink()
    two_random_states(checkpoint)
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (checkpoint / name).mkdir()
        for file in (".metadata", "__0_0.distcp", "__1_0.distcp"):
            (checkpoint / name / file).write_bytes(b"something")


DAMAGE = {
    "truncated weights": (lambda c: half(c / "adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
    "no weights": (lambda c: (c / "adapter_model.safetensors").unlink(), "it has no weights"),
    "empty state": (lambda c: (c / "trainer_state.json").write_text(""), "trainer_state.json is damaged"),
    "another state": (lambda c: (c / "trainer_state.json").write_text("[]"), "holds no state of a training"),
    "no state": (lambda c: (c / "trainer_state.json").unlink(), "never finished"),
    "no optimizer": (lambda c: (c / "optimizer.pt").unlink(), "it has no optimizer.pt"),
    "truncated optimizer": (lambda c: half(c / "optimizer.pt"), "optimizer.pt is damaged"),
    "truncated schedule": (lambda c: half(c / "scheduler.pt"), "scheduler.pt is damaged"),
    "truncated random state": (lambda c: half(c / "rng_state.pth"), "rng_state.pth is damaged"),
    "truncated state of the method": (lambda c: half(c / "lfu_state.safetensors"), "lfu_state.safetensors is damaged"),
    "broken configuration": (lambda c: half(c / "adapter_config.json"), "adapter_config.json is damaged"),
    "truncated random state of one process": (
        lambda c: (two_random_states(c), half(c / "rng_state_1.pth")), "rng_state_1.pth is damaged"
    ),
    "empty scale of fp16": (lambda c: (c / "scaler.pt").touch(), "scaler.pt is damaged"),
    "an index of nothing": (
        lambda c: (c / "model.safetensors.index.json").write_text("{}"), "model.safetensors.index.json is damaged"
    ),
    "an epoch that is none": (lambda c: change(c / "trainer_state.json", epoch="two"), "holds no state of a training"),
    "FSDP, unfinished": (lambda c: (fsdp(c), (c / "optimizer_0" / ".metadata").unlink()), "optimizer_0 has no"),
    "FSDP, empty shard": (
        lambda c: (fsdp(c), (c / "pytorch_model_fsdp_0" / "__1_0.distcp").write_bytes(b"")), "fsdp_0 is damaged"
    ),
    "FSDP, no optimizer": (lambda c: (fsdp(c), shutil.rmtree(c / "optimizer_0")), "it has no optimizer"),
    "FSDP, truncated random state": (lambda c: (fsdp(c), half(c / "rng_state_1.pth")), "rng_state_1.pth is damaged"),
    "DeepSpeed, a folder missing": (
        lambda c: ((c / "global_step6").mkdir(), (c / "latest").write_text("global_step9")), "latest names global_step9"
    ),
    "a folder for a file": (
        lambda c: ((c / "trainer_state.json").unlink(), (c / "trainer_state.json").mkdir()), "can't be read"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, finished, damage):
    harm, says = DAMAGE[damage]
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.copytree(finished / name, tmp_path / name)
    assert checkpoints.fault(tmp_path / "checkpoint-6") is None
    harm(tmp_path / "checkpoint-6")
    said: list[str] = []
    assert checkpoints.newest(tmp_path, say=said.append) == tmp_path / "checkpoint-4"
    assert len(said) == 1
    assert says in said[0]
    assert "checkpoint-6 is passed over" in said[0]


def test_sound_checkpoints_of_several_processes(tmp_path, finished):
    for name in ("fsdp", "deepspeed"):
        shutil.copytree(finished / "checkpoint-6", tmp_path / name)
    fsdp(tmp_path / "fsdp")
    (tmp_path / "deepspeed" / "global_step9").mkdir()
    (tmp_path / "deepspeed" / "latest").write_text("global_step9\n")
    assert checkpoints.fault(tmp_path / "fsdp") is None
    assert checkpoints.fault(tmp_path / "deepspeed") is None


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 cut"])
def test_what_is_found_out_while_loading_is_an_error_of_the_checkpoint(tmp_path, content):
    """For those who name a checkpoint to `LfUTrainer.train`, which does not look at it first."""
    from test_trainer import trainer

    t = trainer(tmp_path)
    t.accelerator.scaler = torch.amp.GradScaler("cpu")
    for name in ("rng_state.pth", "scaler.pt"):
        (tmp_path / name).write_bytes(content)
    for load in (t._load_rng_state, t._load_scaler):
        with pytest.raises(checkpoints.CheckpointError, match="does not fit"):
            load(str(tmp_path))


def test_no_permission_is_told(tmp_path, finished, monkeypatch):
    shutil.copytree(finished / "checkpoint-6", tmp_path / "checkpoint-6")
    read = Path.read_text

    def denied(self, *args, **kwargs):
        if self.name == "trainer_state.json":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", denied)
    assert "Permission denied" in (checkpoints.fault(tmp_path / "checkpoint-6") or "")


def test_names_that_only_look_like_checkpoints(tmp_path):
    for name in ("checkpoint-old", "checkpoint-4-backup", "checkpoint-", "checkpoint-12x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-7").write_text("a file")
    assert checkpoints.checkpoints(tmp_path) == []
    assert checkpoints.newest(tmp_path) is None
    assert checkpoints.newest(tmp_path / "none") is None


def test_training_goes_on_from_the_last_sound_checkpoint_and_ends_the_same(here, finished, model, capsys):
    shutil.copytree(finished, "out")
    Path("out/adapter_model.safetensors").unlink()
    half(Path("out/checkpoint-8/adapter_model.safetensors"))
    Path("out/checkpoint-6/optimizer.pt").unlink()
    assert go_on(model) == 0
    told = capsys.readouterr()
    assert "checkpoint-8 is passed over: adapter_model.safetensors is damaged" in told.err
    assert "checkpoint-6 is passed over: it has no optimizer.pt" in told.err
    assert "going on from out/checkpoint-4" in told.err
    assert "steps 5 to 8" in told.out
    assert_same(adapter(), adapter(str(finished)))
    look_at(Path("out"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--resume_from_checkpoint out/checkpoint-6",
            "no optimizer.pt, without which training would not go on",
        ),
        ("--resume_from_checkpoint true --lora_r 4", "does not fit this model and these settings"),
        ("--resume_from_checkpoint true --use_peft false", "checkpoint"),
        ("--resume_from_checkpoint true --method lfu+ema", "is of method 'lfu', and this run has 'lfu+ema'"),
    ],
)
def test_what_can_not_be_resumed_is_one_line(here, finished, model, capsys, flags, says):
    shutil.copytree(finished, "out")
    Path("out/checkpoint-6/optimizer.pt").unlink()
    assert train(model, "--max_steps 9", flags) == 2
    err = capsys.readouterr().err
    assert len([line for line in err.splitlines() if line.startswith("lfu train: error: ")]) == 1
    assert says in err
    assert "Traceback" not in err
    assert_same(adapter(), adapter(str(finished)))


def test_no_checkpoint_is_sound(here, finished, model, capsys):
    shutil.copytree(finished, "out")
    for path in checkpoints.checkpoints(Path("out")):
        half(path / "adapter_model.safetensors")
    assert go_on(model) == 2
    assert "holds no sound checkpoint" in capsys.readouterr().err


# -- no room -----------------------------------------------------------------------------------------------------------


class room:
    """Within it no file of this process can be longer than so many bytes, as on a disk that is full."""

    def __init__(self, size: int):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("size", [100, 3000, 20_000, 40_000])
def test_no_room_for_a_checkpoint(here, finished, model, capsys, size):
    """The weights, the optimizer, the state: each is the first that does not fit for one of the sizes."""
    begun(finished, 4, 6)
    biggest = max(path.stat().st_size for path in Path("out").rglob("*") if path.is_file())
    assert size < biggest
    with room(size):
        assert go_on(model) == 2
    err = capsys.readouterr().err
    told = [line for line in err.splitlines() if line.startswith("lfu train: error: ")]
    assert len(told) == 1
    assert "can't be written" in told[0]
    assert "go on from out/checkpoint-6" in told[0]
    assert "Traceback" not in err
    look_at(Path("out"))
    assert not list(Path("out").rglob(f"{WRITING}*"))
    assert last_saved(Path("out")) == 6
    if size == 3000:  # what is on disk is the same for all of them
        assert go_on(model) == 0
        assert_same(adapter(), adapter(str(finished)))


@pytest.mark.parametrize("verb", ["export", "evaluate", "probe"])
def test_no_room_for_what_the_other_verbs_write(here, finished, model, capsys, verb):
    from tiny_study import write_questions as write

    write(Path("items.jsonl"), 4)
    commands = {
        "export": ["export", str(finished), "new"],
        "probe": ["probe", "forgetting", model, str(finished), "--limit", "4", "--output_dir", "new"],
        "evaluate": ["evaluate", model, *f"--limit 2 --tasks gsm8k --data_dir {here} --output_dir new".split()],
    }  # fmt: skip
    if verb == "evaluate":
        Path("gsm8k").mkdir()
        shutil.copy("items.jsonl", "gsm8k/test.jsonl")
        shutil.copy("items.jsonl", "gsm8k/train.jsonl")
    with room(600):
        assert main(commands[verb]) == 2
    err = capsys.readouterr().err
    assert len([line for line in err.splitlines() if line.startswith(f"lfu {verb}: error: ")]) == 1, err
    assert "Traceback" not in err
    assert not list(here.rglob(f"{WRITING}*"))
    for path in Path("new").rglob("*.json") if Path("new").exists() else ():
        json.loads(path.read_text())


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kilobytes", [64, 300])
def test_a_disk_that_is_really_full(here, model, kilobytes):
    """A small file system of its own, in a namespace of its own."""
    if os.system("unshare -rm true 2>/dev/null") != 0:
        pytest.skip("no namespaces here")
    Path("disk").mkdir()
    command = " ".join([sys.executable, "-m", "lfu.cli", *words(model, "--save_total_limit 2", out="disk/out")])
    script = f"mount -t tmpfs -o size={kilobytes}k none disk && {{ {command}; echo $? > code; cp -r disk/out kept; }}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, env=environment)
    code = int(Path("code").read_text())
    assert code == 2, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("lfu train: error: ")]) == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    if Path("kept").is_dir():
        look_at(Path("kept"))


# -- the other verbs, interrupted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("verb", ["export", "probe"])
def test_the_other_verbs_interrupted_while_they_write(here, finished, model, monkeypatch, capsys, verb, error):
    replace, calls = os.replace, 0

    def interrupted(a, b):
        nonlocal calls
        calls += 1
        if str(here) in str(Path(b).absolute()):
            raise error
        return replace(a, b)

    commands = {
        "export": ["export", str(finished), "new"],
        "probe": ["probe", "forgetting", model, str(finished), "--limit", "4", "--output_dir", "new"],
    }
    monkeypatch.setattr(os, "replace", interrupted)
    assert main(commands[verb]) in (2, 130)
    assert calls
    assert "Traceback" not in capsys.readouterr().err
    assert [path for path in here.rglob("*") if path.is_file()] == [here / "rows.jsonl"]


def test_user_errors_are_value_errors_for_those_who_catch_them():
    assert issubclass(checkpoints.CheckpointError, UserError)
    assert issubclass(checkpoints.CheckpointError, ValueError)
