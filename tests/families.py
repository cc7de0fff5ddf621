"""One tiny random model of every family that docs/families.md promises: 2 or 3 layers, d = 16, 61 tokens.

`python tests/families.py` writes the table of docs/families.md; test_families.py fails where it is out of date.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny import DEVICE

from lfu.model.anatomy import anatomy
from lfu.undesirable import LoRA

VOCAB = 61
_SMALL = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=64, tie_word_embeddings=False,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attention_dropout=0.0, hidden_dropout=0.0)
_MOE = dict(moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, norm_topk_prob=True)
_MAMBA2 = dict(
    mamba_n_heads=4,
    mamba_d_head=8,
    mamba_d_state=4,
    mamba_n_groups=1,
    mamba_expand=2,
    mamba_d_conv=4,
    mamba_chunk_size=4,
)


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        name: what people call it.
        model: the transformers class.
        config: what its config is given beyond the common small sizes.
        blocks: where its blocks are, below the causal language model; the oracle goes by it.
        special: what is special about it, for the table.
        uncalled: linear layers whose weight the model reads without calling them; `special` names them.
        slow: most of its cases run in `make soak` alone.
    """

    name: str
    model: str
    config: dict[str, Any] = field(default_factory=dict)
    blocks: str = "model.layers"
    special: str = ""
    uncalled: tuple[str, ...] = ()
    slow: bool = False

    @property
    def key(self) -> str:
        return re.sub(r"\W+", "_", self.name.lower()).strip("_")

    def build(self, theta: str = "full", dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        """A random model with weights large enough that the layers differ; `theta`: full, or lora (all linears)."""
        torch.manual_seed(seed)
        kind = getattr(transformers, self.model)
        settings = {name: value for name, value in (_SMALL | _NO_DROPOUT | self.config).items() if value is not None}
        config = kind.config_class(**settings)
        config._experts_implementation = "eager"  # grouped products know no float64 on a CPU
        model = kind(config).to(dtype)
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.2)
        if theta == "lora":
            model = with_lora(model).to(dtype)
        return model.to(DEVICE).train()


FAMILIES = [
    Family("Llama", "LlamaForCausalLM"),
    Family("Qwen2", "Qwen2ForCausalLM", special="bias on q, k, v"),
    Family("Qwen3", "Qwen3ForCausalLM", special="norms on q and k"),
    Family("Mistral", "MistralForCausalLM", dict(sliding_window=4), special="sliding window"),
    Family("SmolLM3", "SmolLM3ForCausalLM", special="some layers without rotary positions"),
    Family("Phi-3", "Phi3ForCausalLM", special="fused qkv and gate-up projections"),
    Family("OLMo 2", "Olmo2ForCausalLM", special="norms after attention and MLP"),
    Family("StableLM", "StableLmForCausalLM", dict(use_parallel_residual=True), special="parallel residual"),
    Family(
        "Gemma 2", "Gemma2ForCausalLM",
        dict(query_pre_attn_scalar=4, sliding_window=4, final_logit_softcapping=2.0, attn_logit_softcapping=5.0),
        special="logits and attention soft-capped, sliding window in turn",
    ),
    Family(
        "Gemma 3 (text)", "Gemma3ForCausalLM",
        dict(query_pre_attn_scalar=4, sliding_window=4, num_hidden_layers=3, sliding_window_pattern=3),
        special="sliding window on most layers",
    ),
    Family(
        "Granite", "GraniteForCausalLM",
        dict(logits_scaling=3.0, residual_multiplier=0.7, embedding_multiplier=2.0, attention_multiplier=0.4),
        special="logits divided, residuals scaled",
    ),
    Family("Cohere", "CohereForCausalLM", dict(logit_scale=0.3, use_qk_norm=True), special="parallel, logits scaled"),
    Family("Cohere 2", "Cohere2ForCausalLM", dict(logit_scale=0.3, sliding_window=4),
           special="parallel, sliding window"),
    Family("GPT-2", "GPT2LMHeadModel", dict(n_inner=24), "transformer.h", "Conv1D, weights `(in, out)`"),
    Family("GPT-NeoX", "GPTNeoXForCausalLM", dict(), "gpt_neox.layers", "parallel attention and MLP"),
    Family("OPT", "OPTForCausalLM", dict(ffn_dim=24, dropout=0.0, word_embed_proj_dim=16, do_layer_norm_before=True),
           "model.decoder.layers", "decoder inside the decoder"),
    Family("Falcon", "FalconForCausalLM",
           dict(new_decoder_architecture=False, parallel_attn=True, multi_query=True, head_dim=None,
                num_key_value_heads=None),
           "transformer.h", "parallel attention, one key-value head"),
    Family("Mixtral", "MixtralForCausalLM", dict(num_local_experts=4, num_experts_per_tok=2), special="fused experts"),
    Family("Qwen2-MoE", "Qwen2MoeForCausalLM", _MOE | dict(shared_expert_intermediate_size=12),
           special="fused experts and a shared one"),
    Family("Qwen3-MoE", "Qwen3MoeForCausalLM", _MOE, special="fused experts"),
    Family("GPT-OSS", "GptOssForCausalLM", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
           special="fused experts `(in, out)` with bias, attention sinks"),
    Family("GraniteMoE hybrid", "GraniteMoeHybridForCausalLM",
           dict(layer_types=["mamba", "attention"], num_local_experts=4, num_experts_per_tok=2, logits_scaling=3.0,
                shared_intermediate_size=12) | _MAMBA2,
           special="Mamba 2 and attention, fused experts; TRL 1.16 needs `router_aux_loss_coef=0`", slow=True),
    Family("Jamba", "JambaForCausalLM",
           dict(mamba_d_state=4, mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=4,
                attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2),
           special="Mamba and attention, fused experts; `dt_proj` is not called", uncalled=("dt_proj",)),
    Family("Bamba", "BambaForCausalLM", dict(attn_layer_indices=[1]) | _MAMBA2,
           special="Mamba 2 and attention", slow=True),
    Family("Falcon-H1", "FalconH1ForCausalLM", _MAMBA2 | dict(mamba_d_ssm=32, lm_head_multiplier=0.5),
           special="Mamba 2 beside attention, logits multiplied", slow=True),
    Family("Zamba2", "Zamba2ForCausalLM", dict(
        tie_word_embeddings=True, num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "hybrid"],
        num_mem_blocks=1, mamba_d_state=4, mamba_ngroups=1, n_mamba_heads=4, mamba_expand=2, chunk_size=4,
        use_mem_eff_path=False, num_key_value_heads=4),
        special="one attention block shared by several layers", slow=True),
    Family("Mamba", "MambaForCausalLM", dict(state_size=4, time_step_rank=4, expand=2, use_mambapy=False),
           "backbone.layers", "no attention; `dt_proj` is not called", uncalled=("dt_proj",)),
]  # fmt: skip


def with_lora(model: Any) -> Any:
    """A LoRA theta on all linear layers, away from its own zero as after some training."""
    conv = isinstance(model, transformers.GPT2LMHeadModel)
    targets: Any = ["c_attn", "c_proj", "c_fc"] if conv else "all-linear"
    if model.config.model_type in ("mamba", "falcon_h1"):  # PEFT refuses out_proj, whose weight fast kernels read
        head = model.get_output_embeddings()
        names = (n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head)
        targets = [name for name in names if not name.endswith("out_proj")]
    adapter = LoraConfig(r=2, lora_alpha=4, target_modules=targets, fan_in_fan_out=conv)
    model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


# -- the table of docs/families.md -------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
_MARKS = "<!-- table: python tests/families.py -->\n", "<!-- end of table -->\n"


def table() -> str:
    """The matrix as Markdown: what was found in each tiny model, as the code finds it today."""
    rows = [
        "| family | transformers class | blocks | in each block, a LoRA auxiliary on | special |",
        "| --- | --- | --- | --- | --- |",
    ]
    for family in FAMILIES:
        model = family.build()
        parts = anatomy(model)
        auxiliary = LoRA()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            auxiliary.bind(parts)
        path = next(name for name, module in model.named_modules() if list(module.children()) == parts.blocks)
        covered = _listed(name for name in auxiliary.names if not name.endswith(family.uncalled or ("/",)))
        if auxiliary.experts:
            covered += "; experts: " + _listed(name for name, _ in parts.experts())
        rows.append(f"| {family.name} | `{family.model}` | `{path}` | {covered} | {family.special} |")
    return "\n".join(rows) + "\n"


def _listed(names: Iterable[str]) -> str:
    """The last part of each name, numbers of copies left out, each once."""
    last = ([part for part in name.split(".")[1:] if not part.isdigit()][-1] for name in names)
    return ", ".join(f"`{name}`" for name in dict.fromkeys(last))


def page_with(new: str) -> str:
    """docs/families.md with `new` as its table."""
    before, _, rest = PAGE.read_text().partition(_MARKS[0])
    return before + _MARKS[0] + new + _MARKS[1] + rest.partition(_MARKS[1])[2]


if __name__ == "__main__":
    PAGE.write_text(page_with(table()))
