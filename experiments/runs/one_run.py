"""One run, from its configuration to its result: `run`."""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.config import Config, tokens_a_pass
from experiments.data import packing
from experiments.data.samples import load_data
from experiments.errors import UserError
from experiments.models.generation import answer
from experiments.models.load import prepare_model
from experiments.runs import directory, heldout, load_balance, result_numbers, spectrum
from experiments.runs.before import Before, start_of
from experiments.runs.before_stop import BeforeStop
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.identity import VERSION, config_hash, identity, title
from experiments.runs.measures import Measures, without_prefix
from experiments.runs.model_files import ADAPTER, over_own_base, save_base, save_weights
from experiments.runs.output_files import OutputFiles
from experiments.runs.start import checkpoint_of
from experiments.runs.tracking import tracker
from experiments.system import machine, parallel
from experiments.system.directory import clear, own_directory
from experiments.system.energy import EnergyMeter
from experiments.system.progress import bar
from experiments.training.engines import engine_of
from experiments.training.evaluation import Evaluation, SampleLoss, evaluate_each
from experiments.training.expert_load import ExpertLoad
from experiments.training.loop import Trainer, checkpoints_by_time, heldout_record
from kernels.bench.machine import commit
from modules.adapters.config import changes_base


def run(
    cfg: Config,
    base: Path | None = None,
    watch: Callable[[dict], None] | None = None,
    before: dict[str, Before] | None = None,
) -> dict:
    """Train as `cfg` says, write everything to `cfg.output_dir`, return the content of result.json.

    With `cfg.resume` training goes on from a checkpoint, in the directory of the run that wrote it.

    Args:
        base: a directory with the configured model packed as `cfg.quant` says (experiments/runs/shared_base.py).
        watch: gets every record of metrics.jsonl when it is written. An exception that it raises stops the run.
        before: what earlier runs have measured before training, by `start_of`. The run adds what it measures.

    Raises:
        UserError: the configuration or a file that it names is wrong; the message says how to repair it.
    """
    parallel.check(cfg)
    checkpoint = checkpoint_of(cfg) if cfg.resume else None
    path = Path(cfg.output_dir) if checkpoint is None else checkpoint.parent.parent
    may_write = checkpoint is not None or cfg.overwrite
    with own_directory(path, lambda: None if may_write else directory.earlier_run(path)):
        one = _Run(cfg, OutputFiles(path), checkpoint, base, watch, {} if before is None else before)
        one.begin()
        with one.tracked():
            one.measure_before()
            one.train()
            result = one.measure_after()
        return one.finish(result)


class _Run:
    """A run: its model, data and trainer, and the steps of `run` in their order."""

    def __init__(
        self,
        cfg: Config,
        files: OutputFiles,
        checkpoint: Path | None,
        base: Path | None,
        watch: Callable[[dict], None] | None,
        before: dict[str, Before],
    ):
        self.cfg, self.files, self.checkpoint, self.watch, self.before = cfg, files, checkpoint, watch, before
        self.shared_base = base is not None  # packing one may be the peak of a run's memory
        self.start, self.energy = time.perf_counter(), EnergyMeter()
        device, dtype = machine.set_up(cfg.trainer)
        many = f", {parallel.size()} processes ({parallel.mode(cfg)})" if parallel.size() > 1 else ""
        print(f"{title(cfg)}{many}: {machine.describe(device, dtype)}")

        machine.seed_all(cfg.seed)
        self.engine = engine_of(cfg, device)
        start = cfg if checkpoint is None else over_own_base(cfg, files.path)
        self.model, self.tokenizer = prepare_model(start, self.engine.loads_on, dtype, base)
        self.storage = result_numbers.storage(self.model)
        self.engine.place(self.model)
        self.data = load_data(cfg.data, self.tokenizer, trains=True)
        print(self.data.note)
        if cfg.data.packing:
            print(packing.note(self.data.train, tokens_a_pass(cfg), cfg.seed))
        self.measures = Measures(cfg, self.data, self.tokenizer)
        self.samples = [example for example in self.data.heldout if example.prompt_ids][: cfg.trainer.samples]
        self.trainer = Trainer(self.model, cfg, dtype, self.tokenizer.pad_token_id, self.engine)
        self.trained = self.trainer.trained
        if not parallel.is_main():
            torch.manual_seed(parallel.seed_of(cfg.seed))  # until here all processes draw the same
        self.loads: dict[int, dict[str, list[int]]] = {}  # of experts, by the step of the newest evaluation
        self.checkpoints = Checkpoints(files.path, cfg, self.data)
        self.before_stop = BeforeStop()
        self.losses: tuple[int, list[SampleLoss]] | None = None  # of each held-out sample, after so many steps

    def begin(self) -> None:
        """Start the run's files anew, or restore the checkpoint and cut the files back to its step."""
        if self.checkpoint is None:
            if parallel.is_main():
                clear(self.files.path, directory.FILES)  # not before: a mistake has left them as they were
                self.files.begin(self.cfg)
            if changes_base(self.cfg.init):
                with self.engine.whole(self.model, everything=True):
                    if parallel.is_main():
                        save_base(self.cfg, self.model, self.tokenizer, self.files.path)
            return
        self.before_stop = BeforeStop.of_checkpoint(self.checkpoints.restore(self.checkpoint, self.trainer))
        self.trained = self.trainer.trained
        if parallel.is_main():
            self.files.rewind(self.cfg, self.trained.steps, self.before_stop.metrics)
        print(f"going on after step {self.trained.steps} of {self.files.path}")

    @contextlib.contextmanager
    def tracked(self) -> Iterator[None]:
        """Inside, `self.tracking` is the configured tracker. An error inside ends with the trained weights saved, an
        interruption also with a checkpoint."""
        try:
            with (
                parallel.interrupts_wait() if parallel.size() > 1 else contextlib.nullcontext(),
                tracker(self.cfg, self.files.path, self.before_stop.tracker_id, self.trained.steps) as self.tracking,
            ):
                yield
        except BaseException as error:
            if self.trained.steps and parallel.stops_together(error):
                with parallel.interrupts_wait():
                    self._stop(interrupted=isinstance(error, KeyboardInterrupt))
            if isinstance(error, KeyboardInterrupt) and self.checkpoints.exist():
                error.args = (f"go on with: python -m experiments.run resume={self.files.path}",)
            raise

    def _stop(self, interrupted: bool) -> None:
        """Save the weights and, if the run was interrupted, a checkpoint; say where they are."""
        try:
            if interrupted and self.checkpoints.wanted and self.trainer.between_steps:
                self._checkpoint()
            self._save_weights(finished=False)
            where = f"its weights and metrics are in {self.files.path}"
        except OSError as full:  # the error that the run ends with may be the same one
            where = str(full)
        if parallel.is_main():
            print(f"stopped after step {self.trained.steps}: {where}", file=sys.stderr)
        parallel.wait()  # torchrun ends all as soon as one has ended

    def measure_before(self) -> None:
        """Measure the model before training, unless a checkpoint or an earlier run has kept that."""
        if self.before_stop.before is not None:
            return
        start = start_of(self.cfg, [*self.data.heldout, *self.measures.second])
        if known := self.before.get(start):
            self.before_stop = BeforeStop(seconds=known.seconds, joules=known.joules)
            self._tell(known.evaluation)
        else:
            self.before[start] = known = self._measured_before()
        self.before_stop.before, self.before_stop.texts_before = known.evaluation, known.texts
        self.before_stop.measures_before, self.before_stop.tracker_id = known.measures, self.tracking.run_id

    def _measured_before(self) -> Before:
        seconds, joules = self._seconds(), self._joules()
        with without_prefix(self.model):
            measures = self.measures.measure(self.model).numbers
            evaluation, texts = self._evaluate(), self._answers()
        if not math.isfinite(evaluation.loss):
            dtype = str(self.trainer.dtype).removeprefix("torch.")
            raise UserError(
                f"the held-out loss is {evaluation.loss} before training, in {dtype}: check the model's weights"
            )
        spent = None if joules is None else self._joules() - joules
        return Before(evaluation, texts, measures, self._seconds() - seconds, spent)

    def train(self) -> None:
        """Train to the end, then go back to the best weights if `trainer.keep_best` asks for them."""
        save_best = functools.partial(self.checkpoints.save_best, self.trainer)
        with parallel.interrupts_wait() if parallel.size() == 1 else contextlib.nullcontext():
            self.trainer.fit(self.data, self._log, self._evaluate, self._checkpoint, save_best)
        if self.cfg.trainer.keep_best:
            self.checkpoints.restore_best(self.trainer)
            self.trainer.between_steps = False  # these weights are not those of the optimizer's state

    def measure_after(self) -> dict:
        """Save the weights, measure the model, show samples; return the measured part of result.json."""
        cfg, trained, before = self.cfg, self.trained, self.before_stop
        layers = self._save_weights(finished=True)
        balance = load_balance.rows(self._load())
        samples = self._samples()
        measured = self.measures.measure(self.model)
        losses = self._losses_after()
        if parallel.is_main():
            heading = f"{title(cfg)} on {cfg.data.name}"
            self.files.plot_loss(heading)
            self.files.write_samples(heading, samples)
            rows = heldout.as_rows("heldout", self.data.heldout, losses, measured.flags)
            self.files.write_heldout(rows + heldout.as_rows("second", self.measures.second, measured.second, {}))
            self.files.write_experts(balance)
        result = {
            "method": cfg.method.name,
            "rank": cfg.rank,
            "steps": trained.steps,
            "best_step": trained.best_step,
            **result_numbers.compare(before.before, trained.best if cfg.trainer.keep_best else trained.evaluation),
            **result_numbers.before_and_after(before.measures_before, measured.numbers),
            **spectrum.summary(layers),
            **load_balance.summary(balance),
            **self.storage,
        }
        self.tracking.summarize(result)
        self.tracking.show(samples)
        if (adapter := self.files.path / ADAPTER).is_dir():
            self.tracking.keep(adapter)
        return result

    def finish(self, result: dict) -> dict:
        """Add costs and identity of the run to `result`, write result.json, return its content."""
        cfg, trained = self.cfg, self.trained
        result |= {
            "tokens_per_s": trained.tokens / trained.seconds,
            "peak_memory_bytes": max(parallel.gather(machine.peak_memory_bytes(self.model.device)), default=0),
            "shared_base": None if cfg.quant.name == "none" else self.shared_base,
            "processes": parallel.size(),
            "train_seconds": trained.seconds,
            "total_seconds": self._seconds(),
            "cpu_energy_joules": self._joules(),
            "seed": cfg.seed,
            "machine": machine.about(self.model.device),
            "versions": machine.versions(),
            "commit": commit(),
            "results_version": VERSION,
            "config_hash": config_hash(cfg),
            "config": identity(cfg),
        }
        if parallel.is_main():
            self.files.write_result(result)
            if checkpoints_by_time(cfg):
                self.checkpoints.delete()
        return result

    def _log(self, record: dict) -> None:
        self.energy.joules()  # its counters wrap
        if parallel.is_main():
            self.files.log(record)
        self.tracking.log(record)
        if self.watch:
            self.watch(record)

    def _evaluate(self) -> Evaluation:
        batch_size, pad_id = self.cfg.trainer.eval_batch_size, self.tokenizer.pad_token_id
        load = ExpertLoad(self.model)
        evaluation, losses = evaluate_each(self.model, self.data.heldout, batch_size, pad_id, bar("evaluating"), load)
        self.losses = self.trained.steps, losses
        self.loads = {self.trained.steps: load.total()}
        self._tell(evaluation)
        return evaluation

    def _tell(self, evaluation: Evaluation) -> None:
        self._log({"step": self.trained.steps} | heldout_record(evaluation))
        loss, accuracy = f"loss {evaluation.loss:.3f}", f"token accuracy {evaluation.token_accuracy:.1%}"
        tqdm.write(f"held out, step {self.trained.steps}: {loss}, {accuracy}")

    def _losses_after(self) -> list[SampleLoss]:
        """The loss of each held-out sample with the final weights, measured again where these are not the last ones
        that were measured: the best of earlier steps, or those of a checkpoint."""
        steps = self.trained.best_step if self.cfg.trainer.keep_best else self.trained.steps
        if self.losses is None or self.losses[0] != steps:
            batch_size, pad_id = self.cfg.trainer.eval_batch_size, self.tokenizer.pad_token_id
            self.losses = steps, evaluate_each(self.model, self.data.heldout, batch_size, pad_id)[1]
        return self.losses[1]

    def _load(self) -> dict[str, list[int]]:
        """The tokens that each expert gets with the weights that the run ends with: of the newest evaluation, unless
        that was of other weights, or before a stop."""
        step = self.trained.best_step if self.cfg.trainer.keep_best else self.trained.steps
        if step not in self.loads:
            load = ExpertLoad(self.model)
            if load.layers:
                batch_size, pad_id = self.cfg.trainer.eval_batch_size, self.tokenizer.pad_token_id
                progress = bar("counting tokens of experts")
                evaluate_each(self.model, self.data.heldout, batch_size, pad_id, progress, load)
            return load.total()
        return self.loads[step]

    def _checkpoint(self) -> None:
        now = asdict(self.before_stop) | {"seconds": self._seconds(), "joules": self._joules()}
        now["metrics"] = self.files.settled() if parallel.is_main() else None
        self.checkpoints.save(self.trainer, now)

    def _answers(self) -> list[str]:
        """The model's texts for the sample prompts."""
        prompts = [sample.prompt_ids for sample in self.samples]
        tokens = self.cfg.trainer.sample_tokens
        if not prompts:
            return []
        if parallel.is_main():
            print(f"writing samples: {len(prompts)} answers of up to {tokens} tokens")
        return answer(self.model, self.tokenizer, prompts, tokens, reasoning=True)

    def _samples(self) -> list[dict[str, str]]:
        """The sample prompts with reference and answers."""
        texts = zip(self.samples, self.before_stop.texts_before, self._answers())
        return [
            {
                "prompt": self.tokenizer.decode(sample.prompt_ids),
                "reference": sample.reference,
                "before": before,
                "after": after,
            }
            for sample, before, after in texts
        ]

    def _save_weights(self, finished: bool) -> list[dict]:
        """Write the weights and, of a finished run, spectrum.csv; return the spectra, in process 0."""
        layers = []
        with self.engine.whole(self.model, everything=finished):
            if parallel.is_main():
                save_weights(self.cfg, self.model, self.tokenizer, self.files.path)
                if finished:
                    layers = spectrum.spectra(self.model)
                    self.files.write_spectra(layers)
        return layers

    def _seconds(self) -> float:
        """The time of the run until now, the time before a stop included."""
        return self.before_stop.seconds + time.perf_counter() - self.start

    def _joules(self) -> float | None:
        """The energy until now, likewise; None if the machine does not tell, or did not before a stop."""
        now = self.energy.joules()
        return None if now is None or self.before_stop.joules is None else self.before_stop.joules + now
