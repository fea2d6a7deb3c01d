"""AdamW and AdamW8bit beside torch's and bitsandbytes' optimizers; saving, loading, bad input."""

import json

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modules import AdamW, AdamW8bit
from tests.modules.optim_cases import HYPER, STEPS, paging, parameters, train


def assert_equal_states(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for i in one:
        assert one[i].keys() == other[i].keys()
        for name in one[i]:
            assert one[i][name].shape == other[i][name].shape and torch.equal(one[i][name], other[i][name]), (i, name)


def test_against_float64_and_torch():
    ours, theirs, exact = parameters(), parameters(), parameters(torch.float64)
    for cls, params in ((AdamW, ours), (torch.optim.AdamW, theirs), (torch.optim.AdamW, exact)):
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 1e-3, "weight_decay": 0.0}]
        train(cls(groups, **HYPER))
    for mine, torchs, want in zip(ours, theirs, exact):
        error, torch_error = ((p - want).abs().max() for p in (mine, torchs))
        assert error <= 2 * torch_error + 4 * torch.finfo(torch.float32).eps * want.abs().max()


def test_the_state_is_torchs():
    """A run begun with torch.optim.AdamW goes on with ours, and back."""
    params, others = parameters(), parameters()
    torchs, ours = torch.optim.AdamW(params, **HYPER), AdamW(others, **HYPER)
    train(torchs, range(3))
    with torch.no_grad():
        for p, q in zip(params, others):
            q.copy_(p)
    ours.load_state_dict(torchs.state_dict())
    assert_equal_states(ours.state_dict()["state"], torchs.state_dict()["state"])
    train(torchs, range(3, STEPS))
    train(ours, range(3, STEPS))
    for p, q in zip(params, others):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)
    torchs.load_state_dict(ours.state_dict())


def test_8_bit_state_follows_fp32_as_closely_as_bitsandbytes_does():
    params = {name: parameters() for name in ("ours", "bitsandbytes", "fp32")}
    classes = {"ours": AdamW8bit, "bitsandbytes": bnb.optim.AdamW8bit, "fp32": torch.optim.AdamW}
    states = {}
    for name, cls in classes.items():
        optimizer = cls(params[name], **HYPER)
        with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles its code for odd lengths, for seconds
            train(optimizer, range(30))
        states[name] = optimizer.state
    for i, (mine, theirs, fp32, start) in enumerate(zip(*params.values(), parameters())):
        update = (fp32 - start).norm()
        error, their_error = ((p - fp32).norm() for p in (mine, theirs))
        assert error <= 1.1 * their_error + 1e-6 * update, i
        if mine.numel() >= 4096:
            assert 0 < their_error < 0.1 * update
            state, their_state = states["ours"][mine], states["bitsandbytes"][theirs]
            torch.testing.assert_close(state["exp_avg_absmax"], their_state["absmax1"], rtol=0.05, atol=0)
            torch.testing.assert_close(state["exp_avg_sq_absmax"], their_state["absmax2"], rtol=0.05, atol=0)


def test_bytes_of_8_bit_state():
    optimizer = AdamW8bit([nn.Parameter(torch.zeros(256, 256)), nn.Parameter(torch.zeros(4095))])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    large, small = (
        sum(t.numel() * t.element_size() for name, t in state.items() if name != "step")
        for state in optimizer.state.values()
    )
    assert (large, small) == (256 * 256 * 2 + 2 * 256 * 4, 4095 * 8)


@pytest.mark.parametrize("cls", [AdamW, AdamW8bit])
@pytest.mark.parametrize("before, after", [(False, False), (False, True), (True, False), (True, True)])
def test_a_run_goes_on_from_its_saved_state_bit_for_bit(cls, before, after, tmp_path):
    """Through a safetensors file and JSON, with pages or without them before and after."""
    whole, part = parameters(), parameters()
    train(cls(whole, **HYPER))
    optimizer = cls(part, **HYPER, paging=paging(tmp_path) if before else None)
    train(optimizer, range(3))
    saved = optimizer.state_dict()
    tensors = {f"{i}.{name}": tensor for i, state in saved["state"].items() for name, tensor in state.items()}
    save_file(tensors, tmp_path / "state.safetensors")
    (tmp_path / "groups.json").write_text(json.dumps(saved["param_groups"]))

    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(tmp_path / "state.safetensors").items():
        i, _, name = key.partition(".")
        state.setdefault(int(i), {})[name] = tensor
    resumed = cls([nn.Parameter(p.detach().clone()) for p in part], lr=1.0, paging=paging(tmp_path) if after else None)
    train(resumed, range(1))  # its own state is replaced below
    part = resumed.param_groups[0]["params"]
    with torch.no_grad():
        for p, q in zip(part, optimizer.param_groups[0]["params"]):
            p.copy_(q)
    resumed.load_state_dict({"state": state, "param_groups": json.loads((tmp_path / "groups.json").read_text())})
    train(resumed, range(3, STEPS))
    for p, q in zip(whole, part):
        assert torch.equal(p, q)


def test_with_a_schedule_a_scaler_and_a_closure():
    params = parameters()
    optimizer = AdamW(params, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(sum(p.square().sum() for p in params)).backward()
    scaler.step(optimizer)
    scaler.update()
    schedule.step()
    assert schedule.get_last_lr() == [5e-3]
    assert optimizer.step(lambda: 7.0) == 7.0
    params[0].grad[0] = torch.inf
    unchanged = params[1].clone()
    scaler.step(optimizer)  # a gradient that is not finite: no step
    assert torch.equal(params[1], unchanged)


def test_bad_input_is_refused(tmp_path):
    p, q = nn.Parameter(torch.zeros(5000)), nn.Parameter(torch.zeros(8, 9))
    for params, message in [
        (
            [nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))],
            r"AdamW needs contiguous float32 .* torch.bfloat16 \[3\]",
        ),
        ([nn.Parameter(torch.zeros(8, 9).t())], r"contiguous .* strides \(1, 9\)"),
        ([p, nn.Parameter(torch.zeros(3, device="meta"))], "all on one device; .* on meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            AdamW(params)
    for bad, message in [({"lr": -1.0}, "lr=-1.0"), ({"betas": (0.9, 1.0)}, "betas="), ({"eps": -1e-8}, "eps=-1e-08")]:
        with pytest.raises(ValueError, match=message):
            AdamW([p], **bad)
    with pytest.raises(ValueError, match="paged state cannot grow: give every parameter to the constructor"):
        AdamW([p], paging=paging(tmp_path)).add_param_group({"params": [q]})

    fp32, eight = AdamW([p, q]), AdamW8bit([p, q])
    for optimizer in (fp32, eight):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
    before = eight.state_dict()["state"][0]["exp_avg"].clone()
    with pytest.raises(
        ValueError, match=r"parameter 0: the saved state has .*exp_avg torch.float32 of 5000.*; needed is"
    ):
        eight.load_state_dict(fp32.state_dict())
    with pytest.raises(ValueError, match="other parameters"):
        eight.load_state_dict(AdamW8bit([p]).state_dict())
    assert torch.equal(eight.state_dict()["state"][0]["exp_avg"], before)


@pytest.mark.parametrize("cls", [AdamW, AdamW8bit])
@pytest.mark.parametrize("paged", [False, True], ids=["", "paged"])
def test_capturable_gives_the_same_bits(cls, paged, tmp_path):
    """Also after a stop, to a run of the other kind; gradients are missing now and then (see `train`)."""
    whole, part = parameters(), parameters()
    plain = cls(whole, **HYPER)
    optimizer = cls(part, **HYPER, capturable=True, paging=paging(tmp_path) if paged else None)
    for step in range(STEPS):
        if step == 3:
            other = cls(part, **HYPER)
            other.load_state_dict(optimizer.state_dict())
            optimizer = cls(part, **HYPER, capturable=True)
            optimizer.load_state_dict(other.state_dict())
        for one in (plain, optimizer):
            one.param_groups[0]["lr"] = HYPER["lr"] * 0.5**step
            train(one, range(step, step + 1))
    for p, q in zip(whole, part):
        assert torch.equal(p, q)
    for state, other in zip(plain.state_dict()["state"].values(), optimizer.state_dict()["state"].values()):
        assert all(torch.equal(state[name], other[name]) for name in state)


def test_a_capturable_step_is_skipped_on_the_device():
    params = parameters()
    optimizer = AdamW8bit(params, **HYPER, capturable=True)
    train(optimizer, range(2))
    before, weights = optimizer.state_dict()["state"], [p.detach().clone() for p in params]
    optimizer.found_inf = torch.ones(())
    train(optimizer, range(2, 3))
    assert all(torch.equal(p, q) for p, q in zip(params, weights))
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[name], before[i][name]) for name in state)
