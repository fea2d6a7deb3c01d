"""GGUF files, written here as llama.cpp writes them: a whole model comes out, or the file is refused by name."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.config import ModelConfig
from experiments.errors import UserError
from experiments.models.load import load_model
from tests.experiments.helpers import tiny

IDS = torch.arange(3, 43)[None]
THETA, WIDTH, HEADS, KV_HEADS = 1e4, 64, 4, 2
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 8192, "rope_theta": THETA}
ENDS = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
IN_BLOCK = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
}
IN_BLOCK |= {"up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm"}
IN_BLOCK |= {"post_attention_layernorm": "ffn_norm"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QDORA_CACHE", str(tmp_path / "cache"))


def llama(**more):
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": len(vocabulary())}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False, rope_theta=THETA, **more)).eval()


def vocabulary():
    found = tiny()[1].get_vocab()
    return [*sorted(found, key=found.get), "ab"]


def interleaved(weight, heads):
    """Rows as llama.cpp has them: its rotary turns neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path, model, kind="F32", without=(), more=(), arch="llama"):
    """A GGUF file of `model` at `path`; matrices are quantized as `kind`."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(THETA)
    names = vocabulary()
    writer.add_vocab_size(len(names))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names)
    writer.add_token_types([3 if name.startswith("<|") else 1 for name in names])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(names.index("<|im_end|>"))
    for name, tensor in model.state_dict().items():
        path_of, leaf = name.rsplit(".", 1)
        last = path_of.rpartition(".")[2]
        theirs = ENDS.get(path_of) or f"blk.{path_of.split('.')[2]}.{IN_BLOCK[last]}"
        weight = tensor.numpy()
        if last in ("q_proj", "k_proj") and leaf == "weight":
            weight = interleaved(weight, HEADS if last == "q_proj" else KV_HEADS)
        if theirs not in without:
            of = GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
            writer.add_tensor(f"{theirs}.{leaf}", gguf.quants.quantize(weight, of), raw_dtype=of)
    for name, values in more:
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path):
    return load_model(ModelConfig(name="gguf", source="gguf", path=str(path)), torch.float32, seed=0)[0]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_weights_come_out_as_gguf_dequantizes_them(tmp_path, kind):
    model = llama()
    loaded = load(write(tmp_path / "model.gguf", model, kind))
    of = GGMLQuantizationType[kind]
    for parameter in model.parameters():
        if parameter.dim() == 2:
            packed = gguf.quants.quantize(parameter.detach().numpy(), of)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(packed, of).reshape(parameter.shape).copy())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_a_file_without_a_head_has_a_tied_one(tmp_path):
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    torch.testing.assert_close(
        logits(load(write(tmp_path / "model.gguf", model, without=("output",)))), logits(model), rtol=1e-4, atol=1e-5
    )


def test_scaled_rotary_frequencies_are_read(tmp_path):
    """llama.cpp has divisors of frequencies where Llama 3.1 has settings."""
    model, plain = llama(rope_parameters=LLAMA_3), llama()
    divisors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    assert divisors.max() > 1.5
    loaded = load(write(tmp_path / "model.gguf", model, more=[("rope_freqs.weight", divisors)]))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"other.gguf: rope_freqs.weight is not Llama 3's"):
        load(write(tmp_path / "other.gguf", model, more=[("rope_freqs.weight", divisors + 0.5)]))
    ones = load(write(tmp_path / "ones.gguf", plain, more=[("rope_freqs.weight", torch.ones(8))]))
    torch.testing.assert_close(logits(ones), logits(plain), rtol=1e-4, atol=1e-5)


def test_weights_that_are_missing_or_not_read_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"lacks weights of LlamaForCausalLM: model.layers.1.mlp.up_proj.weight"):
        load(write(tmp_path / "missing.gguf", llama(), without=("blk.1.ffn_up",)))
    with pytest.raises(UserError, match=r"holds 64 values that Llama.* does not read, maybe blk.1.attn_q.bias"):
        load(write(tmp_path / "more.gguf", llama(), more=[("blk.1.attn_q.bias", np.ones(64))]))
    assert not any(entry.suffix != ".lock" for entry in (tmp_path / "cache").iterdir()), "nothing is kept"


def test_damaged_files_are_one_line(tmp_path):
    whole = write(tmp_path / "model.gguf", llama()).read_bytes()
    (tmp_path / "half.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "start.gguf").write_bytes(whole[:200])
    write(tmp_path / "clip.gguf", llama(), arch="clip")
    with pytest.raises(UserError, match=r"start.gguf is damaged: its header counts more than the file holds: "):
        load(tmp_path / "start.gguf")
    for name in ("half", "clip"):
        with pytest.raises(UserError, match=rf"{name}.gguf cannot be read as a language model: \w+"):
            load(tmp_path / f"{name}.gguf")
    with pytest.raises(UserError, match="is a directory: name the GGUF file in it"):
        load(tmp_path)
