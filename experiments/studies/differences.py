"""In what two runs differ. A comparison is of runs that differ in one thing, or it does not tell what made the
difference."""

from experiments.config import Config
from experiments.runs.groups import shown
from experiments.runs.identity import identity

CHOSEN = ("lr", "method.lr", "method.name", "seed")  # each setting has its own best learning rate
SIZES = ("rank", "lora_alpha", "prefix_tokens", "infix_tokens", "target_modules")  # that make parameters equal


def differences(a: Config, b: Config, equal_parameters: bool = False) -> dict[str, tuple[str, str]]:
    """The things in which two configurations differ, each with both values. What follows from one of them does not
    count: α from the rank if α/r stays, a quantization's block size from whether there is one.

    Args:
        equal_parameters: of different adapters the sizes follow, too: they are chosen for equal parameters.
    """
    one, other = identity(a), identity(b)
    keys = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key) and key not in CHOSEN]
    found = {key: (shown(one.get(key)), shown(other.get(key))) for key in keys}
    if "method.adapter" in found:  # another adapter has other keys
        drop(found, [key for key in found if (key in one) != (key in other) and not key.startswith("quant.")])
        drop(found, SIZES if equal_parameters else ())
    names = {a.quant.name, b.quant.name}
    if "none" in names:
        if len(names) > 1:
            drop(found, [key for key in found if key.startswith("quant.") and key != "quant.name"])
    elif "tuned" in names:
        drop(found, ("quant.name", "quant.blocksize") if "quant.map" in found else ())
    elif len(names) > 1:
        drop(found, ["quant.type"])
    if "rank" in found and not (a.rslora or b.rslora) and a.lora_alpha * b.rank == b.lora_alpha * a.rank:
        drop(found, ["lora_alpha"])
    if "rslora" in found:  # the rule for the scale has an α of its own
        drop(found, ["lora_alpha"])
    return found


def drop(found: dict, keys) -> None:
    for key in keys:
        found.pop(key, None)


def told(found: dict[str, tuple[str, str]]) -> str:
    """The things with their values: "method.adapter (lora, dora) and quant.name (none, nf4)"."""
    things = [f"{key} ({one}, {other})" for key, (one, other) in found.items()]
    return " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things) or "nothing"
