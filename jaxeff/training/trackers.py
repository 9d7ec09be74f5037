"""What a run leaves behind and shows: metrics.jsonl, TensorBoard events, curves.png, progress."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"


class MetricsFile:
    """Appends records to ``metrics.jsonl``: one JSON object a line, with its step and kind.

    Args:
      workdir: directory of the run.
      resume_step: records of later steps are dropped: the steps are about to be done again.
    """

    def __init__(self, workdir: Path, resume_step: int | None = None):
        self.path = workdir / METRICS_FILE
        if resume_step is not None and self.path.exists():
            self._drop_after(resume_step)
        self._file = self.path.open("a", buffering=1)

    def _drop_after(self, step: int) -> None:
        kept = [r for r in read_metrics(self.path) if r["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        os.replace(temporary, self.path)

    def write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one record; ``kind`` is ``train`` or ``eval``."""
        record = {"step": step, "kind": kind, "time": round(time.time(), 3), **metrics}
        # JSON has no NaN; a metric that is not finite is written as text.
        record = {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """Returns the records of a ``metrics.jsonl``; a last line cut short by a crash is left out."""
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: dropped an incomplete line", path)
    return records


class TensorBoard:
    """Writes scalars as TensorBoard events under ``<workdir>/tensorboard``."""

    def __init__(self, workdir: Path, resume_step: int | None = None):
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=None if resume_step is None else resume_step + 1,
        )

    def write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one record."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class NoProgress:
    """Shows nothing: processes other than the first."""

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        return None

    def advance(self, step: int) -> None:
        """A step was done."""

    def show(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """A record was written."""

    def message(self, text: str) -> None:
        """Something to tell the user."""


class ProgressBar(NoProgress):
    """A bar with step, loss, rate and time left; plain lines where there is no terminal."""

    def __init__(self, num_steps: int, start: int = 0, console: rich.console.Console | None = None):
        self._console = console or rich.console.Console(file=sys.stderr)
        self._num_steps = num_steps
        self._live = self._console.is_terminal
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("train", total=num_steps, completed=start, status="")

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *unused):
        self._bar.stop()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def show(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        text = "  ".join(f"{k} {_short(v)}" for k, v in metrics.items())
        if kind == "train" and self._live:
            shown = {k: v for k, v in metrics.items() if k in ("loss", "tokens_per_second", "mfu")}
            status = "  ".join(
                f"{k.replace('_per_second', '/s')} {_short(v)}" for k, v in shown.items()
            )
            self._bar.update(self._task, completed=step, status=status)
            return
        self.message(f"{kind:5s} {step:>7d}/{self._num_steps}  {text}")

    def message(self, text: str) -> None:
        # Without soft_wrap lines would be cut at the 80 columns of a terminal that is not there.
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _short(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def plot_curves(workdir: Path) -> Path | None:
    """Draws training and evaluation curves from ``metrics.jsonl`` into ``curves.png``.

    One panel for the loss (training and evaluation together) and one for every other evaluation
    metric. Returns the path, or None when nothing has been recorded.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(workdir / METRICS_FILE)
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for record in records:
        for name, value in record.items():
            if name in ("step", "kind", "time") or not isinstance(value, (int, float)):
                continue
            if record["kind"] == "train" and name != "loss":
                continue
            series.setdefault(name, {}).setdefault(record["kind"], []).append(
                (record["step"], value)
            )
    if not series:
        return None
    names = sorted(series, key=lambda n: (n != "loss", n))
    figure = Figure(figsize=(5.2 * len(names), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for kind, points in series[name].items():
            steps, values = zip(*sorted(points))
            marker = "o" if kind == "eval" else None
            axis.plot(steps, values, label=kind, marker=marker, markersize=3, linewidth=1.2)
        axis.set_xlabel("step")
        axis.set_title(name.replace("_", " "))
        axis.grid(alpha=0.3)
        axis.legend()
    path = workdir / CURVES_FILE
    figure.savefig(path, dpi=120)
    return path
