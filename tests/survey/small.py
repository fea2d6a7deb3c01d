"""Small random models of every architecture of causal language models that transformers has."""

import dataclasses
import warnings
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 259  # of the survey's tokenizer: bytes and three special tokens
LARGEST = 6_000_000  # parameters
MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Sizes by the names that configurations give them. A configuration takes those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "embed_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(
        ("attention_hidden_size", "mamba_d_ssm", "lru_width", "altup_hidden_size", "cross_hidden_size"), 64
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff", "dim_ff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "shared_intermediate_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("index_head_dim", "linear_key_head_dim", "linear_value_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "gated_norm_rank"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k", "index_topk"), 2),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "index_n_heads", "sliding_window"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), VOCABULARY - 3),
    **dict.fromkeys(("eos_token_id", "pad_token_id"), VOCABULARY - 2),
    **dict.fromkeys(("image_size", "model_input_size", "patch_size"), 16),
    **dict.fromkeys(("type_vocab_size", "mm_tokens_per_image", "encoder_hash_byte_group_nb_functions"), 1),
    "mamba_n_heads": 8,
    "encoder_hash_byte_group_vocab": 50,
    "rotary_dim": 8,
    "first_k_dense_replace": 1,
    "is_decoder": True,
    "attention_type": "original_full",
    **dict.fromkeys(("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "hidden_dropout_prob"), 0.0),
    **dict.fromkeys(("attention_probs_dropout_prob", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "activation_dropout", "dropout_p", "emb_pdrop"), 0.0),
}
_KINDS = ("sliding_attention", "full_attention")
_QWEN4 = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16},
    **{"indexer_compress_ratio": 4, "ngram_vocab_size_base": 100, "split_ngram_parts": 1, "hc_lowrank": 8},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
}
# What single architectures need beside them.
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_config": {"hidden_size_global": 64, "vocab_size": 260},
        "decoder_config": {"hidden_size_global": 64, "vocab_size": 260},
    },
    "camembert": {"max_position_embeddings": 1024},  # positions begin behind the padding's id
    "cohere_compass_text": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _KINDS}},
    "data2vec-text": {"max_position_embeddings": 1024},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": 64}},
    "dots3_note": {
        "vision_config": {"per_layer_config": {}, "adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "falcon_h1": {"mamba_d_head": 8},
    "gemma3": {
        "vision_config": {
            **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"image_size": 32, "patch_size": 8},
        },
        "mm_tokens_per_image": 4,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.5, 0.0], "layer_types": [*_KINDS]},
    "gemma4_unified": {"vision_config": {"mm_embed_dim": 64, "output_proj_dims": 64, "mm_posemb_size": 16}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "moshi": {"audio_vocab_size": 32},
    "mpt": {"attn_config": {"attn_type": "multihead_attention", "attn_pdrop": 0}},
    "phi4_multimodal": {
        "audio_config": {"num_blocks": 1, "nemo_conv_channels": 16, "ext_pw_out_channel": 64},
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 8},
    "roberta": {"max_position_embeddings": 1024},
    "roberta-prelayernorm": {"max_position_embeddings": 1024},
    "roc_bert": {"pronunciation_vocab_size": 300, "shape_vocab_size": 300, "shape_embed_dim": 16},
    "xlm": {"emb_dim": 64, "n_words": VOCABULARY, "causal": True},
    "xlm-roberta": {"max_position_embeddings": 1024},
    "xlm-roberta-xl": {"max_position_embeddings": 1024},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX", "max_position_embeddings": 1024},
    "zamba": {
        **{"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
        **{"attention_hidden_size": 128, "attention_head_dim": 32},
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def config_of(model_type: str) -> PreTrainedConfig:
    """A configuration with two small layers, as far as SIZES and MORE know how."""
    return _config(CONFIG_MAPPING[model_type], MORE.get(model_type, {}))


def _config(kind: type[PreTrainedConfig], more: dict[str, Any]) -> PreTrainedConfig:
    names = {f.name for f in dataclasses.fields(kind)}
    values = {name: value for name, value in SIZES.items() if name in names or name in kind.attribute_map}
    values = {name: value for name, value in values.items() if kind.attribute_map.get(name) not in names}
    if "kv_lora_rank" in names:  # queries and keys have as many heads
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    parts = {}
    for name, part in kind.sub_configs.items():
        if part is AutoConfig and kind.sub_configs_defaults[name].model_type in CONFIG_MAPPING:
            part = CONFIG_MAPPING[kind.sub_configs_defaults[name].model_type]
        if name in names and dataclasses.is_dataclass(part):
            parts[name] = _config(part, more.get(name, {})).to_dict()
    values |= more | parts
    config = kind(**values)
    kinds = getattr(config, "layer_types", None)
    if kinds and "layer_types" in names and {*kinds} <= {"linear_attention", "mamba", "conv"}:
        config = kind(**values | {"layer_types": [kinds[0], "full_attention"]})  # a cache needs one layer of attention
    return config


def build(model_type: str) -> PreTrainedModel:
    """The model, fp32, in evaluation mode.

    Raises:
        ValueError: it cannot be built, or is not small.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_of(model_type)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            raise ValueError(f"{size:,} parameters")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # biases, norms and gates that matter, and no row of zeros
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model
