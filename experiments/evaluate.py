"""Measure the model of a finished run: held-out loss, perplexity and token accuracy, or benchmarks.

    python -m experiments.evaluate run=outputs/mine                                 on the samples that the run held out
    python -m experiments.evaluate run=outputs/mine data=jsonl data.path=FILE       on every sample of a file
    python -m experiments.evaluate run=outputs/mine tasks=arc_easy,hellaswag        with lm-evaluation-harness

run=DIR               a run's directory, or one of its checkpoints'
data=… data.…=…       as in a run; data.max_heldout=N uses so many samples
tasks=A,B             of lm-evaluation-harness; include_path=DIR has tasks of your own; limit=N samples of each
merge=true            make dense weights of NF4 codes and adapters first: more memory, faster
trainer.…             device, dtype, threads and eval_batch_size, as in a run
"""

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.config import DataConfig, resolve
from experiments.data.samples import load_data
from experiments.errors import UserError
from experiments.runs import lm_eval_harness
from experiments.runs.finished import FinishedRun, load_run
from experiments.system import machine
from experiments.system.cli import command, composed, read_options
from experiments.system.progress import bar
from experiments.training.evaluation import evaluate


@dataclass
class Options:
    run: str
    tasks: str | None = None
    limit: int | None = None
    include_path: str | None = None
    merge: bool = False


def _data(run: FinishedRun, changes: list[str]) -> DataConfig:
    """The data to measure on: the run's, or as the arguments choose; every sample of a file that they name."""
    data = run.cfg.data
    if not any(change.startswith("data.packing=") for change in changes):
        data = dataclasses.replace(data, packing=False)  # how the run trained
    if _chooses(changes):
        data = resolve(composed("+method=lora", "output_dir=unused", *changes)).data
    if data.path and not data.heldout_path and any(change.startswith("data.path=") for change in changes):
        data = dataclasses.replace(data, heldout_path=data.path, max_train=1, part="heldout")
    return data


def _chooses(changes: list[str]) -> bool:
    """Whether the arguments choose other data, rather than change a setting of the run's."""
    return any(change.startswith("data=") for change in changes)


def _measure(run: FinishedRun, data: DataConfig) -> str:
    """Lines for the terminal."""
    heldout = load_data(data, run.tokenizer).heldout
    start = time.perf_counter()
    evaluation = evaluate(
        run.model, heldout, run.cfg.trainer.eval_batch_size, run.tokenizer.pad_token_id, bar("evaluating")
    )
    seconds = time.perf_counter() - start
    return "\n".join(
        [
            f"{len(heldout)} samples of {data.heldout_path or data.path or data.name}",
            f"loss            {evaluation.loss:10.3f}",
            f"perplexity      {evaluation.perplexity:10.2f}",
            f"token accuracy  {evaluation.token_accuracy:10.1%}",
            f"{evaluation.tokens:,} labelled tokens in {seconds:.1f} s",
        ]
    )


@command
def main() -> None:
    options, changes = read_options(Options, __file__, changes=("trainer.", "data.", "data="))
    if (options.limit or options.include_path) and not options.tasks:
        raise UserError("limit=… and include_path=… are for tasks=…; data.max_heldout=N uses so many samples")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"limit={options.limit}: choose 1 or more")
    if options.tasks:
        if about_data := [change for change in changes if change.startswith("data")]:
            raise UserError(f"{about_data[0]}: tasks bring their own data")
        lm_eval_harness.check_installed()
    of_run = [change for change in changes if not (_chooses(changes) and change.startswith("data"))]
    run = load_run(Path(options.run), of_run, options.merge)
    print(machine.describe(run.model.device, run.dtype), file=sys.stderr)
    if options.tasks:
        print(lm_eval_harness.measure(run, options.tasks.split(","), options.limit, options.include_path))
    else:
        print(_measure(run, _data(run, changes)))


if __name__ == "__main__":
    main()
