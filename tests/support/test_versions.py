"""What an older TRL lacks: the stand-ins give what the newest TRL's own code gives."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import trl.trainer.utils
from trl.models.activation_offloading import OffloadActivations

from lfu.support import versions

NEWEST = pytest.mark.skipif(not hasattr(trl.trainer.utils, "_use_triton"), reason="needs a TRL newer than 1.15")


def case(bias: bool):
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    return hidden, weight, torch.randn(11, requires_grad=True) if bias else None, torch.randint(11, (7,))


@NEWEST
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("outputs", [(), versions.OUTPUTS, ("is_top1",)])
def test_the_plain_loss_is_trls_own(bias, softcap, outputs):
    kernel = trl.trainer.utils._ChunkedLogProbFunction
    found = []
    for function in (kernel, versions.AnyDevice):
        hidden, weight, offset, targets = case(bias)
        results = function.apply(hidden, weight, offset, targets, 0.7, 4, softcap, 0.9, outputs)
        (results[0] * torch.arange(7)).sum().backward()
        found.append((*results, hidden.grad, weight.grad, None if offset is None else offset.grad))
    torch.testing.assert_close(*found)


def test_where_there_is_no_gpu_the_kernel_is_not_asked(monkeypatch):
    monkeypatch.setattr(versions.AnyDevice, "kernel", None)
    old = SimpleNamespace(_ChunkedLogProbFunction=None)
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", old)
    versions.mend_trl()
    versions.mend_trl()  # a second time it stays as it is
    assert old._ChunkedLogProbFunction is versions.AnyDevice
    assert versions.AnyDevice.kernel is None
    hidden, weight, _, targets = case(bias=False)
    log_p = old._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 4)[0]
    expected = -torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(log_p, expected)


@NEWEST
def test_the_newest_trl_is_left_alone():
    kernel, enter = trl.trainer.utils._ChunkedLogProbFunction, OffloadActivations.__enter__
    versions.mend_trl()
    assert trl.trainer.utils._ChunkedLogProbFunction is kernel
    assert OffloadActivations.__enter__ is enter
