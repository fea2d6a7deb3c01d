"""State in pages: the unpaged optimizer's results bit for bit, within the budget, which is enforced and counted."""

import errno
import os

import pytest
import torch
from torch import nn

from kernels import use_backend
from modules import AdamW, AdamW8bit, Paging
from modules.paging import PageStore
from tests.kernels.nf4_cases import needs_triton
from tests.modules.optim_cases import HYPER, paging, parameters, train

PAGE = 4096
CPU = torch.device("cpu")


def store(tmp_path, pages: int, frames: int) -> PageStore:
    return PageStore([PAGE] * pages, CPU, paging(tmp_path, frames))


@pytest.mark.parametrize("frames", [1, 2, 3, 1000])
@pytest.mark.parametrize("cls", [AdamW, AdamW8bit])
def test_results_are_the_unpaged_optimizers_bit_for_bit(cls, frames, tmp_path):
    whole, paged = parameters(), parameters()
    optimizer = cls(paged, **HYPER, paging=paging(tmp_path, frames))
    reference = cls(whole, **HYPER)
    train(reference)
    train(optimizer)
    for p, q in zip(whole, paged):
        assert torch.equal(p, q)
    assert optimizer.pages.peak_resident_bytes <= frames * PAGE
    one, other = reference.state_dict()["state"], optimizer.state_dict()["state"]
    assert one.keys() == other.keys() == {0, 1, 3, 4, 5}  # parameter 2 never had a gradient
    for i in one:
        assert all(torch.equal(one[i][name], other[i][name]) for name in one[i])


@needs_triton
def test_the_kernels_work_on_pages_too(tmp_path):
    whole = nn.Parameter(torch.randn(4200))
    paged = nn.Parameter(whole.detach().clone())
    with use_backend("triton"):
        train(AdamW8bit([whole], **HYPER), range(2))
        train(AdamW8bit([paged], **HYPER, paging=paging(tmp_path)), range(2))
    assert torch.equal(whole, paged)


@pytest.mark.parametrize("pages, frames", [(6, 1), (6, 2), (6, 3), (6, 5), (6, 6), (1, 4)])
def test_residents_and_transfers_are_counted(tmp_path, pages, frames):
    """The next page is on its way while one is worked on; frames - 2 pages or more need not come again."""
    pagestore = store(tmp_path, pages, frames)
    for sweep in range(4):
        pagestore.loads = 0
        for page, content in pagestore.sweep(range(pages)):
            assert pagestore.resident_bytes <= frames * PAGE
            assert frames == 1 or page == pages - 1 or page + 1 in pagestore._frames
            assert (content == sweep).all()
            content += 1
        stay = pages if frames >= pages else max(0, frames - 2)
        assert sweep == 0 or pagestore.loads <= pages - stay
    assert pagestore.peak_resident_bytes == min(pages, frames) * PAGE
    pagestore.flush()
    assert all((pagestore.home(page) == 4).all() for page in range(pages))


def test_pages_outside_the_sweep_are_not_loaded(tmp_path):
    pagestore = store(tmp_path, 5, 2)
    assert [page for page, _ in pagestore.sweep([1, 4])] == [1, 4]
    assert pagestore.loads == 2
    assert [page for page, _ in pagestore.sweep([])] == []


def test_a_spike_takes_the_memory_and_nothing_is_lost(tmp_path):
    """As a forward pass of a long sequence does: between steps, and in the middle of a sweep that was broken off."""
    whole, paged = parameters(), parameters()
    train(AdamW(whole, **HYPER))
    optimizer = AdamW(paged, **HYPER, paging=paging(tmp_path, 3))
    train(optimizer, range(3))
    assert optimizer.evict() == 3 * PAGE and optimizer.pages.resident_bytes == 0
    assert optimizer.evict() == 0
    train(optimizer, range(3, 6))
    for p, q in zip(whole, paged):
        assert torch.equal(p, q)

    pagestore = store(tmp_path, 6, 3)
    for page, content in pagestore.sweep(range(6)):
        content += 1
        if page == 3:
            break
    assert pagestore.evict() == 3 * PAGE
    assert [int(content[0]) for _, content in pagestore.sweep(range(6))] == [1, 1, 1, 1, 0, 0]


def test_an_unpaged_optimizer_has_nothing_to_evict():
    assert AdamW(parameters()).evict() == 0


def test_the_file_has_no_name(tmp_path):
    optimizer = AdamW(parameters(), paging=paging(tmp_path))
    train(optimizer, range(1))
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="a budget of 4,095 bytes is smaller than a page, 4,096"):
        AdamW(parameters(), paging=Paging(4095, tmp_path, page_bytes=4096))
    with pytest.raises(ValueError, match="page_bytes=5000: must be a multiple of 4096"):
        AdamW(parameters(), paging=Paging(10000, tmp_path, page_bytes=5000))
    with pytest.raises(FileNotFoundError):
        AdamW(parameters(), paging=paging(tmp_path / "nowhere"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        AdamW(parameters(), paging=paging(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("host_bytes", [None, 3 * PAGE, 0])
def test_on_a_gpu_homes_are_pinned_memory_first_and_then_the_file(host_bytes, tmp_path):
    whole, paged = ([nn.Parameter(p.detach().cuda()) for p in parameters()] for _ in range(2))
    train(AdamW(whole, **HYPER))
    optimizer = AdamW(paged, **HYPER, paging=Paging(2 * PAGE, tmp_path, host_bytes, PAGE))
    train(optimizer)
    in_host = len(optimizer.pages._homes) if host_bytes is None else host_bytes // PAGE
    assert [optimizer.pages.home(i).is_pinned() for i in range(4)] == [i < in_host for i in range(4)]
    for p, q in zip(whole, paged):
        assert torch.equal(p, q)
