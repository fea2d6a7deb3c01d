"""Which backend an op takes, and that it says so where that is not the obvious one."""

import types

import pytest
import torch

from kernels import dispatch, use_backend

CPU = torch.zeros(1)
GPU = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that GPU is on a card of the given compute capability."""
    monkeypatch.delenv("QDORA_BACKEND", raising=False)
    dispatch._environment.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some card")

    def pretend(*capability: int):
        dispatch._has_matrix_instructions.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    yield pretend
    dispatch._has_matrix_instructions.cache_clear()


@pytest.mark.parametrize("products", [False, True])
def test_by_device(gpu, products, recwarn):
    gpu(8, 0)
    assert dispatch.use_triton(GPU, products) and not dispatch.use_triton(CPU, products)
    with use_backend("torch"):
        assert not dispatch.use_triton(GPU, products)
    assert not recwarn


def test_products_on_an_old_card_run_in_torch_and_say_so_once(gpu, recwarn):
    gpu(7, 5)
    assert dispatch.use_triton(GPU)
    assert not recwarn
    assert not dispatch.use_triton(GPU, products=True) and not dispatch.use_triton(GPU, products=True)
    assert [str(w.message)[:18] for w in recwarn] == ["Some card is sm_75"]
    with use_backend("triton"):
        assert dispatch.use_triton(GPU, products=True)


def test_unknown_backends_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="use_backend: unknown backend 'cuda'"), use_backend("cuda"):
        pass
    dispatch._environment.cache_clear()
    monkeypatch.setenv("QDORA_BACKEND", "numpy")
    with pytest.raises(ValueError, match="QDORA_BACKEND: unknown backend 'numpy'"):
        dispatch.use_triton(CPU)
