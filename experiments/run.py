"""Fine-tune a language model and say what it learned.

    python -m experiments.run +method=qdora rank=16

Methods: full, lora, qlora, dora, qdora. Every key of conf/ can be set on the command line; `-m` runs a sweep:

    python -m experiments.run -m +method=lora,dora rank=4,16
"""

import contextlib
import os
import sys
import time
from pathlib import Path

import hydra
import torch
import transformers
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments import machine, results
from experiments.config import Config, resolve
from experiments.data import Data, load_data
from experiments.errors import UserError
from experiments.evaluate import Evaluation, answer, evaluate
from experiments.files import PROJECT_ROOT, writable_dir
from experiments.models import load_model, quiet
from experiments.progress import bar
from experiments.tracking import Tracker, tracker
from experiments.train import Trained, heldout_record, train
from modules import NF4Linear, attach, decoder_linears, quantize, save_adapter


def run(cfg: Config) -> dict:
    """Train as `cfg` says, write everything to `cfg.output_dir`, return what result.json holds.

    Raises:
        UserError: something in the configuration or the files it names is wrong; the message says what to do.
    """
    directory = results.RunDirectory(writable_dir(Path(cfg.output_dir), "set output_dir to a folder"))
    try:
        return _run(cfg, directory)
    except BaseException:
        with contextlib.suppress(OSError):
            directory.path.rmdir()  # nothing was written yet: leave no empty directory behind
        raise


def _run(cfg: Config, directory: results.RunDirectory) -> dict:
    start = time.perf_counter()
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    device = machine.pick_device(cfg.trainer)
    dtype = machine.pick_dtype(cfg.trainer, device)
    print(f"{cfg.method.name}, rank {cfg.rank}, {cfg.model.name}: {machine.describe(device, dtype)}")

    transformers.set_seed(cfg.seed)
    model, tokenizer = prepare_model(cfg, device, dtype)
    data = load_data(cfg.data, tokenizer)
    print(data.note)
    directory.write_config(cfg)
    trained = Trained()
    try:
        with tracker(cfg, directory.path) as tracking:
            result = _train_and_measure(cfg, model, tokenizer, data, dtype, trained, directory, tracking)
    except BaseException:
        if trained.steps:
            _save_weights(cfg, model, tokenizer, directory.path)
            print(
                f"stopped after step {trained.steps}: its weights and metrics are in {directory.path}", file=sys.stderr
            )
        raise
    result |= {
        "tokens_per_s": trained.tokens / trained.seconds,
        "peak_memory_bytes": machine.peak_memory_bytes(device),
        "train_seconds": trained.seconds,
        "total_seconds": time.perf_counter() - start,
        "seed": cfg.seed,
        "versions": machine.versions(),
        "commit": machine.commit(),
        "config_hash": results.config_hash(cfg),
    }
    directory.write_result(result)
    return result


def prepare_model(
    cfg: Config, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The configured model, quantized and with its adapters, on `device`, and its tokenizer."""
    trains_base = cfg.method.adapter == "none"
    # Weights that train are kept in fp32, whatever the products run in: small updates would round to nothing.
    model, tokenizer = load_model(cfg.model, torch.float32 if trains_base else dtype, cfg.seed)
    _quantize(cfg, model)
    if not trains_base:
        try:
            attach(model, cfg.method.adapter, cfg.rank, cfg.lora_alpha, cfg.target_modules, cfg.dropout)
        except ValueError as error:
            raise UserError(str(error)) from error
    return model.to(device), tokenizer


def _quantize(cfg: Config, model: PreTrainedModel) -> None:
    """Pack the decoder as `cfg.quant` says. What was packed on disk stays as it is, and must be as `cfg.quant` says."""
    packed = {name: linear for name, linear in decoder_linears(model).items() if isinstance(linear, NF4Linear)}
    if not packed:
        if cfg.quant.name == "nf4":
            quantize(model, cfg.quant.blocksize, cfg.quant.double, progress=bar("quantizing"))
        return
    if cfg.quant.name == "none":
        raise UserError(
            f"model.path={cfg.model.path} is packed in NF4, and method={cfg.method.name} takes a dense model: "
            "choose +method=qlora or +method=qdora"
        )
    for name, linear in packed.items():
        blocksize, double = linear.blocksize, linear.quant_state.nested
        if (blocksize, double) != (cfg.quant.blocksize, cfg.quant.double):
            raise UserError(
                f"model.path={cfg.model.path}: {name} is packed with blocksize {blocksize} and "
                f"{'' if double else 'no '}double quantization: set quant.blocksize={blocksize} "
                f"quant.double={str(double).lower()}"
            )


def _train_and_measure(
    cfg: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    dtype: torch.dtype,
    trained: Trained,
    directory: results.RunDirectory,
    tracking: Tracker,
) -> dict:
    def log(record: dict) -> None:
        directory.log(record)
        tracking.log(record)

    def measure(step: int) -> tuple[Evaluation, list[str]]:
        evaluation = evaluate(
            model, data.heldout, cfg.trainer.eval_batch_size, tokenizer.pad_token_id, bar("evaluating")
        )
        log({"step": step} | heldout_record(evaluation))
        print(f"held out, step {step}: loss {evaluation.loss:.3f}, token accuracy {evaluation.token_accuracy:.1%}")
        prompts = [sample.prompt_ids for sample in samples]
        return evaluation, answer(model, tokenizer, prompts, cfg.trainer.sample_tokens) if samples else []

    samples = [example for example in data.heldout if example.prompt_ids][: cfg.trainer.samples]
    before, texts_before = measure(0)
    train(model, data, cfg, dtype, tokenizer.pad_token_id, log, trained)
    after, texts_after = measure(trained.steps)

    _save_weights(cfg, model, tokenizer, directory.path)
    title = f"{cfg.method.name}, rank {cfg.rank}, {cfg.model.name} on {cfg.data.name}"
    directory.plot_loss(title)
    directory.write_samples(
        title,
        [
            {"prompt": tokenizer.decode(sample.prompt_ids), "reference": sample.reference, "before": old, "after": new}
            for sample, old, new in zip(samples, texts_before, texts_after)
        ],
    )
    result = {"method": cfg.method.name, "rank": cfg.rank, **results.compare(before, after), **results.storage(model)}
    tracking.summarize(result)
    return result


def _save_weights(cfg: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """The adapter, or, where every weight trained, the whole model as a Hugging Face directory."""
    if cfg.method.adapter == "none":
        with quiet():
            model.save_pretrained(directory / "model")
        tokenizer.save_pretrained(directory / "model")
    else:
        save_adapter(model, directory / "adapter", cfg.model.path or cfg.model.name)


def _job_directory(output_dir: str) -> str:
    """The run's directory: `output_dir` itself, or in a sweep one of its own inside, named by what the job varies."""
    job = HydraConfig.get().job
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return output_dir
    return str(Path(output_dir) / f"{job.num}_{job.override_dirname.replace('+', '').replace('/', '-')}")


@hydra.main(version_base="1.3", config_path=str(PROJECT_ROOT / "conf"), config_name="config")
def main(cfg: DictConfig) -> None:
    try:
        if OmegaConf.is_missing(cfg, "method"):
            methods = GlobalHydra.instance().config_loader().get_group_options("method")
            raise UserError(f"no method: add one of {', '.join(f'+method={name}' for name in methods)}")
        config = resolve(cfg)
        config.output_dir = _job_directory(config.output_dir)
        result = run(config)
    except UserError as error:  # here, not in cli: Hydra would print a second message around it
        sys.exit(f"error: {error}")
    files = [path for path in sorted(Path(config.output_dir).iterdir()) if not path.name.startswith(".")]
    print(f"\n{results.table(result)}\n\nWritten:", *files, sep="\n  ")


def _one_line(error: Exception) -> str:
    """What a configuration error says, without Hydra's indented details and its advice to add unknown keys."""
    lines = f"{error}\n{error.__cause__ or ''}".partition("Config search path")[0].splitlines()
    kept = [line.strip() for line in lines if line.strip() and not line.startswith((" ", "To append"))]
    return " ".join(dict.fromkeys(kept))


def cli() -> None:
    """`main` with errors of the user's in one line on stderr; exit code 1, or 130 after Ctrl-C."""
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line when it is printed
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes exceptions on instead of printing them its own way
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {_one_line(error)}")
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    cli()
