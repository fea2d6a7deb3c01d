"""AdamW with fp32 or 8-bit state, in memory or in pages. One kernel launch updates all tensors with the same settings.

state_dict()["state"] has for each parameter, by its index, the same tensors as torch.optim.AdamW:
    step                                 fp32 [] (an int in `state`, unless capturable)
    exp_avg, exp_avg_sq                  fp32, the parameter's shape
or with 8-bit state
    step                                 as above
    exp_avg, exp_avg_sq                  uint8 codes, the parameter's shape
    exp_avg_absmax, exp_avg_sq_absmax    fp32 [ceil(elements / 256)]
The format does not depend on paging, so a run can resume with another budget.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels
from kernels.adamw8bit import BLOCKSIZE, state_blocks
from modules.paging import PageStore, Paging

MIN_8BIT_SIZE = 4096  # smaller tensors have fp32 state, as in bitsandbytes
_ALIGNMENT = 16  # bytes: the kernels' widest loads need state in a page aligned so


class Piece(NamedTuple):
    """A range of elements of a flattened parameter, and the state of these elements.

    Attributes:
        start: the first element, a multiple of 256.
        stop: the element behind the last.
        state: the state tensors by name. In the plan of a page: (dtype, first byte in the page, length) of each.
    """

    param: Tensor
    start: int
    stop: int
    state: dict[str, Any]

    def of(self, tensor: Tensor) -> Tensor:
        """These elements of a contiguous tensor of the parameter's shape; the tensor itself if they are all."""
        whole = self.stop - self.start == tensor.numel()  # making a view of every tensor took half of a step's time
        return tensor if whole else tensor.view(-1)[self.start : self.stop]

    def part(self, name: str) -> slice:
        """This piece's range in the flattened state tensor `name` of the whole parameter."""
        if name.endswith("absmax"):
            return slice(self.start // BLOCKSIZE, state_blocks(self.stop))
        return slice(self.start, self.stop)

    def in_page(self, page: Tensor) -> "Piece":
        """A copy of this piece whose state tensors are views of the bytes of its page."""
        views = {k: page[at : at + n * dtype.itemsize].view(dtype) for k, (dtype, at, n) in self.state.items()}
        return self._replace(state=views)


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) with torch.optim.AdamW's arguments. Results are equal except for rounding.

    Args:
        params: parameters, or groups of them: fp32, contiguous, all on one device. If one is a DTensor, as in FSDP,
            the local part is updated and has the state.
        lr, betas, eps, weight_decay: see torch.optim.AdamW.
        paging: keep the state in pages. The results are the same bit for bit.
        capturable: keep lr and the steps' count on the device, so that a CUDA graph can have `step` in it. Before a
            replay `set_lr` passes a schedule's lr on. A replay changes parameters that had a gradient in the capture.

    Attributes:
        pages: the PageStore; None without paging.
        found_inf: fp32 [] on the device, of a capturable one: `step` changes nothing unless it is 0.

    Raises:
        ValueError: a parameter has the wrong dtype, layout or device, a number is out of range, or the budget is
            smaller than a page.
        OSError: the disk has no room for the file with the pages.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        paging: Paging | None = None,
        capturable: bool = False,
    ):
        self.pages: PageStore | None = None
        self.capturable, self.found_inf = capturable, None
        self._lrs: list[Tensor] = []  # fp64 [] of each group
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if paging is not None:
            self._plan, sizes = self.fill_pages(paging.page_bytes)
            self.pages = PageStore(sizes, self._params()[0].device, paging)

    def add_param_group(self, param_group: dict) -> None:
        if self.pages is not None:
            raise ValueError("paged state cannot grow: give every parameter to the constructor")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"{name}={group[name]}: must be 0 or more")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas={group['betas']}: must be at least 0 and below 1")
        device = self._params()[0].device
        if self.capturable:
            self._lrs.append(torch.full((), group["lr"], dtype=torch.float64, device=device))
        for param in group["params"]:
            if param.dtype != torch.float32 or not param.is_contiguous() or param.device != device:
                raise ValueError(
                    f"{type(self).__name__} needs contiguous float32 parameters, all on one device; one is "
                    f"{param.dtype} {list(param.shape)} with strides {param.stride()} on {param.device}"
                )

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def state_layout(self, param: Tensor, elements: int) -> dict[str, tuple[torch.dtype, int]]:
        """(dtype, length) of each state tensor for `elements` elements of `param`, as the kernel orders them."""
        return {"exp_avg": (torch.float32, elements), "exp_avg_sq": (torch.float32, elements)}

    def fill_pages(self, page_bytes: int) -> tuple[list[list[Piece]], list[int]]:
        """(the pieces of each page, the bytes of each page). One parameter may have pieces in several pages."""
        pages: list[list[Piece]] = []
        sizes: list[int] = []
        for param in self._params():
            block_bytes = sum(n * dtype.itemsize for dtype, n in self.state_layout(param, BLOCKSIZE).values())
            start = 0
            elements = _local(param).numel()
            while start < elements:
                room = page_bytes - sizes[-1] - 4 * _ALIGNMENT if pages else 0
                if room < block_bytes:
                    pages.append([])
                    sizes.append(0)
                    continue
                stop = min(elements, start + room // block_bytes * BLOCKSIZE)
                state = {}
                for name, (dtype, n) in self.state_layout(param, stop - start).items():
                    state[name] = (dtype, sizes[-1], n)
                    sizes[-1] += -(-n * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
                pages[-1].append(Piece(param, start, stop, state))
                start = stop
        return pages, sizes

    # ------------------------------------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient.

        Args:
            closure: computes the gradients again and returns the loss.

        Returns:
            The loss that `closure` returned; None without a closure.
        """
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        updated = [param for param in self._params() if param.grad is not None]
        new = [param for param in updated if param not in self.state]
        first = torch.zeros((), device=new[0].device) if new and self.capturable else 0
        for param in new:
            self.state[param] = self._new_state(param, first)
        if self.capturable:
            self._count(updated)
            if not (updated and updated[0].is_cuda and torch.cuda.is_current_stream_capturing()):
                self.set_lr()
        else:
            for param in updated:
                self.state[param]["step"] += 1
        for pieces in self._batches():
            self._update(pieces)
        return loss

    def set_lr(self) -> None:
        """Pass the groups' lr on to the device. The host does not wait."""
        for tensor, group in zip(self._lrs, self.param_groups):
            tensor.fill_(group["lr"])

    def _count(self, updated: list[Tensor]) -> None:
        """Count a step of these parameters on the device. Parameters that were updated together share a count."""
        counts = {id(self.state[param]["step"]): self.state[param]["step"] for param in updated}
        among = set(updated)
        others = {id(state["step"]) for param, state in self.state.items() if param not in among}
        for i, count in counts.items():
            counts[i] = count.clone() if i in others else count
            counts[i] += 1 if self.found_inf is None else self.found_inf == 0
        for param in updated:
            self.state[param]["step"] = counts.get(id(self.state[param]["step"]), self.state[param]["step"])

    def _new_state(self, param: Tensor, step: int | Tensor) -> dict[str, Any]:
        state = {"step": step}
        return state if self.pages is not None else state | self._empty_state(param)

    def _empty_state(self, param: Tensor) -> dict[str, Tensor]:
        part = _local(param)
        layout = self.state_layout(param, part.numel()).items()
        state = {name: torch.zeros(n, dtype=dtype, device=param.device) for name, (dtype, n) in layout}
        return {name: t if name.endswith("absmax") else t.view(part.shape) for name, t in state.items()}

    def _batches(self) -> Iterator[list[Piece]]:
        """The pieces that have a gradient: all in one list, or with paging one list for each page."""
        if self.pages is None:
            params = (param for param in self._params() if param.grad is not None)
            yield [Piece(param, 0, _local(param).numel(), _without_step(self.state[param])) for param in params]
            return
        used = [i for i, pieces in enumerate(self._plan) if any(piece.param.grad is not None for piece in pieces)]
        for i, page in self.pages.sweep(used):
            yield [piece.in_page(page) for piece in self._plan[i] if piece.param.grad is not None]

    def _update(self, pieces: list[Piece]) -> None:
        """Update `pieces` with one launch for all that have the same group, step and kind of state."""
        steps = {}
        groups = {param: i for i, group in enumerate(self.param_groups) for param in group["params"]}
        launches = defaultdict(list)
        for piece in pieces:
            step = self.state[piece.param]["step"]
            key = id(step) if self.capturable else step
            steps[key] = step
            launches[groups[piece.param], key, tuple(piece.state)].append(piece)
        for (i, key, names), members in launches.items():
            group = self.param_groups[i]
            update = kernels.adamw8bit if "exp_avg_absmax" in names else kernels.adamw
            update(
                [piece.of(_local(piece.param)) for piece in members],
                [piece.of(_local(piece.param.grad).contiguous()) for piece in members],
                *([piece.state[name] for piece in members] for name in names),
                lr=self._lrs[i] if self.capturable else group["lr"],
                betas=tuple(group["betas"]),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=steps[key],
                found_inf=self.found_inf if self.capturable else None,
            )

    def evict(self) -> int:
        """Move paged state off the device, and return how many bytes that freed. No state is lost."""
        return 0 if self.pages is None else self.pages.evict()

    # ------------------------------------------------------------------------------------------ saving and loading

    def state_dict(self) -> dict:
        """The same as torch.optim.Optimizer's, except that step is a tensor too. Paged state is copied."""
        saved = super().state_dict()
        counts = {id(state["step"]): float(state["step"]) for state in saved["state"].values()}  # each is read once
        saved["state"] = {
            i: state | {"step": torch.tensor(counts[id(state["step"])], device="cpu")}
            for i, state in saved["state"].items()
        }
        if self.pages is not None:
            self.pages.flush()
            index = {param: i for i, param in enumerate(self._params())}
            for param in self.state:
                saved["state"][index[param]] |= self._empty_state(param)
            for param, name, part, home in self._homes():
                if param in self.state:
                    saved["state"][index[param]][name].view(-1)[part] = home
        return saved

    def _homes(self) -> Iterator[tuple[Tensor, str, slice, Tensor]]:
        """(parameter, name of a state tensor, range in it, the values of that range in host memory) for all pages."""
        for i, pieces in enumerate(self._plan):
            for piece in pieces:
                for name, home in piece.in_page(self.pages.home(i)).state.items():
                    yield piece.param, name, piece.part(name), home

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load a `state_dict` of the same class, paged or not. AdamW also loads torch.optim.AdamW's.

        Raises:
            ValueError: it is of other parameters or of another kind of optimizer. Nothing is changed then.
        """
        params, saved = self._params(), state_dict["state"]
        if [len(g["params"]) for g in state_dict["param_groups"]] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("the saved state is of an optimizer with other parameters")
        for i, state in saved.items():
            wanted = {"step": (torch.float32, 1)} | self.state_layout(params[i], _local(params[i]).numel())
            found = {name: (tensor.dtype, tensor.numel()) for name, tensor in state.items()}
            if found != wanted:
                raise ValueError(f"parameter {i}: the saved state has {_listed(found)}; needed is {_listed(wanted)}")
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        steps: dict[int, int | Tensor] = {i: int(state["step"]) for i, state in saved.items()}
        if self.capturable:
            counts = {n: torch.full((), float(n), device=params[0].device) for n in set(steps.values())}
            steps = {i: counts[n] for i, n in steps.items()}
        for i, state in saved.items():
            self.state[params[i]] = self._new_state(params[i], steps[i])
            for name, tensor in _without_step(self.state[params[i]]).items():
                tensor.copy_(state[name])
        if self.pages is not None:
            self.pages.evict()
            index = {param: i for i, param in enumerate(params)}
            for param, name, part, home in self._homes():
                home.copy_(saved[index[param]][name].view(-1)[part]) if param in self.state else home.zero_()


class AdamW8bit(AdamW):
    """AdamW with 8-bit state, as bitsandbytes' AdamW8bit: 2.03 bytes a parameter instead of 8.

    Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization". The arguments are AdamW's. Parameters of fewer
    than 4096 elements have fp32 state.
    """

    def state_layout(self, param: Tensor, elements: int) -> dict[str, tuple[torch.dtype, int]]:
        if param.numel() < MIN_8BIT_SIZE:
            return super().state_layout(param, elements)
        codes, absmax = (torch.uint8, elements), (torch.float32, state_blocks(elements))
        return {"exp_avg": codes, "exp_avg_sq": codes, "exp_avg_absmax": absmax, "exp_avg_sq_absmax": absmax}


def _local(tensor: Tensor) -> Tensor:
    """The part of `tensor` in this process, if it is a DTensor; else `tensor`."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _without_step(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != "step"}


def _listed(tensors: dict[str, tuple[torch.dtype, int]]) -> str:
    return ", ".join(f"{name} {dtype} of {n}" for name, (dtype, n) in tensors.items())
