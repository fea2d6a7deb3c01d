"""Mixtures of experts whose experts are packed linears in their files, in MXFP4 and NVFP4: against dense models of the
numbers that the formats' documentation gives the bytes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from modules import attach
from modules.experts import LoRAExperts, NF4Experts
from modules.files.bitsandbytes import load_bnb4, save_packed
from modules.files.block_formats import load_block_format
from modules.linear import weight_of
from tests.modules.architectures import logits
from tests.modules.files.test_block_formats import WRITERS, random_packed, set_config

SIZES = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2, "pad_token_id": 0},
}
CONFIGS = {
    "qwen3_moe": lambda width: Qwen3MoeConfig(**SIZES, num_experts=3, moe_intermediate_size=width),
    "mixtral": lambda width: MixtralConfig(**SIZES, num_local_experts=3, intermediate_size=width),
}
LINEARS = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}
EXPERT = "model.layers.1.mlp.experts.2"  # of a Qwen3-MoE


@pytest.fixture
def written(tmp_path):
    """written(writer) is (a directory in which `writer` packed each expert's linears, the dense model of the same
    numbers). `alike`: gate and up of all experts have one number."""

    def make(writer: str, kind: str = "qwen3_moe", width: int = 64, alike: bool = False):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind](width), dtype=torch.float32).eval()
        model.save_pretrained(tmp_path / "written")
        tensors = load_file(tmp_path / "written" / "model.safetensors")
        for i, layer in enumerate(model.model.layers):
            part = "block_sparse_moe" if kind == "mixtral" else "mlp"
            for e in range(3):
                dense = []
                for name in LINEARS[kind]:
                    linear = f"model.layers.{i}.{part}.experts.{e}.{name}"
                    exact, parts = random_packed(tensors.pop(f"{linear}.weight").shape, writer)
                    if alike and "weight_scale_2" in parts:
                        exact, parts["weight_scale_2"] = exact / parts["weight_scale_2"] / 4096, torch.tensor(1 / 4096)
                    dense.append(exact)
                    tensors |= {f"{linear}.{end}": tensor for end, tensor in parts.items()}
                    tensors[f"{linear}.input_{'' if writer == 'modelopt' else 'global_'}scale"] = torch.ones(1)
                layer.mlp.experts.gate_up_proj.data[e] = torch.cat(dense[:2])
                layer.mlp.experts.down_proj.data[e] = dense[2]
        save_file(tensors, tmp_path / "written" / "model.safetensors", metadata={"format": "pt"})
        set_config(tmp_path / "written", WRITERS[writer])
        return tmp_path / "written", model

    return make


def change(directory, changes: dict[str, torch.Tensor | None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path) | {f"{EXPERT}.{name}": tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("writer", WRITERS)
def test_each_expert_is_read_as_it_is(writer, kind, written):
    """Also where every linear has a number of its own, as NVFP4's have here."""
    directory, dense = written(writer, kind)
    model = load_block_format(directory)
    experts = {name: module for name, module in model.named_modules() if isinstance(module, NF4Experts)}
    assert len(experts) == 4
    for name, linear in experts.items():
        got, exact = linear.dequantize().weight, dense.get_parameter(name)
        torch.testing.assert_close(got, exact, rtol=1.2e-7, atol=0)  # 1 / number rounds
        assert writer == "compressed-tensors nvfp4" or torch.equal(got, exact)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("writer", ["modelopt", "compressed-tensors mxfp4"])
def test_every_byte_comes_back(writer, written):
    directory, _ = written(writer)
    tensors = load_file(directory / "model.safetensors")
    state = weight_of(load_block_format(directory).get_submodule("model.layers.1.mlp.experts.gate_up_proj"))
    codes, state = state.values.view(6, -1), state.quant_state
    names = [f"model.layers.1.mlp.experts.{e}.{name}_proj" for e in range(3) for name in ("gate", "up")]
    for i, linear in enumerate(names):
        theirs = tensors[f"{linear}.weight{'' if writer == 'modelopt' else '_packed'}"].flatten()
        assert torch.equal(codes[i], theirs << 4 | theirs >> 4)
        assert torch.equal(state.absmax.view(6, -1)[i], tensors[f"{linear}.weight_scale"].view(torch.uint8).flatten())
        if writer == "modelopt":
            assert torch.equal(state.nested_absmax[i], tensors[f"{linear}.weight_scale_2"])


def test_it_is_saved_again_and_trained(written, tmp_path):
    directory, _ = written("modelopt")
    model = load_block_format(directory, torch.bfloat16)
    save_packed(model, tmp_path / "saved")
    assert torch.equal(logits(load_bnb4(tmp_path / "saved")), logits(model))
    attach(model, "dora", rank=2)
    assert sum(isinstance(module, LoRAExperts) for module in model.modules()) == 4


def test_numbers_that_do_not_fit_are_refused(written):
    """An expert of 32 × 64 values is half of the 4096 that share a number. If all have one, that does not matter."""
    directory, dense = written("modelopt", width=32, alike=True)
    torch.testing.assert_close(logits(load_block_format(directory)), logits(dense), rtol=1e-5, atol=1e-5)
    change(directory, {"up_proj.weight_scale_2": torch.tensor(1 / 2048)})
    first = "model.layers.1.mlp.experts.0.gate_proj"
    refused(directory, f"{EXPERT}.up_proj and {first} have scales of their own, which experts of 32 × 64 values cannot")


def refused(directory, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_block_format(directory)
    assert message in str(error.value) and "\n" not in str(error.value)


BAD = {
    "no scale": ({"up_proj.weight_scale": None}, f"{EXPERT}.up_proj.weight_scale is missing"),
    "no codes": ({"up_proj.weight": None}, f"{EXPERT}.up_proj.weight is missing"),
    "no number": ({"down_proj.weight_scale_2": None}, f"{EXPERT}.down_proj.weight_scale_2 is missing"),
    "shape": ({"up_proj.weight": torch.zeros(8, 32, dtype=torch.uint8)}, f"{EXPERT}.up_proj.weight is uint8 [8, 32]"),
    "an expert less": (
        {f"down_proj.{end}": None for end in ("weight", "weight_scale", "weight_scale_2")},
        "model.layers.1.mlp.experts.0.down_proj and its like are 2, not 3 experts'",
    ),
    "one dense": (
        {"gate_proj.weight": torch.zeros(64, 64)}
        | {f"gate_proj.{end}": None for end in ("weight_scale", "weight_scale_2")},
        f"{EXPERT}.gate_proj.weight is dense, but model.layers.1.mlp.experts.0.gate_proj is packed",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_a_damaged_file(changes, message, written):
    directory, _ = written("modelopt")
    change(directory, changes)
    refused(directory, message)
