"""The same random numbers twice, on every device that a model lies on."""

from __future__ import annotations

import torch

from lfu.model.rng import Replay


class Accelerator:
    """What `torch.cuda`, `torch.xpu` and, without a device's number, `torch.mps` give: the state of their generator."""

    def __init__(self, numbered: bool):
        self.numbered = numbered
        self.state = {0: 0, 1: 0} if numbered else {None: 0}

    def _key(self, device):
        assert len(device) == self.numbered
        return device[0].index if self.numbered else None

    def get_rng_state(self, *device):
        return torch.tensor([self.state[self._key(device)]])

    def set_rng_state(self, state, *device):
        self.state[self._key(device)] = int(state)


def test_masks_of_other_accelerators_than_cuda_are_replayed(monkeypatch):
    modules = {"xpu": Accelerator(True), "mps": Accelerator(False)}
    monkeypatch.setattr(torch, "get_device_module", lambda kind: modules[kind])
    devices = [torch.device("cpu"), torch.device("xpu", 0), torch.device("xpu", 1), torch.device("mps", 0)]
    replay = Replay(devices)
    first = torch.rand(3)
    assert replay.drew()
    modules["xpu"].state[1] = modules["mps"].state[None] = 7  # the clean pass has drawn there
    with replay():
        assert torch.equal(torch.rand(3), first)
        assert modules["xpu"].state == {0: 0, 1: 0}
        assert modules["mps"].state == {None: 0}
        modules["xpu"].state[0] = 3
    assert modules["xpu"].state == {0: 0, 1: 7}
    assert modules["mps"].state == {None: 7}
    assert not torch.equal(torch.rand(3), first)


def test_nothing_drawn_is_nothing_drawn():
    replay = Replay([torch.device("cpu")])
    torch.zeros(3)
    assert not replay.drew()
