"""The baselines on disk: BitFit, Houlsby's adapter and prefixes. LoRA and DoRA are in `modules/files/peft.py`.

prefix_embed without infix is PEFT's PROMPT_TUNING. It is written and read as

    adapter_config.json, adapter_model.safetensors with prompt_embeddings [l_p, d]

PEFT lacks the other baselines. They are written as adapter_model.safetensors with names of this project, and
qdora_config.json with the adapter's settings. There is no adapter_config.json, so PEFT cannot misread the directory.

    <path>.<tensor>     bias of BitFit; adapter_down, … of Houlsby's adapter; prefix of a decoder or block

PEFT's PREFIX_TUNING trains keys and values. `prefix_tuning` converts a prefix_layer without infix to it.
"""

from dataclasses import asdict

import torch
from torch import Tensor, nn

from modules.adapters.bottleneck import BottleneckLinear
from modules.adapters.config import SETTINGS, AdapterConfig
from modules.adapters.own import own_tensor
from modules.adapters.prefix import virtual_tokens
from modules.adapters.state import Adapter

OUR_CONFIG_FILE = "qdora_config.json"
PROMPT = "prompt_embeddings"
_HARMLESS = {  # keys of PROMPT_TUNING that do not change its output, and keys that read_prompt_tuning reads
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"),
    *("num_transformer_submodules", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
    *("tokenizer_kwargs",),
}


def is_prompt_tuning(config: AdapterConfig) -> bool:
    """True if an adapter of `config` is PEFT's PROMPT_TUNING."""
    return config.adapter == "prefix_embed" and config.infix_tokens == 0


def baseline_state(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of a baseline under the names in its file."""
    state = {}
    for path, module in adapter.modules.items():
        if path in adapter.own:
            tensors = {name: own_tensor(module, name) for name in adapter.own[path]}
        elif isinstance(module, BottleneckLinear):
            tensors = module.own_parameters()
        else:
            tensors = {} if module.prefix is None else {"prefix": module.prefix}
        state |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
    if is_prompt_tuning(adapter.config):
        [prefix] = state.values()
        return {PROMPT: prefix}
    return state


def our_config(config: AdapterConfig, base_model_name: str | None) -> dict:
    """The content of qdora_config.json."""
    used = {key: value for key, value in asdict(config).items() if key in SETTINGS[config.adapter]}
    return {"adapter": config.adapter, "base_model_name_or_path": base_model_name} | used


def read_our_config(raw: dict) -> AdapterConfig:
    """The settings in `raw`, the content of a qdora_config.json.

    Raises:
        ValueError: the adapter does not have a setting, or a value is out of range.
    """
    used = SETTINGS.get(raw.get("adapter"), ())
    values = {key: value for key, value in raw.items() if key not in ("adapter", "base_model_name_or_path")}
    if unknown := sorted(values.keys() - set(used)):
        raise ValueError(f"{unknown[0]} is not a setting of adapter {raw.get('adapter')!r}")
    return AdapterConfig(raw.get("adapter"), **values)


def prompt_learning_config(model: nn.Module, kind: str, tokens: int, token_dim: int, heads: int) -> dict:
    """The content of adapter_config.json for PEFT's PROMPT_TUNING or PREFIX_TUNING.

    Args:
        kind: "PROMPT_TUNING" or "PREFIX_TUNING".
        tokens: the number of virtual tokens, l_p.
        token_dim, heads: d and the number of attention heads; for PREFIX_TUNING, the width of all keys of a token and
            the number of key heads.
    """
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": tokens,
        "token_dim": token_dim,
        "num_attention_heads": heads,
        "num_layers": model.config.get_text_config().num_hidden_layers,
        "num_transformer_submodules": 1,
        "inference_mode": True,
    }


def read_prompt_tuning(raw: dict) -> AdapterConfig:
    """The settings in `raw`, the content of an adapter_config.json of PROMPT_TUNING.

    Raises:
        ValueError: a setting is not supported.
    """
    if unknown := [f"{key}={value!r}" for key, value in raw.items() if key not in _HARMLESS and value]:
        raise ValueError(f"{unknown[0]} is not supported")
    if raw.get("num_transformer_submodules") not in (None, 1):
        raise ValueError("num_transformer_submodules must be 1: an encoder with a decoder is not supported")
    return AdapterConfig("prefix_embed", prefix_tokens=raw.get("num_virtual_tokens"))


@torch.no_grad()
def prefix_tuning(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """The active prefix_layer of `model` as PEFT's PREFIX_TUNING, which computes the same.

    Returns:
        The content of adapter_config.json, and the tensors: prompt_embeddings [l_p, 2·L·heads·width] with the prefix's
        keys and values of each layer.

    Raises:
        ValueError: the adapter has an infix, which PEFT cannot have, or layers have keys of different shapes.
    """
    from transformers import DynamicCache  # this import takes seconds; a model with a prefix has done it already

    tokens, infix = virtual_tokens(model)
    if infix:
        raise ValueError("PEFT's prefix tuning has no infix tokens: only infix_tokens=0 can be converted")
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    cache = DynamicCache()  # it keeps all rows, also of a layer that attends to a window
    model.eval()(input_ids=ids, use_cache=True, past_key_values=cache)  # the prefix does not depend on later tokens
    states = [state[0, :, :tokens].float() for layer in cache.layers for state in (layer.keys, layer.values)]
    if len({state.shape for state in states}) > 1:
        raise ValueError("the model's layers have keys of different shapes, which PEFT's prefix tuning cannot hold")
    heads, _, width = states[0].shape
    config = prompt_learning_config(model, "PREFIX_TUNING", tokens, heads * width, heads)
    stacked = torch.stack(states)  # [2L, heads, l_p, width]
    return config, {PROMPT: stacked.permute(2, 0, 1, 3).reshape(tokens, -1).contiguous()}
