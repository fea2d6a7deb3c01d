"""lm-evaluation-harness on a model of ours; the package is optional.

The harness gets the model object as it is, NF4 codes and adapters included, so it measures the model that was trained.
Its tasks that let the model write use the project's own decoding, unless they draw tokens.
"""

import difflib
import importlib.util
import logging
from pathlib import Path

import torch

from experiments.errors import UserError
from experiments.models.generation import Kept, generate
from experiments.models.sampling import Sampling
from experiments.runs.finished import FinishedRun
from experiments.system.quiet import quiet
from modules.adapters.prefix import virtual_tokens


def check_installed() -> None:
    """Raise UserError if the package is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks=… needs lm-evaluation-harness: pip install lm-eval")


def measure(run: FinishedRun, tasks: list[str], limit: int | None, include_path: str | None) -> str:
    """The harness's table of results.

    Args:
        tasks: names of tasks or groups of the harness, or of those in `include_path`.
        limit: samples of each task; None: all.
        include_path: a folder of task files (YAML).

    Raises:
        UserError: an unknown task, or a model with infix tokens.
    """
    if virtual_tokens(run.model)[1]:
        raise UserError("tasks=… does not say where a prompt ends. Infix tokens need that: measure with data=… instead")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model that is loaded already
    if include_path and not Path(include_path).is_dir():
        raise UserError(f"include_path={include_path}: no such directory")
    manager = TaskManager(include_path=include_path)
    for task in tasks:
        if not manager.match_tasks([task]):
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            advice = f"did you mean {', '.join(near)}?" if near else "the harness lists them: lm-eval ls tasks"
            raise UserError(f"tasks={task}: no such task; {advice}")

    class Decoding(HFLM):
        kept = Kept()

        def _model_generate(self, context, max_length, stop, attention_mask, **more):
            if more.get("do_sample") or more.get("temperature"):
                return super()._model_generate(context, max_length, stop, attention_mask=attention_mask, **more)
            prompts = [row[seen.bool()].tolist() for row, seen in zip(context, attention_mask)]
            sampling = Sampling(max_length - context.shape[1])
            answers = generate(self.model, self.tokenizer, prompts, sampling, kept=self.kept, until=stop).ids
            longest = max(map(len, answers))
            pad = self.tokenizer.pad_token_id
            new = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in answers], device=context.device)
            return torch.cat([context, new], 1)

    with quiet():
        model = Decoding(pretrained=run.model, tokenizer=run.tokenizer, batch_size=run.cfg.trainer.eval_batch_size)
        results = simple_evaluate(
            model, tasks=tasks, limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=1000
        )
    return make_table(results)
