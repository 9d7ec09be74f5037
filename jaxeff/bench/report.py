"""Results on the terminal, as JSON, and appended to ``RESULTS.md``."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxeff.bench.measure import BenchError, Environment, Measured, RowResult, Spread

SCHEMA = 1
COLUMNS = ("case", "figure", "median", "min .. max", "paper", "limit")

RESULTS_HEADER = """# Results

Measured by `python -m jaxeff.bench NAME... --record`, newest last. A ratio is that of the times it
names, taken within a round; medians and ranges are over rounds. The limit is what the ratio cannot
exceed.
"""


@dataclasses.dataclass(frozen=True)
class Failure:
    """A row that could not be measured, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """One run of the command."""

    environment: Environment
    rows: tuple[RowResult, ...]
    failures: tuple[Failure, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as nested plain values, with the version of this layout."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}


def check_writable(path: str | os.PathLike) -> None:
    """Checks, before anything is measured, that a report can be written to ``path``.

    Raises:
      BenchError: when its folder is not there or cannot be written.
    """
    path = Path(path)
    target = path if path.exists() else path.absolute().parent
    if path.is_dir() or not os.access(target, os.W_OK):
        raise BenchError(f"cannot write {path}: it is not a file in a folder that can be written")


def write_json(report: Report, path: str | os.PathLike) -> None:
    """Writes the report as JSON.

    Raises:
      BenchError: when the file cannot be written.
    """
    text = json.dumps(report.to_dict(), indent=2) + "\n"
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error}") from error


def append_results(report: Report, path: str | os.PathLike) -> None:
    """Appends a section to the results file, which is begun if it is not there.

    Raises:
      BenchError: when the file cannot be written.
    """
    path = Path(path)
    header = "" if path.exists() else RESULTS_HEADER
    try:
        with path.open("a") as file:
            file.write(f"{header}\n{to_markdown(report)}")
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error}") from error


def to_markdown(report: Report) -> str:
    """Returns the report as a section of Markdown, one table for each row."""
    lines = [f"## {describe(report.environment)}", ""]
    if warning := busy(report.environment):
        lines += [f"{warning[0].upper()}{warning[1:]}.", ""]
    for row in report.rows:
        lines += [f"### {row.name}", "", f"{row.claim}.{_origin(row)}", ""]
        lines += [_markdown_line(COLUMNS), _markdown_line(["---"] * len(COLUMNS))]
        lines += [_markdown_line(cells) for cells in table_lines(row)]
        lines += ["", *(f"* {note}" for note in notes(row))]
        lines += [f"* settings: {_settings(row)}; {row.rounds} rounds", ""]
    lines += [f"{failure.name} was not measured: {failure.reason}\n" for failure in report.failures]
    return "\n".join(lines)


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def print_row(row: RowResult, console: Console) -> None:
    """Prints one row's table and what its limits are."""
    table = Table(
        title=f"[bold]{row.name}[/bold]: {row.claim}{_origin(row)}",
        title_justify="left",
        title_style="",
    )
    for column in COLUMNS:
        numeric = column in ("median", "min .. max", "limit")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric)
    previous = None
    for cells in table_lines(row):
        if cells[0] and previous is not None:
            table.add_section()
        previous = cells
        table.add_row(*cells)
    console.print(table)
    for note in notes(row):
        console.print(f"  {note}", highlight=False)
    console.print()


def describe(where: Environment) -> str:
    """Returns date, device and versions in one line."""
    device = where.device
    if where.platform == "cpu":
        device = f"{where.processor}, {where.cores} cores"
    versions = ", ".join(f"{name} {version}" for name, version in where.versions.items())
    return f"{where.date} · {where.platform}: {device} · Python {where.python}, {versions}"


def busy(where: Environment) -> str:
    """Returns a warning when others were using the cores, else nothing."""
    if where.load is None or where.load < where.cores / 2:
        return ""
    return (
        f"the machine was busy (load {where.load:.1f} on {where.cores} cores) before this run: "
        "times on a CPU are those of a shared machine, and threads that wait for one another "
        "(PyTorch's do) lose most; the ratio of the fastest runs is the one to look at"
    )


def table_lines(row: RowResult) -> list[list[str]]:
    """Returns the cells of a row's table: for each case the ratio, the figures, the seconds."""
    lines = []
    for case in row.cases:
        paper = case.paper or row.paper or "-"
        limit = "-" if case.limit is None else number(case.limit)
        lines.append([case.name, case.ratio_name, *_cells(case.ratio), paper, limit])
        lines.append(["", "  of the fastest runs", number(case.fastest), "", "", ""])
        lines += [["", *_figure(figure), "", ""] for figure in case.figures]
        lines += [["", f"{name} (s)", *_cells(s), "", ""] for name, s in case.seconds.items()]
    return lines


def _figure(figure: Measured) -> list[str]:
    name = f"{figure.name} ({figure.unit})" if figure.unit else figure.name
    return [name, *_cells(figure.spread)]


def _cells(spread: Spread) -> list[str]:
    return [number(spread.median), f"{number(spread.low)} .. {number(spread.high)}"]


def notes(row: RowResult) -> list[str]:
    """Returns a sentence for each limit; cases that share one are named together."""
    named: dict[str, list[str]] = {}
    for case in row.cases:
        named.setdefault(case.limit_note, []).append(case.name)
    return [f"limit ({', '.join(cases)}): {text}" for text, cases in named.items() if text]


def _origin(row: RowResult) -> str:
    parts = [row.source, f"paper: {row.paper}" if row.paper else ""]
    text = "; ".join(part for part in parts if part)
    return f" ({text})" if text else ""


def _settings(row: RowResult) -> str:
    return ", ".join(f"{name}={value}" for name, value in row.settings.items())


def number(value: float) -> str:
    """Returns three significant digits; from a thousand on the integer, thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
