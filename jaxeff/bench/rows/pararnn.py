"""Nonlinear recurrences solved for all steps at once, against loops over time."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from jaxeff.bench.measure import BenchError, Case, Figure, Round, Sample, Variant
from jaxeff.bench.rows import pararnn_contenders as ways
from jaxeff.bench.rows import pararnn_schedules as schedules
from jaxeff.bench.rows import static_schedules
from pallas_kernels import doors, linear_recurrence

TOLERANCE = 1e-3  # of states and gradients, relative to the largest of each or to one
MEMORY = "read and write"
PAPER = {
    ("GRU", 512): "up to 665x over a Python loop, 2.6x over Mamba (A100)",
    ("LSTM", 512): "1.5x over Mamba (A100)",
}

NOTE = (
    f"Newton takes three iterations. The {ways.PYTHON} dispatches every operation of every step on "
    "its own, as the baseline of the paper's 665x does; the linear recurrence, one scan with its "
    "operands ready, stands for Mamba's."
)
CPU_NOTE = (
    "no limit. A CPU has no kernels: the kernel scan is left out, and the fused forms are XLA's, "
    f"Newton by tiles of 128 steps and a loop with its adjoint as an associative scan. {NOTE}"
)
ACCELERATOR_NOTE = (
    f"no limit. The memory's rate is that of `{MEMORY}`, a sum of the three projections. Rates "
    "count what must be moved: projections and states once, and what the gradients need besides. "
    f"{NOTE}"
)
SCHEDULE_NOTE = (
    "not measured: static schedules of whole programs, nothing overlapping, float32. Seconds are "
    "those of the cycles, or of the least HBM traffic (as far as arrays must be read and written) "
    "if that takes longer. The limit is the first baseline's cycles over those of that traffic."
)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ParaRnn:
    """Seconds of ParaGRU and ParaLSTM over all steps, forward and with gradients.

    See arXiv 2510.21450, figures 2 and 5. Projections are ready, standard normal; recurrent weights
    are uniform within 0.5 of zero. States and gradients of all ways are compared before they are
    timed.

    Attributes:
      batch, width: B and H.
      lengths: T of the GRU's cases.
      lstm_lengths: the same of the LSTM's.
      loop_steps: the most steps for which the Python loop is timed, forward.
      memory_rate: whether to give achieved bytes a second, beside those of a large sum.
      schedule_chips: TPUs to compile for; () leaves the static schedules out.
      schedule_sizes: B, T and H of the static schedules.
    """

    batch: int = 2
    width: int = 128
    lengths: tuple[int, ...] = tuple(2**n for n in range(6, 15))
    lstm_lengths: tuple[int, ...] = (2**6, 2**9, 2**12)
    loop_steps: int = 512
    memory_rate: bool = False
    schedule_chips: tuple[str, ...] = ("v5e", "v6e")
    schedule_sizes: tuple[int, int, int] = (8, 2048, 1024)

    ROUNDS: ClassVar[int] = 3
    ON_ACCELERATOR: ClassVar[dict] = {
        "batch": 8,
        "width": 1024,
        "lstm_lengths": tuple(2**n for n in range(6, 15)),
        "memory_rate": True,
    }

    def cases(self, device: jax.Device) -> Iterator[Case]:
        """Yields the static schedules, then each cell at each length, forward and with gradients.

        Raises:
          BenchError: when two ways do not agree.
        """
        yield from self._schedule_cases()
        sizes = [(ways.GRU, steps) for steps in self.lengths]
        sizes += [(ways.LSTM, steps) for steps in self.lstm_lengths]
        # The mesh of one device tells the solver that it may use a kernel, whatever else is here.
        with jax.default_device(device), jax.set_mesh(Mesh(np.array([device]), ("device",))):
            for cell, steps in sizes:
                for gradients in (False, True):
                    yield self._case(cell, steps, gradients)

    def _case(self, cell, steps, gradients):
        kernels = doors.KERNEL_OF_PLATFORM.get(doors.target_platform())
        operands = make_operands(cell, self.batch, steps, self.width)
        programs = _programs(ways.contenders(cell, steps, kernels), operands, kernels)
        runs = _agreeing(f"{cell.name}, T={steps}", programs, operands[-1], gradients)
        if not gradients and steps <= self.loop_steps:
            runs[ways.PYTHON] = functools.partial(ways.python_loop, cell, *operands[:2])
        if self.memory_rate:
            runs[MEMORY] = _memory_run(operands[0])
        technique, *others = (Variant(name, lambda run=run: run) for name, run in runs.items())
        baselines = _with_first(ways.SCAN, others)
        figures = [_speed_up(v.name, technique.name) for v in baselines[1:] if v.name != MEMORY]
        if self.memory_rate:
            figures += self._rates(cell, steps, gradients, runs)
        return Case(
            name=f"{_name(cell.name, gradients)}, T={steps}",
            technique=technique,
            baselines=baselines,
            limit_note=ACCELERATOR_NOTE if kernels else CPU_NOTE,
            paper="-" if gradients else PAPER.get((cell.name, steps), "-"),
            figures=figures,
        )

    def _rates(self, cell, steps, gradients, runs):
        array_bytes = 4 * self.batch * steps * self.width

        def rate(r: Round, name: str) -> float:
            arrays = 4  # read and write
            if name == ways.LINEAR:
                arrays = ways.least_arrays_linear(gradients=gradients)
            elif name != MEMORY:
                arrays = ways.least_arrays(cell.num_states, gradients=gradients)
            return arrays * array_bytes / r.seconds[name]

        def share(name):
            return lambda r: 100 * rate(r, name) / rate(r, MEMORY)

        names = [name for name in runs if name not in (MEMORY, ways.PYTHON)]
        yield Figure("memory's rate", "GB/s", lambda r: rate(r, MEMORY) / 1e9)
        yield Figure(f"rate of {names[0]}", "GB/s", lambda r: rate(r, names[0]) / 1e9)
        for name in names:
            yield Figure(f"share of memory's rate: {name}", "%", share(name))

    def _schedule_cases(self):
        if not static_schedules.can_compile(self.schedule_chips):
            return
        sizes = schedules.Sizes(*self.schedule_sizes)
        for found in schedules.measure_schedules(self.schedule_chips, sizes):
            yield _schedule_case(found, sizes)


def make_operands(
    cell: ways.RecurrentCell, batch: int, steps: int, width: int, seed: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns projections (B, T, 3, H), weights (num_weights, H) and a cotangent (B, T, H)."""
    of_u, of_weights, of_cotangent = jax.random.split(jax.random.key(seed), 3)
    u = jax.random.normal(of_u, (batch, steps, 3, width))
    weights = jax.random.uniform(of_weights, (cell.num_weights, width), minval=-0.5, maxval=0.5)
    return u, weights, jax.random.normal(of_cotangent, (batch, steps, width))


def _with_first(name, variants):
    return sorted(variants, key=lambda variant: variant.name != name)


def _name(subject, gradients):
    return f"{subject} {'with gradients' if gradients else 'forward'}"


def _programs(contenders, operands, kernels):
    """Functions and their operands by name: the contenders, and a linear recurrence."""
    u, weights, _ = operands
    programs = {name: (run, (u, weights)) for name, run in contenders.items()}
    linear = functools.partial(linear_recurrence, implementation=kernels)
    programs[ways.LINEAR] = linear, (jax.nn.sigmoid(u[:, :, 0]), u[:, :, 1])
    return programs


def _agreeing(title, programs, cotangent, gradients):
    """The programs as compiled functions without arguments, by name.

    Those that cannot run here are left out, each with its reason. Raises `BenchError` if results
    differ: then times are not of the same thing.
    """
    runs, results = {}, {}
    for name, (fn, arguments) in programs.items():
        if gradients:
            fn, arguments = ways.with_gradients(fn), (*arguments, cotangent)
        run = functools.partial(jax.jit(fn), *arguments)
        try:
            results[name] = [np.asarray(x) for x in jax.tree.leaves(run())]
        except NotImplementedError as reason:
            _log.warning("%s: %s is left out: %s", title, name, reason)
        except jax.errors.JaxRuntimeError as error:
            if name == ways.SCAN or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            _log.warning("%s: %s is left out: it needs more memory than there is", title, name)
        else:
            runs[name] = run
    results.pop(ways.LINEAR, None)
    _check(results)
    return runs


def _check(results):
    for name, arrays in results.items():
        for found, expected in zip(arrays, results[ways.SCAN], strict=True):
            difference = np.abs(found - expected).max() / max(1.0, np.abs(expected).max())
            if not difference <= TOLERANCE:
                raise BenchError(
                    f"{name} differs from {ways.SCAN} by {difference:.2g}, expected at most "
                    f"{TOLERANCE:.0e}"
                )


def _memory_run(u):
    return functools.partial(jax.jit(lambda u: u[:, :, 0] + u[:, :, 1] + u[:, :, 2]), u)


def _speed_up(name, technique):
    return Figure(f"{name} / {technique}", "", lambda r: r.seconds[name] / r.seconds[technique])


def _schedule_case(found: schedules.Schedule, sizes: schedules.Sizes) -> Case:
    """Times by static schedules: the same in every round."""

    def variant(name):
        return Variant(name, lambda: lambda: Sample(found.at_least(name) / found.clock))

    def thousands(name, cycles):
        return Figure(name, "thousand cycles", lambda r: cycles / 1e3)

    technique, *others = map(variant, found.cycles)
    name = schedules.ASSOCIATIVE if found.subject == ways.LINEAR else ways.ASSOCIATIVE
    baselines = _with_first(name, others)
    figures = [thousands(v.name, found.cycles[v.name]) for v in (technique, *baselines)]
    figures.append(thousands("least HBM traffic", found.hbm_bound))
    share = found.cycles[technique.name] / found.hbm_bound
    figures.append(Figure(f"{technique.name} / least HBM traffic", "", lambda r: share))
    return Case(
        name=f"{found.chip} static, {_name(found.subject, found.gradients)}, {sizes}",
        technique=technique,
        baselines=baselines,
        limit=found.cycles[name] / found.hbm_bound,
        limit_note=SCHEDULE_NOTE,
        paper="-",
        figures=figures,
    )
