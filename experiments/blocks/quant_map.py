"""The block size of each linear: the same for all, or as a map says.

A map is a YAML file that experiments.tune_blocks writes and `quant=tuned quant.map=FILE` reads:

    # checksum …
    base: {…}           the fingerprint of the model that it was chosen for
    double: true
    layers:
      model.layers.0.self_attn.q_proj: {shape: [576, 576], blocksize: 64}
      …
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from experiments.config import QuantConfig
from experiments.errors import UserError
from experiments.system.files import write_atomically
from kernels.codebook import BLOCK_FORMATS, BLOCKSIZES
from modules.adapters.base_print import is_other_base
from modules.files.checked import Damaged, read_checked, with_checksum

Shapes = Mapping[str, tuple[int, ...]]  # of weights, (out, in) or (experts, out, in), by their linears' full names


@dataclass(frozen=True)
class QuantMap:
    """Block sizes by the linears' full names, the shapes they were chosen for, whether absmax is 8 bits, and the
    fingerprint of the model (modules/adapters/base_print.py)."""

    double: bool
    shapes: Shapes
    blocksizes: Mapping[str, int]
    base: Mapping[str, str] = field(default_factory=dict)


def write_map(path: Path, quant_map: QuantMap, comment: str) -> None:
    """Write `quant_map` with `comment`, lines of text, on top."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    lines += [f"base: {json.dumps(quant_map.base)}"] if quant_map.base else []
    lines += [f"double: {str(quant_map.double).lower()}", "layers:"]
    for name, blocksize in quant_map.blocksizes.items():
        lines.append(f"  {name}: {{shape: {list(quant_map.shapes[name])}, blocksize: {blocksize}}}")
    write_atomically(path, with_checksum("\n".join(lines) + "\n"))


def read_map(path: Path) -> QuantMap:
    """The map in a file that `write_map` wrote.

    Raises:
        UserError: no such file, or not such a map.
    """
    try:
        values = yaml.safe_load(read_checked(path))
    except FileNotFoundError as error:
        raise UserError(f"quant.map={path}: no such file: python -m experiments.tune_blocks writes one") from error
    except Damaged as error:
        raise UserError(f"quant.map={error}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not text, or 2026-99-99
        raise UserError(f"quant.map={path}: {' '.join(str(error).split())}") from error
    if (
        not isinstance(values, dict)
        or not isinstance(values.get("double"), bool)
        or not _is_table(values.get("layers"))
        or not isinstance(values.get("base", {}), dict)
    ):
        raise UserError(f"quant.map={path} is not a map of block sizes: it needs `double` and `layers`")
    shapes, blocksizes = {}, {}
    for name, layer in values["layers"].items():
        try:
            shape, blocksize = tuple(layer["shape"]), layer["blocksize"]
            if len(shape) not in (2, 3) or not all(type(size) is int for size in (*shape, blocksize)):
                raise TypeError
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"quant.map={path}: {name} needs {{shape: [out, in], blocksize: …}}") from error
        if blocksize not in BLOCKSIZES:
            raise UserError(
                f"quant.map={path}: {name} has blocksize {blocksize}; choose one of {', '.join(map(str, BLOCKSIZES))}"
            )
        shapes[name], blocksizes[name] = shape, blocksize
    return QuantMap(values["double"], shapes, blocksizes, values.get("base", {}))


def _is_table(layers: object) -> bool:
    return isinstance(layers, dict) and layers != {} and all(isinstance(name, str) for name in layers)


def blocksizes(cfg: QuantConfig, shapes: Shapes, base: Mapping[str, str] | None = None) -> dict[str, int]:
    """The block size that `cfg` gives each linear of a model.

    Args:
        base: the fingerprint of the model. A note says that the map was chosen for another one of the same shapes.

    Raises:
        UserError: the map is for another model or other constants, or a block would run across rows that
            `quant.align=row` keeps apart.
    """
    if cfg.name == "tuned":
        chosen = _from_map(cfg, shapes, base or {})
    else:
        chosen = dict.fromkeys(shapes, cfg.blocksize)
    if cfg.align == "row":
        for name, blocksize in chosen.items():
            in_features = shapes[name][-1]
            if in_features % blocksize:
                sizes = () if cfg.type in BLOCK_FORMATS else BLOCKSIZES
                fitting = ", ".join(str(b) for b in sizes if in_features % b == 0) or "none"
                raise UserError(
                    f"quant.align=row: blocks of {blocksize} would run across the rows of {name}, {in_features} "
                    f"weights each; block sizes that fit: {fitting}"
                )
    return chosen


def _from_map(cfg: QuantConfig, shapes: Shapes, base: Mapping[str, str]) -> dict[str, int]:
    quant_map = read_map(Path(cfg.map))
    if wrong := sorted(dict(quant_map.shapes.items() ^ {name: tuple(s) for name, s in shapes.items()}.items())):
        there, here = quant_map.shapes.get(wrong[0], "missing"), shapes.get(wrong[0], "missing")
        raise UserError(f"quant.map={cfg.map} is for another model: {wrong[0]} is {there} there, {here} here")
    if quant_map.double != cfg.double:
        raise UserError(
            f"quant.map={cfg.map} was chosen for quant.double={str(quant_map.double).lower()}: set it so, or tune anew"
        )
    if is_other_base(quant_map.base, base):
        print(f"note: quant.map={cfg.map} was chosen for another model of the same shapes", file=sys.stderr)
    return {name: quant_map.blocksizes[name] for name in shapes}
