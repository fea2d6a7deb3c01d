"""One layer of a mixture of experts, forward and backward: LoRA and DoRA over packed experts, beside the formula in
plain torch, one expert at a time, and, of LoRA over dense experts, beside PEFT's in transformers' grouped_mm and
unsloth's.

All see the same numbers: the dense experts are those that the packed ones stand for. PEFT has no DoRA for experts. Of a
layer as large as a real model's a part of the result is checked: y and dx of some tokens, the gradients of the adapters
of some experts.
"""

import functools
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import Weight, combine, experts_dora, experts_lora, gather, quantize_4bit, route, swiglu, weight_norm_sq
from kernels.bench.checks import as_accurate
from kernels.bench.nf4 import nf4_bytes
from kernels.bench.spec import DTYPES, Bench, Inputs, Result, Unavailable

SCALING = 2.0
BLOCKSIZE = 64
PROJECTIONS = ("gate_up", "down")
CHECKED_WHOLE = 2**26  # weights of a layer; in float64 Mixtral's would be 11 GB
CHECKED_TOKENS = 64  # of a larger layer
# On a CPU. Of models like Qwen3-30B-A3B's, but fewer and smaller: the check is in float64.
SMALL = {"experts": 16, "top_k": 4, "hidden": 768, "intermediate": 384, "rank": 16}
OF_MODELS = (  # Qwen3-30B-A3B and Mixtral-8x7B
    {"experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768, "rank": 16},
    {"experts": 8, "top_k": 2, "hidden": 4096, "intermediate": 14336, "rank": 16},
)


def _shapes(hidden: int, intermediate: int) -> dict[str, tuple[int, int]]:
    """(out, in) of each projection."""
    return {"gate_up": (2 * intermediate, hidden), "down": (hidden, intermediate)}


def _inputs(
    tokens: int,
    device: torch.device,
    *,
    magnitude: bool,
    dtype: str,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    rank: int,
) -> Inputs:
    """Packed experts, adapters in fp32 that have learned something, tokens, their experts and the output's gradient."""
    generator, compute = torch.Generator(device).manual_seed(0), DTYPES[dtype]

    def tensor(*shape: int, of: torch.dtype = torch.float32) -> Tensor:  # on the device: billions of weights
        return torch.randn(*shape, generator=generator, device=device, dtype=of)

    weights, adapters = {}, {}
    for name, (out, columns) in _shapes(hidden, intermediate).items():
        packed, state = quantize_4bit(tensor(experts, out, columns, of=compute) / columns**0.5, BLOCKSIZE, True)
        weights[name] = Weight(packed, state)
        adapters[f"{name}_A"] = tensor(experts, rank, columns) / columns**0.5
        adapters[f"{name}_B"] = tensor(experts, out, rank) / 10
        if magnitude:
            adapters[f"{name}_m"] = 1 + tensor(experts, out) / 10
    top_k_weights, top_k_index = tensor(tokens, experts).softmax(1).topk(top_k, 1)
    return {
        "weights": weights,
        "dense": {},  # the same, by `_dense`
        "adapters": adapters,
        "x": tensor(tokens, hidden, of=compute),
        "index": top_k_index,
        "scores": (top_k_weights / top_k_weights.sum(1, keepdim=True)).to(compute),
        "dy": tensor(tokens, hidden, of=compute),
    }


def _timed(layer: Callable[..., Tensor], inputs: Inputs, leaves: dict[str, Tensor]) -> Callable[[], Result]:
    """The function to time: `layer` of the leaves and its backward, giving y and the gradient of every leaf."""

    def run() -> Result:
        y = layer(**leaves)
        gradients = torch.autograd.grad(y, list(leaves.values()), inputs["dy"].to(y.dtype))
        return {"y": y.detach()} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}

    return run


def _leaves(inputs: Inputs) -> dict[str, Tensor]:
    leaves = {"x": inputs["x"]} | inputs["adapters"]
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in leaves.items()}


def _dense(inputs: Inputs) -> dict[str, Tensor]:
    """The dense experts, one copy for all who compute with them."""
    if not inputs["dense"]:
        inputs["dense"].update((name, weight.dense()) for name, weight in inputs["weights"].items())
    return inputs["dense"]


def _ours(inputs: Inputs) -> Callable[[], Result]:
    weights, index, scores = inputs["weights"], inputs["index"], inputs["scores"]
    norm_sq = {name: weight_norm_sq(weight.rows()).view(weight.shape[:2]) for name, weight in weights.items()}

    def linear(name: str, rows: Tensor, ends: Tensor, adapters: dict[str, Tensor]) -> Tensor:
        given = {"lora_A": adapters[f"{name}_A"], "lora_B": adapters[f"{name}_B"], "scaling": SCALING}
        if f"{name}_m" not in adapters:
            return experts_lora(rows, ends, weights[name], **given)
        return experts_dora(rows, ends, weights[name], norm_sq[name], magnitude=adapters[f"{name}_m"], **given)

    def layer(x: Tensor, **adapters: Tensor) -> Tensor:
        order, ends = route(index, len(adapters["down_A"]))
        rows = gather(x, order, index.shape[1])
        gate, up = linear("gate_up", rows, ends, adapters).chunk(2, dim=1)
        return combine(linear("down", swiglu(gate, up), ends, adapters), order, scores)

    return _timed(layer, inputs, _leaves(inputs))


def _torch(inputs: Inputs, experts: tuple[int, ...] | None = None, again: bool = False) -> Callable[[], Result]:
    """As the papers write it, in x's dtype, expert by expert. Forms W + sBA of an expert for DoRA's norm.

    Args:
        experts: compute these alone; None: all.
        again: compute each expert again in backward, so that its weights need not be kept in x's dtype.
    """
    weights, index, scores = _dense(inputs), inputs["index"], inputs["scores"]

    def linear(name: str, e: int, x: Tensor, adapters: dict[str, Tensor]) -> Tensor:
        lora_A, lora_B, w = adapters[f"{name}_A"][e], adapters[f"{name}_B"][e], weights[name][e].to(x.dtype)
        y = x @ w.t() + SCALING * (x @ lora_A.to(x.dtype).t()) @ lora_B.to(x.dtype).t()
        if f"{name}_m" not in adapters:
            return y
        norm = (w.to(lora_A.dtype) + SCALING * lora_B @ lora_A).detach().norm(dim=1)
        return (adapters[f"{name}_m"][e] / norm).to(x.dtype) * y

    def expert(e: int, x: Tensor, adapters: dict[str, Tensor]) -> Tensor:
        gate, up = linear("gate_up", e, x, adapters).chunk(2, dim=1)
        return linear("down", e, torch.nn.functional.silu(gate) * up, adapters)

    def layer(x: Tensor, **adapters: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(len(adapters["down_A"])) if experts is None else experts:
            token, place = (index == e).nonzero(as_tuple=True)
            given = (e, x[token], adapters)
            y = checkpoint(expert, *given, use_reentrant=False) if again else expert(*given)
            out = out.index_add(0, token, y * scores[token, place].to(x.dtype).unsqueeze(1))
        return out

    return _timed(layer, inputs, _leaves(inputs))


def _adapted(inputs: Inputs) -> tuple[nn.Module, dict[str, Tensor]]:
    """(transformers' experts, dense, with PEFT's ParamWrapper and its adapter in fp32, as PEFT makes it; its leaves)"""
    import peft
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    adapters = inputs["adapters"]
    experts, hidden, intermediate = inputs["weights"]["down"].shape
    sizes = {"hidden_size": hidden, "moe_intermediate_size": intermediate, "num_experts": experts}
    config = Qwen3MoeConfig(**sizes, hidden_act="silu", experts_implementation="grouped_mm")
    with torch.device("meta"):
        layer = nn.ModuleDict({"experts": Qwen3MoeExperts(config)})
    dense = {f"experts.{name}_proj": weight for name, weight in _dense(inputs).items()}
    layer.load_state_dict(dense, assign=True)
    rank = adapters["down_A"].shape[1]
    lora = peft.LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=[], target_parameters=list(dense))
    wrapped = peft.get_peft_model(layer, lora).base_model.model["experts"]
    leaves = {"x": inputs["x"].detach().clone().requires_grad_()}
    for module in wrapped.modules():
        if isinstance(module, peft.tuners.lora.layer.ParamWrapper):
            name = module.parameter_name.removesuffix("_proj")
            leaves[f"{name}_A"] = module.lora_A["default"].weight  # [experts · rank, in]
            leaves[f"{name}_B"] = module.lora_B["default"].weight  # [out, rank · experts]
    with torch.no_grad():
        for name in PROJECTIONS:
            leaves[f"{name}_A"].copy_(adapters[f"{name}_A"].flatten(0, 1))
            leaves[f"{name}_B"].copy_(adapters[f"{name}_B"].permute(1, 2, 0).flatten(1))
    return wrapped, leaves


def _timed_adapted(inputs: Inputs, forwards: Mapping[type, Callable]) -> Callable[[], Result]:
    """The function to time of `_adapted`, whose modules have these forwards, whoever changes their classes."""
    wrapped, leaves = _adapted(inputs)
    experts, rank, _ = inputs["adapters"]["down_A"].shape
    for module in wrapped.modules():
        if type(module) in forwards:
            module.forward = MethodType(forwards[type(module)], module)
    run = _timed(lambda x, **_: wrapped(x, inputs["index"], inputs["scores"]), inputs, leaves)

    def named() -> Result:
        result = run()
        for name in PROJECTIONS:
            result[f"d{name}_A"] = result[f"d{name}_A"].view(experts, rank, -1)
            result[f"d{name}_B"] = result[f"d{name}_B"].view(-1, rank, experts).permute(2, 0, 1)
        return result

    return named


def _forwards() -> dict[type, Callable]:
    """The forwards that classes of PEFT and transformers have now."""
    from peft.tuners.lora.layer import ParamWrapper
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    return {cls: cls.forward for cls in (ParamWrapper, Qwen3MoeExperts)}


@functools.cache
def _forwards_of_unsloth() -> dict[type, Callable]:
    """Those that importing unsloth gives to the same classes, which get their own back: PEFT is timed beside it."""
    own = _forwards()
    import unsloth  # noqa: F401

    theirs = _forwards()
    for cls, forward in own.items():
        cls.forward = forward
    if theirs == own:
        raise Unavailable("its import changes nothing: it came before, in this process; time experts_lora alone")
    return theirs


def _peft(inputs: Inputs) -> Callable[[], Result]:
    """PEFT's own: adds BA to the dense experts in each forward, and multiplies by transformers' grouped_mm."""
    forwards = _forwards()
    if changed := [cls for cls, forward in forwards.items() if "unsloth" in forward.__module__]:
        raise Unavailable(f"unsloth has changed {changed[0].__name__} in this process; time experts_lora alone")
    return _timed_adapted(inputs, forwards)


def _unsloth(inputs: Inputs) -> Callable[[], Result]:
    """unsloth's: the same modules, with torch's grouped_mm for the adapter beside the one for the dense experts."""
    if not inputs["x"].is_cuda:
        raise Unavailable("unsloth runs on GPUs only")
    return _timed_adapted(inputs, _forwards_of_unsloth())


def _check(inputs: Inputs) -> Callable[[Result], None]:
    precise = {name: inputs[name].double() for name in ("x", "dy", "scores")}
    precise["adapters"] = {name: tensor.double() for name, tensor in inputs["adapters"].items()}
    exact, dtype = {**inputs, **precise}, inputs["x"].dtype
    if sum(weight.shape.numel() for weight in inputs["weights"].values()) <= CHECKED_WHOLE:
        return as_accurate(_torch(exact)(), _torch(inputs)(), dtype)
    check = as_accurate(_checked_part(exact), _checked_part(inputs), dtype)
    return lambda got: check(_part(got))


def _checked_part(inputs: Inputs) -> Result:
    """`_part` of the result, computed without the rest of it."""
    rows = {name: inputs[name][:CHECKED_TOKENS] for name in ("x", "dy", "index", "scores")}
    of_tokens = _torch({**inputs, **rows}, again=True)()
    of_experts = _torch(inputs, (0, len(inputs["adapters"]["down_A"]) - 1), again=True)()
    return _part(of_experts | {name: of_tokens[name] for name in ("y", "dx")})


def _part(result: Result) -> Result:
    """y and dx of the first tokens, gradients of the adapters of the first and the last expert."""
    return {
        name: tensor[:CHECKED_TOKENS] if name in ("y", "dx") else tensor[[0, -1]] for name, tensor in result.items()
    }


def _dense_bytes(inputs: Inputs) -> int:
    return sum(weight.shape.numel() * weight.dtype.itemsize for weight in inputs["weights"].values())


def _packed_bytes(inputs: Inputs) -> int:
    return sum(nf4_bytes(weight.shape.numel(), BLOCKSIZE, double_quant=True) for weight in inputs["weights"].values())


def _cost(
    tokens: int,
    *,
    magnitude: bool,
    dtype: str,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    rank: int,
) -> tuple[int, int]:
    """Forward reads x, W, A, B and writes y; backward reads dy, x, W, A, B and writes dx, dA, dB; m, dm likewise.

    What is between the two projections, and the copies of a token's row for its experts, are not counted.
    """
    size, n_bytes, flops = DTYPES[dtype].itemsize, 0, 0
    for out, columns in _shapes(hidden, intermediate).values():
        weights, adapter = out * columns, rank * (out + columns)
        n_bytes += 2 * nf4_bytes(experts * weights, BLOCKSIZE, double_quant=True) + 3 * 4 * experts * adapter
        flops += tokens * top_k * (4 * weights + 6 * adapter)
        if magnitude:
            n_bytes += 3 * 4 * experts * out
            flops += experts * 2 * rank * weights
    return n_bytes + size * tokens * 5 * hidden, flops


def _bench(kernel: str, magnitude: bool) -> Bench:
    return Bench(
        kernel=kernel,
        mode="forward+backward",
        unit="token",
        sizes=(256, 1024),
        quick_sizes=(4,),
        sizes_of_models=(4096,),
        configs=tuple({"dtype": dtype} | SMALL for dtype in DTYPES),
        configs_of_models=tuple({"dtype": "bf16"} | sizes for sizes in OF_MODELS),
        inputs=partial(_inputs, magnitude=magnitude),
        providers={"ours": _ours, "torch": _torch} | ({} if magnitude else {"peft": _peft, "unsloth": _unsloth}),
        check=_check,
        cost=partial(_cost, magnitude=magnitude),
        weights={"ours": _packed_bytes} | dict.fromkeys(("torch", "peft", "unsloth"), _dense_bytes),
        products=True,
    )


BENCHES = (_bench("experts_lora", magnitude=False), _bench("experts_dora", magnitude=True))
