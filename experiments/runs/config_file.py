"""config.yaml: the configuration of a run, in its directory and in each of its checkpoints."""

from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import Config, resolve
from experiments.errors import UserError
from experiments.system.files import write_atomically

CONFIG = "config.yaml"


def write_config(cfg: Config, directory: Path) -> None:
    """Write config.yaml. `resume` is left out: it is how a run was started, not what it is."""
    values = OmegaConf.structured(cfg)
    values.resume = None
    write_atomically(directory / CONFIG, OmegaConf.to_yaml(values))


def read_config(directory: Path, changes: list[str] = ()) -> Config:
    """What config.yaml says, with `changes` ("key=value") made; keys that it lacks have the schema's defaults.

    Raises:
        UserError: no such file, or not one that this program can have written.
    """
    path = directory / CONFIG
    try:
        values = OmegaConf.load(path)
        merged = OmegaConf.merge(OmegaConf.structured(Config), values, OmegaConf.from_dotlist(list(changes)))
        return resolve(merged)
    except FileNotFoundError as error:
        what = "no config.yaml there, so this is no run's directory" if directory.is_dir() else "no such directory"
        raise UserError(f"{directory}: {what}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
