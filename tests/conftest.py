"""Offline, on one thread, the same seed at the start of each test, and the device that the tests run on."""

import gc
import os
import sys
from functools import cache

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("TQDM_DISABLE", None)  # some tests read the progress that is shown

import pytest
import quicker
import torch
from hypothesis import settings
from pictures import one_of_each_kind, one_pixel

settings.register_profile("here", deadline=None)  # machines are shared: a slow example is no failure
settings.load_profile("here")
torch.set_num_threads(1)  # tiny models: threads only wait for each other


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where the tiny models and batches are")


def pytest_configure(config):
    device = config.getoption("--device")
    os.environ["LFU_TEST_DEVICE"] = device  # tests/tiny.py goes by it
    if device == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no GPU here")
        # the fused kernels add up their gradients in any order, and many tests compare bit for bit
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)


gc.unfreeze = lambda: None  # the end of a study would give back what is frozen below


@cache
def _settled(modules: int) -> None:
    quicker.libraries()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _what_was_imported_stays():
    """Each training ends with a full garbage collection: it need not go through all imported packages every time."""
    _settled(len(sys.modules))


@pytest.fixture(scope="session")
def device(request) -> str:
    """`cpu` or `cuda`, as `--device` says."""
    return request.config.getoption("--device")


@pytest.fixture
def quick_pictures(monkeypatch):
    one_pixel(monkeypatch.setattr)


@pytest.fixture
def few_pictures(monkeypatch):
    one_of_each_kind(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
