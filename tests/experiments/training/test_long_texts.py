"""MLPs in parts and inputs of blocks elsewhere: the gradients stay what they are, and less is held."""

import weakref

import pytest
import torch
from transformers import BioGptConfig, BioGptForCausalLM

from experiments.config import resolve
from experiments.data.chat import Example
from experiments.models.load import prepare_model
from experiments.system.cli import composed
from experiments.training.gradients import accumulate, checkpoint_blocks
from experiments.training.loop import Trainer
from experiments.training.offload import Offload
from modules import unfuse
from modules.fused.chunked import ChunkedMLP
from tests.experiments.helpers import tiny

METHODS = ("full", "lora", "qlora", "dora", "qdora", "bitfit", "houlsby")


def trainer(*overrides: str) -> Trainer:
    cfg = resolve(composed("model=tiny", "rank=4", "output_dir=.", *overrides))
    torch.manual_seed(0)
    model, tokenizer = prepare_model(cfg, torch.device("cpu"), torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith(("lora_B", "adapter_up")):  # zeros would leave others without
            torch.nn.init.normal_(parameter, std=0.1)
    return Trainer(model.train(), cfg, torch.float32, tokenizer.pad_token_id)


def gradients(run: Trainer) -> tuple[float, list[torch.Tensor]]:
    ids = torch.randint(3, 200, (3, 25), generator=torch.Generator().manual_seed(0)).tolist()
    torch.manual_seed(1)
    batch = [[Example(row, row) for row in ids]]
    return accumulate(run.label_loss, batch, run.pad_id, run.dtype, run.scaler, run.engine), [
        p.grad for p in run.parameters
    ]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("method", METHODS)
def test_an_mlp_in_parts_has_the_same_gradients(method, checkpointing):
    given = [f"+method={method}", f"trainer.gradient_checkpointing={checkpointing}"]
    whole, parts = trainer(*given), trainer(*given, "trainer.mlp_tokens=16")
    assert sum(isinstance(module, ChunkedMLP) for module in parts.model.modules()) == 2
    assert list(whole.model.state_dict()) == list(parts.model.state_dict())
    (loss, grads), (other_loss, other_grads) = gradients(whole), gradients(parts)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    scale = torch.stack([grad.norm() for grad in grads]).norm()
    for grad, other in zip(grads, other_grads, strict=True):
        assert (grad - other).norm() <= 1e-6 * scale


def test_unfuse_gives_the_own_mlp_back():
    model = trainer("+method=lora", "trainer.mlp_tokens=16").model
    unfuse(model)
    mlp = model.model.layers[0].mlp
    assert type(mlp).__name__ == "LlamaMLP" and "tokens" not in vars(mlp)


@pytest.mark.parametrize("capturable", [False, True])
def test_dropout_draws_the_same_masks_again(capturable):
    """Of checkpoints inside of checkpoints: else the gradient would not be that of the loss."""
    grads = {}
    for blocks in (False, True):
        run = trainer("+method=lora", "dropout=0.3", "trainer.mlp_tokens=16")
        if blocks:
            checkpoint_blocks(run.model, capturable)
        grads[blocks] = gradients(run)
    assert grads[True][0] == grads[False][0]
    for grad, other in zip(grads[True][1], grads[False][1], strict=True):
        assert torch.equal(grad, other)


def test_less_is_alive_at_a_time():
    """The widest tensors of an MLP, [tokens, 128], are there for a part only."""
    run = trainer("+method=lora", "trainer.mlp_tokens=16")
    rows = []
    for module in run.model.modules():
        if isinstance(module, ChunkedMLP):
            module.up_proj.register_forward_hook(lambda _, args, output: rows.append(output.shape[0]))
    gradients(run)
    assert max(rows) == 16 and sum(rows) == 2 * 2 * 75  # two blocks, computed twice


class Elsewhere:
    """Copies without a GPU: clones whose values are gone until they arrive, and a count of those on the device."""

    def __init__(self):
        self.log: list[tuple[str, int]] = []
        self.inputs: list[weakref.ref] = []

    def to_host(self, tensor):
        self.log.append(("keep", len(self.inputs)))
        self.inputs.append(weakref.ref(tensor))
        return len(self.inputs) - 1, tensor.detach().numpy().copy()

    def to_device(self, host):
        self.log.append(("start", host[0]))
        return host

    def arrived(self, copy):
        self.log.append(("arrived", copy[0]))
        return torch.from_numpy(copy[1])


@pytest.mark.parametrize("method", ["full", "qdora"])
def test_inputs_of_blocks_come_back_bit_for_bit_one_ahead(method):
    given = [f"+method={method}", "trainer.gradient_checkpointing=true"]
    plain, moved = trainer(*given), trainer(*given)
    copies = Elsewhere()
    checkpoint_blocks(moved.model, offload=Offload(copies))
    moved.label_loss.forward = inputs_are_gone(moved.label_loss.forward, copies)
    (loss, grads), (other_loss, other_grads) = gradients(plain), gradients(moved)
    assert loss == other_loss and all(map(torch.equal, grads, other_grads))
    expected = [("keep", 0), ("keep", 1), ("start", 1), ("start", 0), ("arrived", 1), ("arrived", 0)]
    assert copies.log == expected
    moved.model.zero_grad()
    copies.log.clear()
    gradients(moved)
    assert [event for event, _ in copies.log] == [event for event, _ in expected]  # nothing of the first pass is left


def inputs_are_gone(forward, copies: Elsewhere):
    def call(*args, **kwargs):
        output = forward(*args, **kwargs)
        assert all(alive() is None for alive in copies.inputs[1:]), "autograd still holds the input of a block"
        return output

    return call


def test_on_a_cpu_a_line_says_that_it_is_for_a_gpu(capsys):
    trainer("+method=lora", "trainer.gradient_checkpointing=true", "trainer.offload_activations=true")
    assert "trainer.offload_activations=true is for a GPU: on a CPU activations are in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, message",
    [
        (["trainer.offload_activations=true"], "moves what checkpointing keeps: set trainer.gradient_checkpointing"),
        (["trainer.mlp_tokens=0"], "trainer.mlp_tokens=0: choose 1 or more"),
        (["trainer.mlp_tokens=8", "trainer.compile=true"], "trainer.mlp_tokens and trainer.compile=true exclude"),
        (["data.max_length=4096"], "data.max_length=4096 is more than the 2048 positions of tiny"),
        (["data.max_length=4096", "+method=full"], "data.max_length=4096 is more than the 2048 positions of tiny"),
    ],
)
def test_bad_input_is_one_line(command, given, message):
    method = [] if "+method=full" in given else ["+method=lora"]
    code, text = command(*method, *given)
    assert code == 1 and message in text and "Traceback" not in text, text


def test_a_model_without_such_mlps_is_named(tmp_path, command):
    sizes = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BioGptForCausalLM(BioGptConfig(**sizes, intermediate_size=64, activation_dropout=0.1)).save_pretrained(tmp_path)
    tiny()[1].save_pretrained(tmp_path)
    code, text = command("+method=lora", "model=hf", f"model.path={tmp_path}", "trainer.mlp_tokens=8")
    assert code == 1, text
    assert "error: trainer.mlp_tokens=8: no MLP of BioGptDecoderLayer can be computed in parts: leave it out" in text
