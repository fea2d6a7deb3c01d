"""Fine-tune a language model and say what it learned.

    python -m experiments.run +method=qdora rank=16

Methods: full, lora, qlora, dora, qdora; of the LoRA paper's baselines bitfit, adapter (Houlsby's), prefix_embed and
prefix_layer. Every key of conf/ can be set on the command line; `-m` runs a sweep:

    python -m experiments.run -m +method=lora,dora rank=4,16 seed=0,1,2
    python -m experiments.run sweep=rank                                 ready ones are in conf/sweep/

`python -m experiments.report DIR` compares the results in a folder. Several processes share one run:

    torchrun --nproc-per-node 2 -m experiments.run +method=qdora        trainer.parallel=fsdp shards the model too

A run that wrote checkpoints goes on from the newest, in its own directory and as if it had never stopped:

    python -m experiments.run +method=qdora rank=16 trainer.checkpoint_every=10 output_dir=outputs/mine
    python -m experiments.run resume=outputs/mine
"""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from tqdm import tqdm

from experiments.config import Config
from experiments.data.samples import load_data
from experiments.errors import UserError
from experiments.models.generation import answer
from experiments.models.load import prepare_model
from experiments.runs import checkpoints, results, spectrum, sweep
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.directory import ADAPTER, over_own_base, save_base, save_weights
from experiments.runs.measures import Measures, without_prefix
from experiments.runs.resuming import Story, checkpoint_of, configured
from experiments.runs.tracking import Tracker, tracker
from experiments.system import machine, parallel
from experiments.system.cli import run_command
from experiments.system.energy import EnergyMeter
from experiments.system.files import PROJECT_ROOT, writable_dir
from experiments.system.progress import bar
from experiments.training.engines import engine_of
from experiments.training.evaluation import Evaluation, evaluate
from experiments.training.loop import Trainer, heldout_record
from modules.adapters.config import changes_base


def run(cfg: Config, base: Path | None = None, watch: Callable[[dict], None] | None = None) -> dict:
    """Train as `cfg` says, write everything to `cfg.output_dir`, return what result.json holds.

    With `cfg.resume` training goes on from a checkpoint, in the directory of the run that wrote it.

    Args:
        base: a directory with the configured model packed as `cfg.quant` says (experiments/runs/shared_base.py).
        watch: gets every record of metrics.jsonl when it is written; what it raises stops the run.

    Raises:
        UserError: something in the configuration or the files it names is wrong; the message says what to do.
    """
    parallel.check(cfg)
    checkpoint = checkpoint_of(cfg) if cfg.resume else None
    path = Path(cfg.output_dir) if checkpoint is None else checkpoint.parent.parent
    if checkpoint is None and (old := checkpoints.of_run(path)):
        raise UserError(f"{old[-1]} is there: go on from it with resume=latest, or choose another output_dir")
    directory = results.RunDirectory(writable_dir(path, "set output_dir to a folder"))
    try:
        return _Run(cfg, directory, checkpoint, base, watch).result()
    except BaseException:
        with contextlib.suppress(OSError):
            directory.path.rmdir()  # nothing was written yet: leave no empty directory behind
        raise


class _Run:
    """A run from its beginning, or from a checkpoint, to its result."""

    def __init__(
        self,
        cfg: Config,
        directory: results.RunDirectory,
        checkpoint: Path | None,
        base: Path | None,
        watch: Callable[[dict], None] | None,
    ):
        self.cfg, self.directory, self.checkpoint, self.watch = cfg, directory, checkpoint, watch
        self.shared_base = base is not None  # packing one may be the peak of a run's memory
        self.start, self.energy = time.perf_counter(), EnergyMeter()
        device = machine.pick_device(cfg.trainer)
        if device.type == "cpu":
            machine.set_up_cpu(cfg.trainer)
        dtype = machine.pick_dtype(cfg.trainer, device)
        many = f", {parallel.size()} processes ({parallel.mode(cfg)})" if parallel.size() > 1 else ""
        print(f"{results.title(cfg)}{many}: {machine.describe(device, dtype)}")

        machine.seed_all(cfg.seed)
        self.engine = engine_of(cfg, device)
        start = cfg if checkpoint is None else over_own_base(cfg, directory.path)
        self.model, self.tokenizer = prepare_model(start, self.engine.loads_on, dtype, base)
        self.storage = results.storage(self.model)
        self.engine.place(self.model)
        self.data = load_data(cfg.data, self.tokenizer)
        print(self.data.note)
        self.measures = Measures(cfg, self.data, self.tokenizer)
        self.samples = [example for example in self.data.heldout if example.prompt_ids][: cfg.trainer.samples]
        self.trainer = Trainer(self.model, cfg, dtype, self.tokenizer.pad_token_id, self.engine)
        if not parallel.is_main():
            torch.manual_seed(parallel.seed_of(cfg.seed))  # until here all processes draw the same
        self.checkpoints = Checkpoints(directory.path, cfg, self.data)
        self.story = Story()

    def result(self) -> dict:
        """Train, write everything, return what result.json holds."""
        cfg = self.cfg
        if self.checkpoint is None:
            if parallel.is_main():
                self.directory.begin(cfg)
            if changes_base(cfg.init):
                with self.engine.whole(self.model, everything=True):
                    if parallel.is_main():
                        save_base(cfg, self.model, self.tokenizer, self.directory.path)
        else:
            story = self.checkpoints.restore(self.checkpoint, self.trainer)
            self.story = Story.of_checkpoint(story)
            if parallel.is_main():
                self.directory.rewind(cfg, self.trainer.trained.steps)
            print(f"going on after step {self.trainer.trained.steps} of {self.directory.path}")
        trained = self.trainer.trained
        try:
            with (
                parallel.interrupted_together(),
                tracker(cfg, self.directory.path, self.story.tracker_id) as tracking,
            ):
                result = self._train_and_measure(tracking)
        except BaseException as error:
            if trained.steps and parallel.stops_together(error):
                self._save_weights(finished=False)
                if parallel.is_main():
                    where = f"its weights and metrics are in {self.directory.path}"
                    print(f"stopped after step {trained.steps}: {where}", file=sys.stderr)
                parallel.wait()  # torchrun ends all as soon as one has ended
            raise
        result |= {
            "tokens_per_s": trained.tokens / trained.seconds,
            "peak_memory_bytes": max(parallel.gather(machine.peak_memory_bytes(self.model.device)), default=0),
            "shared_base": None if cfg.quant.name == "none" else self.shared_base,
            "processes": parallel.size(),
            "train_seconds": trained.seconds,
            "total_seconds": self._seconds(),
            "cpu_energy_joules": self._joules(),
            "seed": cfg.seed,
            "versions": machine.versions(),
            "commit": machine.commit(),
            "results_version": results.VERSION,
            "config_hash": results.config_hash(cfg),
            "config": results.identity(cfg),
        }
        if parallel.is_main():
            self.directory.write_result(result)
        return result

    def _train_and_measure(self, tracking: Tracker) -> dict:
        cfg, trainer, trained = self.cfg, self.trainer, self.trainer.trained

        def log(record: dict) -> None:
            self.energy.joules()  # its counters wrap
            if parallel.is_main():
                self.directory.log(record)
            tracking.log(record)
            if self.watch:
                self.watch(record)

        def measure() -> Evaluation:
            evaluation = evaluate(
                self.model,
                self.data.heldout,
                cfg.trainer.eval_batch_size,
                self.tokenizer.pad_token_id,
                bar("evaluating"),
            )
            log({"step": trained.steps} | heldout_record(evaluation))
            loss, accuracy = f"loss {evaluation.loss:.3f}", f"token accuracy {evaluation.token_accuracy:.1%}"
            tqdm.write(f"held out, step {trained.steps}: {loss}, {accuracy}")
            return evaluation

        def save() -> None:
            self.checkpoints.save(trainer, asdict(self.story) | {"seconds": self._seconds(), "joules": self._joules()})

        if self.story.before is None:
            with without_prefix(self.model):
                measures = self.measures.measure(self.model)
                self.story = Story(measure(), self._answers(), measures, tracker_id=tracking.run_id)
        trainer.fit(self.data, log, measure, save, lambda: self.checkpoints.save_best(trainer))
        kept = trained.evaluation
        if cfg.trainer.keep_best:
            kept = trained.best
            self.checkpoints.restore_best(trainer)

        layers = self._save_weights(finished=True)
        samples = self._samples()
        self._write_pictures(samples)
        result = {
            "method": cfg.method.name,
            "rank": cfg.rank,
            "steps": trained.steps,
            "best_step": trained.best_step,
            **results.compare(self.story.before, kept),
            **results.before_and_after(self.story.measures_before, self.measures.measure(self.model)),
            **spectrum.summary(layers),
            **self.storage,
        }
        tracking.summarize(result)
        tracking.show(samples)
        if (adapter := self.directory.path / ADAPTER).is_dir():
            tracking.keep(adapter)
        return result

    def _answers(self) -> list[str]:
        """The model's texts for the sample prompts."""
        prompts = [sample.prompt_ids for sample in self.samples]
        return answer(self.model, self.tokenizer, prompts, self.cfg.trainer.sample_tokens) if prompts else []

    def _save_weights(self, finished: bool) -> list[dict]:
        """Write the weights and, of a finished run, spectrum.csv; the spectra, in process 0."""
        layers = []
        with self.engine.whole(self.model, everything=finished):
            if parallel.is_main():
                save_weights(self.cfg, self.model, self.tokenizer, self.directory.path)
                if finished:
                    layers = spectrum.spectra(self.model)
                    self.directory.write_spectra(layers)
        return layers

    def _samples(self) -> list[dict[str, str]]:
        """The sample prompts with reference and answers."""
        return [
            {
                "prompt": self.tokenizer.decode(sample.prompt_ids),
                "reference": sample.reference,
                "before": before,
                "after": after,
            }
            for sample, before, after in zip(self.samples, self.story.texts_before, self._answers())
        ]

    def _write_pictures(self, samples: list[dict[str, str]]) -> None:
        cfg = self.cfg
        if not parallel.is_main():
            return
        title = f"{results.title(cfg)} on {cfg.data.name}"
        self.directory.plot_loss(title)
        self.directory.write_samples(title, samples)

    def _seconds(self) -> float:
        """What the run took until now, the time before a stop included."""
        return self.story.seconds + time.perf_counter() - self.start

    def _joules(self) -> float | None:
        """What it used until now, likewise; None if the machine does not tell, or did not before a stop."""
        now = self.energy.joules()
        return None if now is None or self.story.joules is None else self.story.joules + now


@hydra.main(version_base="1.3", config_path=str(PROJECT_ROOT / "conf"), config_name="config")
def main(cfg: DictConfig) -> sweep.Outcome | None:
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        config = parallel.agree(configured(cfg))
        if sweeping:
            return sweep.job(config, HydraConfig.get().job.override_dirname)
        result = run(config)
    except UserError as error:  # here, not in cli: Hydra would print a second message around it
        if sweeping:
            return sweep.Outcome(sweep.FAILED, str(error))
        sys.exit(parallel.last_words(f"error: {error}"))
    except RuntimeError as error:  # likewise
        if not parallel.lost_another(error):
            raise
        sys.exit(parallel.outlived())
    files = [path for path in sorted(Path(config.output_dir).iterdir()) if not path.name.startswith(".")]
    print(f"\n{results.table(result)}\n\nWritten:", *files, sep="\n  ")


def cli() -> None:
    parallel.start()
    run_command(main)
    parallel.stop()


if __name__ == "__main__":
    cli()
