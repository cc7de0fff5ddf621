"""Unpacking a GGUF file: bit for bit what transformers' own loading gives, and nothing silently left out."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lfu.model.unpack import write_float32

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

HIDDEN, INNER, LAYERS, HEADS, KV, VOCAB = 64, 96, 2, 4, 2, 40


def write_gguf(path, *, tied=True, arch="llama", drop=""):
    """A random Llama: linear weights in Q4_1, Q8_0 or float16, norms in float32; a BPE vocabulary of 40."""
    kinds = gguf.GGMLQuantizationType
    rng = np.random.default_rng(0)
    shapes = {"token_embd": ((VOCAB, HIDDEN), kinds.Q8_0), "output_norm": ((HIDDEN,), kinds.F32)}
    if not tied:
        shapes["output"] = (VOCAB, HIDDEN), kinds.F16
    for i in range(LAYERS):
        block = {
            "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // HEADS * KV, HIDDEN),
            "attn_v": (HIDDEN // HEADS * KV, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
            "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
        }  # fmt: skip
        for name, shape in block.items():
            shapes[f"blk.{i}.{name}"] = shape, kinds.F32 if len(shape) == 1 else kinds.Q4_1
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(97 + i) for i in range(26)), "ab", "cd"]
    writer.add_token_list(words + [f"<w{i}>" for i in range(VOCAB - len(words))])
    writer.add_token_types([3] * 3 + [1] * (VOCAB - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    for name, (shape, kind) in shapes.items():
        if name != drop:
            values = rng.standard_normal(shape).astype(np.float32)
            data = gguf.quants.quantize(values, kind)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_those_of_transformers_bit_for_bit(tmp_path, tied):
    file = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    folder = tmp_path / "out"
    folder.mkdir()
    reader = gguf.GGUFReader
    write_float32(file, folder)
    assert gguf.GGUFReader is reader  # put back
    ours = AutoModelForCausalLM.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    expected = theirs.state_dict()
    assert expected.keys() == ours.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert value.dtype is torch.float32
        assert torch.equal(value, expected[name]), name
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert ours.config.eos_token_id == ours.generation_config.eos_token_id == 2
    ids = AutoTokenizer.from_pretrained(folder)("abcd")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)("abcd")["input_ids"]


def test_a_tensor_too_few_is_an_error(tmp_path):
    """transformers would draw its numbers at random."""
    file = write_gguf(tmp_path / "tiny.gguf", drop="blk.1.ffn_up")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"has no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        write_float32(file, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
