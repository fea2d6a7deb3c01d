"""Conversations to training and held-out samples."""

import os

import numpy
from transformers import PreTrainedTokenizerBase

from experiments.config import DataConfig
from experiments.data import prepare
from experiments.data.cache import Made
from experiments.data.sources import Source
from experiments.data.store import Writer
from experiments.errors import UserError


def chat_samples(
    sources: list[Source], cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, writer: Writer, processes: int
) -> Made:
    """The samples of all sources, and which are for training and which held out.

    Raises:
        UserError: a file or a row is not fit, or nothing is left of a part.
    """
    index = prepare.look(sources, cfg.bad == "skip", processes)
    parts = prepare.parts_of(sources, index, cfg)
    encoded = prepare.tokens_of(sources, len(index.positions), parts, cfg, tokenizer, writer, processes)
    bad = index.bad
    bad.add(encoded.bad.first, encoded.bad.count)
    samples = writer.samples()
    places, notes, dropped = {}, [], 0
    for key, part in zip(("train", "heldout"), parts):
        places[key] = prepare.places_of(part, samples)
        note, lost, used = prepare.note_of(part, encoded, len(places[key]))
        dropped += lost
        if not len(places[key]):
            if lost:
                reason = f"every {part.name} sample is longer than data.max_length={cfg.max_length}: raise it"
            else:
                reason = f"no {part.name} sample is left: {bad}"
            raise UserError(f"{cfg.name}: {reason}")
        if cfg.source == "docstrings":
            groups = index.groups[used[encoded.made[used] > 0]]
            note += f" ({len(numpy.unique(groups))} modules)"
        notes.append(note)
    note = f"{cfg.name}: {', '.join(notes)}"
    shares = None
    if sources[0].weight is not None:
        of_source = index.sources[samples.rows[places["train"]]]
        places["train"] = places["train"][of_source.argsort(kind="stable")]
        training = [source for source in sources if not source.heldout]
        shares = prepare.shares_of(numpy.bincount(of_source, minlength=len(training)).tolist(), training)
        each = (f"{share} of {source.name} ({count})" for source, (count, share) in zip(training, shares))
        note += f"; an epoch has {', '.join(each)}"
    if dropped:
        note += f"; {dropped} longer than {cfg.max_length} tokens dropped"
    if index.ignored:
        note += f"; ignored keys: {', '.join(sorted(index.ignored))}"
    if others := [os.path.basename(name) for source in sources for name in source.others]:
        note += f"; files left out: {', '.join(others[:3])}{', …' if others[3:] else ''}"
    if bad.count:
        note += f"; {bad}"
    return samples, places, shares, note
