"""transformers fills weights that a file lacks, or has in another shape, with random ones, and reports them."""

from pathlib import Path

from transformers import PreTrainedModel

from experiments.errors import UserError


def check_whole(path: Path, model: PreTrainedModel, report: dict) -> None:
    """Raise UserError, which names the tensors, if `path` does not hold all weights of `model` in their shapes.

    Args:
        report: of from_pretrained, with ignore_mismatched_sizes=True and output_loading_info=True.
    """
    kind = type(model).__name__
    if missing := sorted(report["missing_keys"]):
        others = f", and holds {first_three(sorted(report['unexpected_keys']))}" if report["unexpected_keys"] else ""
        raise UserError(
            f"{path} lacks weights of {kind}: {first_three(missing)}{others}. Training would begin with random ones; "
            "get the whole model, or name its right architecture"
        )
    if other := sorted(report["mismatched_keys"]):
        name, found, wanted = other[0]
        more = f"; so have {len(other) - 1} more" if other[1:] else ""
        raise UserError(f"{path}: {name} has the shape {list(found)}, and its configuration means {list(wanted)}{more}")


def first_three(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", … {len(names)} in all" if names[3:] else "")
