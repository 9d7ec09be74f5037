"""Cycles of recurrent cells on TPUs that are not there, by the compiler's static schedules.

``python -m jaxeff.bench.rows.pararnn_schedules CHIP BATCHxSTEPSxWIDTH`` prints them as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.bench.rows import pararnn_contenders as ways
from jaxeff.bench.rows import static_schedules
from pallas_kernels import linear_recurrence

KERNEL, ASSOCIATIVE = "kernel", "associative scan"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one comparison, all float32."""

    batch: int
    steps: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Sizes:
        """Of BATCHxSTEPSxWIDTH."""
        return cls(*map(int, text.split("x")))

    def spec(self, *between: int) -> jax.ShapeDtypeStruct:
        """Shape (B, T, H), with axes between the last two if given."""
        return jax.ShapeDtypeStruct((self.batch, self.steps, *between, self.width), jnp.float32)

    @property
    def array_bytes(self) -> int:
        """Of one array (B, T, H)."""
        return 4 * self.batch * self.steps * self.width

    def __str__(self):
        return f"{self.batch}x{self.steps}x{self.width}"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Cycles of whole programs on one core.

    Attributes:
      chip: name of the chip.
      clock: its cycles in a second.
      subject: which cell, or "linear recurrence".
      gradients: whether gradients are computed too.
      hbm_bound: cycles in which the arrays that must be read and written pass the HBM.
      cycles: of each program, XLA's estimates and kernels by their bundles, which do not wait for
        the HBM; the first is claimed to be good.
    """

    chip: str
    clock: float
    subject: str
    gradients: bool
    hbm_bound: float
    cycles: Mapping[str, float]

    def at_least(self, name: str) -> float:
        """Cycles of a program, or the bound where that is more."""
        return max(self.cycles[name], self.hbm_bound)


def cell_schedule(
    compile_for: Callable[..., Any],
    chip: str,
    cell: ways.RecurrentCell,
    sizes: Sizes,
    *,
    gradients: bool,
    names: Sequence[str] | None = None,
) -> Schedule:
    """Compiles a cell's contenders and counts their cycles.

    Args:
      compile_for: `jaxeff.aot.compile_for_target`.
      chip: "v5e" or another TPU.
      cell: what is run.
      sizes: B, T and H.
      gradients: compute gradients too.
      names: of the contenders to compile; None takes all.
    """
    weights = jax.ShapeDtypeStruct((cell.num_weights, sizes.width), jnp.float32)
    programs = {
        name: (run, (sizes.spec(3), weights))
        for name, run in ways.contenders(cell, sizes.steps, "mosaic_tpu").items()
        if names is None or name in names
    }
    arrays = ways.least_arrays(cell.num_states, gradients=gradients)
    return _schedule(compile_for, chip, cell.name, sizes, arrays, programs, gradients)


def linear_schedule(
    compile_for: Callable[..., Any],
    chip: str,
    sizes: Sizes,
    *,
    gradients: bool,
    names: Sequence[str] | None = None,
) -> Schedule:
    """The same for a diagonal linear recurrence: the kernel, and XLA by both its methods."""
    operands = sizes.spec(), sizes.spec()
    options = {
        KERNEL: {"implementation": "mosaic_tpu"},
        ASSOCIATIVE: {"implementation": "xla", "method": "scan"},
        ways.SCAN: {"implementation": "xla", "method": "sequential"},
    }
    programs = {
        name: (functools.partial(linear_recurrence, **choice), operands)
        for name, choice in options.items()
        if names is None or name in names
    }
    arrays = ways.least_arrays_linear(gradients=gradients)
    return _schedule(compile_for, chip, ways.LINEAR, sizes, arrays, programs, gradients)


def _schedule(compile_for, chip, subject, sizes, arrays, programs, gradients):
    cycles = {}
    for name, (run, operands) in programs.items():
        if gradients:
            run, operands = ways.with_gradients(run), (*operands, sizes.spec())
        report = compile_for(run, operands, chip)
        cycles[name] = report.estimated_cycles
    clock, bandwidth = report.target.chip.clock, report.target.chip.hbm_bandwidth
    return Schedule(
        chip=chip,
        clock=clock,
        subject=subject,
        gradients=gradients,
        hbm_bound=arrays * sizes.array_bytes / bandwidth * clock,
        cycles=cycles,
    )


def measure_schedules(chips: Sequence[str], sizes: Sizes) -> list[Schedule]:
    """Returns the schedules of both cells and of the linear recurrence on all chips.

    Raises:
      BenchError: when one fails, with the last line of what it said.
    """
    module = "jaxeff.bench.rows.pararnn_schedules"
    found = static_schedules.from_processes(module, chips, [str(sizes)])
    return [Schedule(**entry) for entries in found for entry in entries]


def main(arguments: Sequence[str]) -> None:
    """Prints all schedules on one chip."""
    chip, text = arguments
    sizes, compile_for = Sizes.parse(text), static_schedules.compiler_for(chip)
    found = []
    for gradients in (False, True):
        found.append(linear_schedule(compile_for, chip, sizes, gradients=gradients))
        for cell in (ways.GRU, ways.LSTM):
            found.append(cell_schedule(compile_for, chip, cell, sizes, gradients=gradients))
    print(json.dumps([dataclasses.asdict(entry) for entry in found]))


if __name__ == "__main__":
    main(sys.argv[1:])
