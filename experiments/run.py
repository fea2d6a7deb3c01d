"""Fine-tune a language model and say what it learned.

    python -m experiments.run +method=qdora rank=16

Methods: full, lora, qlora, dora, qdora. Every key of conf/ can be set on the command line; `-m` runs a sweep:

    python -m experiments.run -m +method=lora,dora rank=4,16
"""

import sys
import time
from pathlib import Path

import hydra
import torch
import transformers
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments import machine, results
from experiments.config import Config, resolve
from experiments.data import Data, load_data
from experiments.errors import UserError
from experiments.evaluate import Evaluation, answer, evaluate
from experiments.files import writable_dir
from experiments.models import load_model
from experiments.tracking import Tracker, tracker
from experiments.train import Trained, heldout_record, train
from modules import attach, quantize, save_adapter


def run(cfg: Config) -> dict:
    """Train as `cfg` says, write everything to `cfg.output_dir`, return what result.json holds.

    Raises:
        UserError: something in the configuration or the files it names is wrong; the message says what to do.
    """
    start = time.perf_counter()
    directory = results.RunDirectory(writable_dir(Path(cfg.output_dir), "set output_dir to a folder"))
    directory.write_config(cfg)
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    device = machine.pick_device(cfg.trainer)
    dtype = machine.pick_dtype(cfg.trainer, device)
    print(f"{cfg.method.name}, rank {cfg.rank}, {cfg.model.name}: {machine.describe(device, dtype)}")

    transformers.set_seed(cfg.seed)
    model, tokenizer = prepare_model(cfg, device, dtype)
    data = load_data(cfg.data, tokenizer)
    print(data.note)
    trained = Trained()
    try:
        with tracker(cfg, directory.path) as tracking:
            result = _train_and_measure(cfg, model, tokenizer, data, dtype, trained, directory, tracking)
    except BaseException:
        if trained.steps:
            _save_weights(cfg, model, tokenizer, directory.path)
            print(f"Stopped after step {trained.steps}; its weights and metrics are in {directory.path}", flush=True)
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
    if cfg.quant.name == "nf4":
        quantize(model, cfg.quant.blocksize, cfg.quant.double)
    if not trains_base:
        try:
            attach(model, cfg.method.adapter, cfg.rank, cfg.lora_alpha, cfg.target_modules, cfg.dropout)
        except ValueError as error:
            raise UserError(str(error)) from error
    return model.to(device), tokenizer


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
        evaluation = evaluate(model, data.heldout, cfg.trainer.eval_batch_size, tokenizer.pad_token_id)
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
        model.save_pretrained(directory / "model")
        tokenizer.save_pretrained(directory / "model")
    else:
        save_adapter(model, directory / "adapter", cfg.model.path or cfg.model.name)


def _finished(cfg: Config) -> str:
    directory = Path(cfg.output_dir)
    return "\n".join(f"  {path}" for path in sorted(directory.iterdir()) if not path.name.startswith("."))


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    try:
        if OmegaConf.is_missing(cfg, "method"):
            methods = GlobalHydra.instance().config_loader().get_group_options("method")
            raise UserError(f"no method: add one of {', '.join(f'+method={name}' for name in methods)}")
        config = resolve(cfg)
        if hydra_config.mode == RunMode.MULTIRUN:
            overrides = hydra_config.job.override_dirname.replace("+", "").replace("/", "-")
            config.output_dir = str(Path(config.output_dir) / f"{hydra_config.job.num}_{overrides}")
        result = run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"interrupted; what there is lies in {config.output_dir}", file=sys.stderr)
        sys.exit(130)
    print(f"\n{results.table(result)}\n\nWritten to {config.output_dir}:\n{_finished(config)}")


if __name__ == "__main__":
    main()
