"""A packed weight whose tensors are damaged or do not fit each other is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.files.bitsandbytes import load_bnb4

LINEAR = "model.layers.1.mlp.down_proj"  # of the Llama: [64, 128]


def _edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


STATE = f"{LINEAR}.weight.quant_state.bitsandbytes__nf4"


def _edit_state(**changes):
    def change(tensors):
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        state = {key: value for key, value in state.items() if value is not None}
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def _put(name, make):
    def change(tensors):
        tensors[name] = make(tensors.get(name)).contiguous()

    return change


def _rename(tensors):
    tensors[STATE.replace("nf4", "fp4")] = tensors.pop(STATE)


W = f"{LINEAR}.weight"
DAMAGES = {
    **{
        f"no {name}": (lambda tensors, name=name: tensors.pop(name), f"{name} is missing")
        for name in (W, f"{W}.absmax", f"{W}.quant_map", f"{W}.nested_absmax", f"{W}.nested_quant_map", STATE)
    },
    "no norm": (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight is missing"),
    "codes": (_put(W, lambda w: w[:-1]), rf"{W} is uint8 \[4095, 1\]; the codes of a weight \[64, 128\] are 4096"),
    "dense": (_put(W, lambda _: torch.zeros(64, 128)), rf"{W} is float32 \[64, 128\]; the codes of"),
    "absmax": (_put(f"{W}.absmax", lambda t: t[:-1]), rf"{W}.absmax is uint8 \[127\]; the model needs uint8 \[128\]"),
    "absmax dtype": (_put(f"{W}.absmax", lambda t: t.float()), rf"{W}.absmax is float32 \[128\]; the model needs"),
    "nested absmax": (_put(f"{W}.nested_absmax", lambda t: t.repeat(2)), rf"{W}.nested_absmax is float32 \[2\]; the"),
    "quant_map": (_put(f"{W}.quant_map", lambda t: t * 0.9), f"{W}.quant_map does not hold bitsandbytes'"),
    "8-bit map": (_put(f"{W}.nested_quant_map", lambda t: -t), f"{W}.nested_quant_map does not hold bitsandbytes'"),
    "fp4": (_rename, f"{W} is packed in fp4, not in nf4"),
    "fp4 in JSON": (_edit_state(quant_type="fp4"), f"{STATE} has quant_type='fp4'; it must be nf4"),
    "blocksize": (_edit_state(blocksize=48), f"{STATE} has blocksize=48; it must be one of 32, 64"),
    "another blocksize": (_edit_state(blocksize=128), rf"{W}.absmax is uint8 \[128\]; the model needs uint8 \[64\]"),
    "dtype": (_edit_state(dtype="int8"), f"{STATE} has dtype='int8'; it must be one of float32"),
    "shape": (_edit_state(shape=[128, 64]), rf"{STATE} has shape=\[128, 64\]; it must be \[64, 128\], the model's"),
    "nested blocksize": (_edit_state(nested_blocksize=64), f"{STATE} has nested_blocksize=64; it must be 256"),
    "no nested blocksize": (_edit_state(nested_blocksize=None), f"{STATE} has nested_blocksize=None; it must be 256"),
    "nested dtype": (_edit_state(nested_dtype="float16"), f"{STATE} has nested_dtype='float16'; it must be float32"),
    "no offset": (_edit_state(nested_offset=None), f"{STATE} has nested_offset=None; it must be a finite number"),
    "not JSON": (_put(STATE, lambda t: t[:-1]), f"{STATE} is not JSON"),
    "extra": (_put("model.extra", lambda _: torch.ones(1)), "model.extra belongs to no tensor of LlamaForCausalLM"),
    "extra piece": (_put(f"{W}.scb", lambda _: torch.ones(1)), f"{W}.scb belongs to no tensor"),
    "norm": (_put("model.norm.weight", lambda t: t[:-1]), r"model.norm.weight is float32 \[63\]; the model needs"),
    "norm dtype": (_put("model.norm.weight", lambda t: t.int()), r"model.norm.weight is int32 \[64\], not floats"),
    "a packed norm": (_put("model.norm.weight.absmax", lambda _: torch.ones(1)), "absmax belongs to no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_tensor_is_named(llama_copy, change, message):
    _edit(llama_copy, change)
    with pytest.raises(ValueError, match=message):
        load_bnb4(llama_copy)
