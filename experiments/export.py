"""Take the model of a finished run elsewhere, and prove that it arrived: logits are compared with the run's.

    python -m experiments.export run=outputs/mine to=merged

to=merged     a Hugging Face directory with dense weights, which transformers loads by itself
to=peft       the adapter in PEFT's format with the tokenizer, for peft.PeftModel or AutoPeftModelForCausalLM;
              prefix_layer becomes the keys and values of PEFT's prefix tuning
to=bnb4       a Hugging Face directory packed in NF4, or FP4 if the base was, which transformers loads with
              bitsandbytes; the adapter is merged first and the result packed again, which loses some of it: how much
              is printed

run=DIR           a run's directory, or one of its checkpoints'
output_dir=DIR    where to; must not exist; by default a folder named after `to` in the run's directory
trainer.…         device and dtype, as in a run; merged weights are written in that dtype
"""

import contextlib
import gc
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationMethod

from experiments.blocks.quant_map import blocksizes
from experiments.config import QuantConfig
from experiments.data.tokens import tokenize
from experiments.errors import UserError
from experiments.models.directory import model_directory
from experiments.models.load import load_base
from experiments.runs.finished import FinishedRun, load_run, make_dense
from experiments.runs.model_files import ADAPTER, over_own_base, run_of
from experiments.system import machine
from experiments.system.cli import command, read_options
from experiments.system.files import claim, delete_partials, directory_atomically
from experiments.system.progress import bar
from experiments.system.quiet import quiet
from kernels.codebook import BITSANDBYTES_TYPES
from modules import adapters, decoder_linears, dequantize, merge, quantize
from modules.adapters.merge import can_merge
from modules.adapters.state import named_adapter
from modules.adapters.targets import biased_modules
from modules.experts import is_experts
from modules.files.baselines import OUR_CONFIG_FILE, prefix_tuning
from modules.files.bitsandbytes import by_definition, save_bnb4
from modules.files.checked import seal_directory
from modules.files.peft import CONFIG_FILE, WEIGHTS_FILE
from modules.linear import weight_shape

CHECK_TOKENS = 256  # of this file's text
# ‖logits − the run's‖ / ‖the run's‖ above which an export is wrong. Merging rounds each weight once more.
LARGEST_ERROR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Reader = Callable[[], nn.Module]  # loads the export with the library that it is for


@dataclass
class Options:
    run: str
    to: str
    output_dir: str | None = None


def _merged(run: FinishedRun, source: Path, directory: Path, ids: Tensor) -> tuple[Reader, Tensor]:
    _check_dense(run, "merged")
    expected = _logits(run.model, ids)
    make_dense(run.model)
    _declare_biases(run.model, "merged")
    with quiet():
        run.model.save_pretrained(directory)
    dtype = run.dtype
    return lambda: AutoModelForCausalLM.from_pretrained(directory, dtype=dtype), expected


def _check_dense(run: FinishedRun, to: str) -> None:
    if adapters(run.model) and not can_merge(named_adapter(run.model).config):
        raise UserError(
            f"to={to}: method={run.cfg.method.name} adds what dense weights cannot hold: take "
            "experiments.generate or evaluate, or to=peft where PEFT has the method"
        )


def _declare_biases(model: PreTrainedModel, to: str) -> None:
    """Let the config say that linears have biases that BitFit gave them.

    Raises:
        UserError: the architecture has no place for them.
    """
    config = model.config.get_text_config()
    has = {name.rpartition(".")[0] for name in model.state_dict() if name.endswith(".bias")}

    def missing() -> set[str]:
        with torch.device("meta"), quiet():
            return has - set(biased_modules(AutoModelForCausalLM.from_config(model.config)))

    if missing():
        for key in ("attention_bias", "mlp_bias"):
            if hasattr(config, key):
                setattr(config, key, True)
    if homeless := sorted(missing()):
        raise UserError(f"to={to}: {type(model).__name__} has no place for the bias that {homeless[0]} got")


def _peft(run: FinishedRun, source: Path, directory: Path, ids: Tensor) -> tuple[Reader, Tensor]:
    if not (source / ADAPTER).is_dir():
        raise UserError(
            f"{source} has no adapter, for method={run.cfg.method.name} trained every weight: "
            "take to=merged, or make an adapter with experiments.extract"
        )
    cfg, dtype = over_own_base(run.cfg, run_of(source)), run.dtype
    if cfg.method.adapter == "prefix_layer" and not cfg.infix_tokens:
        config, tensors = prefix_tuning(run.model)
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        print("PEFT's prefix tuning trains keys and values: these follow from the trained activations")
    elif (source / ADAPTER / OUR_CONFIG_FILE).is_file():
        on = " with infix tokens" if cfg.infix_tokens else " on experts" if cfg.method.adapter == "dora" else ""
        raise UserError(f"to=peft: PEFT has nothing that computes method={cfg.method.name}{on}")
    else:
        shutil.copytree(source / ADAPTER, directory, dirs_exist_ok=True)
    from peft import PeftModel  # here, because importing it takes seconds that other exports need not spend

    if cfg.model.source != "tiny" and cfg.model.weights is None:
        path, base = directory / CONFIG_FILE, str(model_directory(cfg.model).absolute())
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}, indent=2) + "\n")
    if cfg.quant.name != "none":
        print(f"trained over {cfg.quant.type}: the logits are those over a base that is packed as the run's was")

    def read() -> nn.Module:
        base, _ = load_base(cfg, dtype)
        dequantize(base)
        elsewhere = "PEFT takes names such as gate_proj for those of experts in this architecture"
        try:
            model = PeftModel.from_pretrained(base, directory)
        except ValueError as error:
            raise UserError(f"to=peft: PEFT refuses the adapter ({error}): {elsewhere}") from error
        names = {name.rpartition(".lora_")[0] for name in load_file(directory / WEIGHTS_FILE) if ".lora_" in name}
        if lost := sorted(names - {name for name, module in model.named_modules() if hasattr(module, "lora_A")}):
            raise UserError(f"to=peft: PEFT puts nothing on {lost[0]}: {elsewhere}; name others with target_modules")
        return model

    return read, _logits(run.model, ids)


def _bnb4(run: FinishedRun, source: Path, directory: Path, ids: Tensor) -> tuple[Reader, Tensor]:
    _check_dense(run, "bnb4")
    model, learned = run.model, _logits(run.model, ids)
    quant = run.cfg.quant if run.cfg.quant.name != "none" else QuantConfig(name="nf4")
    if quant.type not in BITSANDBYTES_TYPES:
        raise UserError(f"bitsandbytes has no {quant.type}, in which the base of {source} is packed: take to=merged")
    if experts := [name for name, linear in decoder_linears(model).items() if is_experts(linear)]:
        raise UserError(
            f"to=bnb4: {experts[0]} has the weights of experts, which bitsandbytes does not pack: take to=merged"
        )
    _check_plain(model)
    if adapters(model) and (layers := merge(model, unload=True).values()):
        error, update = (sum(getattr(layer, name) for layer in layers) / len(layers) for name in ("error", "update"))
        print(f"packing loses {error:.1%} of a merged matrix on average, where the adapter had changed {update:.1%}")
    _declare_biases(model, "bnb4")
    shapes = {name: weight_shape(linear) for name, linear in decoder_linears(model).items()}
    quantize(model, blocksizes(quant, shapes), quant.double, bar("quantizing"), quant.type)
    packed = _logits(model, ids)
    print(f"packing changes the logits by {_relative(packed, learned):.2g} of their size")
    directory.rmdir()  # save_bnb4 makes it
    with quiet():
        save_bnb4(model, directory)
    return lambda: by_definition(AutoModelForCausalLM.from_pretrained(directory)), packed


def _check_plain(model: PreTrainedModel) -> None:
    """Raise UserError if the model has linears that transformers does not pack: of a class of its own, as Falcon's, or
    kept in fp32, as some of DeepSeek-V4's; or experts that it keeps otherwise in packed models, as Llama 4's."""
    with torch.device("meta"), quiet():
        plain = AutoModelForCausalLM.from_config(model.config)
    in_fp32 = [*(plain._keep_in_fp32_modules or ()), *(plain._keep_in_fp32_modules_strict or ())]
    for name in decoder_linears(plain):
        kind = type(plain.get_submodule(name))
        if kind not in (nn.Linear, Conv1D):
            raise UserError(
                f"to=bnb4: {name} is a {kind.__name__}, and transformers packs plain linears alone: take to=merged"
            )
        if not should_convert_module(name, in_fp32):
            raise UserError(f"to=bnb4: transformers keeps {name} in fp32 and does not pack it: take to=merged")
    for name, module in plain.named_modules():
        packed = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__, {"quantization_methods": []})
        if QuantizationMethod.BITS_AND_BYTES in packed["quantization_methods"]:
            raise UserError(
                f"to=bnb4: in a packed model transformers takes {name} for linears of each expert, and here they are "
                "one tensor: take to=merged"
            )


EXPORTS = {"merged": _merged, "peft": _peft, "bnb4": _bnb4}


@torch.inference_mode()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [tokens, vocabulary], fp32 on the CPU; PEFT's prompt tuning has some of its own tokens before."""
    return model.eval()(input_ids=ids.to(model.device)).logits[0, -ids.shape[1] :].float().cpu()


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def _read_back(read: Reader, to: str, device: torch.device, ids: Tensor) -> tuple[nn.Module, Tensor]:
    """The export, as its library loads it, and its logits. UserError: it cannot."""
    try:
        written = read().to(device)
        return written, _logits(written, ids)
    except (ValueError, RuntimeError, NotImplementedError, KeyError, AttributeError, TypeError) as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"to={to}: its library could not read what was written ({told}): nothing is kept") from error


@torch.inference_mode()
def _is_rounding(written: nn.Module, ids: Tensor, found: Tensor, expected: Tensor) -> bool:
    """True if the run's logits are as near to those of the `written` model in fp32 as its own in its dtype, within a
    factor of two: where rounding alone has a router choose other experts, both are far from them."""
    exact = _logits(written.float(), ids)
    return _relative(expected, exact) <= 2 * _relative(found, exact)


@contextlib.contextmanager
def _claimed(target: Path) -> Iterator[None]:
    """Inside, nobody else exports to `target`."""
    with claim(target.with_name(f".{target.name}.lock")) as claimed:
        if not claimed or target.exists():  # it was not there when the command began
            raise UserError(f"another export to {target} began at the same time: set output_dir to another folder")
        delete_partials(target)
        yield


def export(source: Path, to: str, target: Path, changes: list[str]) -> None:
    """Write the model of the run in `source` to `target` in the format `to`, read it back, print how far it differs.

    Raises:
        UserError: there is nothing to export, `target` exists, or the export gives other logits. Nothing is left then.
    """
    if to not in EXPORTS:
        raise UserError(f"to={to}: choose {', '.join(EXPORTS)}")
    if target.exists():
        raise UserError(f"{target} exists already: nothing is overwritten; set output_dir to another folder")
    run = load_run(source, changes)
    print(machine.describe(run.model.device, run.dtype), file=sys.stderr)
    device, dtype = run.model.device, run.dtype
    ids = torch.tensor([tokenize(run.tokenizer, Path(__file__).read_text(encoding="utf-8"))["input_ids"]])
    ids = ids[:, :CHECK_TOKENS]
    with _claimed(target), directory_atomically(target) as directory:
        read, expected = EXPORTS[to](run, source, directory, ids)
        run.tokenizer.save_pretrained(directory)
        seal_directory(directory)
        del run  # two models need not be in memory
        gc.collect()
        with quiet():
            written, found = _read_back(read, to, device, ids)
        error, most = _relative(found, expected), (found - expected).abs().max().item()
        print(f"read back: logits of {ids.shape[1]} tokens differ by {error:.2g} of their size, at most by {most:.2g}")
        if not error <= LARGEST_ERROR[dtype] and not _is_rounding(written, ids, found, expected):
            raise UserError(f"the export is wrong, {error:.2g} is more than rounding does: nothing is kept")


@command
def main() -> None:
    options, changes = read_options(Options, __file__, changes=("trainer.",))
    target = Path(options.output_dir) if options.output_dir else Path(options.run) / options.to
    export(Path(options.run), options.to, target, changes)
    print("Written:", *sorted(target.iterdir()), sep="\n  ")


if __name__ == "__main__":
    main()
