"""The main job on the Triton backend, in Triton's interpreter where there is no GPU, follows the torch backend."""

import json

import pytest
import torch

from kernels.op import interpreting, use_backend

SMALL = ["trainer.steps=1", "trainer.batch_size=1", "trainer.eval_every=0", "trainer.samples=0", "data.max_heldout=1"]


@pytest.mark.skipif(not (torch.cuda.is_available() or interpreting()), reason="no GPU, and TRITON_INTERPRET is not 1")
def test_a_run_on_triton_follows_the_run_on_torch(command, tmp_path):
    path, losses = tmp_path / "short.jsonl", {}  # short, because the interpreter takes 0.1 s a token
    path.write_text("".join(f'{{"prompt": "{n}", "completion": "b"}}\n' for n in range(9)))
    settings = ["+method=qdora", *SMALL, "lr=1e-2", "dropout=0.1", "data=jsonl", f"data.path={path}"]
    for backend in ("torch", "triton"):
        out = tmp_path / backend
        with use_backend(backend):
            code, text = command(*settings, f"output_dir={out}")
        assert code == 0, text
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[backend] = [record.get("loss", record.get("heldout_loss")) for record in records]
    assert len(losses["torch"]) == 3  # a step, and the held-out loss before and after
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-5)
    assert losses["torch"][-1] < losses["torch"][0]
