"""The error of each linear of a model when it is packed, by block size, and the predicted rise of the loss.

With Ŵ the unpacked form of a packed weight W [out, in], x its inputs and g the gradient of a sample's log-likelihood
(of the experts of a layer W is [experts, out, in], and each has inputs of its own):

    error     ‖W − Ŵ‖² / ‖W‖²
    output    Σ_x ‖(W − Ŵ)x‖² / Σ_x ‖Wx‖²          from G = Σ_x xxᵀ [in, in]: Σ_x ‖Dx‖² = tr(D G Dᵀ)
    fisher    ½ Σ_ij E[g_ij²] (w_ij − ŵ_ij)²        nats a labelled token

`output` is the layer-wise error that GPTQ minimises (Frantar et al. 2022), as a share of the outputs. `fisher` is the
second-order term of the KL divergence from the model as it was, with the diagonal of the Fisher information (Optimal
Brain Damage, LeCun et al. 1990; SqueezeLLM, Kim et al. 2023, weighs weights so). Its labels are drawn from the model,
not read from the data, so that E[g] = 0 and E[ggᵀ] is the Fisher information itself; one forward and one backward pass
a sample.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import kernels
from experiments.data.chat import Example
from experiments.data.samples import collate
from experiments.errors import UserError
from experiments.system.files import write_atomically
from experiments.training.evaluation import label_logits, to_device
from kernels.codebook import BLOCKSIZES
from modules import NF4Linear, decoder_linears
from modules.experts import is_experts
from modules.files.checked import Damaged, read_checked, with_checksum
from modules.linear import dense_weight, is_conv1d

OUTLIER = 4.0  # standard deviations; of Gaussian weights 6.3e-5 are beyond
SENSITIVITIES = ("fisher", "output")  # predictors of the rise of the loss
MEASURES = ("spread", "error", "output", "fisher")  # of a linear at a block size
STATISTICS = ("std", "kurtosis", "outliers")  # of a linear


@dataclass(frozen=True)
class LayerProfile:
    """One linear.

    Attributes:
        shape: (out, in); of experts (experts, out, in).
        std: of the weights.
        kurtosis: their fourth standardised moment; 3 if they are Gaussian.
        outliers: the share of them further than OUTLIER standard deviations from their mean.
        sizes: by block size: spread, the standard deviation of the blocks' absmax as a share of its mean; error, output
            and fisher as above.
    """

    shape: tuple[int, ...]
    std: float
    kurtosis: float
    outliers: float
    sizes: dict[int, dict[str, float]]


@dataclass(frozen=True)
class Profile:
    """Every linear by its full name, and how it was measured: model, data, samples, tokens, type, double."""

    about: dict
    layers: dict[str, LayerProfile]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: layer.shape for name, layer in self.layers.items()}

    @property
    def base(self) -> dict[str, str]:
        """The model's fingerprint (modules/adapters/base_print.py); older profiles have none."""
        found = self.about.get("base", {})
        return found if isinstance(found, dict) else {}

    def rises(self, measure: str) -> dict[str, dict[int, float]]:
        """`measure`, output or fisher, by linear and block size."""
        return {
            name: {size: values[measure] for size, values in layer.sizes.items()} for name, layer in self.layers.items()
        }


class Calibration:
    """Squares of the inputs and of the gradients of a model's linears, summed over samples.

    Attributes:
        inputs: Σ xxᵀ, fp32 [in, in], by the linears' full names; linears with the same input share one. Of experts
            [experts, in, in].
        squares: Σ g², fp32, in the shape of the weight, g being a sample's gradient.
        tokens: labelled ones seen.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.linears = model, decoder_linears(model)
        if packed := [name for name, linear in self.linears.items() if isinstance(linear, NF4Linear)]:
            raise UserError(f"{packed[0]} is packed in NF4 already: block sizes are chosen for a dense model")
        self.inputs: dict[str, Tensor] = {}
        self.squares = {
            name: torch.zeros_like(dense_weight(linear), dtype=torch.float32) for name, linear in self.linears.items()
        }
        self.tokens = 0
        self._last: tuple[Tensor, Tensor] | None = None  # the input of the linear before, and its Σ xxᵀ

    def see(
        self, examples: list[Example], generator: torch.Generator, progress: Callable[[Iterable], Iterable] = iter
    ) -> None:
        """Add `examples`, one pass each. Labels are drawn with `generator`."""
        hooks = [linear.register_forward_pre_hook(self._watcher(name)) for name, linear in self.linears.items()]
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for linear in self.linears.values():
            linear.weight.requires_grad_(True)
        try:
            for example in progress(examples):
                batch = to_device(collate([example], 0), self.model.device)
                logits, _ = label_logits(self.model, batch)
                drawn = torch.multinomial(logits.detach().float().softmax(-1).cpu(), 1, generator=generator)
                F.cross_entropy(logits.float(), drawn.squeeze(1).to(logits.device), reduction="sum").backward()
                self._last = None
                self.tokens += len(drawn)
                for name, linear in self.linears.items():
                    if linear.weight.grad is not None:
                        gradient = linear.weight.grad.t() if is_conv1d(linear) else linear.weight.grad
                        self.squares[name].add_(gradient.float().square())
                        linear.weight.grad = None
        finally:
            for hook in hooks:
                hook.remove()
            self.model.requires_grad_(False)
        if idle := [name for name in self.linears if name not in self.inputs]:
            raise UserError(f"no token of the calibration samples reaches {idle[0]}: set samples to more")

    def _watcher(self, name: str) -> Callable[[nn.Module, tuple], None]:
        @torch.no_grad()
        def watch_experts(linear: nn.Module, args: tuple) -> None:
            x, ends = args
            if name not in self.inputs:
                self.inputs[name] = x.new_zeros(len(ends), x.shape[1], x.shape[1], dtype=torch.float32)
            for sums, rows in zip(self.inputs[name], x.float().tensor_split(ends.tolist())):
                sums.addmm_(rows.t(), rows)

        @torch.no_grad()
        def watch(_, args: tuple) -> None:
            if self._last is None or self._last[0] is not args[0]:
                x = args[0].flatten(0, -2).float()
                if name not in self.inputs:
                    self.inputs[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
                self.inputs[name].addmm_(x.t(), x)
                self._last = args[0], self.inputs[name]
            self.inputs[name] = self._last[1]

        return watch_experts if is_experts(self.linears[name]) else watch


@torch.no_grad()
def profile_layer(
    weight: Tensor, inputs: Tensor, squares: Tensor, tokens: int, double: bool, quant_type: str = "nf4"
) -> LayerProfile:
    """Profile one weight.

    Args:
        weight: [out, in], or of experts [experts, out, in], in the dtype it is packed from.
        inputs: Σ xxᵀ, fp32 [in, in], or of experts [experts, in, in].
        squares: Σ g², fp32 in the weight's shape, over samples with `tokens` labelled tokens together.
        double, quant_type: see `kernels.quantize_4bit`.
    """
    w = weight.float()
    centred = w.double() - w.double().mean()
    std = centred.square().mean().sqrt()
    energy, response = w.square().sum().item(), ((w @ inputs) * w).sum().item()
    sizes = {}
    for size in BLOCKSIZES:
        if size > w.numel():
            break
        packed, quant_state = kernels.quantize_4bit(weight, size, double, quant_type)
        difference = w - kernels.dequantize_4bit(packed, quant_state).float()
        absmax = F.pad(w.reshape(-1), (0, -w.numel() % size)).view(-1, size).abs().amax(dim=1)
        sizes[size] = {
            "spread": (absmax.std(correction=0) / absmax.mean().clamp(min=1e-30)).item(),
            "error": difference.square().sum().item() / max(energy, 1e-30),
            "output": ((difference @ inputs) * difference).sum().item() / max(response, 1e-30),
            "fisher": 0.5 * (squares * difference.square()).sum().item() / tokens,
        }
    return LayerProfile(
        tuple(weight.shape),
        std.item(),
        (centred.pow(4).mean() / std.pow(4).clamp(min=1e-60)).item(),
        (centred.abs() > OUTLIER * std).double().mean().item(),
        sizes,
    )


def profile_model(
    calibration: Calibration, double: bool, quant_type: str = "nf4", progress: Callable[[Iterable], Iterable] = iter
) -> dict[str, LayerProfile]:
    """The profile of each linear by its full name."""
    inputs, squares, tokens = calibration.inputs, calibration.squares, calibration.tokens
    return {
        name: profile_layer(dense_weight(linear), inputs[name], squares[name], tokens, double, quant_type)
        for name, linear in progress(list(calibration.linears.items()))
    }


def write_profile(path: Path, profile: Profile) -> None:
    """Write a CSV, a row a linear, below two comments: its checksum, and `profile.about` in JSON."""
    there = sorted({size for layer in profile.layers.values() for size in layer.sizes})
    columns = [f"{measure}_{size}" for measure in MEASURES for size in there]
    text = io.StringIO()
    text.write(f"# {json.dumps(profile.about)}\n")
    writer = csv.DictWriter(text, ["layer", "experts", "out", "in", *STATISTICS, *columns], lineterminator="\n")
    writer.writeheader()
    for name, layer in profile.layers.items():
        row = {"layer": name} | dict(zip(("in", "out", "experts"), layer.shape[::-1]))
        row |= {key: getattr(layer, key) for key in STATISTICS}
        row |= {f"{key}_{size}": value for size, values in layer.sizes.items() for key, value in values.items()}
        writer.writerow(row)
    write_atomically(path, with_checksum(text.getvalue()))


def read_profile(path: Path) -> Profile:
    """The profile in a file that `write_profile` wrote.

    Raises:
        UserError: no such file, or not such a profile.
    """
    try:
        first, _, rest = read_checked(path).partition("\n")
        about = json.loads(first.removeprefix("# "))
        layers = {row["layer"]: _layer(row) for row in csv.DictReader(io.StringIO(rest))}
        if not layers or not {"model", "type", "double"} <= about.keys():
            raise ValueError("it has no layers" if not layers else "it does not say of which model it is")
    except OSError as error:
        raise UserError(f"profile={path}: {error.strerror}: leave profile out to measure one") from error
    except Damaged as error:
        raise UserError(f"profile={error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise UserError(f"profile={path} is not a profile that tune_blocks wrote: {error}") from error
    return Profile(about, layers)


def _layer(row: dict[str, str]) -> LayerProfile:
    sizes: dict[int, dict[str, float]] = {}
    for column, value in row.items():
        measure, _, size = column.partition("_")
        if measure in MEASURES and value:
            sizes.setdefault(int(size), {})[measure] = float(value)
    if not all(math.isfinite(value) for values in sizes.values() for value in values.values()):
        raise ValueError(f"{row['layer']} has values that are not numbers")
    shape = tuple(
        int(row[size]) for size in ("experts", "out", "in") if row.get(size)
    )  # without experts in older files
    return LayerProfile(shape, *(float(row[key]) for key in STATISTICS), sizes)
