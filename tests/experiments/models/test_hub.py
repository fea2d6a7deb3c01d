"""Models by their name on the Hugging Face Hub: from its cache, downloaded from a Hub that is made up here, or how."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from experiments import run
from experiments.config import ModelConfig
from experiments.errors import UserError
from experiments.models import hub
from experiments.models.architecture import load_architecture
from experiments.models.load import load_model
from tests.experiments.helpers import SMALL, TINY, tiny

NAME = "Someone/Model-0.6B"
FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
OTHERS = [
    "pytorch_model.bin",
    "modeling_x.py",
    "original/consolidated.safetensors",
    "README.md",
    "consolidated.safetensors",
]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A Hub with the tiny model, and files that nobody should fetch."""
    source, cache = tmp_path / "hub", tmp_path / "cache"
    model, tokenizer = tiny()
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    for name in OTHERS:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("not for us")
    state = SimpleNamespace(online=True, fetched=0, source=source, cache=cache, error=None)

    def snapshot_download(name, allow_patterns, ignore_patterns, local_files_only=False):
        from huggingface_hub.utils import filter_repo_objects

        assert name == NAME
        if local_files_only:
            if not cache.exists():
                raise LocalEntryNotFoundError("not cached")
            return str(cache)
        state.fetched += 1
        files = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, cache / file)
        return str(cache)

    class Api:
        def model_info(self, name, timeout):
            assert timeout <= 10
            if state.error:
                raise state.error
            if not state.online:
                raise httpx2.ConnectError("Name or service not known")
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=path.name) for path in source.iterdir()])

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "HfApi", Api)
    return state


def config(path: str = NAME) -> ModelConfig:
    return ModelConfig(name="hf", source="hf", path=path)


def test_a_model_is_downloaded_once_without_pickles_and_code(fake, capsys):
    model, tokenizer = load_model(config(), torch.float32, seed=0)
    assert f"downloading {NAME} to " in capsys.readouterr().out
    assert sorted(path.name for path in fake.cache.iterdir()) == sorted({*FILES, "generation_config.json"})
    expected = tiny()[0].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.chat_template == tiny()[1].chat_template
    fake.online = False
    load_model(config(), torch.float32, seed=0)
    assert fake.fetched == 1


def test_a_plan_needs_the_settings_alone(fake):
    assert load_architecture(config()).hidden_size == 64
    assert sorted(path.name for path in fake.cache.iterdir()) == ["config.json", "generation_config.json"]
    load_model(config(), torch.float32, seed=0)  # fetches the rest
    assert (fake.cache / "model.safetensors").is_file()


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            httpx2.ConnectError("Name or service not known"),
            r"cannot be reached \(Name or service not known\): where th",
        ),
        (
            httpx2.ReadTimeout("timed out"),
            r"cannot be reached \(timed out\): where there is a network run `hf download",
        ),
        (RepositoryNotFoundError("404", response=response(404)), r"has no such model \(or a private one\)"),
        (GatedRepoError("403", response=response(403)), r"accept its licence on https://huggingface.co/Someone/Model"),
    ],
)
def test_a_model_that_cannot_be_fetched(fake, error, message):
    fake.error = error
    with pytest.raises(UserError, match=message) as told:
        load_model(config(), torch.float32, seed=0)
    assert str(told.value).startswith(f"model.path={NAME}: ") and "\n" not in str(told.value)
    assert not fake.cache.exists()


def test_offline_and_pickles(fake, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"HF_HUB_OFFLINE is set: unset it, or where there is a network run `hf download"
    ):
        load_model(config(), torch.float32, seed=0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for path in fake.source.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="no safetensors in this repository, and pickles are not read"):
        load_model(config(), torch.float32, seed=0)


def test_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    assert hub.is_name("Qwen/Qwen3-0.6B") and hub.is_name("a/b")
    assert not any(map(hub.is_name, ("outputs/model", "/a/b", "./b", "~/b", "a/b/c", "gpt2", "a/b..c", "../a")))
    with pytest.raises(
        UserError, match=r"model.path=gpt2: no such directory; of a model on the Hugging Face Hub give ORG"
    ):
        load_model(config("gpt2"), torch.float32, seed=0)


def test_a_run_of_a_model_by_its_name(fake, terminal, chats, tmp_path):
    where = ["data=jsonl", f"data.path={chats}", f"output_dir={tmp_path / 'out'}"]
    code, text = terminal(run, "+method=lora", *TINY, "model=hf", f"model.path={NAME}", *SMALL, *where)
    assert code == 0, text
    assert f'"base_model_name_or_path": "{NAME}"' in (tmp_path / "out" / "adapter" / "adapter_config.json").read_text()
    code, text = terminal(run, "+method=lora", *TINY, f"model.path={NAME}", *where)
    assert code == 1 and f"model=tiny reads no model.path: add model=hf for {NAME}" in text
