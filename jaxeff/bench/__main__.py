"""Measure claims side by side with their baselines, on the device that is here.

    python -m jaxeff.bench --list
    python -m jaxeff.bench decoder_train decoder_decode --json figures.json --record
    python -m jaxeff.bench decoder_train --set steps=8 --set config.model.num_layers=2

A row runs its technique and its baselines in turn, warm, in one process, and gives medians over the
rounds with their range, the paper's figure where there is one, and the limit. The machine should
have nothing else to do. Sizes are small on a CPU and larger on an accelerator; --list NAME shows
the settings of a row, and --set changes them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import jax
from rich.console import Console

from jaxeff.bench.measure import (
    DEFAULT_ROUNDS,
    BenchError,
    RowResult,
    environment,
    measure_case,
)
from jaxeff.bench.registry import ROWS, Row, find_row, make_settings
from jaxeff.bench.report import (
    Failure,
    Report,
    append_results,
    busy,
    check_writable,
    print_row,
    write_json,
)
from jaxeff.training.config import ConfigError, nearest, to_dict
from jaxeff.training.host import keep_freed_memory

# What jax calls the platforms.
PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxeff.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows to measure")
    parser.add_argument(
        "--list",
        action="store_true",
        help="list the rows, or the settings of those named, and exit",
    )
    parser.add_argument("--device", choices=PLATFORMS, help="default: the best one that is there")
    parser.add_argument(
        "--rounds", type=int, help=f"interleaved rounds (default {DEFAULT_ROUNDS} for most rows)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of every row named",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument(
        "--record",
        nargs="?",
        const="RESULTS.md",
        metavar="FILE",
        help="append the tables to a Markdown file (default RESULTS.md)",
    )
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line.

    Exits with status 2 on arguments that cannot be understood.
    """
    parser = make_parser()
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        known = [a.lstrip("-") for action in parser._actions for a in action.option_strings]
        parser.error(f"unknown argument {unknown[0]!r}{nearest(name, known)}")
    if not flags.names and not flags.list:
        parser.error("name at least one row (--list shows them)")
    if flags.rounds is not None and flags.rounds < 1:
        parser.error(f"--rounds is {flags.rounds}; expected at least 1")
    return flags


def parse_settings(pairs: Sequence[str]) -> dict[str, str]:
    """Returns ``KEY=VALUE`` texts as a dictionary.

    Raises:
      ConfigError: for a text without ``=``.
    """
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(f"--set {pair!r} has no value; expected KEY=VALUE")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def select_device(platform: str | None) -> jax.Device:
    """Returns the first device of the platform, which becomes the one that jax uses.

    Raises:
      BenchError: when there is none.
    """
    if platform is None:
        return jax.local_devices()[0]
    before = jax.config.jax_platforms
    # Only the platform asked for is started, so that nothing is traced for another one.
    jax.config.update("jax_platforms", PLATFORMS[platform])
    try:
        device = jax.local_devices()[0]
    except RuntimeError as error:
        jax.config.update("jax_platforms", before)
        raise BenchError(f"--device {platform}: there is none here ({error})") from error
    if device.platform != platform:
        jax.config.update("jax_platforms", before)
        raise BenchError(f"--device {platform}: there is none here, only {device.platform}")
    return device


def list_rows(names: Sequence[str], changes: dict[str, str], platform: str, console: Console):
    """Prints every row's claim; or, for rows that are named, their settings too."""
    for row in [find_row(name) for name in names] or ROWS.values():
        console.print(f"[bold]{row.name}[/bold]  {row.claim}", highlight=False)
        for title, text in (("paper", row.paper), ("source", row.source)):
            if text:
                console.print(f"    {title}: {text}", highlight=False)
        if names:
            for key, value in to_dict(make_settings(row, platform, changes)).items():
                console.print(f"    --set {key}={value}", highlight=False, markup=False)


def measure_row(
    row: Row, changes: dict[str, str], device: jax.Device, rounds: int | None, console: Console
) -> RowResult:
    """Measures all cases of a row.

    Raises:
      BenchError: when something it needs is not there.
      ConfigError: for settings that cannot work.
    """
    settings = make_settings(row, device.platform, changes)
    rounds = rounds or getattr(settings, "ROUNDS", DEFAULT_ROUNDS)
    results = []
    with console.status(f"{row.name}: preparing") as status:
        for case in settings.cases(device):
            status.update(f"{row.name}: {case.name}")
            results.append(measure_case(case, rounds))
            status.update(f"{row.name}: preparing")
    return RowResult(
        name=row.name,
        claim=row.claim,
        paper=row.paper,
        source=row.source,
        settings=to_dict(settings),
        rounds=rounds,
        cases=tuple(results),
    )


def run(flags: argparse.Namespace, console: Console) -> Report:
    """Measures the rows, printing each as it is done.

    Raises:
      BenchError: when the device is not there or a file cannot be written.
      ConfigError: for an unknown row or setting, before anything is measured.
    """
    changes = parse_settings(flags.set)
    rows = [find_row(name) for name in dict.fromkeys(flags.names)]
    for path in filter(None, (flags.json, flags.record)):
        check_writable(path)
    device = select_device(flags.device)
    for row in rows:
        make_settings(row, device.platform, changes)
    where = environment(device)
    if warning := busy(where):
        console.print(f"note: {warning}\n", highlight=False)
    results, failures = [], []
    for row in rows:
        try:
            results.append(measure_row(row, changes, device, flags.rounds, console))
            print_row(results[-1], console)
        # Too little memory for one row is no reason to lose the others.
        except (BenchError, jax.errors.JaxRuntimeError) as error:
            failures.append(Failure(row.name, str(error).partition("\n")[0]))
            console.print(
                f"{row.name} was not measured: {failures[-1].reason}", highlight=False, markup=False
            )
    return Report(where, tuple(results), tuple(failures))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 1 when a row could not be measured."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    console = Console(width=None if sys.stdout.isatty() else 140)
    flags = parse(sys.argv[1:] if arguments is None else arguments)
    keep_freed_memory()  # as jaxeff.train does
    try:
        if flags.list:
            platform = flags.device or ("cpu" if not flags.names else jax.default_backend())
            list_rows(flags.names, parse_settings(flags.set), platform, console)
            return 0
        report = run(flags, console)
        if flags.json:
            write_json(report, flags.json)
        if flags.record:
            append_results(report, flags.record)
    except (BenchError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
