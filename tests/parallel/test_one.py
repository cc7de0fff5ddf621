"""One process: what stands in for a loss that is not finite."""

from __future__ import annotations

import torch

from lfu.parallel.one import OneProcess


def test_nothing_reaches_a_theta_on_several_devices():
    """As `device_map="auto"` lays a model out; the second device is torch's meta device."""
    theta = [torch.nn.Parameter(torch.ones(3, device=device)) for device in ("cpu", "meta")]
    loss = OneProcess().nothing({}, theta)
    assert float(loss.detach()) == 0
    loss.backward()
    assert [p.grad.device.type for p in theta] == ["cpu", "meta"]
    assert not theta[0].grad.any()
