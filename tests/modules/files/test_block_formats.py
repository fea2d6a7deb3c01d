"""MXFP4 and NVFP4 as gpt-oss, ModelOpt and compressed-tensors write them: against transformers' own dequantization, and
against dense models of the numbers that their documentation gives the bytes.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from kernels import Weight, quantize_4bit
from modules import NF4Linear, quantize
from modules.files.block_formats import load_block_format, mxfp4_names, mxfp4_tensors, parts_of_weight, read_mxfp4
from modules.files.four_bits import load_4bit, save_4bit
from modules.files.tensors import TensorFiles
from tests.modules.architectures import logits
from tests.modules.files.conftest import CONFIGS

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
LINEAR = "model.layers.1.mlp.up_proj"
WRITERS = {
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
    "compressed-tensors nvfp4": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    "compressed-tensors mxfp4": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
}


def random_packed(shape: torch.Size, writer: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(a dense weight, its tensors by the names after the linear's), the even value in the low nibble."""
    size = 32 if "mxfp4" in writer else 16
    codes = torch.randint(16, shape, dtype=torch.uint8)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    blocks = shape[0], shape[1] // size
    if "mxfp4" in writer:
        exponents = torch.randint(118, 123, blocks, dtype=torch.uint8)
        scale = 2.0 ** (exponents.float() - 127)
        parts = {"weight_packed": packed, "weight_scale": exponents}
    else:
        stored, number = (
            torch.randint(40, 120, blocks, dtype=torch.uint8).view(torch.float8_e4m3fn),
            torch.rand(1) / 1e4,
        )
        if writer == "modelopt":
            parts = {"weight": packed, "weight_scale": stored, "weight_scale_2": number[0]}
        else:
            parts = {"weight_packed": packed, "weight_scale": stored, "weight_global_scale": number}
            number = 1 / number.mul_(1e7)
        scale = stored.float() * number
    return E2M1[codes.long()] * scale.repeat_interleave(size, dim=1), parts


@pytest.fixture
def written(tmp_path):
    """written(writer) is (a directory as `writer` leaves it, the dense model of the same numbers)."""

    def make(writer: str, architecture: str = "llama"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=torch.float32).eval()
        directory = tmp_path / "written"
        model.save_pretrained(directory)
        tensors = load_file(directory / "model.safetensors")
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.data, parts = random_packed(module.weight.shape, writer)
                del tensors[f"{name}.weight"]
                tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
                tensors[f"{name}.input_scale" if writer == "modelopt" else f"{name}.input_global_scale"] = torch.ones(1)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        set_config(directory, WRITERS[writer])
        return directory, model

    return make


def set_config(directory, quantization: dict | None) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.pop("quantization_config", None)
    path.write_text(json.dumps(config | ({"quantization_config": quantization} if quantization else {})))


def change(directory, **tensors: torch.Tensor | None) -> None:
    """Replace or delete tensors of LINEAR."""
    path = directory / "model.safetensors"
    found = load_file(path) | {f"{LINEAR}.{name}": tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------- linears


@pytest.mark.parametrize("writer", WRITERS)
def test_linears_are_read_as_they_are(writer, written):
    directory, dense = written(writer)
    model = load_4bit(directory)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert len(linears) == 14 and not isinstance(model.lm_head, NF4Linear)
    for name, linear in linears.items():
        exact = dense.get_submodule(name).weight
        torch.testing.assert_close(linear.dequantize().weight, exact, rtol=1.2e-7, atol=0)  # 1 / number rounds
        if writer != "compressed-tensors nvfp4":
            assert torch.equal(linear.dequantize().weight, exact)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)
    assert load_4bit(directory, torch.bfloat16).get_submodule(LINEAR).dtype == torch.bfloat16


def test_modelopts_own_configuration_file(written):
    directory, dense = written("modelopt")
    set_config(directory, None)
    found = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (directory / "hf_quant_config.json").write_text(json.dumps(found))
    assert torch.equal(logits(load_4bit(directory)), logits(load_block_format(directory)))
    torch.testing.assert_close(logits(load_4bit(directory)), logits(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("writer", ["modelopt", "compressed-tensors mxfp4"])
def test_every_byte_comes_back(writer, written, tmp_path):
    directory, _ = written(writer)
    save_4bit(load_4bit(directory), tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "again"))
    before = {
        name: tensor
        for name, tensor in before.items()
        if not name.endswith(".input_scale") and "input_global" not in name
    }
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor.view(-1), after[name].view(-1)), name
    assert torch.equal(logits(load_4bit(tmp_path / "again")), logits(load_4bit(directory)))


@pytest.mark.parametrize("quant_type", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt"])
def test_what_quantize_packs_is_saved_and_loaded(quant_type, architecture, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=torch.bfloat16).eval()
    quantize(model, quant_type=quant_type)
    save_4bit(model, tmp_path / "saved")
    again = load_4bit(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model)) and again.dtype == torch.bfloat16
    entries = (tmp_path / "saved" / "checksums.json").read_text()
    assert "model.safetensors" in entries and not hasattr(model.config, "quantization_config")


BAD = {
    "no scale": ({"weight_scale": None}, f"{LINEAR}.weight_scale is missing"),
    "no number": ({"weight_scale_2": None}, f"{LINEAR}.weight_scale_2 is missing"),
    "no codes": ({"weight": None}, f"{LINEAR}.weight is missing"),
    "shape of the scales": (
        {"weight_scale": torch.zeros(128, 2, dtype=torch.float8_e4m3fn)},
        f"{LINEAR}.weight_scale is float8_e4m3fn [128, 2]; the model needs float8_e4m3fn [128, 4]",
    ),
    "dtype of the scales": ({"weight_scale": torch.zeros(128, 4)}, f"{LINEAR}.weight_scale is float32 [128, 4]; the"),
    "shape of the codes": (
        {"weight": torch.zeros(128, 64, dtype=torch.uint8)},
        f"{LINEAR}.weight is uint8 [128, 64]; the model needs uint8 [128, 32]",
    ),
    "number": ({"weight_scale_2": torch.tensor(0.0)}, f"{LINEAR}.weight_scale_2 is not one number above 0"),
    "another tensor": ({"weight_zeros": torch.ones(1)}, f"{LINEAR}.weight_zeros belongs to no tensor of Llama"),
}


@pytest.mark.parametrize(("tensors", "message"), BAD.values(), ids=BAD)
def test_a_damaged_file(tensors, message, written):
    directory, _ = written("modelopt")
    change(directory, **tensors)
    with pytest.raises(ValueError) as error:
        load_4bit(directory)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, r"packed with modelopt \(FP8\); bitsandbytes' NF4 and FP4"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, r"compressed-tensors \(pack-quantized\)"),
        ({"quant_method": "gptq"}, r"packed with gptq \(None\); .* modelopt's NVFP4"),
    ],
)
def test_other_ways_to_pack_are_refused(quantization, message, written):
    directory, _ = written("modelopt")
    set_config(directory, quantization)
    with pytest.raises(ValueError, match=message):
        load_4bit(directory)


def test_blocks_across_rows_fit_no_file(tmp_path):
    config = CONFIGS["llama"].__class__(**CONFIGS["llama"].to_dict() | {"intermediate_size": 72})
    model = AutoModelForCausalLM.from_config(config)
    quantize(model, quant_type="nvfp4")
    with pytest.raises(ValueError, match=r"mlp.down_proj: 72 columns are not a whole number of nvfp4's blocks of 16"):
        save_4bit(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists() and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- gpt-oss


@pytest.fixture
def experts(tmp_path):
    """A file with one layer's experts as gpt-oss is shipped, and its tensors."""
    torch.manual_seed(0)
    name, tensors = "model.layers.0.mlp.experts.", {}
    for part, (rows, columns) in {"gate_up_proj": (12, 64), "down_proj": (64, 32)}.items():
        tensors[f"{name}{part}_blocks"] = torch.randint(256, (3, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{name}{part}_scales"] = torch.randint(110, 135, (3, rows, columns // 32), dtype=torch.uint8)
        tensors[f"{name}{part}_bias"] = torch.randn(3, rows)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_experts_are_transformers(experts, dtype):
    directory, tensors = experts
    files = TensorFiles(directory)
    names = mxfp4_names(files)
    assert [name.rpartition(".")[2] for name in names] == ["down_proj", "gate_up_proj"]
    for name in names:
        weight = read_mxfp4(files, name, dtype)
        blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # [experts, in, out]
        assert torch.equal(weight.dense(), theirs.transpose(1, 2)) and weight.dtype == dtype
        assert weight.values.numel() == blocks.numel() and weight.shape == theirs.transpose(1, 2).shape
        again = mxfp4_tensors(weight)
        assert torch.equal(again["_blocks"], blocks) and torch.equal(again["_scales"], scales)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_proj_scales": None}, "experts.down_proj_scales is missing, and .*experts.down_proj_blocks is there"),
        ({"down_proj_blocks": None}, "experts.down_proj_blocks is missing, and .*experts.down_proj_scales is there"),
        (
            {"down_proj_scales": torch.zeros(3, 64, 2, dtype=torch.uint8)},
            r"experts.down_proj: codes uint8 \[3, 64, 1, 16\] do not belong to scales uint8 \[3, 64, 2\] of mxfp4",
        ),
        (
            {"down_proj_scales": torch.zeros(3, 64, 1)},
            r"experts.down_proj_scales is float32 \[3, 64, 1\]; the model needs uint8",
        ),
    ],
)
def test_damaged_experts(experts, changes, message):
    directory, tensors = experts
    tensors |= {f"model.layers.0.mlp.experts.{name}": tensor for name, tensor in changes.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        files = TensorFiles(directory)
        for name in mxfp4_names(files):
            read_mxfp4(files, name, torch.bfloat16)


def test_parts_with_numbers_of_their_own_fit_no_file():
    packed, state = quantize_4bit(torch.randn(256, 32), quant_type="nvfp4")
    state.nested_absmax[1] *= 2
    with pytest.raises(ValueError, match="parts of the weight have numbers of their own"):
        parts_of_weight(Weight(packed, state))
