"""The identity of a run: the values that decide its numbers, and a hash of them."""

import hashlib
import json
from typing import Any

from experiments.config import ADAPTER_KEYS, RENAMED_METHODS, Config, flat
from modules.adapters.config import SETTINGS

VERSION = 1  # of the numbers in result.json: raise it when earlier ones can no longer be compared with new ones


def identity(cfg: Config) -> dict[str, Any]:
    """The values that decide the numbers of a run, by their full keys. A method without rank has no rank there, a dense
    base no blocksize."""
    used = SETTINGS.get(cfg.method.adapter, ())
    unused = tuple(key for key in ADAPTER_KEYS if key not in used)
    if cfg.quant.name == "none":
        unused += ("quant.type", "quant.blocksize", "quant.double")
    return {key: value for key, value in flat(cfg).items() if key not in unused}


def config_hash(cfg: Config) -> str:
    """Twelve hex digits that runs of one configuration and one VERSION share, wherever they write and whatever tracks
    them. A key that has the schema's default does not count, so a key that is added later changes no hash."""
    defaults = flat(Config())
    told = {key: value for key, value in identity(cfg).items() if key not in defaults or value != defaults[key]}
    old_names = {new: old for old, new in RENAMED_METHODS.items()}  # a new name changes no hash either
    told["method.name"] = old_names.get(cfg.method.name, cfg.method.name)
    return hashlib.sha256(json.dumps([VERSION, told], sort_keys=True).encode()).hexdigest()[:12]


def title(cfg: Config) -> str:
    """The method, its size, and the model: "lora, rank 16, smollm2"."""
    sizes = [key for key in ("rank", "prefix_tokens", "infix_tokens") if key in SETTINGS.get(cfg.method.adapter, ())]
    named = [f"{key.replace('_', ' ')} {getattr(cfg, key)}" for key in sizes if getattr(cfg, key)]
    weights = " with random weights" if cfg.model.weights else ""
    return ", ".join([cfg.method.name, *named, cfg.model.name + weights])
