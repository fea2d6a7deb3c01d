"""model.weights=random: the same bits on every machine, everything else as transformers begins with it."""

import hashlib
import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from experiments import run
from experiments.config import resolve
from experiments.errors import UserError
from experiments.models.load import load_base, load_model, prepare_model
from experiments.models.random_weights import fill, random_weight
from experiments.system.cli import composed
from modules import NF4Linear, decoder_linears

CPU = torch.device("cpu")
SMALL = (
    *(
        "model.architecture.vocab_size=300",
        "model.architecture.hidden_size=64",
        "model.architecture.num_hidden_layers=2",
    ),
    *("model.architecture.intermediate_size=128", "model.architecture.num_attention_heads=4"),
    *("model.architecture.num_key_value_heads=2", "model.weights=random", "trainer.device=cpu"),
)


def config(*changes: str):
    return resolve(composed("output_dir=unused", *changes))


def test_a_weight_is_splitmix64_of_its_index():
    """Against the definition in Python's integers."""
    mask = 2**64 - 1
    key = int.from_bytes(hashlib.sha256(b"3 layer.weight").digest()[:8], "little")
    expected = []
    for i in range(6):
        x = (i * 0x9E3779B97F4A7C15 + key) & mask
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        x ^= x >> 31
        expected.append(sum(x >> shift & 0xFFFF for shift in (0, 16, 32, 48)) - 131070)
    weight = random_weight("layer.weight", torch.Size([2, 3]), 0.02, 3, torch.float32, CPU)
    scale = 0.02 / math.sqrt((65536**2 - 1) / 3)
    torch.testing.assert_close(weight.flatten(), torch.tensor(expected).float() * scale)


def test_weights_are_near_normal_and_independent_of_chunks(monkeypatch):
    weight = random_weight("a", torch.Size([500, 400]), 0.02, 0, torch.float32, CPU)
    assert abs(weight.mean()) < 2e-4 and weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert (weight.abs() < 0.02).float().mean().item() == pytest.approx(0.683, abs=0.02)
    monkeypatch.setattr("experiments.models.random_weights.CHUNK", 777)
    assert torch.equal(random_weight("a", torch.Size([500, 400]), 0.02, 0, torch.float32, CPU), weight)
    for name, seed in (("b", 0), ("a", 1)):
        other = random_weight(name, torch.Size([500, 400]), 0.02, seed, torch.float32, CPU)
        assert abs((other * weight).mean()) < 0.02**2 * 0.02


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "opt", "mixtral"])
def test_everything_but_matrices_begins_as_in_transformers(kind):
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "ffn_dim": 128, "word_embed_proj_dim": 64}
    config = AutoConfig.for_model(kind, **sizes, max_position_embeddings=64)
    expected = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fill(model, CPU, seed=0)
    named = dict(model.named_parameters())
    assert named.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        mine = named[name]
        assert mine.dtype == parameter.dtype and mine.device == CPU, name
        if parameter.ndim < 2:
            assert torch.equal(mine, parameter), name
        else:
            assert mine.float().std().item() == pytest.approx(parameter.float().std().item(), rel=0.1), name
    buffers = dict(model.named_buffers())
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    ids = torch.arange(10).unsqueeze(0)
    assert model.eval()(input_ids=ids).logits.isfinite().all()


def test_a_preset_is_packed_as_it_comes_with_the_bits_of_the_dense_model():
    cfg = config("+method=qdora", "model=llama-3-8b", "rank=4", *SMALL)
    dense, tokenizer = load_model(cfg.model, torch.float32, cfg.seed)
    assert len(tokenizer) == 300
    for model in (load_base(cfg, torch.float32)[0], prepare_model(cfg, CPU, torch.float32)[0]):
        packed = {name: linear for name, linear in decoder_linears(model).items() if isinstance(linear, NF4Linear)}
        assert packed.keys() == decoder_linears(dense).keys()
        for name, linear in decoder_linears(dense).items():
            expected = NF4Linear.from_linear(linear, cfg.quant.blocksize, cfg.quant.double, cfg.quant.type)
            assert torch.equal(packed[name].weight, expected.weight), name


def test_a_run_trains_repeats_bit_for_bit_and_names_its_weights(tmp_path, terminal):
    losses = []
    for name in ("a", "b"):
        arguments = ["+method=qdora", "model=llama-3-8b", "trainer=debug", "rank=4", "data=arithmetic", *SMALL]
        code, text = terminal(run, *arguments, "trainer.samples=0", "trainer.steps=2", f"output_dir={tmp_path / name}")
        assert code == 0 and "qdora, rank 4, llama-3-8b with random weights" in text
        assert "llama-3-8b has random weights, and a tokenizer of bytes with 300 tokens" in text
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["config"]["model.weights"] == "random"
        losses.append(result["loss_after"])
    assert losses[0] == losses[1] and math.isfinite(losses[0])


def test_mistakes():
    with pytest.raises(UserError, match=r"model.weights=radnom: choose random, or leave it out"):
        config("+method=qdora", "model=llama-3-8b", "model.weights=radnom")
    with pytest.raises(UserError, match=r"model=tiny has random weights already: leave model.weights out"):
        config("+method=qdora", "model=tiny", "model.weights=random")
    small = config("+method=qdora", "model=llama-3-8b", *SMALL, "model.architecture.vocab_size=100")
    with pytest.raises(UserError, match=r"tokenizer of bytes, whose 258 tokens are more than the vocabulary's 100"):
        load_model(small.model, torch.float32, 0)
