"""How a run starts: the configuration that a command line means, and the checkpoint to go on from."""

from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.config import Config, flat, resolve
from experiments.errors import UserError
from experiments.runs import checkpoints
from experiments.runs.config_file import read_config
from experiments.system.cli import is_given
from experiments.system.files import RESULT

# Keys that may change when a run is resumed: those of its end, those of its memory, and the dtype, which the restored
# state is compared with anyway.
MAY_CHANGE = {"trainer.steps", "trainer.early_stopping_patience", "trainer.dtype"}
MAY_CHANGE |= {"trainer.gradient_checkpointing", "optim.paged", "optim.budget_mb", "optim.host_mb"}


def configured(cfg: DictConfig) -> Config:
    """The configuration as composed; where resume comes without a method, the run's own with the changes given."""
    given = list(HydraConfig.get().overrides.task)
    output_dir = cfg.output_dir
    if cfg.resume:
        if cfg.overwrite:
            raise UserError("overwrite=true starts anew and resume=… goes on: leave one of them out")
        has_directory = is_given("output_dir")
        if cfg.resume == checkpoints.LATEST and not has_directory:
            cfg.resume = str(checkpoints.newest_run(Path(output_dir).parent))
        checkpoint = checkpoints.find(cfg.resume, Path(output_dir))
        run_directory = checkpoint.parent.parent
        if has_directory and Path(output_dir).absolute() != run_directory:
            raise UserError(f"output_dir={output_dir}: the run goes on in {run_directory}: leave output_dir out")
        output_dir = str(run_directory)
    if not OmegaConf.is_missing(cfg, "method"):
        config = resolve(cfg)
    elif cfg.resume:
        config = read_config(checkpoint, given)
    else:
        methods = GlobalHydra.instance().config_loader().get_group_options("method")
        raise UserError(f"no method: add one of {', '.join(f'+method={name}' for name in methods)}")
    config.output_dir, config.resume = output_dir, cfg.resume
    return config


def checkpoint_of(cfg: Config) -> Path:
    """The checkpoint to go on from.

    Raises:
        UserError: there is none, it is of another configuration, or its run is finished.
    """
    checkpoint = checkpoints.find(cfg.resume, Path(cfg.output_dir))
    was, now = flat(read_config(checkpoint)), flat(cfg)
    different = {key for key in was.keys() | now.keys() if was.get(key) != now.get(key)}
    if wrong := sorted(different - MAY_CHANGE):
        values = ", ".join(f"{key} ({was.get(key)} there, {now.get(key)} here)" for key in wrong)
        raise UserError(f"{checkpoint} is of another configuration: {values}")
    trained, result = checkpoints.read_state(checkpoint)["trained"], checkpoint.parent.parent / RESULT
    if trained.steps > cfg.trainer.steps or (trained.finished(cfg.trainer) and result.exists()):
        raise UserError(
            f"{checkpoint}: nothing is left to do after its {trained.steps} steps: raise trainer.steps, or "
            "trainer.early_stopping_patience if that ended it"
        )
    if "trainer.steps" in different:
        print(f"trainer.steps was {was['trainer.steps']}: the learning rate follows the new schedule from here on")
    return checkpoint
