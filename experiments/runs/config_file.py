"""config.yaml: the configuration of a run, in its directory and in each of its checkpoints."""

from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import Config, resolve
from experiments.errors import UserError
from experiments.system.files import write_atomically
from modules.files.checked import Damaged, verify_file

CONFIG = "config.yaml"
DEPTH = 50  # of the values in one


def write_config(cfg: Config, directory: Path) -> None:
    """Write config.yaml. `resume` and `overwrite` are left out: they say how a run was started, not which run it is."""
    values = OmegaConf.structured(cfg)
    values.resume, values.overwrite = None, False
    write_atomically(directory / CONFIG, OmegaConf.to_yaml(values))


def _check_yaml(path: Path) -> None:
    """Raise UserError for YAML that no run writes, and that takes more time and memory than its size lets one think."""
    depth = 0
    for event in yaml.parse(path.read_text(encoding="utf-8")):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > DEPTH:
            what = f"lists or objects {DEPTH} deep" if depth > DEPTH else f"*{event.anchor} in place of a value"
            raise UserError(f"{path} is not a run's: it has {what}")


def read_config(directory: Path, changes: list[str] = ()) -> Config:
    """The configuration in config.yaml; keys that it lacks have the schema's defaults.

    Args:
        changes: overrides of single keys in Hydra's grammar, "trainer.steps=40".

    Raises:
        UserError: no such file, or not one that this program can have written; a change that is not of one key.
        OverrideParseException: a change that Hydra cannot read.
    """
    path = directory / CONFIG
    try:
        verify_file(path)
        _check_yaml(path)
        values = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        for change in OverridesParser.create().parse_overrides(list(changes)):
            if change.is_add() or change.is_delete() or change.is_sweep_override():
                raise UserError(f"{change.input_line}: give one value for a key of the run, as key=value")
            OmegaConf.update(values, change.key_or_group, change.value())
        return resolve(values)
    except FileNotFoundError as error:
        what = "no config.yaml there, so this is not a run's directory" if directory.is_dir() else "no such directory"
        raise UserError(f"{directory}: {what}") from error
    except Damaged as error:
        raise UserError(str(error)) from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
