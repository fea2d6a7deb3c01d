"""The life of one small model with one method, each stage beside PEFT or plain transformers."""

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import tokenizers
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from experiments.config import resolve
from experiments.errors import UserError
from experiments.export import export
from experiments.models.directory import UNTRAINABLE
from experiments.models.generation import generate
from experiments.models.sampling import Sampling
from experiments.models.tiny import CHATML
from experiments.runs.finished import load_run
from experiments.runs.one_run import run
from experiments.system.cli import composed
from modules import NF4Linear, adapted_linears, decoder_linears, unfuse
from modules.experts import NF4Experts, is_experts
from modules.files.peft import CONFIG_FILE
from modules.files.peft_experts import from_peft
from modules.linear import dense_weight, is_conv1d
from tests.modules.moe_cases import by_formula, gradients_by_formula
from tests.survey.small import VOCABULARY, build

METHODS = ("lora", "qlora", "dora", "qdora")
STAGES = ("train", "load", "gradients", "generate", "merged", "bnb4")
CLOSE = 1e-4  # ‖ours − theirs‖ / ‖theirs‖ of logits in fp32
CLOSE_GRADIENTS = 1e-3  # likewise of each gradient, beside the largest of all
IDS = torch.arange(3, 43).view(2, 20)
NEW = 4  # tokens
NOT_PACKED = "experts, which bitsandbytes does not pack"


def tokenizer() -> PreTrainedTokenizerBase:
    """Bytes and three special tokens, and a chat template."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = CHATML
    assert len(made) == VOCABULARY
    return made


def save_small(model_type: str, folder: Path) -> Path:
    """Write the small model of `model_type` with its tokenizer, and chats to train on, into `folder`."""
    directory = folder / model_type
    if model_type in UNTRAINABLE:  # transformers cannot make all of them: the configuration is enough to be refused
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    else:
        model = build(model_type)
        logits(model)  # or it is no model, but sizes that do not fit
        model.save_pretrained(directory)
        tokenizer().save_pretrained(directory)
    chats = [{"prompt": f"add {n} and {n}", "completion": f"it is {2 * n}"} for n in range(12)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return directory


def live(directory: Path, method: str, out: Path) -> dict[str, str]:
    """Train the model in `directory` for a step, save, load, generate and export it.

    Returns:
        Of each stage that was reached "ok", or the difference; "said": what was left out; "refused": why it ended.
    """
    found: dict[str, str] = {}
    try:
        with silent() as said:
            run(resolve(composed(*arguments(directory, method, out))))
        found["train"] = "ok"
        found["said"] = "\n".join(line for line in said.getvalue().splitlines() if "adapted: " in line)
        finished = load_run(out)
        ours, theirs = finished.model, reference(finished.model, directory, out)
        found["load"] = _close(difference(logits(ours), logits(theirs)))
        found["gradients"] = _gradients(ours, theirs)
        prompt = IDS[:1, :6]
        answer = generate(ours, finished.tokenizer, prompt.tolist(), Sampling(max_new_tokens=NEW)).ids[0]
        unfuse(ours)  # which gives transformers its functions back
        found["generate"] = "ok" if answer == _greedy(theirs, prompt) else "other tokens"
        for to in ("merged", "bnb4"):
            try:
                with silent():
                    export(out, to, out / to, [])
            except UserError as error:
                if NOT_PACKED not in str(error):
                    raise
            found[to] = "ok"
    except UserError as error:
        found["refused"] = str(error)
    return found


def arguments(directory: Path, method: str, out: Path) -> list[str]:
    data = ["data=jsonl", f"data.path={directory.parent / 'chats.jsonl'}", "data.max_heldout=2"]
    trainer = ["trainer=debug", "trainer.steps=1", "trainer.batch_size=2", "trainer.eval_every=0", "trainer.samples=1"]
    trainer += ["trainer.sample_tokens=4", "trainer.dtype=float32", "trainer.device=cpu", "lr=1e-2", "rank=4"]
    return [f"+method={method}", "model=hf", f"model.path={directory}", *data, *trainer, f"output_dir={out}"]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def reference(ours: PreTrainedModel, directory: Path, out: Path) -> nn.Module:
    """PEFT's model of the run in `out`, over transformers' base with the weights that ours was packed to. Of DoRA on
    experts, which PEFT does not have, transformers' model with the weights that the formula gives."""
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if not (out / "adapter" / CONFIG_FILE).is_file():
        return by_formula(base, ours).float()  # not every model runs in float64
    for name, linear in decoder_linears(ours).items():
        if isinstance(linear, NF4Experts):
            base.get_parameter(name).data.copy_(dense_weight(linear).mT if linear.in_out else dense_weight(linear))
        elif isinstance(linear, NF4Linear):
            own, weight = base.get_submodule(name), dense_weight(linear)
            own.weight.data.copy_(weight.t() if is_conv1d(own) else weight)
    # Of some architectures PEFT takes names such as gate_proj for those of experts. Here its layers are the oracle.
    conversion = "peft.utils.transformers_weight_conversion"
    with (
        mock.patch(f"{conversion}.convert_peft_config_for_transformers"),
        mock.patch(
            f"{conversion}.convert_peft_adapter_state_dict_for_transformers",
            lambda **given: given["adapter_state_dict"],
        ),
    ):
        return PeftModel.from_pretrained(base, out / "adapter", is_trainable=True)


def _gradients(ours: nn.Module, theirs: nn.Module) -> str:
    for model in (ours, theirs):
        out = model.eval()(input_ids=IDS, use_cache=False).logits
        nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    expected = _peft_gradients(ours, theirs) if isinstance(theirs, PeftModel) else gradients_by_formula(ours, theirs)
    largest = max(want.norm() for want in expected.values() if want is not None)
    worst = 0.0
    for name, want in expected.items():
        got = ours.get_parameter(name).grad
        if (got is None) != (want is None):
            return f"{name}: one has none"
        if got is not None:
            worst = max(worst, ((got - want.view_as(got)).norm() / (want.norm() + 1e-2 * largest)).item())
    return _close(worst, CLOSE_GRADIENTS)


def _peft_gradients(ours: nn.Module, theirs: PeftModel) -> dict[str, Tensor | None]:
    """Those of PEFT's model, by the names of our parameters."""
    there = {name.removeprefix("base_model.model."): p.grad for name, p in theirs.named_parameters()}
    experts = [name for name, layer in adapted_linears(ours).items() if is_experts(layer.base)]
    loras = {
        name: grad
        for name, grad in there.items()
        if name.endswith((".lora_A.default.weight", ".lora_B.default.weight"))
    }
    loras = {name.replace(".default", ""): grad for name, grad in loras.items()}
    loras = from_peft(ours, experts, loras, "")
    names = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
    found = {
        f"{name.removesuffix(end)}{own}": grad
        for name, grad in loras.items()
        for end, own in names.items()
        if name.endswith(end)
    }
    for name, layer in adapted_linears(ours).items():
        if hasattr(layer, "magnitude"):
            found[f"{name}.magnitude"] = there[f"{name}.lora_magnitude_vector.default.weight"]
    return found


def _greedy(model: nn.Module, prompt: Tensor) -> list[int]:
    """The likeliest tokens, whatever the model's own defaults are: BART's force one at the end. Without a cache, for
    Moshi's forgets tokens that its attention sees."""
    end, pad = VOCABULARY - 2, VOCABULARY - 1
    how = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=pad, eos_token_id=[end], use_cache=False)
    own = model.base_model.model if isinstance(model, PeftModel) else model
    own.generation_config = how
    out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))
    return out[0, prompt.shape[1] :].tolist()


def difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def _close(difference: float, most: float = CLOSE) -> str:
    return "ok" if difference <= most else f"{difference:.1e}"


@contextlib.contextmanager
def silent() -> Iterator[io.StringIO]:
    """Nothing is printed inside; gives what would have been."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield said
