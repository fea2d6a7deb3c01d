"""Hold the memory that papers state against the memory that is counted here.

    python -m experiments.plan.claims

QLoRA: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314; LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
Nothing is measured: every figure is of models on the meta device, as in experiments.plan.
"""

import sys
import textwrap
from dataclasses import dataclass

import torch

from experiments.config import resolve
from experiments.errors import UserError
from experiments.plan.budget import Budget, budget
from experiments.plan.cards import CARDS
from experiments.system.cli import command, composed


@dataclass(frozen=True)
class Claim:
    """A published figure, ours, and why they agree or do not."""

    what: str
    source: str
    published: str
    here: str
    holds: bool
    why: str


def _budget(seq: int, *overrides: str) -> Budget:
    return budget(resolve(composed(*overrides, "output_dir=.")), torch.bfloat16, 1, seq)


def claims() -> list[Claim]:
    """Every claim, in the order in which they are printed."""
    qlora = _budget(512, "model=llama-65b", "+method=qlora", "rank=64")
    single = _budget(512, "model=llama-65b", "+method=qlora", "rank=64", "quant.double=false")
    full65 = _budget(512, "model=llama-65b", "+method=full")
    lora = _budget(2048, "model=gpt3-175b", "+method=lora", "rank=4", "target_modules=[q_proj,v_proj]")
    full175 = _budget(2048, "model=gpt3-175b", "+method=full")
    base65, base175 = full65.parameters, full175.parameters
    card = CARDS["a6000"]
    saved = single.constants - qlora.constants
    times = base175 / lora.trained
    ratio = full175.peak(True) / lora.peak(True)
    return [
        Claim(
            "NF4 with double quantization, bits a weight",
            "QLoRA, §3",
            "4.127",
            f"{qlora.bits:.3f}",
            f"{qlora.bits:.3f}" == "4.127",
            "4 + 8/64 + 32/(64·256), counted on the tensors of LLaMA 65B",
        ),
        Claim(
            "what double quantization saves on 65B",
            "QLoRA, §3",
            "0.373 bits a weight, about 3 GB",
            f"{single.bits - qlora.bits:.3f} bits, {saved / 1e9:.2f} GB",
            f"{single.bits - qlora.bits:.3f}" == "0.373",
            "",
        ),
        Claim(
            "finetuning LLaMA 65B on one GPU of 48 GB",
            "QLoRA, abstract",
            "< 48 GB",
            f"{qlora.peak(True) / 1e9:.1f} GB",
            qlora.peak(True) < card.usable_bytes,
            f"rank 64 on every linear, one sequence of 512 tokens, checkpointing, AdamW in fp32; {card.name} has "
            f"{card.mib * 2**20 / 1e9:.1f} GB. With optim=adamw8bit it is "
            f"{(qlora.peak(True) - qlora.states['adamw'] + qlora.states['adamw8bit']) / 1e9:.1f} GB; without "
            f"checkpointing {qlora.peak(False) / 1e9:.1f} GB, which does not fit",
        ),
        Claim(
            "16-bit finetuning of all weights of 65B",
            "QLoRA, §1",
            "> 780 GB",
            f"{full65.peak(True) / 1e9:.0f} GB",
            full65.peak(True) > 780e9,
            f"weights and gradients in 16 bits and Adam's state in fp32, 12 bytes a parameter, are "
            f"{12 * base65 / 1e9:.0f} GB. Here weights that train and their gradients are fp32 too, 16 bytes",
        ),
        Claim(
            "GPT-3 175B: fewer trainable parameters with LoRA",
            "LoRA, abstract",
            "10,000 times",
            f"{times:,.0f} times",
            times >= 10_000,
            f"{base175:,} against {lora.trained:,}: rank 4 on q and v, the setting for which the paper names the "
            f"factor (§4.2). 10,000 is rounded; at rank 1 it is {times * 4:,.0f}",
        ),
        Claim(
            "GPT-3 175B: memory of training with LoRA",
            "LoRA, §4.2",
            "350 GB",
            f"{lora.dense / 1e9:.0f} GB of weights, {lora.peak(True) / 1e9:.0f} in all",
            round(lora.dense / 1e9) in range(345, 355),
            "the weights in 16 bits; one sequence of 2048 tokens with checkpointing comes on top",
        ),
        Claim(
            "GPT-3 175B: memory of training all weights",
            "LoRA, §4.2",
            "1.2 TB, 3 times LoRA's",
            f"{full175.peak(True) / 1e12:.2f} TB, {ratio:.1f} times",
            False,
            f"1.2 TB are {1.2e12 / base175:.1f} bytes a parameter, less than the 12 of weights and gradients in 16 "
            "bits beside Adam's state in fp32; the paper does not say what it counts. Here they are 16, so LoRA saves "
            "more than it claims",
        ),
    ]


def table(rows: list[Claim]) -> str:
    """The claims as the terminal shows them."""
    lines = [f"{'':<50}{'published':<34}{'counted here':<34}"]
    for row in rows:
        lines.append(f"{row.what:<50}{row.published:<34}{row.here:<34}{'' if row.holds else '≠'}".rstrip())
        note = f"{row.source}. {row.why}".rstrip(". ")
        lines += textwrap.wrap(note, 112, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


@command
def main() -> None:
    if len(sys.argv) > 1:
        raise UserError(f"{sys.argv[1]}: this command takes no arguments")
    print(table(claims()))


if __name__ == "__main__":
    main()
