"""Which values of the data's keys make sense."""

import math

from experiments.config import DataConfig
from experiments.data import arithmetic
from experiments.data.sources import IN_PARTS
from experiments.errors import UserError

GENERATED = ("docstrings", "arithmetic", "facts", "records")
SOURCES = (*GENERATED, "jsonl", "text")
PARTS = ("heldout", "validation")


def check(cfg: DataConfig, trains: bool) -> None:
    """Raise UserError for values that the schema's types cannot exclude.

    Args:
        trains: the data is to be trained on.
    """
    if cfg.packing and not trains:
        raise UserError("data.packing=true is about training, and nothing trains on this data: leave it out")
    if cfg.source not in SOURCES:
        raise UserError(f"data.source={cfg.source} is not one of {', '.join(SOURCES)}")
    if cfg.too_long not in ("error", "drop", "truncate"):
        raise UserError(f"data.too_long={cfg.too_long} is not one of error, drop, truncate")
    if cfg.train_on not in ("all", "last", "everything"):
        raise UserError(f"data.train_on={cfg.train_on} is not one of all, last, everything")
    if cfg.bad not in ("error", "skip"):
        raise UserError(f"data.bad={cfg.bad} is not one of error, skip")
    if not 0 < cfg.heldout_fraction < 1:
        raise UserError(f"data.heldout_fraction={cfg.heldout_fraction} is not between 0 and 1")
    for name, least in ("max_length", 2), ("max_train", 1), ("max_heldout", 1):
        value = getattr(cfg, name)
        if value is not None and value < least:
            raise UserError(f"data.{name}={value} is less than {least}")
    if cfg.levels is not None:
        if cfg.source != "arithmetic":
            raise UserError(f"data={cfg.name} has no levels: leave data.levels out, or use data=arithmetic")
        if not cfg.levels or not set(cfg.levels) <= set(arithmetic.LEVELS):
            there = ", ".join(map(str, arithmetic.LEVELS))
            raise UserError(f"data.levels={cfg.levels}: choose some of {there}")
    if cfg.answer_tokens < 0:
        raise UserError(f"data.answer_tokens={cfg.answer_tokens} is less than 0")
    if cfg.answer_tokens and cfg.source == "text":
        raise UserError("data.answer_tokens: plain text has no prompts to answer: leave it out")
    if cfg.part not in PARTS:
        raise UserError(f"data.part={cfg.part} is not one of {', '.join(PARTS)}")
    if cfg.source in IN_PARTS and cfg.heldout_fraction != DataConfig.heldout_fraction:
        raise UserError(f"data={cfg.name} comes in parts of its own: leave data.heldout_fraction out")
    generated = cfg.source in GENERATED
    named = [cfg.path, *(source.path for source in cfg.sources or ()), cfg.heldout_path]
    if generated and (files := [path for path in named if path]):
        raise UserError(f"data={cfg.name} reads no file: for {files[0]} use data=jsonl or data=text")
    if not generated and not cfg.path and not cfg.sources:
        raise UserError(f"data={cfg.name} needs data.path=FILE")
    _check_sources(cfg)
    if cfg.source == "text":
        for key in ("chat_template", "chat_template_kwargs"):
            if getattr(cfg, key):
                raise UserError(f"data.{key}: plain text goes through no chat template: leave it out")


def _check_sources(cfg: DataConfig) -> None:
    if not cfg.sources:
        return
    if cfg.path:
        raise UserError("data.path and data.sources: give one of them")
    weights = [source.weight for source in cfg.sources]
    for number, (source, weight) in enumerate(zip(cfg.sources, weights), start=1):
        if not source.path:
            raise UserError(f"data.sources: source {number} has no path: give each as {{path: FILE, weight: NUMBER}}")
        if weight is None and any(other is not None for other in weights):
            raise UserError(f"data.sources: {source.path} has no weight, and others have one: give all or none")
        if weight is not None and not 0 < weight < math.inf:
            raise UserError(f"data.sources: weight={weight} of {source.path}: choose a number above 0")
