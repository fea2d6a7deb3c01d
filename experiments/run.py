"""Fine-tune a language model, and measure it before and after.

    python -m experiments.run +method=qdora rank=16

Methods: full, lora, qlora, dora, qdora; of the LoRA paper's baselines bitfit, houlsby, prefix_embed and prefix_layer.
Every key of conf/ can be set on the command line; `-m` runs a sweep:

    python -m experiments.run -m +method=lora,dora rank=4,16 seed=0,1,2
    python -m experiments.run sweep=rank                                 ready ones are in conf/sweep/

`python -m experiments.report DIR` compares the results in a folder. Several processes share one run:

    torchrun --nproc-per-node 2 -m experiments.run +method=qdora        trainer.parallel=fsdp shards the model too

A run that was interrupted or died goes on from its newest checkpoint, in its own directory, as if it had never stopped:

    python -m experiments.run resume=outputs/mine
"""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.config import Config
from experiments.runs import result_numbers, sweep
from experiments.runs.one_run import run
from experiments.runs.start import configured
from experiments.system import parallel
from experiments.system.cli import hydra_command, is_given
from experiments.system.directory import new_directory


@hydra_command("config", Config)
def main(cfg: DictConfig) -> sweep.Outcome | None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return sweep.hydra_job(cfg)
    config = configured(cfg)
    if parallel.is_main() and not config.resume and not is_given("output_dir"):
        config.output_dir = str(new_directory(Path(config.output_dir)))
    config = parallel.agree(config)
    result = run(config)
    files = [path for path in sorted(Path(config.output_dir).iterdir()) if not path.name.startswith(".")]
    print(f"\n{result_numbers.table(result)}\n\nWritten:", *files, sep="\n  ")
    return None


if __name__ == "__main__":
    parallel.start()
    main()
    parallel.stop()
