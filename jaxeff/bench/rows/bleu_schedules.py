"""Cycles of BLEU on TPUs that are not there, by the compiler's static schedules.

``python -m jaxeff.bench.rows.bleu_schedules CHIP BATCHxLENGTHxREFERENCES...`` prints them as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.bench.rows import static_schedules
from jaxeff.metrics.bleu import sentence_bleu
from pallas_kernels.ngram_counts import tpu

MAX_ORDER = 4
# Comparing a register of 8 x 128 pairs of positions: compare and select for each order, and an add.
PAIRS_PER_REGISTER, INSTRUCTIONS_PER_REGISTER = 8 * 128, 2 * MAX_ORDER + 1
VECTOR_SLOTS = 4  # vector instructions in a bundle, v5e and v6e alike


@dataclasses.dataclass(frozen=True)
class Cell:
    """Sizes of one comparison."""

    batch: int
    length: int
    num_references: int

    @property
    def bound(self) -> float:
        """Least cycles for comparing all pairs of positions once, every slot busy.

        The pairs are each candidate position's with the earlier ones and with all of the
        references'.
        """
        keys = (self.length - 1) / 2 + self.num_references * self.length
        registers = self.batch * self.length * keys / PAIRS_PER_REGISTER
        return registers * INSTRUCTIONS_PER_REGISTER / VECTOR_SLOTS

    def __str__(self):
        return f"{self.batch}x{self.length}x{self.num_references}"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Cycles of one call on one core, all sentences full.

    Attributes:
      chip: name of the chip.
      clock: its cycles in a second.
      kernel: of the program with the Pallas kernel.
      kernel_alone: of the kernel in it.
      sort: of the program that sorts.
    """

    chip: str
    clock: float
    kernel: float
    kernel_alone: float
    sort: float


def schedule(compile_for: Callable[..., Any], chip: str, cell: Cell) -> Schedule:
    """Compiles both programs for `chip` and counts their cycles.

    Args:
      compile_for: `jaxeff.aot.compile_for_target`.
      chip: "v5e" or "v6e".
      cell: the sizes.
    """
    with_sort = _compile(compile_for, chip, cell, method="sort")
    with_kernel = _compile(compile_for, chip, cell, implementation="mosaic_tpu")
    kernel = with_kernel.kernel("ngram_counts")
    trips = tpu.loop_trips(
        cell.batch,
        cell.length,
        cell.num_references,
        cell.length,
        max_order=MAX_ORDER,
        grid_trips=kernel.schedule.grid_steps,
    )
    alone = kernel.count * kernel.schedule.bundles_with(trips)
    return Schedule(
        chip=chip,
        clock=with_kernel.target.chip.clock,
        kernel=with_kernel.costs.cycles + alone,
        kernel_alone=alone,
        sort=with_sort.estimated_cycles,
    )


def _compile(compile_for, chip, cell, **choice):
    score = functools.partial(sentence_bleu, smoothing="floor", pad_id=None, **choice)
    candidates = jax.ShapeDtypeStruct((cell.batch, cell.length), jnp.int32)
    shape = (cell.batch, cell.num_references, cell.length)
    return compile_for(score, (candidates, jax.ShapeDtypeStruct(shape, jnp.int32)), chip)


def measure_schedules(chips: Sequence[str], cells: Sequence[Cell]) -> list[tuple[Cell, Schedule]]:
    """Returns the schedules of all cells on all chips, compiled in one process for each chip.

    Raises:
      BenchError: when one fails, with the last line of what it said.
    """
    module = "jaxeff.bench.rows.bleu_schedules"
    outputs = static_schedules.from_processes(module, chips, [str(cell) for cell in cells])
    found = []
    for entries in outputs:
        found += zip(cells, (Schedule(**entry) for entry in entries), strict=True)
    return found


def main(arguments: Sequence[str]) -> None:
    """Prints the schedules of the cells on one chip."""
    chip, *cells = arguments
    compile_for = static_schedules.compiler_for(chip)
    found = [schedule(compile_for, chip, Cell(*map(int, cell.split("x")))) for cell in cells]
    print(json.dumps([dataclasses.asdict(entry) for entry in found]))


if __name__ == "__main__":
    main(sys.argv[1:])
