"""The steering auxiliary."""

from __future__ import annotations

import torch
from tiny import tiny_batch, tiny_model

from lfu import LfUStep
from lfu.undesirable import Steering


def test_norm_preserving_steering_survives_a_zero_hidden_state():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[0].zero_()
    batch = {k: v.flip(1) for k, v in tiny_batch().items()}  # left padding, token 0
    assert LfUStep(model, auxiliary=Steering(preserve_norm=True))(batch).skipped is None
