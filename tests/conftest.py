"""Offline, on one thread, and the same seed at the start of each test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

settings.register_profile("here", deadline=None)  # machines are shared: a slow example is no failure
settings.load_profile("here")
torch.set_num_threads(1)  # tiny models: threads only wait for each other


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
