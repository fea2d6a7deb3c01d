"""The files that a run writes about itself: its metrics, its result with spectra and held-out samples, loss.png …"""

import json
from pathlib import Path

from experiments.config import Config
from experiments.errors import UserError
from experiments.runs import heldout, load_balance, spectrum
from experiments.runs.config_file import CONFIG, write_config
from experiments.system.files import (
    EXPERTS,
    HELDOUT,
    METRICS,
    RESULT,
    SPECTRUM,
    as_csv,
    sync,
    write_atomically,
    write_figure,
)
from experiments.system.palette import BLUE, ORANGE
from modules.files.checked import SUMS, checksum_of, seal_files


class OutputFiles:
    """The files of the run in `path`. Each is whole at any moment; metrics.jsonl grows by a line at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics = path / METRICS
        self.records: list[dict] = []

    def begin(self, cfg: Config) -> None:
        """Start anew: write config.yaml."""
        (self.path / SUMS).unlink(missing_ok=True)  # of an earlier end
        write_config(cfg, self.path)

    def rewind(self, cfg: Config, step: int, checksum: str | None) -> None:
        """Go on after `step`: keep the records up to there. Later records of a killed run come again.

        Args:
            checksum: of these records; None: of a checkpoint that has none.
        """
        try:
            lines = self.metrics.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.metrics} cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            try:
                self.records.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                if number < len(lines):  # the last one may be half written
                    raise UserError(f"{self.metrics}:{number}: not JSON: {error}") from error
        try:
            self.records = [record for record in self.records if record["step"] <= step]
        except (TypeError, KeyError) as error:
            raise UserError(f"{self.metrics} has a line that is not a record of a step: {error!r}") from error
        if checksum not in (None, checksum_of(self._text())):
            raise UserError(f"{self.metrics} is damaged: up to step {step} it is not as the run had written it")
        self.begin(cfg)
        write_atomically(self.metrics, self._text())

    def settled(self) -> str:
        """Have the records so far on the disk; returns their checksum, for a checkpoint that goes on after them."""
        sync(self.metrics)
        return checksum_of(self._text())

    def _text(self) -> str:
        return "".join(json.dumps(record) + "\n" for record in self.records)

    def log(self, record: dict) -> None:
        self.records.append(record)
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write_result(self, result: dict) -> None:
        write_atomically(self.path / RESULT, json.dumps(result, indent=2) + "\n")
        seal_files(self.path, (CONFIG, RESULT, METRICS, SPECTRUM, EXPERTS, HELDOUT))

    def write_spectra(self, rows: list[dict]) -> None:
        """Write spectrum.csv, a line an adapted linear (experiments/runs/spectrum.py); nothing without an adapter."""
        if rows:
            write_atomically(self.path / SPECTRUM, as_csv(spectrum.COLUMNS, rows))

    def write_experts(self, rows: list[dict]) -> None:
        """Write experts.csv, a line a layer of experts (experiments/runs/load_balance.py); nothing without experts."""
        if rows:
            write_atomically(self.path / EXPERTS, as_csv(load_balance.COLUMNS, rows))

    def write_heldout(self, rows: list[dict]) -> None:
        write_atomically(self.path / HELDOUT, heldout.text_of(rows))

    def write_samples(self, title: str, samples: list[dict[str, str]]) -> None:
        """Write samples.md: of each sample its prompt, reference, and the model's text before and after."""
        parts = [
            f"# {title}\n" if samples else f"# {title}\n\nNo samples: the data has no prompts, or trainer.samples=0."
        ]
        for number, sample in enumerate(samples, start=1):
            parts.append(f"## {number}\n\n```\n{sample['prompt'].strip()}\n```\n")
            for name in ("reference", "before", "after"):
                parts.append(f"**{name}**: {' '.join(sample[name].split()) or '(nothing)'}\n")
        write_atomically(self.path / "samples.md", "\n".join(parts))

    def plot_loss(self, title: str) -> None:
        """Draw loss.png from the records so far: training loss a step, held-out loss where it was measured."""
        from matplotlib.figure import Figure  # here: it takes memory that training could use

        figure = Figure(figsize=(7, 4.2), layout="constrained")  # not pyplot, whose state a notebook shares
        axes = figure.subplots()
        for key, style in (
            ("loss", {"color": BLUE, "lw": 1.2, "label": "training batch"}),
            ("heldout_loss", {"color": ORANGE, "marker": "o", "lw": 1.8, "label": "held out"}),
        ):
            points = [(record["step"], record[key]) for record in self.records if key in record]
            axes.plot(*zip(*points), **style)
        axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats a token)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        write_figure(self.path / "loss.png", figure)
