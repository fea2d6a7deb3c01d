"""The baselines on disk, beside the adapters of PEFT's LoRA format (`modules/files/peft.py`).

PEFT has prefix_embed without infix as PROMPT_TUNING, and that is how it is written and read:

    adapter_config.json, adapter_model.safetensors with prompt_embeddings [l_p, d]

It has nothing like the others. Their directory holds the same tensors' file, under names of ours, and
qdora_config.json, whose content is the adapter's settings, so that PEFT finds nothing there to misread:

    <path>.<tensor>     bias of BitFit; adapter_down, … of Houlsby's; prefix of a decoder or block

PEFT's PREFIX_TUNING trains keys and values. A prefix_layer without infix amounts to such, which `prefix_tuning` gives.
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
_HARMLESS = {  # keys of PROMPT_TUNING that say nothing about what it computes, or that read_prompt_tuning reads
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"),
    *("num_transformer_submodules", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
    *("tokenizer_kwargs",),
}


def is_prompt_tuning(config: AdapterConfig) -> bool:
    """Whether PEFT's PROMPT_TUNING computes what the adapter does."""
    return config.adapter == "prefix_embed" and config.infix_tokens == 0


def baseline_state(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of a baseline under the names they have in its file."""
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
        ValueError: keys or values that no adapter can have.
    """
    used = SETTINGS.get(raw.get("adapter"), ())
    values = {key: value for key, value in raw.items() if key not in ("adapter", "base_model_name_or_path")}
    if unknown := sorted(values.keys() - set(used)):
        raise ValueError(f"{unknown[0]} is no setting of adapter {raw.get('adapter')!r}")
    return AdapterConfig(raw.get("adapter"), **values)


def prompt_learning_config(model: nn.Module, kind: str, tokens: int, token_dim: int, heads: int) -> dict:
    """The content of adapter_config.json for PEFT's PROMPT_TUNING or PREFIX_TUNING.

    Args:
        token_dim, heads: of PREFIX_TUNING, width and number of the heads that have keys and values.
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
        ValueError: a setting that cannot be represented, by name.
    """
    if unknown := [f"{key}={value!r}" for key, value in raw.items() if key not in _HARMLESS and value]:
        raise ValueError(f"{unknown[0]} cannot be represented")
    if raw.get("num_transformer_submodules") not in (None, 1):
        raise ValueError("num_transformer_submodules other than 1, of an encoder and a decoder, cannot be represented")
    return AdapterConfig("prefix_embed", prefix_tokens=raw.get("num_virtual_tokens"))


@torch.no_grad()
def prefix_tuning(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """PEFT's PREFIX_TUNING that computes what the prefix_layer on `model` does: adapter_config.json, and the tensors.

    Returns:
        The config, and prompt_embeddings [l_p, 2·L·heads·width]: of each layer the keys and the values of the prefix.

    Raises:
        ValueError: an infix, which PEFT has no place for, or layers of different shapes.
    """
    from transformers import DynamicCache  # here, because importing it takes seconds and whoever has a prefix has it

    tokens, infix = virtual_tokens(model)
    if infix:
        raise ValueError("PEFT's prefix tuning has no infix tokens: infix_tokens=0 can be written so")
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    cache = DynamicCache()  # one that keeps all, whatever window a layer has
    model.eval()(input_ids=ids, use_cache=True, past_key_values=cache)  # the prefix does not depend on what follows
    states = [state[0, :, :tokens].float() for layer in cache.layers for state in (layer.keys, layer.values)]
    if len({state.shape for state in states}) > 1:
        raise ValueError("the model's layers have keys of different shapes, which PEFT's prefix tuning cannot hold")
    heads, _, width = states[0].shape
    config = prompt_learning_config(model, "PREFIX_TUNING", tokens, heads * width, heads)
    stacked = torch.stack(states)  # [2L, heads, l_p, width]
    return config, {PROMPT: stacked.permute(2, 0, 1, 3).reshape(tokens, -1).contiguous()}
