"""Which models keep the samples of a pack apart, how, and that their loss and gradients are those of the samples."""

import pytest
import torch
from transformers import PreTrainedModel

from experiments.errors import UserError
from experiments.models import decoding
from experiments.training.packing import ON_GPU, packing_of
from modules.fused import attention
from tests.experiments.training.varlen import varlen_reference
from tests.survey import small


@pytest.mark.parametrize(
    "model_type, way",
    [
        ("llama", "_positions"),
        ("gpt2", "_positions"),
        ("mistral", "_positions"),  # a sliding window shorter than the probe
        ("gemma3_text", "_positions"),
        ("qwen3_moe", "_positions"),
        ("opt", "positions_and_masks"),
        ("gpt_oss", "positions_and_masks"),
        ("falcon", "positions_and_masks"),
    ],
)
def test_models_that_keep_samples_apart(model_type, way):
    model = small.build(model_type)
    assert packing_of(model).__name__ == way
    assert not model.training
    assert packing_of(model.to(torch.bfloat16)).__name__ == way


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next", "bart", "bloom", "openai-gpt", "lfm2_moe"])
def test_models_that_mix_them_are_refused_by_name(model_type):
    model = small.build(model_type).train()
    with pytest.raises(UserError, match=f"data.packing=true: .* in {type(model).__name__}.*: leave packing out"):
        packing_of(model)
    assert model.training


@pytest.mark.parametrize(
    "model_type, way",
    [
        ("llama", "_positions_and_boundaries"),
        ("mistral", "_positions_and_boundaries"),  # a sliding window shorter than the probe
        ("gemma3_text", "_positions_and_boundaries"),
        ("gemma2", "positions_and_masks"),  # a softcap
        ("gpt_oss", "positions_and_masks"),  # sinks
        ("llama4_text", "positions_and_masks"),  # chunks of attention
        ("opt", "_positions_and_boundaries"),
        ("falcon", "positions_and_masks"),  # its code asks for the name of the implementation
    ],
)
def test_what_a_gpu_keeps_samples_apart_by(model_type, way, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", varlen_reference)
    assert packing_of(small.build(model_type), ON_GPU).__name__ == way


@pytest.mark.parametrize("probe", [packing_of, decoding.bytes_per_column])
def test_a_lack_of_memory_does_not_count_as_what_a_model_cannot_do(probe, monkeypatch):
    def lacks(*args, **kwargs):
        torch.empty(2**58)

    model = small.build("llama")
    monkeypatch.setattr(model, "forward", lacks)
    with pytest.raises(RuntimeError, match="you tried to allocate"):
        probe(model)


def test_the_longest_window_is_told_of(monkeypatch):
    """A window longer than the probe shows in nothing but the arguments of attention."""
    monkeypatch.setattr(attention, "varlen_attn", varlen_reference)
    model = small.build("llama")
    model.config.sliding_window = 4096  # of which its layers know nothing
    assert packing_of(model, ON_GPU).__name__ == "positions_and_masks"


def test_without_the_kernel_there_are_masks():
    assert packing_of(small.build("llama"), ON_GPU).__name__ == "positions_and_masks"


def row(model: PreTrainedModel, samples: list[torch.Tensor]) -> torch.Tensor:
    ids = torch.cat(samples)[None]
    places = torch.cat([torch.arange(len(sample)) for sample in samples])[None]
    return model(input_ids=ids, use_cache=False, **packing_of(model)(model, places, None)).logits[0]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "qwen3_moe", "opt", "gpt_oss", "gptj", "phi3"])
def test_a_pack_is_its_samples_one_by_one(model_type):
    model = small.build(model_type)
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(250, (n,), generator=generator) for n in (19, 3, 1, 30)]
    packed = row(model, samples)
    weights = torch.randn(packed.shape, generator=generator)
    parameters = list(model.parameters())
    packed_gradients = torch.autograd.grad((packed * weights).sum(), parameters, allow_unused=True)
    alone = torch.cat([model(input_ids=sample[None], use_cache=False).logits[0] for sample in samples])
    gradients = torch.autograd.grad((alone * weights).sum(), parameters, allow_unused=True)
    assert (packed - alone).norm() <= 1e-6 * alone.norm()
    scale = torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()
    for one, other in zip(packed_gradients, gradients):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= 1e-6 * scale
