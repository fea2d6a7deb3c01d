"""The library beside transformers, TRL and accelerate: models, optimizers and trainers as their users have them."""

import copy

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modules import (
    NF4Linear,
    adapted_linears,
    attach,
    dequantize,
    detach,
    fuse,
    load_adapter,
    merge,
    quantize,
    set_adapter,
    trainable_parameters,
)
from modules.files.bitsandbytes import save_bnb4
from tests.modules.architectures import ARCHITECTURES, IDS, bnb4_model, dense_model, logits, scramble


def samples() -> list[dict]:
    return [{"input_ids": ids, "labels": ids} for ids in IDS.repeat(4, 1)]


def quick(directory, **settings) -> dict:
    """Arguments of a short training on this CPU."""
    settings = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 3, "save_steps": 3} | settings
    return {"output_dir": str(directory), "report_to": "none", "use_cpu": True, "disable_tqdm": True} | settings


@pytest.mark.parametrize("name, ours", [("r", "rank"), ("lora_dropout", "dropout"), ("use_dora", "adapter")])
def test_a_name_of_pefts_is_answered_with_ours(llama, name, ours):
    with pytest.raises(TypeError, match=f"attach: {name}= is {ours}= here"):
        attach(llama, "lora", **{name: 8})
    with pytest.raises(TypeError, match="attach: rnk= is not one of rank, lora_alpha, target_modules"):
        attach(llama, "lora", rnk=8)
    assert not adapted_linears(llama)


def test_an_optimizer_takes_the_trainable_parameters(llama):
    attach(llama, "dora", rank=2)
    optimizer = torch.optim.AdamW(trainable_parameters(llama).values(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    llama(IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {name for name, p in llama.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= trainable_parameters(llama).keys() and any(name.endswith("lora_B") for name in moved)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_that_bitsandbytes_packed_is_adapted_as_it_is(tmp_path, architecture, adapter):
    model = bnb4_model(architecture)
    expected = logits(model)
    attach(model, adapter, rank=4)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert all(isinstance(linear.base, NF4Linear) for linear in adapted_linears(model).values())
    scramble(model)
    model.save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(bnb4_model(architecture), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    detach(model)
    save_bnb4(model, tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    theirs = bnb4_model(architecture).state_dict()
    assert again.keys() == theirs.keys() and all(torch.equal(again[key], theirs[key]) for key in theirs)


def test_what_cannot_be_taken_over_is_refused():
    model = bnb4_model("llama")
    linear = model.model.layers[0].mlp.up_proj
    linear.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj: bitsandbytes has rounded its constants"):
        attach(model, "lora")
    linear.weight.quant_state.packing_format_for_cpu = False
    quantize(model)  # packed already: taken over, nothing else
    assert not adapted_linears(model) and isinstance(model.model.layers[0].mlp.up_proj, NF4Linear)


@pytest.mark.parametrize("packed", [False, True])
def test_save_pretrained_writes_what_loads(tmp_path, packed):
    base = dense_model("llama")
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if packed:
        quantize(model)
        base = copy.deepcopy(model)
    attach(model, "lora", rank=4)  # of DoRA transformers 5.23 loads all but the magnitudes, of PEFT's files too
    scramble(model.eval())
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    load_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(base.eval()), expected, rtol=0, atol=0)
    if packed:
        return
    by_peft = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")  # transformers finds the base in the config
    torch.testing.assert_close(logits(by_peft.eval()), expected, rtol=1e-5, atol=1e-5)

    set_adapter(model, None)
    model.save_pretrained(tmp_path / "same")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "same")
    assert torch.equal(logits(again.eval()), logits(dense_model("llama")))
    set_adapter(model, "default")
    with pytest.raises(ValueError, match="upload that directory"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)
    merge(model, unload=True)
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again.eval()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_under_autocast_products_run_in_its_dtype(adapter, dtype, packed, fused):
    """As trainers call a model with bf16=True. Loss and gradients are as near to fp32's as rounding lets them."""

    def computed(model, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        gradients = {name: p.grad for name, p in trainable_parameters(model).items()}
        return loss.item(), torch.cat([gradients[name].flatten().double() for name in sorted(gradients)])

    model = dense_model("llama").train()
    if packed:
        quantize(model)
    attach(model, adapter, rank=4)
    scramble(model)
    exact_loss, exact = computed(copy.deepcopy(model), False)
    model.to(dtype) if dtype != torch.float32 else None
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.float()
    if fused:
        fuse(model)
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    loss, gradients = computed(model, True)
    assert seen == [torch.bfloat16]
    assert loss == pytest.approx(exact_loss, rel=2e-3)
    assert torch.nn.functional.cosine_similarity(gradients, exact, dim=0) > 0.999


@pytest.mark.parametrize("base_is", ["dense", "bitsandbytes", "quantized"])
def test_trainer(tmp_path, base_is):
    model = bnb4_model("llama") if base_is == "bitsandbytes" else dense_model("llama")
    base = copy.deepcopy(model)
    if base_is == "quantized":
        quantize(model)
        base = copy.deepcopy(model)
        dequantize(base)
    attach(model, "dora", rank=4)
    fuse(model)
    before = model(IDS, labels=IDS).loss.item()
    trainer = Trainer(model, TrainingArguments(**quick(tmp_path)), train_dataset=samples())
    trainer.train()
    after = model.eval()(IDS, labels=IDS).loss.item()
    assert after < before - 0.1
    checkpoint = tmp_path / "checkpoint-6"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    theirs = PeftModel.from_pretrained(base, checkpoint).eval()
    assert theirs(IDS, labels=IDS).loss.item() == pytest.approx(after, rel=1e-4)


def test_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from experiments.models.load import tiny_model

    model, tokenizer = tiny_model(torch.float32, seed=0)
    quantize(model)
    attach(model, "dora", rank=4)
    fuse(model)
    chat = [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "one"}]
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=False)
    before = model.eval()(ids, labels=ids).loss.item()
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**quick(tmp_path), max_length=64),
        train_dataset=datasets.Dataset.from_list([{"messages": chat}] * 12),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.state.log_history[-1]["train_loss"] < before
    assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").is_file()
    assert all(linear.lora_B.abs().max() > 0 for linear in adapted_linears(model).values())


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model = dense_model("llama")
    quantize(model)
    attach(model, "lora", rank=4)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(samples(), 3))
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
