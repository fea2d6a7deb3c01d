"""A model's shapes without its weights, from its config.json: the model itself, on the meta device."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from experiments.config import ModelConfig
from experiments.errors import UserError
from experiments.models.directory import model_directory
from experiments.models.tiny import tiny_model
from experiments.system.quiet import quiet


def load_architecture(cfg: ModelConfig) -> PreTrainedConfig:
    """The configured model's config.json: its shapes, without weights. `model.path` may also be that file itself.

    Raises:
        UserError: there is nothing to read, or transformers does not have the architecture.
    """
    if cfg.source == "tiny":
        return tiny_model(torch.float32, 0)[0].config
    try:
        if cfg.source == "preset":
            return AutoConfig.for_model(**cfg.architecture)
        path = model_directory(cfg, weights=False)
        if path.is_dir() and not (path / "config.json").is_file():
            raise UserError(f"model.path={path}: no config.json, so this is not a Hugging Face model directory")
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"model={cfg.name}: {' '.join(str(error).split())}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # how the weights are packed is for `quant` to say
    return config


def architecture_for_heads(cfg: ModelConfig, align: str) -> PreTrainedConfig | None:
    """The model's config.json if blocks are to be aligned to its attention heads (quant.align=head), else None."""
    return load_architecture(cfg) if align == "head" else None


def meta_model(cfg: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The configured model on the meta device: every module and shape, no weights.

    Raises:
        UserError: there is nothing to read, or it is not a causal language model.
    """
    config = load_architecture(cfg)
    with torch.device("meta"), quiet():
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:
            raise UserError(f"model={cfg.name} is not a causal language model: {str(error).splitlines()[0]}") from error
