"""MXFP4 and NVFP4 as gpt-oss, ModelOpt and compressed-tensors write them: against transformers' own dequantization, and
against dense models of the numbers that their documentation gives the bytes.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from kernels import Weight, quantize_4bit
from modules import NF4Linear, quantize
from modules.experts import NF4Experts
from modules.files.bitsandbytes import load_bnb4, save_bnb4, save_packed
from modules.files.block_formats import GPT_OSS, load_block_format, parts_of_weight, read_parts
from modules.files.tensors import TensorFiles
from modules.linear import weight_of
from tests.modules.architectures import logits
from tests.modules.files.conftest import CONFIGS
from tests.modules.moe_cases import pack_as_shipped

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
    model = load_block_format(directory)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert len(linears) == 14 and not isinstance(model.lm_head, NF4Linear)
    for name, linear in linears.items():
        exact = dense.get_submodule(name).weight
        torch.testing.assert_close(linear.dequantize().weight, exact, rtol=1.2e-7, atol=0)  # 1 / number rounds
        if writer != "compressed-tensors nvfp4":
            assert torch.equal(linear.dequantize().weight, exact)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)
    assert load_block_format(directory, torch.bfloat16).get_submodule(LINEAR).dtype == torch.bfloat16


def test_modelopts_own_configuration_file(written):
    directory, dense = written("modelopt")
    set_config(directory, None)
    found = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (directory / "hf_quant_config.json").write_text(json.dumps(found))
    torch.testing.assert_close(logits(load_block_format(directory)), logits(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("writer", WRITERS)
def test_every_byte_comes_back(writer, written):
    directory, _ = written(writer)
    tensors = load_file(directory / "model.safetensors")
    for name, linear in load_block_format(directory).named_modules():
        if isinstance(linear, NF4Linear):
            codes, scales, number = parts_of_weight(weight_of(linear))
            codes_name = "weight" if writer == "modelopt" else "weight_packed"
            assert torch.equal(codes.flatten(1), tensors[f"{name}.{codes_name}"])
            assert torch.equal(scales.view(torch.uint8), tensors[f"{name}.weight_scale"].view(torch.uint8))
            if writer == "modelopt":
                assert torch.equal(number, tensors[f"{name}.weight_scale_2"])


@pytest.mark.parametrize("quant_type", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "opt"])
def test_what_quantize_packs_is_saved_and_loaded(quant_type, architecture, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=torch.bfloat16).eval()
    quantize(model, quant_type=quant_type)
    with pytest.raises(ValueError, match=f"packed in {quant_type}: bitsandbytes supports one of nf4, fp4"):
        save_bnb4(model, tmp_path / "theirs")
    save_packed(model, tmp_path / "saved")
    again = load_bnb4(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model)) and again.dtype == torch.bfloat16


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
        load_block_format(directory)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, r"packed with modelopt \(FP8\); bitsandbytes' NF4"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, r"compressed-tensors \(pack-quantized\)"),
        ({"quant_method": "gptq"}, "packed with gptq; .* ModelOpt's NVFP4"),
    ],
)
def test_other_ways_to_pack_are_refused(quantization, message, written):
    directory, _ = written("modelopt")
    set_config(directory, quantization)
    with pytest.raises(ValueError, match=message):
        load_block_format(directory)


def test_blocks_across_rows_fit_no_file():
    packed, state = quantize_4bit(torch.randn(4, 72), quant_type="nvfp4")
    with pytest.raises(ValueError, match="72 columns are not a whole number of nvfp4's blocks of 16"):
        parts_of_weight(Weight(packed, state))


# ------------------------------------------------------------------------------------------- gpt-oss

SMALL_OSS = {
    **{"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "vocab_size": 99},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    **{"sliding_window": 8, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1},
}
SHAPES = {"gate_up_proj": torch.Size([3, 12, 64]), "down_proj": torch.Size([3, 64, 32])}  # [experts, out, in]


@pytest.fixture
def experts(tmp_path):
    """A file with one layer's experts as gpt-oss is shipped, and its tensors."""
    torch.manual_seed(0)
    tensors = {}
    for name, (*rows, columns) in SHAPES.items():
        tensors[f"{name}_blocks"] = torch.randint(256, (*rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(110, 135, (*rows, columns // 32), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, tensors


def test_gpt_oss_as_it_is_shipped(tmp_path):
    """Experts stay packed, everything else is dense; the logits are those of the model that transformers unpacks."""
    config = GptOssConfig(**SMALL_OSS, layer_types=["sliding_attention", "full_attention"])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    tensors = pack_as_shipped(tmp_path)
    model = load_block_format(tmp_path, torch.float32)
    experts = [module for module in model.modules() if isinstance(module, NF4Experts)]
    assert len(experts) == 4 and {module.quant_type for module in experts} == {"mxfp4"}
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    torch.testing.assert_close(logits(model), logits(theirs.eval()), rtol=1e-5, atol=1e-5)
    missing = "model.layers.1.mlp.experts.down_proj_scales"
    save_file({name: tensor for name, tensor in tensors.items() if name != missing}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        load_block_format(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_experts_are_transformers(experts, dtype):
    directory, tensors = experts
    for name, shape in SHAPES.items():
        weight = read_parts(TensorFiles(directory), name, shape, dtype, "mxfp4", GPT_OSS)
        blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # [experts, in, out]
        assert torch.equal(weight.dense(), theirs.transpose(1, 2)) and weight.dtype == dtype
        codes, again, number = parts_of_weight(weight)
        assert torch.equal(codes, blocks) and torch.equal(again.view(torch.uint8), scales) and number == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_proj_scales": None}, "down_proj_scales is missing"),
        ({"down_proj_blocks": None}, "down_proj_blocks is missing"),
        (
            {"down_proj_scales": torch.zeros(3, 64, 2, dtype=torch.uint8)},
            r"down_proj_scales is uint8 \[3, 64, 2\]; the model needs uint8 \[3, 64, 1\]",
        ),
        ({"down_proj_scales": torch.zeros(3, 64, 1)}, r"down_proj_scales is float32 \[3, 64, 1\]; the model needs"),
        ({"down_proj_blocks": torch.zeros(3, 64, 16)}, r"down_proj_blocks is float32 \[3, 64, 16\]; the model needs"),
    ],
)
def test_damaged_experts(experts, changes, message):
    directory, tensors = experts
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        read_parts(TensorFiles(directory), "down_proj", SHAPES["down_proj"], torch.bfloat16, "mxfp4", GPT_OSS)


def test_parts_with_numbers_of_their_own_fit_no_file():
    packed, state = quantize_4bit(torch.randn(256, 32), quant_type="nvfp4")
    state.nested_absmax[1] *= 2
    with pytest.raises(ValueError, match="parts of the weight have numbers of their own"):
        parts_of_weight(Weight(packed, state))
