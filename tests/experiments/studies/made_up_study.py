"""Results of a study that are made up: its runs' files, with effects that are known."""

import json
import math
import zlib
from pathlib import Path

import numpy

from experiments.runs.heldout import text_of
from experiments.runs.identity import identity
from experiments.studies.definition import Study
from experiments.studies.plan import SEARCH, Job, Results, plan

SAMPLES = 120


def rng_of(*parts: object) -> numpy.random.Generator:
    return numpy.random.default_rng(zlib.crc32(repr(parts).encode()))


def write_job(
    folder: Path, job: Job, effect: float = 0.0, best: float = 1e-3, noise: float = 0.05, answers: bool = True
):
    """A run's directory.

    Args:
        effect: on the held-out loss of each sample.
        best: the best learning rate: the loss rises by 0.05 for each factor of ten away from it.
        noise: standard deviation of a sample's loss from seed to seed.
    """
    cfg = job.cfg
    away = 0.05 * abs(math.log10(cfg.lr / best))
    samples = 3 + rng_of(job.task, "samples").normal(0, 0.5, SAMPLES)
    by_seed = rng_of(job.task, job.setting, cfg.seed, cfg.lr).normal(0, 0.002)
    own = rng_of(job.task, job.setting, cfg.seed, cfg.lr, "rest").normal(0, noise, SAMPLES)
    losses = samples + effect + away + by_seed + own + 0.8 / cfg.trainer.steps
    tokens = rng_of(job.task, "tokens").integers(5, 40, SAMPLES)
    loss = float(numpy.average(losses, weights=tokens))
    rows = [
        {"set": "heldout", "sample": f"{n:010x}", "tokens": int(t), "loss": float(one)}
        | ({"exact_match": int(one < 3)} if answers and job.stage != SEARCH else {})
        for n, (t, one) in enumerate(zip(tokens, losses))
    ]
    result = {
        **{"method": cfg.method.name, "rank": cfg.rank, "seed": cfg.seed, "results_version": 1},
        **{"config": identity(cfg), "config_hash": job.identity, "steps": cfg.trainer.steps, "best_step": 1},
        **{"loss_before": 4.0, "loss_after": loss, "perplexity_before": 54.0, "perplexity_after": math.exp(loss)},
        **{"token_accuracy_before": 0.3, "token_accuracy_after": 0.4, "total_params": 10**6, "trainable_params": 1000},
        **{"bits_per_weight": 16.0, "base_bytes": 10**6, "adapter_bytes": 10**4, "tokens_per_s": 100.0},
        **{"peak_memory_bytes": 10**9, "train_seconds": 0.5 * cfg.trainer.steps, "versions": {}, "commit": "0" * 40},
        "total_seconds": 0.5 * cfg.trainer.steps + 20.0,
    }
    if job.stage != SEARCH:
        learned = 4.0 - loss
        result |= {"second_loss_before": 3.0, "second_loss_after": 3.0 + learned * (0.02 + 40 * cfg.lr) + 10 * effect}
        if answers:
            result |= {"exact_match_before": 0.0, "exact_match_after": float((losses < 3).mean())}
    path = folder / f"{job.name}_{job.identity}"
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps(result))
    (path / "heldout.csv").write_text(text_of(rows))


def write_study(folder: Path, study: Study, effects: dict[str, float], **more) -> list[Job]:
    """All runs that the study asks for, with an effect for each setting; returns them in their order."""
    results, written = Results(folder), []
    while True:
        results.refresh()
        missing = plan(study, results).missing(results)
        if not missing:
            return written
        for job in missing:
            write_job(folder, job, effects.get(job.setting, 0.0), **more)
        written += missing
