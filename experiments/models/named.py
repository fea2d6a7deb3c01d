"""The models that have a name: the files of conf/model/."""

from omegaconf import OmegaConf

from experiments.config import ModelConfig
from experiments.system.files import PROJECT_ROOT

MODELS = PROJECT_ROOT / "conf" / "model"


def model_names() -> list[str]:
    return sorted(path.stem for path in MODELS.glob("*.yaml"))


def named_model(name: str) -> ModelConfig:
    """The model that `model=<name>` means on the command line."""
    values = OmegaConf.load(MODELS / f"{name}.yaml")
    values.pop("defaults")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))
