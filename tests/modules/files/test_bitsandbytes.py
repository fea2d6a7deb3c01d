"""4-bit model directories of transformers and bitsandbytes: the same logits in both directions."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from modules import NF4Linear, attach, quantize
from modules.files.bitsandbytes import by_definition, load_bnb4, save_bnb4, save_packed
from modules.files.checked import SUMS
from tests.modules.architectures import ARCHITECTURES, logits
from tests.modules.moe_cases import MODELS as MOE_MODELS
from tests.modules.moe_cases import moe_model, outputs

LINEAR = "model.layers.1.mlp.down_proj"  # of the Llama: [64, 128]


def theirs(directory, dtype=None):
    return by_definition(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype or "auto").eval())


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_directions(packed, tmp_path, architecture, double):
    both_directions(packed(architecture, bnb_4bit_use_double_quant=double), tmp_path)


def test_both_directions_in_fp4(packed, tmp_path):
    directory = packed("llama", bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="fp4")
    assert load_bnb4(directory).get_submodule(LINEAR).quant_type == "fp4"
    both_directions(directory, tmp_path)


def both_directions(directory, tmp_path):
    ours = load_bnb4(directory)
    expected = logits(theirs(directory))
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert sum(isinstance(module, NF4Linear) for module in ours.modules()) >= 8 and not ours.training

    save_bnb4(ours, tmp_path / "again")
    torch.testing.assert_close(logits(theirs(tmp_path / "again")), expected, rtol=0, atol=0)
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not hasattr(ours.config, "quantization_config")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_loads_a_model_that_quantize_packed(llama, tmp_path, quant_type):
    quantize(llama.eval(), blocksize=32, double_quant=False, quant_type=quant_type)
    save_bnb4(llama, tmp_path / "saved")
    model = theirs(tmp_path / "saved")
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.blocksize == 32
    torch.testing.assert_close(logits(model), logits(llama), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(load_bnb4(tmp_path / "saved")), logits(llama))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(packed, dtype):
    directory = packed("llama", dtype, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    ours, exact = load_bnb4(directory), logits(load_bnb4(directory, torch.float32))
    assert ours.dtype == dtype and ours.get_submodule(LINEAR).dtype == dtype
    error, their_error = ((logits(m).float() - exact).abs().max() for m in (ours, theirs(directory)))
    assert error <= 2 * their_error + torch.finfo(dtype).eps * exact.abs().max()


def test_codes_stored_in_another_dtype(packed):
    directory = packed("llama", bnb_4bit_quant_storage=torch.bfloat16)
    assert load_file(directory / "model.safetensors")[f"{LINEAR}.weight"].dtype == torch.bfloat16
    assert torch.equal(logits(load_bnb4(directory)), logits(load_bnb4(packed("llama"))))


def test_skipped_modules_stay_dense(packed, tmp_path):
    directory = packed("llama", llm_int8_skip_modules=["q_proj", "lm_head"])
    ours = load_bnb4(directory)
    assert type(ours.model.layers[1].self_attn.q_proj) is torch.nn.Linear
    torch.testing.assert_close(logits(ours), logits(theirs(directory)), rtol=1e-5, atol=1e-5)
    save_bnb4(ours, tmp_path / "again")
    assert type(theirs(tmp_path / "again").model.layers[1].self_attn.q_proj) is torch.nn.Linear
    assert torch.equal(logits(theirs(tmp_path / "again")), logits(theirs(directory)))


def test_a_packed_lm_head(packed, tmp_path):
    directory = packed("llama", llm_int8_skip_modules=[])
    ours = load_bnb4(directory)
    assert isinstance(ours.lm_head, NF4Linear)
    torch.testing.assert_close(logits(ours), logits(theirs(directory)), rtol=1e-5, atol=1e-5)
    save_bnb4(ours, tmp_path / "again")
    assert torch.equal(logits(theirs(tmp_path / "again")), logits(theirs(directory)))


def test_tied_embeddings_are_one_tensor(packed):
    ours = load_bnb4(packed("qwen3"))
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_no_dense_weight_is_ever_made(packed):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            # torch.empty touches no memory, and linears are made with it before their weight moves to meta
            if isinstance(out, torch.Tensor) and not out.is_meta and func is not torch.ops.aten.empty.memory_format:
                self.numel = max(self.numel, out.numel() if out.is_floating_point() else 0)
            return out

    directory = packed("opt")
    with Largest() as largest:
        load_bnb4(directory)
    assert largest.numel == 99 * 128  # the embeddings of the tokens; the packed linears have up to 64 · 256


@pytest.mark.parametrize(
    "quantization, message",
    [
        (None, "has no quantization_config: the weights are not packed"),
        ({"quant_method": "gptq", "bits": 4}, "packed with gptq; only bitsandbytes' NF4 and FP4 can be read"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "packed with 8-bit bitsandbytes; only"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "q_proj.weight is packed in nf4, not in fp4"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "af4"},
            "bnb_4bit_quant_type is af4, not nf4 or fp4",
        ),
    ],
    ids=["dense", "gptq", "8 bits", "fp4", "af4"],
)
def test_other_quantizations_are_refused(llama_copy, quantization, message):
    path = llama_copy / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(ValueError, match=message):
        load_bnb4(llama_copy)


def test_a_packed_head_tied_to_the_embeddings_is_refused(packed, tmp_path):
    directory = shutil.copytree(packed("llama", llm_int8_skip_modules=[]), tmp_path / "tied")
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lm_head.weight is packed, but config.json ties it to model.embed_tokens"):
        load_bnb4(directory)


def test_save_overwrites_nothing_and_drops_nothing(llama, tmp_path):
    with pytest.raises(ValueError, match="no linear of the model is packed: quantize it first"):
        save_bnb4(llama, tmp_path / "new")
    other = copy.deepcopy(llama)
    quantize(other, quant_type="int4")
    with pytest.raises(ValueError, match="packed in int4: bitsandbytes supports one of nf4, fp4"):
        save_bnb4(other, tmp_path / "new")
    quantize(llama)
    (tmp_path / "old").mkdir()
    with pytest.raises(ValueError, match="old exists already: nothing is overwritten"):
        save_bnb4(llama, tmp_path / "old")
    attach(llama, "lora", rank=4)
    with pytest.raises(ValueError, match="a directory of a packed model cannot hold adapters: detach"):
        save_bnb4(llama, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_by_definition_where_rows_are_no_whole_number_of_blocks(llama, tmp_path, double):
    """Weights in float64 by bitsandbytes' definition of the format; its CPU kernel gives others on AVX-512."""
    quantize(llama, blocksize=128, double_quant=double)  # q_proj has rows of 64
    save_bnb4(llama, tmp_path / "saved")
    name = "model.layers.0.self_attn.q_proj"
    file = load_file(tmp_path / "saved" / "model.safetensors")
    codes, absmax = file[f"{name}.weight"].flatten().long(), file[f"{name}.weight.absmax"].double()
    if double:
        state = json.loads(bytes(file[f"{name}.weight.quant_state.bitsandbytes__nf4"].tolist()))
        scale = file[f"{name}.weight.nested_absmax"].double().repeat_interleave(256)[: absmax.numel()]
        absmax = file[f"{name}.weight.nested_quant_map"].double()[absmax.long()] * scale + state["nested_offset"]
    values = file[f"{name}.weight.quant_map"].double()[torch.stack([codes >> 4, codes & 15], dim=1).flatten()]
    exact = (values * absmax.repeat_interleave(128)[: values.numel()]).view(64, 64)
    q_proj = theirs(tmp_path / "saved").get_submodule(name)
    found = q_proj(torch.eye(64)).T.double()
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)
    ours = llama.get_submodule(name).dequantize().weight.double()
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", MOE_MODELS)
def test_packed_experts_are_written_and_read_again(tmp_path, kind):
    model = moe_model(kind)
    quantize(model, blocksize=32)
    with pytest.raises(ValueError, match=r"experts\.\w+ is packed, and bitsandbytes has no packed experts"):
        save_bnb4(model, tmp_path / "bnb4")
    save_packed(model, tmp_path / "packed")
    again = load_bnb4(tmp_path / "packed")
    assert torch.equal(outputs(again), outputs(model))
    state, want = again.state_dict(), model.state_dict()
    assert state.keys() == want.keys() and all(torch.equal(state[name], want[name]) for name in want)
    with pytest.raises((ValueError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_a_scale_of_packed_experts_that_is_missing_is_named(tmp_path):
    model = moe_model("qwen3_moe")
    quantize(model)
    save_packed(model, tmp_path / "packed")
    (tmp_path / "packed" / SUMS).unlink()
    path = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.experts.down_proj.weight.absmax"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load_bnb4(tmp_path / "packed")
