"""Models of the Hugging Face Hub by their name, such as Qwen/Qwen3-0.6B: from the local cache, or downloaded.

Only weights in safetensors, the tokenizer and settings are fetched: neither pickles nor code.
"""

from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from experiments.errors import UserError
from experiments.system import parallel
from modules.files.packed_model import MODELOPT_FILE

SECONDS = 5  # to reach the Hub in
SETTINGS = ["config.json", "generation_config.json", MODELOPT_FILE, "*.safetensors.index.json"]
TOKENIZER = ["tokenizer*.json", "*.model", "vocab.*", "merges.txt", "tekken.json", "special_tokens_map.json"]
TOKENIZER += ["added_tokens.json", "chat_template*", "preprocessor_config.json"]
WANTED = [*SETTINGS, *TOKENIZER, "*.safetensors"]
LEFT = ["*/*", "consolidated*"]  # the same weights once more, for other programs


def is_name(path: str) -> bool:
    """Whether it can be the name of a model on the Hub, ORGANISATION/NAME, and does not look like a path here."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return "/" in path and not Path(path).parent.exists()


def hub_directory(name: str, weights: bool = True) -> Path:
    """The model as a Hugging Face directory in the Hub's own cache; downloaded if it is not there.

    Args:
        weights: False: its settings are enough.

    Raises:
        UserError: it is not there and cannot be fetched; the message says how to get it.
    """
    wanted = WANTED if weights else SETTINGS
    with parallel.main_first():
        try:
            directory = Path(
                snapshot_download(name, allow_patterns=wanted, ignore_patterns=LEFT, local_files_only=True)
            )
            if not weights or any(directory.glob("*.safetensors")):
                return directory
        except LocalEntryNotFoundError:
            pass
        return _download(name, wanted)


def _download(name: str, wanted: list[str]) -> Path:
    how = f"where there is a network run `hf download {name} --local-dir DIR`, and set model.path=DIR"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"model.path={name}: no such directory, and HF_HUB_OFFLINE is set: unset it, or {how}")
    try:
        info = HfApi().model_info(name, timeout=SECONDS)
        files = [file.rfilename for file in info.siblings or ()]
        if "*.safetensors" in wanted and not any("/" not in file and file.endswith(".safetensors") for file in files):
            raise UserError(
                f"model.path={name}: no safetensors in this repository, and pickles are not read: choose another"
            )
        print(f"downloading {name} to {constants.HF_HUB_CACHE}", flush=True)
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=LEFT))
    except GatedRepoError as error:
        ask = f"accept its licence on {constants.ENDPOINT}/{name}, then `hf auth login`"
        raise UserError(f"model.path={name}: this model is for those who asked for it: {ask}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"model.path={name}: no such directory, and {constants.ENDPOINT} has no such model (or a private one)"
        ) from error
    except (OSError, HTTPError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"model.path={name}: no such directory, and {constants.ENDPOINT} cannot be reached ({reason}): {how}"
        ) from error
