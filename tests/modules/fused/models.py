"""Small models, what they compute, and which ops they call."""

import copy

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from modules import attach, quantize

SMALL = {
    **{"vocab_size": 101, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


def small(model_class=LlamaForCausalLM, config_class=LlamaConfig, **changes) -> nn.Module:
    torch.manual_seed(0)
    return model_class(config_class(**SMALL | changes)).requires_grad_(False).eval()


def adapted(adapter: str, model_class=LlamaForCausalLM, config_class=LlamaConfig, **settings) -> nn.Module:
    """A packed model with adapters that have learned something, in training mode."""
    model = small(model_class, config_class)
    quantize(model)
    attach(model, adapter, 4, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train()


def pair(*args, **settings) -> tuple[nn.Module, nn.Module]:
    """Two equal models by `adapted`."""
    model = adapted(*args, **settings)
    return model, copy.deepcopy(model)


def ids() -> Tensor:
    return torch.randint(101, (2, 9), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(2)  # of dropout
    tokens = ids().to(next(model.parameters()).device)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_computes_the_same(model: nn.Module, other: nn.Module) -> None:
    for got, want in zip(loss_and_gradients(model), loss_and_gradients(other), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
