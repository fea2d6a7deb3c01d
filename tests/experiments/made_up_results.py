"""Results that are made up, in a run's files, so that a report on them is known."""

import hashlib
import json
import math
from pathlib import Path

from experiments.runs.groups import MEASURES, Group, group, read_runs

ADAPTERS = {"bitfit": "bitfit", "full": "none", "lora": "lora", "qlora": "lora", "dora": "dora", "qdora": "dora"}
LOSSES = {
    ("lora", 4): [2.90, 2.94, 2.93],
    ("lora", 16): [2.80, 2.85, 2.82],
    ("qdora", 4): [2.91, 2.96, 2.94],
    ("qdora", 16): [2.81, 2.845, 2.826],
}


def write_run(folder: Path, method: str, seed: int, loss: float, curve: bool = True, **changes) -> Path:
    """A run's directory with a result.json as experiments.run writes it; `changes` are of its configuration, with __
    for a dot, or of what the result says besides."""
    quant = "nf4" if method.startswith("q") else "none"
    config = {
        **{"model.name": "smollm2", "model.source": "wheel", "data.name": "docstrings", "data.max_length": 192},
        **{"method.name": method, "method.adapter": ADAPTERS[method], "method.lr": 1e-3, "lr": 1e-3},
        **{"quant.name": quant, "trainer.name": "default", "trainer.steps": 20, "seed": seed},
    }
    if method not in ("full", "bitfit"):
        config |= {"rank": 16, "dropout": 0.0, "target_modules": "all-linear"}
    if quant == "nf4":
        config |= {"quant.blocksize": 64, "quant.double": True}
    measured = {*MEASURES, "results_version", "versions", "machine", "shared_base"} & changes.keys()
    config |= {key.replace("__", "."): value for key, value in changes.items() if key not in measured}
    if "rank" in config:
        config["lora_alpha"] = 2.0 * config["rank"]
    bits = 32.0 if quant == "none" else 4 + (8.127 if config["quant.double"] else 32) / config["quant.blocksize"]
    result = {
        **{"method": method, "rank": config.get("rank", 16), "seed": seed, "results_version": 1, "config": config},
        **{"steps": 20, "best_step": 20, "loss_before": 3.65, "loss_after": loss},
        **{"perplexity_before": math.exp(3.65), "perplexity_after": math.exp(loss)},
        **{"token_accuracy_before": 0.33, "token_accuracy_after": 0.44},
        **{"trainable_params": 1000 * config.get("rank", 134515), "total_params": 134_515_008},
        **{"bits_per_weight": bits, "base_bytes": 168_000_000, "adapter_bytes": 4000 * config.get("rank", 0)},
        **{"tokens_per_s": 140.0, "peak_memory_bytes": 5 * 10**9, "train_seconds": 110.0, "total_seconds": 180.0},
        **{"versions": {"torch": "2.13.0"}, "commit": "0" * 40},
    }
    result |= {key: changes[key] for key in measured}
    identity = json.dumps([result["results_version"], config], sort_keys=True)
    result["config_hash"] = hashlib.sha256(identity.encode()).hexdigest()[:12]
    path = folder / f"{method},rank={config.get('rank')},seed={seed}_{result['config_hash']}"
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps(result))
    if curve:
        records = [{"step": 0, "heldout_loss": 3.65}]
        records += [{"step": s, "loss": loss + 1 / s, "lr": 1e-3} for s in range(1, 21)]
        records += [{"step": s, "heldout_loss": loss + 1 / s} for s in (10, 20)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 2')
    return path


def groups_of(folder: Path) -> list[Group]:
    return group(read_runs(folder)[0])
