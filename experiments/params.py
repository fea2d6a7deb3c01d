"""The table of trainable parameters in the LoRA paper, counted here and as it was printed.

    python -m experiments.params model=gpt3-175b

Hu et al. 2021 (https://arxiv.org/abs/2106.09685), tables 4 and 15 and section 5.1, which have the formulas in the
headings: L is the number of layers, d the width of the model, r the rank, l_p and l_i the numbers of prefix and infix
tokens. No LayerNorm trains in Adapter-H (of the paper's 2 L_LN d, L_LN = 0): so its five numbers agree. Every row is a
count on the model itself with the modules of +method=lora, bitfit, houlsby, prefix_embed and prefix_layer attached, on
the meta device, so without weights. The paper's figures are for GPT-3 175B; for another model= there are our counts
alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import PreTrainedModel

from experiments.config import ModelConfig
from experiments.errors import UserError
from experiments.models.architecture import meta_model
from experiments.system.cli import hydra_command
from modules import LoRALinear, adapted_linears, attach, decoder_linears, detach, trainable_parameters
from modules.linear import weight_shape

PAPERS_MODEL = "gpt3-175b"
PROJECTIONS = {"q": ["q_proj"], "k": ["k_proj"], "v": ["v_proj"], "o": ["o_proj", "out_proj"]}  # as models name them

# The paper's printed numbers, in millions, by the setting.
LORA = {  # (adapted projections, rank)
    ("v", 2): "4.7",
    ("qv", 1): "4.7",
    ("qv", 2): "9.4",
    ("qkvo", 1): "9.4",
    ("qv", 4): "18.8",
    ("qkvo", 2): "18.8",
    ("qv", 8): "37.7",
    ("qkvo", 4): "37.7",
    ("qv", 64): "301.9",
    ("qkvo", 64): "603.8",
}
FINE_TUNING, BITFIT = "175255.8", "14.2"
ADAPTER_H = {1: "7.1", 4: "21.2", 8: "40.1", 16: "77.9", 64: "304.4"}  # r
PREFIX_EMBED = {(32, 8): "0.4", (64, 8): "0.9", (128, 8): "1.7", (256, 8): "3.2", (512, 8): "6.4"}  # (l_p, l_i)
PREFIX_LAYER = {(2, 2): "5.1", (8, 0): "10.1", (8, 8): "20.2", (32, 4): "44.1", (64, 0): "76.1"}  # (l_p, l_i)


# Why a printed number differs from the count, where it was not merely cut off. Checked by hand.
NOT_THE_FORMULA = {
    ("LoRA", "r_q = r_k = r_v = r_o = 64"): "twice the 301.9 above, which was cut",
    (
        "Fine-tuning",
        None,
    ): "no formula in the paper; counted are GPT-3's shapes in OPT's architecture, embeddings tied",
    (
        "BitFit",
        None,
    ): "no formula in the paper; a layer has 9 d biases in linears and 2 d in norms, 12 d would be 14.2",
    ("PrefixLayer", None): "0.8 to 8 % above the formula; neither do L + 1 layers, or l_p or l_i alone, give all five",
}


@dataclass
class ParamsConfig:
    model: ModelConfig = field(default_factory=ModelConfig)


ConfigStore.instance().store(name="params_schema", node=ParamsConfig)


@dataclass(frozen=True)
class Row:
    """A method's setting.

    Attributes:
        formula: of the number of parameters.
        parameters: that train.
        published: the paper's number of them in millions, as printed.
    """

    method: str
    formula: str
    setting: str
    parameters: int
    published: str

    @property
    def why(self) -> str:
        """The known reason why the paper has another number."""
        if f"{self.parameters // 10**5 / 10:.1f}" == self.published:
            return "the formula's number cut off after one decimal, not rounded"
        return NOT_THE_FORMULA.get((self.method, self.setting)) or NOT_THE_FORMULA[self.method, None]

    @property
    def agrees(self) -> bool:
        """Whether the paper's number is ours, rounded to its one decimal."""
        return f"{self.parameters / 1e6:.1f}" == self.published


def count_all(cfg: ModelConfig) -> list[Row]:
    """Every row of the table for the configured model.

    Raises:
        UserError: no such model, or one without separate projections to q, k and v.
    """
    model = meta_model(cfg, torch.float32)
    return [*_lora_rows(cfg, model), *_baseline_rows(cfg, model)]


def _lora_rows(cfg: ModelConfig, model: PreTrainedModel) -> Iterator[Row]:
    linears = decoder_linears(model)
    there = {name.rpartition(".")[2] for name in linears}
    for (projections, rank), published in LORA.items():
        targets = [name for projection in projections for name in PROJECTIONS[projection] if name in there]
        if len(targets) < len(projections):
            raise UserError(
                f"model={cfg.name}: the table is of attention with the linears q_proj, k_proj, v_proj and o_proj or "
                f"out_proj; this model has {', '.join(sorted(targets)) or 'none of them'}"
            )
        setting = " = ".join(f"r_{projection}" for projection in projections) + f" = {rank}"
        parameters = _trained(cfg, model, "lora", rank=rank, target_modules=targets)
        shapes = {weight_shape(linear) for name, linear in linears.items() if name.rpartition(".")[2] in targets}
        square = shapes == {(model.config.get_text_config().hidden_size,) * 2}
        yield Row("LoRA", "2 d r a matrix" if square else "(in + out) r a matrix", setting, parameters, published)


def _baseline_rows(cfg: ModelConfig, model: PreTrainedModel) -> Iterator[Row]:
    yield Row("Fine-tuning", "every weight", "all", sum(p.numel() for p in model.parameters()), FINE_TUNING)
    yield Row("BitFit", "every bias", "all", _trained(cfg, model, "bitfit"), BITFIT)
    for r, published in ADAPTER_H.items():
        yield Row("Adapter-H", "2 L (2 d r + r + d)", f"r = {r}", _trained(cfg, model, "houlsby", rank=r), published)
    for method, adapter, formula, printed in (
        ("PrefixEmbed", "prefix_embed", "d (l_p + l_i)", PREFIX_EMBED),
        ("PrefixLayer", "prefix_layer", "L d (l_p + l_i)", PREFIX_LAYER),
    ):
        for (l_p, l_i), published in printed.items():
            parameters = _trained(cfg, model, adapter, prefix_tokens=l_p, infix_tokens=l_i)
            yield Row(method, formula, f"l_p = {l_p}, l_i = {l_i}", parameters, published)


def _trained(cfg: ModelConfig, model: PreTrainedModel, adapter: str, **settings) -> int:
    """How many parameters the adapter trains on `model`, which is left without it.

    Raises:
        UserError: the model cannot have it.
    """
    try:
        attach(model, adapter, **settings)
    except ValueError as error:
        raise UserError(f"model={cfg.name}: {error}") from error
    parameters = sum(p.numel() for p in trainable_parameters(model).values())
    fitted = {name: layer.rank for name, layer in adapted_linears(model).items() if layer.rank != settings.get("rank")}
    detach(model)
    for name, most in fitted.items():  # attach gives narrow linears the largest rank that they can have
        raise UserError(f"model={cfg.name}: rank {settings['rank']} is out of range: {name} can have 1 to {most}")
    return parameters


def of_one_matrix(out_features: int, in_features: int, rank: int) -> int:
    """Parameters that LoRA trains on one linear."""
    layer = LoRALinear(nn.Linear(in_features, out_features, bias=False, device="meta"), rank, lora_alpha=rank)
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)


def table(name: str, rows: list[Row]) -> str:
    """The rows as the terminal shows them; the paper's numbers beside them if `name` is its model."""
    beside = name == PAPERS_MODEL
    reasons = list(dict.fromkeys(row.why for row in rows if not row.agrees)) if beside else []
    lines = [f"{name}: trainable parameters", ""]
    lines.append(f"{'':<29}{'counted':>16}{'millions':>10}" + (f"{'paper':>10}" if beside else ""))
    heading = None
    for row in rows:
        if heading != (heading := f"{row.method}: {row.formula}"):
            lines.append(heading)
        line = f"  {row.setting:<27}{row.parameters:>16,}{row.parameters / 1e6:>10.1f}"
        if beside:
            line += f"{row.published:>10}" + ("" if row.agrees else f"  ≠ {reasons.index(row.why) + 1}")
        lines.append(line)
    if beside:
        different = sum(not row.agrees for row in rows)
        lines += ["", f"≠  {different} of {len(rows)} were printed otherwise than the count rounds to:"]
        lines += [f"   {number}  {reason}" for number, reason in enumerate(reasons, start=1)]
    lines += ["", "LoRA on one matrix: (in + out) r"]
    for out_features, in_features, rank in ((512, 512, 2), (8000, 2000, 10)):
        count = of_one_matrix(out_features, in_features, rank)
        lines.append(f"  {f'{out_features} × {in_features}, r = {rank}':<27}{count:>16,}")
    return "\n".join(lines)


@hydra_command("params", ParamsConfig)
def main(cfg: DictConfig) -> None:
    config: ParamsConfig = OmegaConf.to_object(cfg)
    print(table(config.model.name, count_all(config.model)))


if __name__ == "__main__":
    main()
