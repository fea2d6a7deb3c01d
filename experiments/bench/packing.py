"""Tokens a second with and without packing, on this machine.

    python -m experiments.bench.packing

SmolLM2 with QDoRA, rank 16, trains on the docstrings of the main job and on made-up samples with a long tail of
lengths. Padding is not counted as tokens. Packs and batches follow one another in turn, so that a busy moment hits
both. The ratio in the last column is of the processor's time, in which other processes had no part. Without packing,
samples of similar length share a batch (experiments/data/samples.py).
"""

import random
import sys
import time

from experiments.bench import arguments
from experiments.config import resolve, tokens_a_pass
from experiments.data.chat import IGNORED, Example
from experiments.data.packing import packs
from experiments.data.samples import batches, load_data
from experiments.models.load import prepare_model
from experiments.system import machine
from experiments.system.cli import command, composed
from experiments.training.loop import Trainer

MEDIAN, SPREAD, SHORTEST, LONGEST = 90, 1.1, 8, 512  # tokens of a long-tailed sample, log-normal
SETS = {"docstrings": ["trainer.batch_size=8"], "long tail": ["trainer.batch_size=4", f"data.max_length={LONGEST}"]}


def long_tail(count: int, vocabulary: int) -> list[Example]:
    """Samples whose last third is the answer."""
    rng, found = random.Random(0), []
    for _ in range(count):
        length = min(LONGEST, max(SHORTEST, round(rng.lognormvariate(0, SPREAD) * MEDIAN)))
        ids = [rng.randrange(vocabulary) for _ in range(length)]
        prompt = length * 2 // 3
        found.append(Example(ids, [IGNORED] * prompt + ids[prompt:]))
    return found


def compare(name: str, rounds: int, given: list[str]) -> str:
    """A line of the table."""
    cfg = resolve(composed("+method=qdora", "output_dir=unused", "data.packing=true", *SETS[name], *given))
    device, dtype = machine.set_up(cfg.trainer)
    model, tokenizer = prepare_model(cfg, device, dtype)
    data = load_data(cfg.data, tokenizer, trains=True).train if name == "docstrings" else None
    data = data or long_tail(1000, len(tokenizer))
    trainer = Trainer(model.train(), cfg, dtype, tokenizer.pad_token_id)
    packing, tokens = trainer.packing, tokens_a_pass(cfg)
    streams = packs(data, tokens, 0), batches(data, cfg.trainer.batch_size, 0)
    seconds, own, seen, places = [0.0, 0.0], [0.0, 0.0], [0, 0], [0, 0]
    for turn in range(rounds + 1):  # the first one warms up
        for side, stream in enumerate(streams):
            trainer.packing = None if side else packing
            done = 0
            while done < tokens * 3 // 4:
                batch = next(stream)
                lengths = [len(example.input_ids) for example in batch]
                start, own_start = time.perf_counter(), time.process_time()
                trainer.step([batch])
                done += sum(lengths)
                if turn:
                    seconds[side] += time.perf_counter() - start
                    own[side] += time.process_time() - own_start
                    seen[side] += sum(lengths)
                    places[side] += max(lengths) * len(lengths) if side else tokens
    packed, padded = (n / s for n, s in zip(seen, seconds))
    by_processor = seen[0] / own[0] / (seen[1] / own[1])
    share = [1 - n / all_places for n, all_places in zip(seen, places)]
    sides = f"{padded:>12,.0f}{share[1]:>10.1%}{packed:>14,.0f}{share[0]:>10.1%}"
    return f"{name:<14}{sides}{packed / padded:>9.2f}{by_processor:>16.2f}"


@command
def main() -> None:
    options = arguments.packing(sys.argv[1:])
    given = ["trainer.device=cpu", *([f"trainer.threads={options.threads}"] if options.threads else [])]
    device, dtype = machine.set_up(resolve(composed("+method=qdora", "output_dir=unused", *given)).trainer)
    print(machine.describe(device, dtype))
    print(f"{'':<14}{'tokens/s':>12}{'padding':>10}{'packed':>14}{'padding':>10}{'ratio':>9}{'processor time':>16}")
    for name in SETS:
        print(compare(name, options.rounds, given), flush=True)


if __name__ == "__main__":
    main()
