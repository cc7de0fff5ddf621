"""Every model family of docs/families.md against the same promises, and architectures that nobody has seen before.

The models are tiny and random (tests/families.py). What takes long, hybrids mostly, is marked `soak`.
"""

from __future__ import annotations

import copy
import warnings

import families
import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from families import FAMILIES, Family, with_lora
from oracle import Oracle
from peft import PeftModel
from tiny import DEVICE, Float64Throughout, gradients, relative_difference, tiny_batch
from torch import nn

from lfu import LfUConfig, LfUStep, LfUTrainer
from lfu.model.anatomy import anatomy
from lfu.model.rng import generators
from lfu.undesirable import LoRA, Steering
from lfu.undesirable.experts import PlusLowRank

transformers.logging.set_verbosity_error()  # slow reference kernels are what is wanted here
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*were not called in the first forward"),
    pytest.mark.filterwarnings("ignore:.*neither linear layers nor fused experts"),
    pytest.mark.filterwarnings("ignore:.*keys did not match any targeted module"),
]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
BATCH = tiny_batch(rows=2, length=8)


def inputs() -> dict[str, torch.Tensor]:
    return {name: BATCH[name] for name in ("input_ids", "attention_mask")}


def hidden_and_logits(model, step: LfUStep) -> list[torch.Tensor]:
    parts = step.anatomy
    kept: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda m, a, out: kept.append(_first(out))) for block in parts.blocks]
    try:
        return [model(**inputs(), use_cache=False).logits, *kept]
    finally:
        for handle in handles:
            handle.remove()


def _first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def steps_of(model) -> list[LfUStep]:
    return [LfUStep(model, auxiliary=kind) for kind in (LoRA(rank=3), "steering")]


# -- the matrix --------------------------------------------------------------------------------------------------------


@every_family
def test_a_zero_auxiliary_changes_nothing(family: Family):
    """Attached and zero: hidden states and logits are equal, entry by entry."""
    model = family.build()
    for step in steps_of(model):
        plain = hidden_and_logits(model, step)
        step.auxiliary.reset(generators(0, 0))
        with step.auxiliary.attached():
            attached = hidden_and_logits(model, step)
        assert len(plain) == len(step.anatomy.blocks) + 1
        assert all(torch.equal(a, b) for a, b in zip(plain, attached))


def _cases():
    for family in FAMILIES:
        for theta in ("full", "lora"):
            for kind in ("lora", "steering"):
                # each theta and each auxiliary once; the other two pairs bring no code that these have not run
                fast = (theta, kind) == ("full", "lora") or (not family.slow and (theta, kind) == ("lora", "steering"))
                marks = [] if fast else [pytest.mark.soak]
                yield pytest.param(family, theta, kind, marks=marks, id=f"{family.key}-{theta}-{kind}")


@pytest.mark.parametrize(("family", "theta", "kind"), _cases())
def test_the_step_is_the_oracle(family: Family, theta: str, kind: str):
    """Losses and gradients of the naive step, in float64, to 1e-10."""
    model = family.build(theta)
    step = LfUStep(model, auxiliary=LoRA(rank=3) if kind == "lora" else Steering())
    layers = list(range(1, len(step.anatomy.blocks) + 1))
    oracle = Oracle(
        model, auxiliary=kind, alpha=0.1, lam=5.0, consistency="mse", layers=layers, blocks=family.blocks,
        uncalled=family.uncalled,
    )  # fmt: skip
    drawn = None
    if kind == "lora":
        step.auxiliary.reset(generators(step.settings.seed, 0))
        names = [*step.auxiliary.names, *["experts"] * len(step.auxiliary.experts)]
        drawn = [
            a.clone() for name, (a, _) in zip(names, step.auxiliary.pairs) if not name.endswith(family.uncalled or "/")
        ]
    with Float64Throughout():
        record = step(BATCH)
        want = oracle(BATCH, a_matrices=drawn)
    assert record.skipped is None
    assert record.consistency > 0
    assert relative_difference(gradients(model), want["grads"]) < 1e-10
    assert record.sft_loss == pytest.approx(want["sft_loss"], rel=1e-10)
    assert record.consistency == pytest.approx(want["consistency"], rel=1e-9)
    assert record.ascent_grad_norm == pytest.approx(want["norm"], rel=1e-10)


@every_family
def test_logits_made_from_the_last_representation_are_the_models(family: Family):
    """`consistency="logit_kl"` scales and caps as the family does."""
    model = family.build()
    step = LfUStep(model, consistency="logit_kl")
    where = torch.arange(BATCH["input_ids"].numel(), device=DEVICE)
    with Float64Throughout(), step.reader.reading(where, detach=True) as hidden:
        logits = model(**inputs(), use_cache=False).logits.flatten(0, 1)
    (last,) = hidden.values()
    torch.testing.assert_close(step.anatomy.logits(last), logits, rtol=1e-12, atol=1e-12)


@every_family
def test_training_lowers_the_loss_and_what_is_saved_is_what_was_trained(family: Family, tmp_path):
    model = family.build(dtype=torch.float32)
    step = LfUStep(model, alpha=0.01, lam=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(3):
        losses.append(step(BATCH).sft_loss)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    model.eval().save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = type(model).from_pretrained(tmp_path, experts_implementation="eager").to(DEVICE).eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, again(**inputs()).logits)


@every_family
def test_every_linear_layer_of_every_block_has_an_auxiliary(family: Family):
    """And every fused expert; by weights, counted without the package's own search."""
    model = family.build()
    auxiliary = LoRA()
    auxiliary.bind(anatomy(model))
    blocks = model.get_submodule(family.blocks)
    linear = {id(m.weight) for m in blocks.modules() if type(m).__name__ in ("Linear", "Conv1D", "FalconLinear")}
    fused = {id(p) for name, p in blocks.named_parameters() if "experts" in name and p.dim() == 3}
    assert sorted(id(site.weight) for site in auxiliary.sites) == sorted(linear)
    assert {id(experts.weight) for experts in auxiliary.experts} == fused
    assert bool(fused) == ("experts" in family.special)


def test_the_page_is_up_to_date():
    assert families.PAGE.read_text() == families.page_with(families.table()), "run: python tests/families.py"


@pytest.mark.soak
@pytest.mark.parametrize("theta", ["full", "lora"])
@every_family
def test_the_trainer_runs_it_as_trl_is_set_up(family: Family, theta: str, tmp_path):
    """TRL's fused head and gradient checkpointing included; the adapter or model that is saved is what was trained."""
    from test_trainer import DATA, settings, tokenizer

    # TRL's fused head looks for config.num_experts, which this one calls num_local_experts
    options = {"router_aux_loss_coef": 0.0} if family.name == "GraniteMoE hybrid" else {}
    model = family.build(dtype=torch.float32)
    untrained = copy.deepcopy(model)
    run = LfUTrainer(
        model=with_lora(model) if theta == "lora" else model,
        args=settings(tmp_path / "run", LfUConfig, max_steps=12, learning_rate=2e-2, **options),
        train_dataset=Dataset.from_list(DATA["prompt_completion"]),
        processing_class=tokenizer(),
    )
    run.train()
    losses = [entry["lfu/sft_loss"] for entry in run.state.log_history if "lfu/sft_loss" in entry]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    assert all(entry["lfu/skipped"] == 0 for entry in run.state.log_history if "lfu/skipped" in entry)
    run.save_model(tmp_path / "saved")
    load = lambda: PeftModel.from_pretrained(untrained, tmp_path / "saved")
    again = load() if theta == "lora" else type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    again.to(DEVICE).config._experts_implementation = "eager"
    with torch.no_grad():
        torch.testing.assert_close(run.model.eval()(**inputs()).logits, again.eval()(**inputs()).logits)


# -- fused experts -----------------------------------------------------------------------------------------------------

MIXTRAL = next(family for family in FAMILIES if family.name == "Mixtral")


@pytest.mark.parametrize("name", ["Mixtral", "GPT-OSS"])
@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_experts_multiply_by_the_sum_however_the_model_does_it(way: str, name: str):
    """With a moved pair: the logits of a model whose experts hold `W + scaling B A`."""
    family = next(family for family in FAMILIES if family.name == name)
    model = family.build(dtype=torch.float32)
    model.set_experts_implementation(way)
    auxiliary = LoRA(targets=["gate_up_proj", "down_proj"])
    auxiliary.bind(anatomy(model))
    assert not auxiliary.sites
    auxiliary.reset(generators(0, 0))
    for _, b in auxiliary.pairs:
        torch.nn.init.normal_(b, std=0.3)
    auxiliary.move([None] * len(auxiliary.pairs))
    with torch.no_grad():
        plain = model(**inputs()).logits
        with auxiliary.attached():
            moved = model(**inputs()).logits
        for experts, (a, b) in zip(auxiliary.experts, auxiliary.pairs):
            delta = auxiliary.scaling * b @ a
            experts.weight.add_(delta.mT if experts.transposed else delta)
        want = model(**inputs()).logits
    assert float((want - plain).abs().max()) > 0.1
    torch.testing.assert_close(moved, want, rtol=1e-4, atol=1e-5)


def test_a_small_move_of_an_expert_is_not_rounded_away_in_bfloat16():
    """The move is far below the rounding of W: formed in bfloat16, the sum would be W again."""
    weight = torch.full((2, 16, 16), 1.0, dtype=torch.bfloat16, device=DEVICE)
    left, right = torch.full((2, 16, 8), 1e-3, device=DEVICE), torch.full((2, 8, 16), 1e-1, device=DEVICE)
    assert torch.equal(weight + (left @ right).bfloat16(), weight)
    stand_in = PlusLowRank.of(weight, left.bfloat16(), right.bfloat16())
    x = torch.eye(16, dtype=torch.bfloat16, device=DEVICE)
    x[:, 1::2] = -x[:, ::2]  # W x is zero: what is left is L R x
    x[:, ::2] *= 1.5
    x[:, 1::2] *= 1.5
    exact = F.linear(x.double(), weight[1].double() + (left @ right)[1].double())
    torch.testing.assert_close(F.linear(x, stand_in[1]).double(), exact, rtol=0.02, atol=1e-9)


def test_anything_else_done_to_the_stand_in_is_done_to_the_sum():
    weight, left, right, x = (
        torch.randn(3, *shape, device=DEVICE, dtype=torch.float64) for shape in ((4, 5), (4, 2), (2, 5), (6, 5))
    )
    stand_in, whole = PlusLowRank.of(weight, left, right), weight + left @ right
    assert stand_in.shape == whole.shape
    assert stand_in.dtype == whole.dtype
    for did in (
        lambda w: w * 2, lambda w: w[1:], lambda w: w[0, 1], lambda w: w.permute(2, 0, 1), lambda w: w.transpose(0, 1),
        lambda w: torch.einsum("eoi,eti->eto", w, x), lambda w: w.chunk(2, dim=1)[1], lambda w: w.float().sum(),
        lambda w: torch.bmm(w, x.mT), lambda w: w @ x.mT, lambda w: x @ w.transpose(1, 2), lambda w: x @ w.mT,
        lambda w: torch.bmm(x, w.transpose(-1, -2)), lambda w: F.linear(x[0], w[0]), lambda w: w.unbind(0)[1],
        lambda w: w[torch.tensor([0, 2])] @ x.mT[:2], lambda w: F.linear(x[0], w[2], bias=torch.ones(4).to(x)),
        lambda w: torch.stack([w[0], w[1]]), lambda w: torch.cat([x, w], dim=1),
    ):  # fmt: skip
        torch.testing.assert_close(torch.as_tensor(did(stand_in)).as_subclass(torch.Tensor), did(whole))


def test_nothing_is_left_on_the_experts_after_an_error():
    model = MIXTRAL.build()
    experts = model.model.layers[0].mlp.experts
    step = LfUStep(model)
    with pytest.raises(ZeroDivisionError):
        LfUStep(model, loss_fn=lambda m, batch, items: (m(**inputs()), 1 / 0))(BATCH)
    handle = model.model.layers[1].mlp.experts.act_fn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(BATCH)
    handle.remove()
    for layer in model.model.layers:
        assert "gate_up_proj" not in layer.mlp.experts.__dict__
        assert type(layer.mlp.experts.gate_up_proj) is nn.Parameter
        assert not layer.mlp.experts._forward_hooks
        assert not layer.mlp.experts._forward_pre_hooks
    assert "gate_up_proj" in dict(experts.named_parameters())


@pytest.mark.parametrize("theta", ["full", "lora"])
def test_experts_under_gradient_checkpointing(theta: str):
    """The recompute in the backward sees the same stand-in."""
    found = []
    for checkpointing in (False, True):
        model = MIXTRAL.build(theta)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        LfUStep(model, ascent_steps=2)(BATCH)
        found.append(gradients(model))
    assert relative_difference(*found) < 1e-12


def test_experts_of_an_unknown_layout_are_counted_and_named():
    """DBRX stacks its experts into the rows of a matrix."""
    config = transformers.DbrxConfig(
        d_model=16, n_heads=4, n_layers=2, max_seq_len=32, vocab_size=61,
        attn_config=dict(kv_n_heads=2, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=16, moe_num_experts=2, moe_top_k=1),
    )  # fmt: skip
    message = r"6 weight tensors in the blocks of DbrxForCausalLM \(3,072 numbers: ffn.experts.mlp.v1, .*get no LoRA"
    with pytest.warns(UserWarning, match=message):
        LfUStep(transformers.DbrxForCausalLM(config))


def test_routers_and_short_convolutions_are_not_worth_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LfUStep(MIXTRAL.build())


# -- layers that are shared, or not called -----------------------------------------------------------------------------


def test_a_weight_that_several_layers_share_has_one_auxiliary():
    model = next(family for family in FAMILIES if family.name == "Zamba2").build()
    step = LfUStep(model)
    first, second = (model.model.layers[i].shared_transformer.self_attn.q_proj for i in (1, 2))
    assert first.weight is second.weight
    assert len(step.auxiliary.uses) > len(step.auxiliary.sites)
    number = {id(site): n for site, n in step.auxiliary.uses}
    assert number[id(first)] == number[id(second)]


@pytest.mark.filterwarnings("default:.*were not called in the first forward")
def test_layers_whose_weight_is_read_without_a_call_are_named_once():
    model = next(family for family in FAMILIES if family.name == "Mamba").build()
    step = LfUStep(model)
    with pytest.warns(UserWarning, match=r"2 layers \(1.mixer.dt_proj, 2.mixer.dt_proj\) were not called"):
        step(BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(BATCH)


# -- architectures nobody has seen before ------------------------------------------------------------------------------


class _Block(nn.Module):
    """Returns a tuple, as older models do."""

    def __init__(self, width: int):
        super().__init__()
        self.mix, self.grow, self.shrink = nn.Linear(width, width), nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, hidden):
        past = hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1, device=hidden.device).unsqueeze(-1)
        hidden = hidden + self.mix(past)
        return hidden + self.shrink(torch.tanh(self.grow(hidden))), None


class HomeMadeConfig(transformers.PreTrainedConfig):
    model_type = "home_made"

    def __init__(self, layout: str = "list", **more):
        super().__init__(**more)
        self.layout, self.hidden_size, self.num_hidden_layers, self.vocab_size = layout, 16, 3, 61


class HomeMade(transformers.PreTrainedModel):
    """A decoder that returns a tuple. `layout`: list (beside lists of norms), chain, named, or shared."""

    config_class = HomeMadeConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        width, depth = config.hidden_size, config.num_hidden_layers
        self.embed = nn.Embedding(config.vocab_size, width)
        made = [_Block(width) for _ in range(depth)]
        if config.layout == "list":
            self.norms, self.trunk = nn.ModuleList(nn.LayerNorm(width) for _ in made), nn.ModuleList(made)
        elif config.layout == "chain":
            self.tower = nn.ModuleDict({"trunk": nn.Sequential(*made)})
        elif config.layout == "shared":
            self.trunk = nn.ModuleList(made[:1] * depth)
        else:
            self.first, self.second, self.third = made
        self.post_init()

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        layout = self.config.layout
        hidden = self.embed(input_ids)
        for block in {
            "list": lambda: self.trunk, "shared": lambda: self.trunk, "chain": lambda: self.tower["trunk"],
            "named": lambda: (self.first, self.second, self.third),
        }[layout]():  # fmt: skip
            (hidden, _) = block(hidden)
        return hidden, None


class HomeMadeForCausalLM(transformers.PreTrainedModel):
    config_class = HomeMadeConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.body = HomeMade(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(self.body(input_ids)[0]))


def home_made(layout: str) -> HomeMadeForCausalLM:
    torch.manual_seed(0)
    model = HomeMadeForCausalLM(HomeMadeConfig(layout)).double().to(DEVICE)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("kind", ["lora", "steering"])
@pytest.mark.parametrize(("layout", "blocks"), [("list", None), ("chain", "tower.trunk")])
def test_a_home_made_architecture_is_the_oracle_too(layout: str, blocks: str | None, kind: str):
    model = home_made(layout)
    step = LfUStep(model, blocks=blocks, auxiliary=kind)
    path = f"body.{blocks or 'trunk'}"
    oracle = Oracle(model, auxiliary=kind, alpha=0.1, lam=5.0, consistency="mse", layers=[1, 2, 3], blocks=path)
    drawn = None
    if kind == "lora":
        step.auxiliary.reset(generators(step.settings.seed, 0))
        drawn = [a.clone() for a, _ in step.auxiliary.pairs]
        assert len(drawn) == 9
    step(BATCH)
    assert relative_difference(gradients(model), oracle(BATCH, a_matrices=drawn)["grads"]) < 1e-10


@pytest.mark.parametrize("blocks", [None, "first", "trunks", "embed"])
def test_blocks_that_cannot_be_found_are_asked_for_by_the_name_of_the_argument(blocks: str | None):
    layout = "named" if blocks is None else "chain"
    message = {
        None: "no list of 3 blocks found in HomeMade: name it with the argument `blocks`, for example blocks='layers'",
        "first": "blocks='first': HomeMade has no such module; its lists of modules are tower, tower.trunk",
        "trunks": "blocks='trunks': HomeMade has no such module",
        "embed": "blocks='embed' is a Embedding, not an nn.ModuleList",
    }[blocks]
    with pytest.raises(ValueError, match=message):
        LfUStep(home_made(layout), blocks=blocks)


def test_the_config_passes_the_place_of_the_blocks_on(tmp_path):

    from test_trainer import DATA, settings, tokenizer

    for blocks, message in (
        (None, None),
        ("model.layers", "LlamaModel has no such module; its lists of modules are layers"),
    ):
        make = lambda blocks=blocks: LfUTrainer(
            model=FAMILIES[0].build(dtype=torch.float32),
            args=settings(tmp_path, LfUConfig, blocks=blocks),
            train_dataset=Dataset.from_list(DATA["prompt_completion"]),
            processing_class=tokenizer(),
        )
        if message is None:
            assert make().step is not None
        else:
            with pytest.raises(ValueError, match=message):
                make()


def test_one_block_run_several_times_is_refused():
    """ALBERT's way: the layers can't be told apart by their modules."""
    with pytest.raises(ValueError, match="HomeMade runs one block as several layers"):
        LfUStep(home_made("shared"))


def test_an_encoder_decoder_is_refused():
    config = transformers.T5Config(vocab_size=61, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8)
    with pytest.raises(
        ValueError, match="T5ForConditionalGeneration is an encoder-decoder: LfU compares layers of a dec"
    ):
        LfUStep(transformers.T5ForConditionalGeneration(config))
