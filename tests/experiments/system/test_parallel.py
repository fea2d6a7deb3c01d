"""Several processes against one: losses, weights, files, resumed runs; packed weights bit for bit; how runs end."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import Gemma2Config, Gemma2ForCausalLM

from experiments import run
from experiments.config import ModelConfig, TrainerConfig, resolve
from experiments.data.samples import batches, load_data
from experiments.models.load import load_model, prepare_model
from experiments.system import machine, parallel
from experiments.system.cli import composed
from experiments.training.engines import engine_of
from experiments.training.loop import Trainer
from tests.experiments.helpers import TINY, records, result, write_chats
from tests.experiments.several_processes import failures, processes, run_until, runs

METHODS = ["full", "lora", "qlora", "dora", "qdora"]
BASELINES = ["houlsby", "prefix_layer"]  # for DDP alone
MODES = {"full": ["ddp", "fsdp"], "lora": ["fsdp"], "qlora": ["fsdp"], "dora": ["ddp"], "qdora": ["ddp", "fsdp"]}
BOTH = [*((method, mode) for method in METHODS for mode in MODES[method]), *((method, "ddp") for method in BASELINES)]
# 19 samples in batches of 6: the fourth of each epoch has one sample, which leaves all processes but one without any
SETTINGS = ["trainer.device=cpu", "trainer.dtype=float32", "trainer.batch_size=6", "trainer.grad_accum=2", "lr=3e-3"]
SETTINGS += ["data.max_train=19", "data.max_heldout=5", "trainer.eval_batch_size=2"]
SHORT = ["trainer.steps=2", "trainer.eval_every=0", "trainer.samples=0"]
LONG = ["trainer.checkpoint_every=2", "data.answer_tokens=3", "trainer.samples=1", "trainer.sample_tokens=4"]
EACH = dict.fromkeys(METHODS + BASELINES, SHORT) | {"qdora": LONG, "full": ["trainer.samples=0", LONG[0]]}
CLOCKS = {"tokens_per_s", "train_seconds", "total_seconds", "peak_memory_bytes", "cpu_energy_joules", "machine"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    write_chats(folder)
    tokenizer = load_model(ModelConfig(name="tiny", source="tiny"), torch.float32, seed=0)[1]
    shape = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(**shape, **heads)).save_pretrained(folder / "gemma")
    tokenizer.save_pretrained(folder / "gemma")
    return folder


def arguments(folder: Path, name: str, *overrides: str) -> list[str]:
    where = ["data=jsonl", f"data.path={folder / 'chats.jsonl'}", f"output_dir={folder / name}"]
    # lora on a model whose logits are no linear function of its last hidden state
    model = ["model=hf", f"model.path={folder / 'gemma'}"] if "+method=lora" in overrides else []
    return [*TINY, *SETTINGS, *where, *model, *overrides]


def good(ended) -> None:
    assert [process.exitcode for process in ended] == [0] * len(ended), ended
    assert all(not process.text for process in ended[1:]), ended  # process 0 alone speaks


@pytest.fixture(scope="module")
def one(folder) -> Path:
    """Each method in one process; returns the folder, with `<method>-one` in it."""
    for method in METHODS + BASELINES:
        run.run(resolve(composed(*arguments(folder, f"{method}-one", f"+method={method}", *EACH[method]))))
    return folder


@pytest.fixture(scope="module")
def two(folder) -> Path:
    """Each method in two processes: `<method>-ddp`, `<method>-fsdp`; with everything that there is besides:
    `dropout-ddp`, `dropout-fsdp`."""
    jobs = []
    for method, mode in BOTH:
        how = [f"trainer.parallel={mode}"] if method in METHODS else []  # DDP is the usual one
        jobs.append(arguments(folder, f"{method}-{mode}", f"+method={method}", *how, *EACH[method]))
    for mode in ("ddp", "fsdp"):
        more = [
            *LONG,
            "optim.paged=true",
            "optim.budget_mb=4",
            "dropout=0.1",
            "trainer.gradient_checkpointing=true",
            "trainer.keep_best=true",
            "init=pissa",
        ]
        jobs.append(arguments(folder, f"dropout-{mode}", "+method=qdora", f"trainer.parallel={mode}", *more))
    good(processes(2, folder / "two", runs, jobs))
    return folder


@pytest.fixture(scope="module")
def resumed(one, two) -> Path:
    """Runs resumed from their second step by two processes."""
    jobs = []
    for name in ("dropout-ddp", "dropout-fsdp", "full-fsdp", "qdora-one"):
        jobs.append([f"resume={stopped(two, name, name + '-by-two')}", "trainer.parallel=fsdp"])
    jobs[0][1] = "trainer.parallel=ddp"
    good(processes(2, two / "resumed", runs, jobs))
    return two


def stopped(folder: Path, name: str, copy: str) -> Path:
    """A copy of a run as it was after its second step."""
    shutil.copytree(folder / name, folder / copy)
    (folder / copy / "result.json").unlink()
    shutil.rmtree(folder / copy / "checkpoints" / "step-00000004")
    return folder / copy


@pytest.fixture(scope="module")
def four(one, two) -> Path:
    """qlora in four processes: `qlora-ddp4`, `qlora-fsdp4`, and a run of two resumed by four."""
    how = {mode: ["+method=qlora", f"trainer.parallel={mode}", *SHORT] for mode in ("ddp", "fsdp")}
    jobs = [arguments(two, f"qlora-{mode}4", *overrides) for mode, overrides in how.items()]
    jobs.append([f"resume={stopped(two, 'qdora-ddp', 'qdora-ddp-by-four')}", "trainer.parallel=fsdp"])
    good(processes(4, two / "four", runs, jobs))
    return two


def assert_same_training(directory: Path, one: Path) -> None:
    """The same losses, gradients and weights within what fp32 sums in another order differ by."""
    for record, single in zip(records(directory), records(one), strict=True):
        assert record.keys() == single.keys()
        for key in record.keys() - {"seconds"}:
            assert record[key] == pytest.approx(single[key], rel=1e-3 if key == "grad_norm" else 1e-5), (key, single)
    mine, theirs = result(directory), result(one)
    for key in mine.keys() - CLOCKS - {"processes", "commit"}:
        assert mine[key] == (pytest.approx(theirs[key], rel=1e-3) if isinstance(mine[key], float) else theirs[key]), key
    for path in one.rglob("*.safetensors"):
        ours, single = load_file(directory / path.relative_to(one)), load_file(path)
        for key in single.keys() - {"random:torch"}:
            assert ours[key].shape == single[key].shape and ours[key].dtype == single[key].dtype, (path, key)
            scale = single[key].float().abs().mean() + 1e-6
            assert (ours[key].float() - single[key].float()).abs().mean() <= 1e-2 * scale, (path, key)
    assert {p.name for p in directory.iterdir()} == {p.name for p in one.iterdir()}


@pytest.mark.parametrize("method, mode", BOTH)
def test_two_processes_train_as_one_does(one, two, method, mode):
    assert_same_training(two / f"{method}-{mode}", one / f"{method}-one")
    assert result(two / f"{method}-{mode}")["processes"] == 2


@pytest.mark.parametrize("mode", ["ddp4", "fsdp4"])
def test_four_processes_train_as_one_does(one, four, mode):
    assert_same_training(four / f"qlora-{mode}", one / "qlora-one")


@pytest.mark.parametrize("name", ["dropout-ddp", "dropout-fsdp", "full-fsdp"])
def test_resumed_by_as_many_processes_it_is_the_same_run_bit_for_bit(resumed, name):
    whole, again = resumed / name, resumed / f"{name}-by-two"
    for path in whole.rglob("*.safetensors"):
        assert path.read_bytes() == (again / path.relative_to(whole)).read_bytes(), path
    without = [{k: v for k, v in record.items() if k != "seconds"} for record in records(whole)]
    assert without == [{k: v for k, v in record.items() if k != "seconds"} for record in records(again)]


def test_resumed_by_another_number_of_processes_it_is_the_same_within_rounding(resumed, four, terminal):
    assert_same_training(resumed / "qdora-one-by-two", resumed / "qdora-one")
    assert_same_training(four / "qdora-ddp-by-four", resumed / "qdora-one")
    for name, single in (("qdora-fsdp", "qdora-one"), ("full-fsdp", "full-one")):
        code, text = terminal(run, f"resume={stopped(resumed, name, f'{name}-by-one')}")
        assert code == 0 and "going on after step 2" in text, text
        assert_same_training(resumed / f"{name}-by-one", resumed / single)


# ------------------------------------------------------------------------------------------- what each process has


def placed(folder: Path) -> None:
    """In each process: every tensor of a model has the bits after `place` that it had before; how much of the model and
    of the optimizer's state the process has."""
    parallel.start()
    for mode, double in (("fsdp", "true"), ("fsdp", "false"), ("ddp", "true")):
        dtype = ["trainer.dtype=bfloat16", f"quant.double={double}", f"trainer.parallel={mode}"]
        cfg = resolve(composed("+method=qdora", *arguments(folder, "placed", *dtype)))
        engine = engine_of(cfg, torch.device("cpu"))
        model, tokenizer = prepare_model(cfg, engine.loads_on, torch.bfloat16)
        provoke(model)
        whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        engine.place(model)
        assert model.state_dict().keys() == whole.keys()
        for name, tensor in model.state_dict().items():
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            assert tensor.dtype == whole[name].dtype and torch.equal(bits(tensor), bits(whole[name])), name
        if mode == "fsdp":
            own = sum(local(tensor).nbytes for tensor in model.state_dict().values())
            assert own < 0.55 * sum(tensor.nbytes for tensor in whole.values())
            for block in model.model.layers:
                block.unshard()
                gathered = dict([*block.named_parameters(), *block.named_buffers()])
                for name, tensor in gathered.items():
                    before = whole.get(f"model.layers.{block.self_attn.layer_idx}.{name}")
                    assert before is None or torch.equal(bits(tensor), bits(before)), name
                block.reshard()

        model, tokenizer = prepare_model(cfg, engine.loads_on, torch.bfloat16)
        engine.place(model)
        trainer = Trainer(model, cfg, torch.bfloat16, tokenizer.pad_token_id, engine)
        trainer.step([next(batches(load_data(cfg.data, tokenizer).train, 4, seed=0))])
        state = [t for tensors in trainer.optimizer.state.values() for t in tensors.values() if torch.is_tensor(t)]
        trainable = sum(p.numel() for p in trainer.parameters)
        print(f"state {sum(t.numel() for t in state) / (2 * trainable):.2f}", file=sys.stderr)
    parallel.stop()


def provoke(model: nn.Module) -> None:
    """Put bits into the base that a conversion on the way would change."""
    layer = model.model.layers[0].self_attn.q_proj.base
    layer.weight.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)  # pairs of them: every fp16 and bf16 NaN's bytes
    constants = layer.absmax if layer.nested_absmax is None else layer.nested_absmax
    constants.view(torch.int32)[0] = 0x7F800001  # a signalling NaN, which arithmetic makes a quiet one
    model.model.layers[0].input_layernorm.weight.detach().view(torch.int16)[:2] = torch.tensor([0x7F81, -0x7F])


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def test_packed_weights_are_sharded_bit_for_bit_and_the_optimizers_state_too(folder):
    ended = processes(2, folder / "placed", placed, folder)
    assert [process.exitcode for process in ended] == [0, 0], ended
    shares = [[float(line.split()[1]) for line in e.text.splitlines() if line.startswith("state")] for e in ended]
    for parts in zip(*shares, strict=True):
        assert sum(parts) == pytest.approx(1, abs=0.02) and max(parts) < 0.6, shares


# --------------------------------------------------------------------------------------------------- how it ends


def test_what_several_processes_cannot_do_is_said_once_and_early(folder):
    cases = {
        "trainer.batch_size=1 is too small for 2 processes: raise it": ["+method=lora", "trainer.batch_size=1"],
        "trainer.compile=true is for one process": ["+method=lora", "trainer.compile=true"],
        "trainer.parallel=fsdp cuts parameters where optim=adamw8bit": [
            *("+method=lora", "trainer.parallel=fsdp", "optim=adamw8bit")
        ],
        "trainer.parallel=fsdp cannot train method=bitfit: use trainer.parallel=ddp": [
            *("+method=bitfit", "trainer.parallel=fsdp")
        ],
        "trainer.parallel=zero: choose auto, ddp or fsdp": ["+method=lora", "trainer.parallel=zero"],
        "a sweep starts a process for each run itself": ["+method=lora,dora", "-m"],
        "no method: add one of": [],
        "the training loss became nan at step 2: stopped with the weights of step 1": ["+method=lora", "lr=1e30"],
    }
    more = ["model=hf", "model.path=/nowhere"]  # which a check that comes too late would trip over
    jobs = [
        [*arguments(folder, f"bad-{i}"), *(more if "nan" not in message else []), *overrides]
        for i, (message, overrides) in enumerate(cases.items())
    ]
    ended = processes(2, folder / "bad", failures, jobs)
    texts = "\n".join(process.text for process in ended)
    assert "Traceback" not in texts and [process.text.count("exit code") for process in ended] == [len(cases)] * 2, (
        texts
    )
    for message in cases:
        assert texts.count(message) == 1, (message, texts)  # by one process
    written = {path.name for path in folder.glob("bad-*")}
    assert written == {f"bad-{len(cases) - 1}"} and (folder / f"bad-{len(cases) - 1}" / "adapter").is_dir()


def test_a_killed_process_ends_all_of_them(folder):
    """With torchrun's own launcher."""
    (folder / "killed").mkdir()
    config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="forkserver")
    config.max_restarts, config.logs_specs = 0, DefaultLogsSpecs(str(folder / "killed-logs"))
    job = arguments(folder, "killed-run", "+method=qdora", "trainer.steps=50", *LONG)
    with pytest.raises(ChildFailedError, match=r"Signal 9 \(SIGKILL\) received by PID"):
        elastic_launch(config, run_until)("SIGKILL 3", folder / "killed", job)
    text = (folder / "killed" / "0").read_text()
    assert "Traceback" not in text and text.count("error:") <= 1, text
    assert (folder / "killed-run" / "checkpoints" / "step-00000002" / "training.json").is_file()


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_ctrl_c_in_one_process_stops_all_after_the_same_step(folder, mode):
    job = arguments(folder, f"interrupted-{mode}", "+method=qdora", "trainer.steps=50", f"trainer.parallel={mode}")
    ended = processes(2, folder / f"sigint-{mode}", run_until, "SIGINT 3", folder / f"sigint-{mode}", job)
    assert [process.exitcode for process in ended] == [130, 130], ended
    text = ended[0].text + ended[1].text
    assert "Traceback" not in text and text.count("\ninterrupted\n") == 1, text
    assert text.count("stopped after step 3: its weights and metrics are in") == 1, text
    interrupted = folder / f"interrupted-{mode}"
    assert (interrupted / "adapter" / "adapter_model.safetensors").is_file() and records(interrupted)[-1]["step"] == 3
    assert [path.name for path in (interrupted / "checkpoints").iterdir()] == ["step-00000003"]
    assert text.rstrip().endswith(f"go on with: python -m experiments.run resume={interrupted}")


def test_threads_are_shared(monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "local_size", lambda: 2)
    monkeypatch.setattr(machine, "usable_cores", lambda: 6)
    before = torch.get_num_threads()
    try:
        machine.set_up_cpu(TrainerConfig(name="test", steps=1, batch_size=2))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
