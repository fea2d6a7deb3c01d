"""On a GPU: steps in CUDA graphs give the eager steps' losses and weights bit for bit."""

import pytest
import torch

from experiments.config import resolve
from experiments.data.chat import Example
from experiments.data.samples import Data
from experiments.models.load import prepare_model
from experiments.system.cli import composed
from experiments.training.evaluation import Evaluation
from experiments.training.graphs import Graphs
from experiments.training.loop import Trainer

FEATURES = {
    "full": ["+method=full"],
    "lora": ["+method=lora", "dropout=0.2"],
    "qlora-8bit": ["+method=qlora", "optim=adamw8bit", "trainer.loraplus_lr_ratio=4"],
    "dora-accumulated": ["+method=dora", "trainer.grad_accum=2", "dropout=0.2"],
    "qdora": ["+method=qdora"],
    "qdora-checkpointed": ["+method=qdora", "trainer.gradient_checkpointing=true", "dropout=0.2"],
    "prefix": ["+method=prefix_layer", "prefix_tokens=2", "infix_tokens=1"],
    "houlsby": ["+method=houlsby"],
}


def samples() -> Data:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 200, (40,), generator=generator).tolist()
    rows = [torch.randint(3, 200, (n,), generator=generator).tolist() for n in lengths]
    examples = [Example(row, [-100] * 3 + row[3:]) for row in rows]
    return Data(examples[4:], examples[:4], "")


def trained(folder, *overrides: str) -> tuple[Trainer, list[dict]]:
    settings = ["model=tiny", "rank=4", f"output_dir={folder}", "trainer.steps=16", "trainer.batch_size=4", "lr=0.01"]
    cfg = resolve(composed(*settings, "trainer.checkpoint_every=0", *overrides))
    torch.manual_seed(0)
    model, tokenizer = prepare_model(cfg, torch.device("cuda"), torch.bfloat16)
    trainer = Trainer(model, cfg, torch.bfloat16, tokenizer.pad_token_id)
    records: list[dict] = []
    trainer.fit(samples(), records.append, lambda: Evaluation(1.0, 0.0, 1), lambda: None, lambda: None)
    return trainer, [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("overrides", FEATURES.values(), ids=FEATURES)
def test_graphs_give_the_eager_steps_bit_for_bit(overrides, tmp_path, capsys):
    eager, own_records = trained(tmp_path, *overrides, "trainer.cuda_graphs=false")
    captured, their_records = trained(tmp_path, *overrides, "trainer.cuda_graphs=true")
    assert "run eagerly" not in capsys.readouterr().out
    graphs = captured.static.graphs
    assert isinstance(graphs, Graphs) and len(graphs.graphs) >= 3 and not graphs.full
    assert own_records == their_records and len(own_records) == 16
    for p, q in zip(eager.parameters, captured.parameters, strict=True):
        assert torch.equal(p, q)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_does_not_fit_runs_eagerly_and_says_so_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("experiments.training.graphs.MEMORY_SHARE", -1.0)
    _, records = trained(tmp_path, "+method=qdora")
    assert capsys.readouterr().out.count("some steps run eagerly, not in a CUDA graph: its memory") == 1
    assert len(records) == 16
