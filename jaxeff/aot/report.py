"""Prints a compiled program's report as a table, and writes it as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from jaxeff.aot.results import CompiledReport, KernelReport

WIDTH = 120  # of the tables where they are not printed on a terminal

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = ("", "k", "M", "G", "T", "P", "E")


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of a training run beside its compiled step.

    Attributes:
      config: name of the config.
      mesh: sizes of the mesh axes.
      num_params: trained parameters, all devices together.
      tokens: tokens (or examples) in a global batch.
      unit: what ``tokens`` counts.
      params_bytes, optimizer_bytes, batch_bytes: the arguments' parts, per device.
    """

    config: str
    mesh: dict[str, int]
    num_params: int
    tokens: int
    unit: str
    params_bytes: float
    optimizer_bytes: float
    batch_bytes: float

    @property
    def rule_of_thumb(self) -> float:
        """6 N D: the usual estimate of a transformer's training flops (arXiv 2001.08361)."""
        return 6.0 * self.num_params * self.tokens


def show_bytes(value: float) -> str:
    """Returns e.g. ``1.41 GiB``."""
    return _scaled(value, 1024.0, _BINARY)


def show_number(value: float, unit: str = "") -> str:
    """Returns e.g. ``461 Tflop``."""
    return f"{_scaled(value, 1000.0, _DECIMAL)}{unit}"


def show_seconds(value: float) -> str:
    """Returns e.g. ``12.3 ms``."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if abs(value) * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def _short(name: str, length: int = 38) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _scaled(value: float, base: float, units: tuple[str, ...]) -> str:
    steps = 0
    while abs(value) >= base and steps < len(units) - 1:
        value /= base
        steps += 1
    digits = f"{value:.0f}" if steps == 0 and value == int(value) else f"{value:.4g}"
    return f"{digits} {units[steps]}"


def collectives_by_kind(report: CompiledReport) -> list[dict[str, Any]]:
    """Returns rows of kind, group size, count, payload and sent bytes, seconds; dearest first."""
    rows: dict[tuple[str, int], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for collective, seconds in zip(
        report.costs.collectives, report.collective_seconds, strict=True
    ):
        row = rows[collective.kind, len(collective.group)]
        row["count"] += collective.count
        row["payload_bytes"] += collective.count * collective.payload
        row["sent_bytes"] += collective.count * collective.sent
        row["seconds"] += seconds
    table = [{"kind": kind, "devices": size, **row} for (kind, size), row in rows.items()]
    return sorted(table, key=lambda row: -row["seconds"])


def print_report(report: CompiledReport, run: Run | None, console: Console | None = None) -> None:
    """Prints the report as tables."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, WIDTH))
    console.print(Group(*tables(report, run)))


def tables(report: CompiledReport, run: Run | None = None) -> list[Any]:
    """Returns the report's tables, to be printed one after the other."""
    parts = [_program(report, run), _memory(report, run), _time(report)]
    if report.costs.collectives:
        parts.append(_collectives(report))
    if any(kernel.schedule for kernel in report.kernels):
        parts.append(_tpu_kernels(report))
    if any(kernel.resources for kernel in report.kernels):
        parts.append(_gpu_kernels(report))
    spaced = [item for part in parts for item in (part, "")]
    return spaced + [f"note: {note}" for note in notes(report)]


def _table(title: str, *columns: str) -> Table:
    """A table headed by its title, which stands over the first column."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate((title, *columns)):
        first = index == 0
        table.add_column(
            f"[bold]{column}[/bold]" if first else column,
            justify="left" if first else "right",
            no_wrap=True,
        )
    return table


def _program(report: CompiledReport, run: Run | None) -> Table:
    table = _table(f"{report.name} for {report.target} ({report.target.chip.description})", "")
    costs, devices = report.costs, report.num_devices
    if run is not None:
        axes = " x ".join(f"{name} {size}" for name, size in run.mesh.items() if size > 1)
        table.add_row("mesh", axes or "one device")
        table.add_row("parameters", show_number(run.num_params))
        table.add_row(f"{run.unit} per step", show_number(run.tokens))
    table.add_row("devices", str(devices))
    table.add_row("matmul flops per device", show_number(costs.flops, "flop"))
    table.add_row("matmul flops, all devices", show_number(costs.flops * devices, "flop"))
    if report.model_flops:
        ratio = costs.flops * devices / report.model_flops
        table.add_row("  over the model's flops", f"{ratio:.3f}")
    if run is not None and run.unit == "tokens":
        table.add_row("  over 6 N D", f"{costs.flops * devices / run.rule_of_thumb:.3f}")
    if report.xla_flops is not None:
        table.add_row("XLA's count (loop bodies once)", show_number(report.xla_flops, "flop"))
    table.add_row("other flops per device", show_number(costs.other_flops, "flop"))
    table.add_row("HBM traffic per device", show_bytes(costs.hbm_bytes))
    table.add_row("compile time", show_seconds(report.compile_seconds))
    return table


def _memory(report: CompiledReport, run: Run | None) -> Table:
    memory = report.memory
    table = _table("memory per device", "", "of HBM")

    def row(label: str, value: float, style: str | None = None) -> None:
        share = f"{100 * value / memory.capacity:.1f} %"
        table.add_row(label, show_bytes(value), share, style=style)

    row("arguments", memory.arguments)
    if run is not None:
        row("  parameters", run.params_bytes)
        row("  optimiser state", run.optimizer_bytes)
        row("  batch", run.batch_bytes)
    row("outputs", memory.outputs)
    row("  in place of donated arguments", -memory.aliased)
    row("temporaries", memory.temporaries)
    row("code", memory.code)
    row("total", memory.total, "bold")
    row("HBM", memory.capacity)
    if memory.fits:
        row("fits, with room for", memory.headroom, "green")
    else:
        row("DOES NOT FIT, too much by", -memory.headroom, "red")
    for size, shapes in memory.largest[:4]:
        table.add_row(f"  largest: {_short(shapes, 60)}", show_bytes(size), "")
    return table


def _time(report: CompiledReport) -> Table:
    roofline, chip = report.roofline, report.target.chip
    table = _table("least time of a step", "", "at")
    table.add_row(
        "matrix products",
        show_seconds(roofline.compute),
        show_number(chip.peak_flops, "flop/s"),
    )
    table.add_row("HBM", show_seconds(roofline.hbm), f"{show_bytes(chip.hbm_bandwidth)}/s")
    links = f"{show_bytes(chip.link_bandwidth)}/s a link" if report.num_devices > 1 else ""
    table.add_row("collectives", show_seconds(roofline.collectives), links)
    table.add_row(
        f"roofline ({roofline.limit})", show_seconds(roofline.seconds), "all overlapping",
        style="bold",
    )  # fmt: skip
    if roofline.estimate is not None:
        table.add_row(
            "compiler's estimate on the cores",
            show_seconds(roofline.estimate),
            f"{show_number(chip.clock, 'Hz')}, kernels static",
        )
    if report.mfu_bound is not None:
        table.add_row("MFU bound", f"{100 * report.mfu_bound:.1f} %", "", style="bold")
    return table


def _collectives(report: CompiledReport) -> Table:
    table = _table("collectives per step and device", "devices", "count", "payload", "sent", "time")
    for row in collectives_by_kind(report):
        table.add_row(
            row["kind"],
            str(row["devices"]),
            f"{row['count']:.0f}",
            show_bytes(row["payload_bytes"]),
            show_bytes(row["sent_bytes"]),
            show_seconds(row["seconds"]),
        )
    return table


def _tpu_kernels(report: CompiledReport) -> Table:
    table = _table(
        "kernels, static schedules", "calls", "steps", "bundles/step", "cycles",
        "MXU cycles", "MXU bound", "spills", "time",
    )  # fmt: skip
    for kernel in report.kernels:
        schedule = kernel.schedule
        if schedule is None:
            continue
        table.add_row(
            _short(kernel.name),
            f"{kernel.count:.0f}",
            str(schedule.grid_steps),
            f"{schedule.bundles_per_step:.0f}{'+' if schedule.unknown_trips else ''}",
            show_number(schedule.cycles),
            show_number(schedule.mxu_cycles),
            f"{100 * schedule.mxu_utilisation:.0f} %",
            str(schedule.spills),
            show_seconds(kernel.count * schedule.cycles / report.target.chip.clock),
        )
    return table


def _gpu_kernels(report: CompiledReport) -> Table:
    table = _table(
        "kernels, static resources", "calls", "blocks", "threads", "registers",
        "spills", "shared", "blocks/SM", "waves",
    )  # fmt: skip
    for kernel in report.kernels:
        used = kernel.resources
        if used is None:
            continue
        table.add_row(
            _short(used.entry),
            f"{kernel.count:.0f}",
            str(used.blocks),
            str(used.threads),
            str(used.registers),
            show_bytes(used.spill_bytes),
            "?" if used.shared_bytes is None else show_bytes(used.shared_bytes),
            str(used.blocks_per_sm),
            f"{used.waves:.2f}",
        )
    return table


def notes(report: CompiledReport) -> list[str]:
    """Returns what the reader should know of the figures."""
    found = []
    if report.costs.unknown_loops:
        names = ", ".join(sorted(set(report.costs.unknown_loops)))
        found.append(f"loops whose trip count is not static are counted once: {names}")
    if report.unstated_kernels:
        names = ", ".join(kernel.name for kernel in report.unstated_kernels)
        found.append(f"kernels that state no flops are not in the roofline: {names}")
    missing = [kernel.name for kernel in report.kernels if kernel.schedule is None]
    if report.target.is_tpu and missing:
        names = ", ".join(missing)
        found.append(f"kernels without a schedule are not in the compiler's estimate: {names}")
    if any(kernel.schedule for kernel in report.kernels):
        found.append("static schedules count conditional blocks (pl.when) as executed")
    if not report.target.is_tpu and report.target.num_devices == 1 and not report.memory.fits:
        found.append("the GPU compiler does not fail when memory is short; the run would")
    return found


def to_json(report: CompiledReport, run: Run | None = None) -> dict[str, Any]:
    """Returns the report as nested dicts of numbers and text, ready for ``json.dump``."""
    memory, roofline, costs = report.memory, report.roofline, report.costs
    result: dict[str, Any] = {
        "name": report.name,
        "target": str(report.target),
        "chip": dataclasses.asdict(report.target.chip),
        "devices": report.num_devices,
        "compile_seconds": report.compile_seconds,
        "memory": {
            **dataclasses.asdict(memory),
            "total": memory.total,
            "headroom": memory.headroom,
            "fits": memory.fits,
        },
        "flops": {
            "matmul_per_device": costs.flops,
            "matmul_all_devices": costs.flops * report.num_devices,
            "other_per_device": costs.other_flops,
            "transcendentals_per_device": costs.transcendentals,
            "model": report.model_flops,
            "xla_cost_analysis": report.xla_flops,
        },
        "hbm_bytes_per_device": costs.hbm_bytes,
        "roofline": {
            **dataclasses.asdict(roofline),
            "seconds": roofline.seconds,
            "limit": roofline.limit,
            "mfu_bound": report.mfu_bound,
        },
        "collectives": collectives_by_kind(report),
        "kernels": [_kernel_json(kernel) for kernel in report.kernels],
        "notes": notes(report),
    }
    if run is not None:
        result["run"] = {**dataclasses.asdict(run), "six_n_d": run.rule_of_thumb}
    return _finite(result)


def _kernel_json(kernel: KernelReport) -> dict[str, Any]:
    entry = {
        "name": kernel.name,
        "count": kernel.count,
        "flops": kernel.flops,
        "bytes": kernel.nbytes,
    }
    if kernel.schedule is not None:
        entry["schedule"] = {
            **dataclasses.asdict(kernel.schedule),
            "cycles": kernel.schedule.cycles,
            "mxu_utilisation": kernel.schedule.mxu_utilisation,
        }
    if kernel.resources is not None:
        entry["resources"] = dataclasses.asdict(kernel.resources)
    return entry


def _finite(value: Any) -> Any:
    """JSON has no infinities."""
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
