"""The run command: what it writes, that it repeats itself, and how it ends when something is wrong."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from experiments.config import RENAMED_METHODS, resolve
from experiments.data.samples import load_data
from experiments.errors import UserError
from experiments.models.load import load_model
from experiments.system.cli import composed
from experiments.system.files import PROJECT_ROOT
from experiments.training.evaluation import evaluate
from kernels import Weight, quantize_4bit
from modules import decoder_linears
from modules.files.block_formats import parts_of_weight
from tests.experiments.helpers import records, tiny

METHODS = ["full", "lora", "qlora", "dora", "qdora"]
RESULT_KEYS = {
    *("method", "rank", "seed", "machine", "versions", "commit", "config_hash", "config", "results_version"),
    *("bits_per_weight", "base_bytes", "adapter_bytes"),
    *("steps", "best_step"),
    *("loss_before", "loss_after", "perplexity_before", "perplexity_after"),
    *("token_accuracy_before", "token_accuracy_after", "trainable_params", "total_params"),
    *("tokens_per_s", "peak_memory_bytes", "train_seconds", "total_seconds", "cpu_energy_joules", "effective_rank"),
    *("processes", "shared_base"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_leaves_its_files(command, tmp_path, method):
    code, text = command(f"+method={method}", "trainer.steps=6", "lr=1e-2")
    assert code == 0, text
    out = tmp_path / "out"
    weights = "model" if method == "full" else "adapter"
    files = {
        "config.yaml",
        "metrics.jsonl",
        "result.json",
        "loss.png",
        "samples.md",
        "checksums.json",
        "heldout.csv",
        weights,
    }
    if method != "full":
        files.add("spectrum.csv")
    assert {path.name for path in out.iterdir()} == files
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    result = json.loads((out / "result.json").read_text())
    assert result.keys() == RESULT_KEYS
    assert result["loss_after"] < result["loss_before"]
    assert result["perplexity_after"] == pytest.approx(math.exp(result["loss_after"]))
    if method.startswith("q"):
        assert 4.1 < result["bits_per_weight"] < 4.2
    else:
        assert result["bits_per_weight"] == 32
    assert (result["adapter_bytes"] == 0) == (method == "full")

    steps = [record["step"] for record in records(out) if "loss" in record]
    measured = [record["step"] for record in records(out) if "heldout_loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6] and measured == [0, 2, 4, 6]
    samples = (out / "samples.md").read_text()
    assert samples.count("**reference**: It is ") == 1 and samples.count("**before**") == 1
    for shown in ("perplexity", "token accuracy", str(out / "result.json")):
        assert shown in text


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_measures_the_same_loss_with_the_saved_adapter(command, tmp_path, chats, method):
    assert command(f"+method={method}", "lr=1e-2")[0] == 0
    cfg = resolve(composed(f"+method={method}", "model=tiny", "data=jsonl", f"data.path={chats}", "trainer=debug"))
    model, tokenizer = load_model(cfg.model, torch.float32, cfg.seed)
    theirs = PeftModel.from_pretrained(model, tmp_path / "out" / "adapter")
    heldout = load_data(cfg.data, tokenizer).heldout
    loss = evaluate(theirs.get_base_model(), heldout, 8, tokenizer.pad_token_id).loss
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert loss == pytest.approx(result["loss_after"], rel=1e-5)
    assert loss < result["loss_before"] - 0.01


@pytest.mark.parametrize("method", ["qlora", "qdora"])
def test_a_seed_repeats_itself_bit_for_bit(command, tmp_path, method):
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    for out, seed in ((first, 3), (second, 3), (other, 4)):
        code, text = command(f"+method={method}", f"output_dir={out}", f"seed={seed}", "dropout=0.1")
        assert code == 0, text

    def numbers(out):
        return [{k: v for k, v in record.items() if k != "seconds"} for record in records(out)]

    def adapter(out):
        return (out / "adapter" / "adapter_model.safetensors").read_bytes()

    assert numbers(first) == numbers(second) != numbers(other)
    assert adapter(first) == adapter(second) != adapter(other)
    hashes = [json.loads((out / "result.json").read_text())["config_hash"] for out in (first, second, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_sweep_runs_every_combination(command, tmp_path):
    code, text = command(
        "-m", "+method=lora,dora", "rank=2,4", "trainer.steps=1", "trainer.samples=0", "data.max_heldout=2"
    )
    assert code == 0, text
    found = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/result.json")]
    assert {(result["method"], result["rank"]) for result in found} == {
        (method, rank) for method in ("lora", "dora") for rank in (2, 4)
    }


@pytest.mark.parametrize("group", ["model", "quant", "data", "trainer", "tracking", "method"])
def test_every_config_composes(group):
    names = {path.stem: path.stem for path in (PROJECT_ROOT / "conf" / group).glob("*.yaml")}
    assert names
    if group == "method":
        names |= RENAMED_METHODS
    for name, resolved in names.items():
        overrides = [f"+method={name}"] if group == "method" else ["+method=lora", f"{group}={name}"]
        overrides += ["quant.map=unused"] if name == "tuned" else []
        cfg = resolve(composed(*overrides, "output_dir=unused"))
        assert getattr(cfg, group).name == resolved
        assert cfg.lora_alpha == 2 * cfg.rank


def test_the_command_line_wins(tmp_path):
    cfg = resolve(composed("+method=qdora", "rank=3", "lr=0.5", "quant.blocksize=128", "output_dir=unused"))
    assert (cfg.rank, cfg.lr, cfg.quant.name, cfg.quant.blocksize, cfg.lora_alpha) == (3, 0.5, "nf4", 128, 6)


BAD = {
    "no method": ([], "no method: add one of +method=adapter, +method=bitfit"),
    "unknown method": (["+method=vera"], "+method=vera: no such method; there are adapter, bitfit, dora"),
    "rank 0": (["+method=lora", "rank=0"], "rank=0: choose 1 or more"),
    "negative rank": (["+method=lora", "rank=-3"], "rank=-3: choose 1 or more"),
    "rank too large": (["+method=lora", "rank=65"], "rank 65 is out of range: model.layers.0.self_attn.q_proj can"),
    "rank not a number": (["+method=lora", "rank=ten"], "rank=ten: choose a whole number"),
    "unquoted regex": (
        ["+method=lora", "target_modules=.*[01].*"],
        "target_modules=.*[01].* cannot be read: quote it twice, \"target_modules='.*[01].*'\"",
    ),
    "no value": (["+method=lora", "rank"], "rank cannot be read: give it as key=value"),
    "misspelt key": (["+method=lora", "rnk=3"], "no such key: rnk; did you mean rank?"),
    "added key": (["+method=lora", "+rnk=3"], "no such key: rnk; did you mean rank?"),
    "added nested key": (
        ["+method=lora", "+trainer.stepz=3"],
        "no such key: trainer.stepz; did you mean trainer.st",
    ),
    "blocksize": (["+method=qlora", "quant.blocksize=48"], "quant.blocksize=48: choose one of 32, 64, 128"),
    "small blocksize": (["+method=qlora", "quant.blocksize=16"], "quant.blocksize=16: choose one of 32, 64, 128"),
    "quantized full": (["+method=full", "quant=nf4"], "method=full trains every weight, which quant=nf4 freezes"),
    "dropout": (["+method=lora", "dropout=1"], "dropout=1.0: choose a number from 0 to below 1"),
    "lr": (["+method=lora", "lr=0"], "lr=0.0: choose a number above 0"),
    "lr is no number": (["+method=lora", "lr=nan"], "lr=nan: choose a number above 0"),
    "infinite lr": (["+method=lora", "lr=inf"], "lr=inf: choose a number above 0"),
    "lora_alpha": (["+method=lora", "lora_alpha=nan"], "lora_alpha=nan: choose a number above 0"),
    "alpha_pattern": (["+method=lora", "alpha_pattern={q_proj:nan}"], "alpha of q_proj=nan: choose a number above 0"),
    "weight_decay": (["+method=lora", "trainer.weight_decay=nan"], "trainer.weight_decay=nan: choose 0 or more"),
    "max_grad_norm": (["+method=lora", "trainer.max_grad_norm=-1"], "trainer.max_grad_norm=-1.0: choose 0 or more"),
    "warmup is no number": (["+method=lora", "trainer.warmup=nan"], "trainer.warmup=nan: choose a share of the steps"),
    "warmup": (["+method=lora", "trainer.warmup=2"], "trainer.warmup=2.0: choose a share of the steps, from 0 to 1"),
    "LoRA+": (["+method=lora", "trainer.loraplus_lr_ratio=nan"], "loraplus_lr_ratio=nan: choose a number above 0"),
    "seed": (["+method=lora", "seed=-1"], "seed=-1: choose a whole number from 0 to 2³² - 1"),
    "large seed": (["+method=lora", f"seed={2**32}"], f"seed={2**32}: choose a whole number from 0 to 2³² - 1"),
    "threads": (["+method=lora", "trainer.threads=0"], "trainer.threads=0: choose 1 or more"),
    "samples": (["+method=lora", "trainer.samples=-1"], "trainer.samples=-1: choose 0 or more"),
    "sample tokens": (["+method=lora", "trainer.sample_tokens=0"], "trainer.sample_tokens=0: choose 1 or more"),
    "both": (["+method=lora", "overwrite=true", "resume=latest"], "overwrite=true starts anew and resume=… goes on"),
    "steps": (["+method=lora", "trainer.steps=0"], "trainer.steps=0: choose 1 or more"),
    "schedule": (["+method=lora", "trainer.schedule=step"], "choose cosine, linear or constant"),
    "dtype": (["+method=lora", "trainer.dtype=int8"], "trainer.dtype=int8: choose auto, float32"),
    "device": (["+method=lora", "trainer.device=tpu"], "trainer.device=tpu: choose auto, cpu or cuda"),
    "tracking": (["+method=lora", "tracking.name=tb"], "tracking.name=tb: choose none, wandb or tensorboard"),
    "targets": (["+method=lora", "target_modules=[nope]"], "matches no linear of the model; it has down_proj, gate_"),
    "no data path": (["+method=lora", "data=jsonl"], "data=jsonl needs data.path=FILE"),
    "no data file": (["+method=lora", "data.path=/nowhere.jsonl"], "/nowhere.jsonl"),
    "output not writable": (
        ["+method=lora", "output_dir=/dev/null/x"],
        "cannot write to /dev/null/x",
    ),
    "sweep not writable": (["-m", "+method=lora", "output_dir=/dev/null/x"], "Not a directory: '/dev/null/x'"),
    "sample too long": (["+method=lora", "data.max_length=8"], "data.max_length"),
}


@pytest.mark.parametrize("overrides, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing(command, tmp_path, overrides, message):
    code, text = command(*overrides)
    assert code == 1
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], text
    assert "Traceback" not in text
    out = tmp_path / "out"
    assert not out.exists() or [path.name for path in out.iterdir()] == ["config.yaml"]


def test_a_packed_directory_is_trained_over_as_it_is(command, tmp_path, packed_tiny):
    results = []
    for model in (["model=tiny"], ["model=hf", f"model.path={packed_tiny}", "overwrite=true"]):
        code, text = command("+method=qdora", "trainer.dtype=float32", *model)
        assert code == 0, text
        results.append(json.loads((tmp_path / "out" / "result.json").read_text()))
    same = ("loss_before", "loss_after", "trainable_params", "total_params", "bits_per_weight", "base_bytes")
    assert [results[0][key] for key in same] == [results[1][key] for key in same]


def test_a_directory_that_modelopt_packed_is_trained_over_as_it_is(command, tmp_path):
    model, tokenizer = tiny()
    model.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    for name, linear in decoder_linears(model).items():
        parts = parts_of_weight(Weight(*quantize_4bit(linear.weight, quant_type="nvfp4")))
        ends = ("weight", "weight_scale", "weight_scale_2")
        tensors |= {f"{name}.{end}": part for end, part in zip(ends, (parts[0].flatten(1), *parts[1:]))}
    save_file(tensors, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "packed" / "config.json"
    packed_by = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | packed_by))
    losses = []
    for settings in (["model=tiny"], ["model=hf", f"model.path={path.parent}", "overwrite=true"]):
        code, text = command("+method=qdora", "quant=nvfp4", "trainer.dtype=float32", *settings)
        assert code == 0, text
        losses.append(json.loads((tmp_path / "out" / "result.json").read_text())["loss_after"])
    assert losses[0] == losses[1]
    code, text = command("+method=qdora", *settings)
    assert code == 1 and "q_proj is packed in nvfp4, not in nf4: choose quant=nvfp4" in text


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["+method=dora"],
            "is packed in four bits, and method=dora needs a dense model: choose +method=qlora",
        ),
        (["+method=qlora", "quant.blocksize=128"], "set quant.blocksize=64 quant.double=true"),
        (["+method=qlora", "quant.double=false"], "is packed with blocksize 64 and double quantization: set quant."),
    ],
)
def test_another_quantization_than_the_directorys_is_refused(command, packed_tiny, overrides, message):
    code, text = command("model=hf", f"model.path={packed_tiny}", *overrides)
    assert code == 1 and message in text and "Traceback" not in text


@pytest.mark.parametrize(
    "line, message",
    [
        ("{not json", "chats.jsonl:41"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "chats.jsonl:41"),
        ("", "no such file"),
    ],
    ids=["not JSON", "no assistant turn", "missing file"],
)
def test_bad_data_is_named(command, chats, line, message):
    if line:
        with chats.open("a") as file:
            file.write(line + "\n")
    else:
        chats.unlink()
    code, text = command("+method=lora")
    assert code == 1 and message in text.lower() and "Traceback" not in text


def test_an_empty_data_file(command, chats):
    chats.write_text("")
    code, text = command("+method=lora")
    assert code == 1 and "chats.jsonl" in text and "Traceback" not in text


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_what_was_there(command, tmp_path):
    code, text = command("+method=lora", "lr=1e38", "trainer.max_grad_norm=0", "trainer.steps=9", "trainer.warmup=0")
    assert code == 1
    assert "the training loss became nan at step" in text and "try a lower lr than 1e+38" in text
    out = tmp_path / "out"
    assert f"its weights and metrics are in {out}" in text
    assert {"adapter", "config.yaml", "metrics.jsonl"} == {path.name for path in out.iterdir()}


def test_ctrl_c_says_where_the_outputs_are_and_leaves_no_half_file(tmp_path, chats):
    out = tmp_path / "out"
    args = ["+method=qdora", "model=tiny", "trainer=debug", "rank=4", "trainer.steps=100000", "trainer.eval_every=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *args, "data=jsonl", f"data.path={chats}", f"output_dir={out}"],
        cwd=PROJECT_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) > 3:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, printed + errors
    assert f"its weights and metrics are in {out}" in errors and "Traceback" not in errors
    assert errors.rstrip().endswith(f"interrupted\ngo on with: python -m experiments.run resume={out}")
    assert {path.name for path in out.iterdir()} == {"adapter", "checkpoints", "config.yaml", "metrics.jsonl"}
    assert not list(out.rglob("*.partial"))
    assert all(math.isfinite(record["loss"]) for record in records(out) if "loss" in record)
    PeftModel.from_pretrained(
        load_model(resolve(composed("+method=lora", "model=tiny")).model, torch.float32, 0)[0], out / "adapter"
    )


def test_unknown_keys_are_refused_in_python_too():
    cfg = composed("+method=lora", "output_dir=unused", "+rnk=3")
    with pytest.raises(UserError, match="no such key: rnk"):
        resolve(cfg)
