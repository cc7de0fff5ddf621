"""The LoRA auxiliary: where it attaches, and how its products are added."""

from __future__ import annotations

import functools
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import DEVICE, gradients, relative_difference, tiny_batch, tiny_model
from transformers.pytorch_utils import Conv1D

from lfu import LfUStep
from lfu.model.anatomy import anatomy
from lfu.model.rng import generators
from lfu.undesirable import LoRA
from lfu.undesirable.lora import _SharedInputs


@pytest.mark.parametrize("saved", ["down_proj", "mlp"])
def test_of_a_module_that_peft_copies_the_copy_alone_has_a_pair(saved):
    """`modules_to_save`: the original stays in the tree and is never called."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved])
    model = get_peft_model(tiny_model("llama"), config, autocast_adapter_dtype=False).double().to(DEVICE)
    step = LfUStep(model)
    assert len(step.auxiliary.sites) == 4 * 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step(tiny_batch()).skipped is None


def test_of_fused_experts_that_peft_copies_the_copy_alone_has_pairs():
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"])
    model = get_peft_model(tiny_model("mixtral"), config, autocast_adapter_dtype=False).double().to(DEVICE)
    step = LfUStep(model)
    assert len(step.auxiliary.experts) == 4 * 2
    assert step(tiny_batch()).skipped is None


def test_lora_targets():
    step = LfUStep(tiny_model("llama"), auxiliary=LoRA(targets=["q_proj", "down_proj"]))
    assert len(step.auxiliary.sites) == 2 * 4


@pytest.mark.parametrize("theta", ["full", "lora"])
def test_an_input_that_several_layers_share_is_read_once(monkeypatch, theta):
    model = tiny_model("llama", theta=theta)
    step = LfUStep(model)
    products = 0

    def counted(*args):
        nonlocal products
        products += 1
        return torch.nn.functional.linear(*args)

    monkeypatch.setattr("lfu.undesirable.lora.F", SimpleNamespace(linear=counted))
    counts = []
    for _ in range(2):
        products = 0
        step(tiny_batch())
        counts.append(products)
    shared = 4 * 4  # four layers of q k v, o, gate up, down
    assert counts == [4 * 7 + shared, shared + shared]  # the first pass of all shows who shares


@pytest.mark.parametrize("theta", ["full", "lora"])
def test_sites_that_are_seen_together_late_change_nothing_under_gradient_checkpointing(theta):
    """A block that runs again must save what it saved, though by then more is known of its sites."""

    class Forgetful(LoRA):
        def move(self, steps, length=1.0):
            super().move(steps, length)
            self.groups = {}  # as if the perturbed pass were the first to call them: experts nobody was sent to

    batch, found = tiny_batch(), []
    for kind in (LoRA, Forgetful):
        model = tiny_model("llama", theta=theta)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if theta == "lora":
            model.enable_input_require_grads()
        step = LfUStep(model, auxiliary=kind())
        for _ in range(2):
            assert step(batch).skipped is None
        found.append(gradients(model))
    assert relative_difference(*found) < 1e-12


@pytest.mark.parametrize("layer", [torch.nn.Linear(8, 6), torch.nn.Linear(8, 6, bias=False), Conv1D(6, 8)], ids=str)
@pytest.mark.parametrize("moved", [False, True])
def test_the_low_rank_product_is_added_where_the_output_lies(layer, moved):
    """No copy, also of a view, as a layer with a bias returns; and what comes out may be changed in place."""
    x, b = torch.randn(2, 5, 8), torch.randn(6, 3, requires_grad=True)
    inputs = SimpleNamespace(low=lambda n, x: torch.ones(10, 3))
    auxiliary = LoRA()
    auxiliary.pairs, auxiliary.moved = [(None, b)], moved
    plain = layer(x)
    want = plain + moved * auxiliary.scaling * (torch.ones(10, 3) @ b.T).view(2, 5, 6)
    found = auxiliary._hook(inputs, 0)(layer, (x,), {}, plain)
    torch.testing.assert_close(found, want)
    assert found.data_ptr() == plain.data_ptr()
    found.clamp_(-1, 1).sum().backward()
    assert b.grad is not None


def test_experts_whose_kernel_reads_the_weight_itself_are_told():
    """As Liger's fused experts do: the auxiliary's stand-in for the parameter is not asked."""
    import transformers

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad, None

    config = transformers.MixtralConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).to(DEVICE)
    for block in model.model.layers:
        experts = block.mlp.experts
        experts.forward = lambda x, *_, e=experts: Kernel.apply(x, e.gate_up_proj)
    with pytest.warns(UserWarning, match=r"4 layers \(experts.gate_up_proj, experts.down_proj.* not called"):
        assert LfUStep(model)(tiny_batch()).skipped is None


def test_an_output_that_a_hook_of_the_user_keeps_stays_as_it_was():
    found, kept = [], []
    for watched in (False, True):
        model = tiny_model("llama")
        if watched:
            linear = model.model.layers[0].mlp.down_proj
            linear.register_forward_hook(lambda module, args, y: kept.append((y, y.detach().clone())))
        LfUStep(model)(tiny_batch())
        found.append(gradients(model))
    assert len(kept) == 2
    assert all(torch.equal(y.detach(), then) for y, then in kept)
    assert relative_difference(*found) == 0


def test_linear_layers_called_by_keyword():
    """And by a forward of another library, in another order: Liger's SwiGLU."""
    found = []
    for patched in (False, True):
        model = tiny_model("llama", theta="lora")
        if patched:
            for block in anatomy(model).blocks:
                block.mlp.forward = functools.partial(_swiglu, block.mlp)
        for seed in (0, 1):
            assert LfUStep(model)(tiny_batch(seed)).skipped is None
        found.append(gradients(model))
    assert relative_difference(*found) < 1e-12


def _swiglu(mlp, x):
    up = mlp.up_proj(input=x) if type(mlp.up_proj) is torch.nn.Linear else mlp.up_proj(x=x)
    return mlp.down_proj(_SiLUMul.apply(mlp.gate_proj(x), up))


class _SiLUMul(torch.autograd.Function):
    """As Liger's: the backward writes over what was saved, gate and up."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        sigmoid = gate.sigmoid()
        of_gate = grad * up * (sigmoid * (1 + gate * (1 - sigmoid)))
        up.copy_(grad * gate * sigmoid)
        gate.copy_(of_gate)
        return gate, up


def test_the_matrices_are_those_of_the_last_move_in_any_dtype():
    """Two ascents move A, too; what was cast before belongs to the A before."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    bound = LoRA(rank=3), LoRA(rank=3)
    for auxiliary in bound:
        auxiliary.bind(anatomy(model))
    moved, again = bound
    moved.reset(generators(0, 0))
    batch = tiny_batch()
    with moved.attached():
        model(**batch)
    for _ in range(2):
        moved.move([torch.full_like(p, 0.1) for p in moved.parameters()])
    moved.freeze()
    again.restore(moved.kept())
    again.load_state(moved.state())  # sites that are read together: the last bits hang on it
    found = []
    for auxiliary in bound:
        with auxiliary.attached(), torch.no_grad():
            found.append(model(**batch).logits)
    assert torch.equal(*found)


def _shared_inputs():
    matrices = [torch.randn(2, 4, dtype=torch.float64) for _ in range(2)]
    return _SharedInputs(lambda dtype, n: matrices[n], 2, {0: [0, 1], 1: [0, 1]}, moved=True), matrices


def test_an_input_that_was_changed_in_place_is_read_again():
    x = torch.randn(3, 4, dtype=torch.float64)
    inputs, matrices = _shared_inputs()
    inputs.low(0, x)
    x.mul_(3)
    torch.testing.assert_close(inputs.low(1, x), x @ matrices[1].T)


def test_an_input_first_read_without_a_graph_is_read_again_with_one():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    inputs, _ = _shared_inputs()
    with torch.no_grad():
        inputs.low(0, x)
    assert inputs.low(1, x).requires_grad


def test_a_shared_input_is_not_kept_alive():
    x = torch.randn(3, 4, dtype=torch.float64)
    inputs, _ = _shared_inputs()
    inputs.low(0, x)
    gone = weakref.ref(x)
    del x
    assert gone() is None
