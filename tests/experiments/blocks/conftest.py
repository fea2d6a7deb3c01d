"""Samples for profiles and trials of block sizes."""

import pytest

from experiments.config import DataConfig
from experiments.data.samples import load_data
from tests.experiments.helpers import tiny, write_chats


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    path = write_chats(tmp_path_factory.mktemp("chats"))
    return load_data(DataConfig(name="jsonl", source="jsonl", path=str(path)), tiny()[1]).train[:3]
