"""Static schedules of TPU kernels, read from the compiler's final bundles.

A TPU core is in-order and very long instruction word: it issues one bundle per cycle unless it
waits for memory or for a unit. The number of bundles in a loop's body times the loop's trips is
therefore a lower bound on cycles, and close to the truth where transfers are hidden.

The compiler writes, for each kernel, ``*-<name>-NN-final_bundles.txt`` (one line per bundle, with
its loop depth as a number of ``>``; a loop starts at a line marked ``LB:`` and ends at the branch
on its exit test) and ``*-final_hlo-static-per-bundle-utilization.txt`` (for every bundle, how many
slots of each kind are busy).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from jaxeff.aot.targets import Chip

_BUNDLE = re.compile(r"^\s*(?:0x([0-9a-f]+)|0)\s+(?:([A-Z]{2}):|:)\s*(>*)\s*\{?(.*)$")
_BRANCH = re.compile(r"sbr\.rel \(!%(\w+)\) target = \$region(\d+)")
_START_REGION = re.compile(r"Start region (\d+)")
_SCALAR = re.compile(r"%(\w+) = (s\w+)(?:\.\w+)*(?: \([^)]*\),)? ([^/;}]*)")
_ITERATION_BOUNDS = re.compile(r"^iteration_bounds: \(([\d, ]+)\)", re.M)
_MATMUL = re.compile(r"vmatmul\.(?:mubr\.|msk\.)*(\w+)\.")

# Rows that one vmatmul pushes through an array, by the bits of an element: 8 sublanes of 32 bits.
_SUBLANES = 8
_TYPE_BITS = {"f32": 32, "bf16": 16, "f16": 16, "s8": 8, "u8": 8, "f8e4m3": 8, "f8e5m2": 8,
              "s4": 4, "u4": 4}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a kernel.

    Attributes:
      depth: 1 for the outermost.
      first, last: its bundles, both included, inner loops among them.
      trips: how often the body runs, or None when the bound is not a constant.
    """

    depth: int
    first: int
    last: int
    trips: int | None


@dataclasses.dataclass(frozen=True)
class KernelSchedule:
    """Static schedule of one call of a TPU kernel on one core.

    Attributes:
      name: name of the instruction.
      bundles: bundles of the program, each counted once.
      grid_steps: runs of the outermost loop; 1 for a kernel without a grid.
      bundles_per_step: bundles of one run, inner loops multiplied by their trips.
      total_bundles: bundles issued by the whole call.
      mxu_cycles: cycles the call's matrix products need at the arrays' peak rate, tiles that are
        not full included.
      mxu_busy: share of bundles of the busiest loop body in which the compiler has the matrix units
        reserved.
      spills: vector registers stored to and loaded from memory in the loops' bodies for want of
        registers, per run of the body.
      loops: all loops, outermost first.
      unknown_trips: True when some loop's bound is not static; it is counted once.
    """

    name: str
    bundles: int
    grid_steps: int
    bundles_per_step: float
    total_bundles: float
    mxu_cycles: float
    mxu_busy: float
    spills: int
    loops: tuple[Loop, ...]
    unknown_trips: bool

    @property
    def cycles(self) -> float:
        """Lower bound on the cycles of one call."""
        return max(self.total_bundles, self.mxu_cycles)

    def bundles_with(self, trips: Sequence[float]) -> float:
        """Returns the bundles of a call whose loops run as often as the caller knows they do.

        Args:
          trips: of each of `loops`, in their order; for a loop whose trips vary, their mean.

        Raises:
          ValueError: when there are not as many as there are loops.
        """
        if len(trips) != len(self.loops):
            raise ValueError(
                f"trips has {len(trips)} entries; kernel {self.name!r} has {len(self.loops)} loops"
            )
        loops = [
            dataclasses.replace(loop, trips=count)
            for loop, count in zip(self.loops, trips, strict=True)
        ]
        return float(sum(_executions(address, loops) for address in range(self.bundles)))

    @property
    def mxu_utilisation(self) -> float:
        """Share of the peak rate that the call can reach at best."""
        return self.mxu_cycles / self.cycles if self.cycles else 0.0


@dataclasses.dataclass(frozen=True)
class _Program:
    """Texts of the bundles by address, their loop depths, and the loops."""

    texts: dict[int, str]
    depths: dict[int, int]
    loops: tuple[Loop, ...]


def find_schedules(
    directory: str | Path,
    chip: Chip,
    names: Collection[str] | None = None,
    ignore: Collection[str] = (),
) -> dict[str, KernelSchedule]:
    """Returns the schedules dumped in ``directory``, by name of instruction.

    Args:
      directory: where the compiler wrote its dumps.
      chip: what it compiled for.
      names: instructions to read; None reads all, XLA's own fusions among them.
      ignore: file names to leave out, those of earlier programs.
    """
    found = {}
    for path in sorted(Path(directory).glob("*-final_bundles.txt")):
        name = kernel_name(path)
        if name is None or path.name in ignore or (names is not None and name not in names):
            continue
        table = _utilization_file(path)
        text = path.read_text(errors="replace")
        found[name] = parse_schedule(
            name, text, table.read_text() if table is not None else "", chip
        )
    return found


def kernel_name(path: Path) -> str | None:
    """Returns the instruction's name in a dump file's name, or None for the program's frame."""
    match = re.match(r"\d+-(.*)-\d+-final_bundles\.txt$", path.name)
    if match is None or match.group(1) == "TLP" or match.group(1).startswith("<"):
        return None
    return match.group(1)


def _utilization_file(path: Path) -> Path | None:
    match = re.match(r"(\d+-.*)-\d+-final_bundles\.txt$", path.name)
    suffix = "final_hlo-static-per-bundle-utilization.txt"
    for other in path.parent.iterdir():
        if other.name.startswith(match.group(1) + "-") and other.name.endswith(suffix):
            return other
    return None


def parse_schedule(name: str, bundles: str, utilization: str, chip: Chip) -> KernelSchedule:
    """Returns the schedule of a kernel from its two dump files' texts.

    Args:
      name: name of the instruction.
      bundles: the final bundles.
      utilization: the per-bundle slot table; may be empty.
      chip: gives the rate of the matrix units.

    Raises:
      ValueError: when ``bundles`` holds no bundle.
    """
    program = _read_program(name, bundles)
    grid_steps = _grid_steps(program, bundles)
    grid = _grid_loop(program.loops)
    loops = tuple(
        dataclasses.replace(loop, trips=grid_steps) if loop is grid else loop
        for loop in program.loops
    )
    weights = {a: _executions(a, loops) for a in program.texts}
    total = float(sum(weights.values()))
    per_step = total
    if grid is not None:
        inside = sum(weights[a] for a in weights if grid.first <= a <= grid.last)
        per_step = inside / grid_steps
    busy, spills = _slots(utilization, program, loops)
    return KernelSchedule(
        name=name,
        bundles=len(program.texts),
        grid_steps=grid_steps,
        bundles_per_step=per_step,
        total_bundles=total,
        mxu_cycles=sum(weights[a] * _mxu_cycles(text, chip) for a, text in program.texts.items()),
        mxu_busy=busy,
        spills=spills,
        loops=loops,
        unknown_trips=any(loop.trips is None for loop in loops),
    )


def _read_program(name: str, text: str) -> _Program:
    texts: dict[int, str] = {}
    depths: dict[int, int] = {}
    scalars: dict[str, tuple[str, str]] = {}
    heads: dict[str, int] = {}  # region that starts at a loop's head -> address
    branches: list[tuple[int, int, str]] = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match is None:
            continue  # the key at the top, or a comment that goes on
        address, mark, depth, body = match.groups()
        address = int(address or "0", 16)
        texts[address], depths[address] = body, len(depth)
        for result, opcode, arguments in _SCALAR.findall(body):
            scalars[result] = (opcode, arguments.strip())
        if mark == "LB":
            heads |= dict.fromkeys(_START_REGION.findall(body), address)
        branch = _BRANCH.search(body)
        if branch and branch.group(2) in heads:
            branches.append((heads[branch.group(2)], address, branch.group(1)))
    if not texts:
        raise ValueError(f"the dump of kernel {name!r} holds no bundles")
    loops = [
        Loop(
            depths[first],
            first,
            _with_delay_slots(last, depths[first], texts, depths, heads.values()),
            _trips(predicate, scalars),
        )
        for first, last, predicate in sorted(branches)
    ]
    return _Program(texts, depths, tuple(loops))


def _trips(predicate: str, scalars: dict[str, tuple[str, str]]) -> int | None:
    """Trips of the loop that goes on until ``predicate``, if all its bounds are constants."""
    opcode, arguments = scalars.get(predicate, ("", ""))
    test = re.fullmatch(r"%(\w+), (\d+)", arguments)
    if opcode != "scmp" or test is None:
        return None
    start, step = 0, 1
    _, increment = scalars.get(test.group(1), ("", ""))
    update = re.fullmatch(r"(\d+), %(\w+)", increment)
    if update:
        step = int(update.group(1))
        _, phi = scalars.get(update.group(2), ("", ""))
        _, initial = scalars.get(phi.split(",")[0].lstrip("%"), ("", ""))
        start = int(initial) if initial.isdigit() else 0
    return math.ceil((int(test.group(2)) - start) / step)


def _with_delay_slots(branch: int, level: int, texts, depths, heads) -> int:
    """Address of the last bundle that runs after a backward branch was issued.

    Branch delay slots are empty, or hold work of the loop; what follows them is outside of it, and
    may be the head of the next loop.
    """
    last = branch
    while (
        last + 1 in texts
        and last - branch < 8
        and last + 1 not in heads
        and (depths[last + 1] >= level or re.fullmatch(r"\s*\}.*", texts[last + 1]))
    ):
        last += 1
    return last


def _grid_loop(loops: tuple[Loop, ...]) -> Loop | None:
    """The longest of the outermost loops."""
    outermost = [loop for loop in loops if loop.depth == 1]
    return max(outermost, key=lambda loop: loop.last - loop.first, default=None)


def _grid_steps(program: _Program, text: str) -> int:
    """Steps of the grid on one core.

    A kernel with windows runs its loop a few times more, to fill and drain the pipeline, with the
    body left out; the bounds of the windows give the steps themselves.
    """
    grid = _grid_loop(program.loops)
    if grid is None:
        return 1
    bounds = _ITERATION_BOUNDS.search(text)
    if bounds:
        steps = math.prod(int(size) for size in bounds.group(1).split(",") if size.strip())
        if grid.trips is None or 0 <= grid.trips - steps <= 4:
            return steps
    return grid.trips or 1


def _executions(address: int, loops: Sequence[Loop]) -> float:
    return math.prod(
        (1 if loop.trips is None else loop.trips)
        for loop in loops
        if loop.first <= address <= loop.last
    )


def _mxu_cycles(text: str, chip: Chip) -> float:
    """Cycles of all arrays together that the products issued in a bundle take at peak rate."""
    cycles = 0.0
    core_rate = chip.flops_per_cycle / chip.num_cores
    for dtype in _MATMUL.findall(text):
        bits = _TYPE_BITS.get(dtype, 16)
        rows = _SUBLANES * 32 / bits
        # A narrower type packs more rows and runs as much faster than bfloat16; float32 does not.
        speed = max(1.0, 16 / bits)
        cycles += rows * chip.mxu_size**2 * 2 / (core_rate * speed)
    return cycles


def _slots(utilization: str, program: _Program, loops: tuple[Loop, ...]) -> tuple[float, int]:
    """Share of bundles with reserved matrix units, and spills, in the innermost heavy loop."""
    head, _, rows = utilization.partition("== UTILIZATION:")
    lines = [line for line in head.splitlines() if line.strip() and not line.startswith("==")]
    if len(lines) < 2:
        return 0.0, 0
    names = [name.strip() for name in lines[0].split(",")]
    capacity = dict(zip(names, map(int, lines[1].split()), strict=False))
    table = [list(map(int, row.split())) for row in rows.splitlines() if row.strip()]
    addresses = sorted(program.texts)
    if len(table) != len(addresses):
        return 0.0, 0
    inside = [
        dict(zip(names, row, strict=False))
        for address, row in zip(addresses, table, strict=True)
        if not loops or any(loop.first <= address <= loop.last for loop in loops)
    ]
    busy = sum(row["MATMUL"] for row in inside) / (capacity["MATMUL"] * max(len(inside), 1))
    spills = sum(row.get("VLOAD:FILL", 0) + row.get("VSTORE:SPILL", 0) for row in inside)
    return busy, spills
