"""Trials of block sizes: the loss of the packed model, and the standard error of differences."""

import numpy
import pytest

from experiments.blocks.trials import Losses, Packable, measure
from experiments.training.evaluation import evaluate
from modules import quantize
from tests.experiments.helpers import tiny


def test_losses_are_those_of_the_packed_model(samples):
    model, tokenizer = tiny()
    exact = measure(model, samples, 2, tokenizer.pad_token_id)
    packable = Packable(model, double=True)
    sizes = {name: (32, 64)[i % 2] for i, name in enumerate(packable.linears)}
    packable.pack(sizes)
    losses = measure(model, samples, 2, tokenizer.pad_token_id)
    packed = tiny()[0]
    quantize(packed, sizes)
    assert losses.mean == pytest.approx(evaluate(packed, samples, 2, tokenizer.pad_token_id).loss, rel=1e-6)
    assert losses.above(exact)[0] == pytest.approx(losses.mean - exact.mean)
    packable.pack({})
    assert measure(model, samples, 2, tokenizer.pad_token_id).mean == exact.mean


def test_the_standard_error_is_that_of_independent_samples():
    rng = numpy.random.default_rng(0)
    tokens = rng.integers(1, 30, size=200)
    common, means = rng.normal(size=200), []  # of a sample's tokens alike: they are not independent
    losses = [Losses(tokens * (mean + common), tokens) for mean in (0.3, 0.0)]
    assert losses[0].above(losses[1]) == pytest.approx((0.3, 0.0), abs=1e-12)
    for _ in range(400):
        noise = rng.normal(size=200)
        means.append(Losses(tokens * noise, tokens).above(Losses(0.0 * tokens, tokens)))
    differences, errors = zip(*means)
    assert numpy.mean(errors) == pytest.approx(numpy.std(differences), rel=0.1)
