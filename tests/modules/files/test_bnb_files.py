"""4-bit model directories of transformers and bitsandbytes: the same logits in both directions, damage is named."""

import copy
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from modules import NF4Linear, attach, quantize
from modules.files.bitsandbytes import by_definition, load_bnb4, save_bnb4

SMALL = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
# Rows of whole blocks: with AVX-512 bitsandbytes 0.50.2 dequantizes others wrongly (rows of 96 in blocks of 64).
GATED = SMALL | {"intermediate_size": 128, "num_key_value_heads": 2}
CONFIGS = {
    "llama": transformers.LlamaConfig(**GATED),
    "gpt2": transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=64),
    "qwen3": transformers.Qwen3Config(**GATED, head_dim=16, tie_word_embeddings=True),
    "gemma3": transformers.Gemma3TextConfig(**GATED, head_dim=16, sliding_window=4),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=256, word_embed_proj_dim=128, max_position_embeddings=64),
}
IDS = torch.arange(21).view(3, 7)
LINEAR = "model.layers.1.mlp.down_proj"  # of the Llama: [64, 128]


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """packed(architecture, dtype=…, **BitsAndBytesConfig) is a directory that transformers + bitsandbytes saved."""
    made = {}

    def make(architecture, dtype=torch.float32, max_shard_size="1GB", **config):
        key = (architecture, dtype, max_shard_size, str(config))
        if key not in made:
            dense, made[key] = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("packed")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=dtype)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter)
            model.save_pretrained(dense)
            config = BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4"} | config)
            theirs = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=dtype)
            theirs.save_pretrained(made[key], max_shard_size=max_shard_size)
        return made[key]

    return make


@pytest.fixture
def llama_copy(packed, tmp_path):
    """A directory of its own to damage: the Llama with double quantization."""
    return shutil.copytree(packed("llama", bnb_4bit_use_double_quant=True), tmp_path / "llama")


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def theirs(directory, dtype=None):
    return by_definition(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype or "auto").eval())


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("architecture", CONFIGS)
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
def test_what_quantize_packed_loads_in_bitsandbytes(llama, tmp_path, quant_type):
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


def test_shards(packed):
    directory = packed("llama", max_shard_size="30KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load_bnb4(directory)), logits(load_bnb4(packed("llama"))))


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
    "quant_map": (_put(f"{W}.quant_map", lambda t: t * 0.9), f"{W}.quant_map does not hold the values"),
    "8-bit map": (_put(f"{W}.nested_quant_map", lambda t: -t), f"{W}.nested_quant_map does not hold the values"),
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


def test_a_truncated_file_is_named(llama_copy):
    path = llama_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or not a safetensors file"):
        load_bnb4(llama_copy)


def test_shards_and_their_index_must_agree(packed, tmp_path):
    directory = shutil.copytree(packed("llama", max_shard_size="30KB"), tmp_path / "shards")
    index = directory / "model.safetensors.index.json"
    shard = json.loads(index.read_text())["weight_map"]["model.norm.weight"]
    kept = load_file(directory / shard)
    save_file({name: t for name, t in kept.items() if name != "model.norm.weight"}, directory / shard)
    with pytest.raises(ValueError, match=f"{shard}: model.norm.weight is missing: model.safetensors.index.json places"):
        load_bnb4(directory)
    (directory / shard).unlink()
    with pytest.raises(ValueError, match=f"{shard} is missing: model.safetensors.index.json names it"):
        load_bnb4(directory)
    index.write_text("[]")
    with pytest.raises(ValueError, match="is not an index of shards"):
        load_bnb4(directory)
    index.unlink()
    with pytest.raises(ValueError, match=r"no weights: neither model\.safetensors nor model"):
        load_bnb4(directory)


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
    with pytest.raises(ValueError, match="packed in int4, of which bitsandbytes takes one of nf4, fp4"):
        save_bnb4(other, tmp_path / "new")
    quantize(llama)
    (tmp_path / "old").mkdir()
    with pytest.raises(ValueError, match="old exists already: nothing is overwritten"):
        save_bnb4(llama, tmp_path / "old")
    attach(llama, "lora", rank=4)
    with pytest.raises(ValueError, match="the model has adapters, which a bitsandbytes directory cannot hold"):
        save_bnb4(llama, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
