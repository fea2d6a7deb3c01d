"""Models that transformers and bitsandbytes packed and saved."""

import shutil

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

SMALL = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
# Rows of whole blocks: with AVX-512 bitsandbytes 0.50.2 dequantizes others wrongly (rows of 96 in blocks of 64).
GATED = SMALL | {"intermediate_size": 128, "num_key_value_heads": 2}
# Other models than architectures.py's: Llama's head is not tied, Qwen3's is, and OPT projects its embeddings.
CONFIGS = {
    "llama": transformers.LlamaConfig(**GATED),
    "gpt2": transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=64),
    "qwen3": transformers.Qwen3Config(**GATED, head_dim=16, tie_word_embeddings=True),
    "gemma3": transformers.Gemma3TextConfig(**GATED, head_dim=16, sliding_window=4),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=256, word_embed_proj_dim=128, max_position_embeddings=64),
}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """packed(architecture, dtype=…, **BitsAndBytesConfig) is a directory that transformers + bitsandbytes saved."""
    made = {}

    def make(architecture, dtype=torch.float32, max_shard_size="1GB", **config):
        key = (architecture, dtype, max_shard_size, str(config))
        if key not in made:
            dense, made[key] = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("packed")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=dtype)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter)
            model.save_pretrained(dense)
            config = BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4"} | config)
            theirs = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=dtype)
            theirs.save_pretrained(made[key], max_shard_size=max_shard_size)
        return made[key]

    return make


@pytest.fixture
def llama_copy(packed, tmp_path):
    """A directory of its own to damage: the Llama with double quantization."""
    return shutil.copytree(packed("llama", bnb_4bit_use_double_quant=True), tmp_path / "llama")
