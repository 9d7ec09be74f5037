"""How a claim is measured: technique and baselines in turn, in one process, warm.

Other work on the machine, clocks and temperatures drift over seconds. So every round runs all
variants one after the other, alternately forwards and backwards, and a ratio is taken within a
round before medians are taken over rounds.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

# A run shorter than this is repeated within its round, so that the clock and the dispatch of the
# last call do not count.
SHORTEST_SECONDS = 0.02

DEFAULT_ROUNDS = 5


class BenchError(RuntimeError):
    """A row cannot be measured here, and the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a run may return to say what was measured, in place of the skeleton's own clock.

    Attributes:
      seconds: the time that counts; None takes the time of the whole call.
      values: other measurements of this run, by name.
    """

    seconds: float | None = None
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)


Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One thing that is timed.

    Attributes:
      name: unique within its case.
      prepare: called once; returns the function that is timed. That function's result (arrays, or
        None when it has waited itself) is waited for within the time, unless it is a ``Sample``.
    """

    name: str
    prepare: Callable[[], Run]


@dataclasses.dataclass(frozen=True)
class Round:
    """The measurements of one round.

    Attributes:
      seconds: seconds of one run, by variant.
      values: the ``Sample.values`` of each variant that returned one.
    """

    seconds: Mapping[str, float]
    values: Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure beside the ratio, computed in every round.

    Attributes:
      name: what it is.
      unit: its unit, empty for a plain number.
      of: its value in one round.
    """

    name: str
    unit: str
    of: Callable[[Round], float]


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: a technique against its baselines at one size.

    Attributes:
      name: which size or kind.
      technique: what is claimed to be good.
      baselines: what it is compared with; the first one gives the ratio.
      ratio: of one round; None takes first baseline's seconds over the technique's, a speed-up.
      ratio_name: what the ratio is; None says which seconds are divided.
      limit: the ratio that cannot be exceeded (roofline, exact count), if there is one.
      limit_note: a sentence that says what the limit is.
      paper: the paper's ratio for this case, as text.
      figures: further figures.
    """

    name: str
    technique: Variant
    baselines: Sequence[Variant] = ()
    ratio: Callable[[Round], float] | None = None
    ratio_name: str | None = None
    limit: float | None = None
    limit_note: str = ""
    paper: str = ""
    figures: Sequence[Figure] = ()

    def __post_init__(self):
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise ValueError(f"variants of case {self.name!r} share a name: {names}")
        if self.ratio is None and not self.baselines:
            raise ValueError(f"case {self.name!r} needs a baseline or a ratio")

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The technique and the baselines."""
        return (self.technique, *self.baselines)

    def ratio_of(self, measured: Round) -> float:
        """Returns the ratio of one round."""
        if self.ratio is not None:
            return self.ratio(measured)
        return measured.seconds[self.baselines[0].name] / measured.seconds[self.technique.name]

    def name_of_ratio(self) -> str:
        """Returns what the ratio is."""
        if self.ratio_name is not None or not self.baselines:
            return self.ratio_name or "ratio"
        return f"{self.baselines[0].name} / {self.technique.name}"


class Settings(Protocol):
    """A row's class: a frozen dataclass of settings that knows how to measure them.

    It may have class attributes ``ON_ACCELERATOR``, the settings that differ there, and ``ROUNDS``,
    how many rounds to take unless the command line says.
    """

    def cases(self, device: jax.Device) -> Iterator[Case]:
        """Yields the cases to measure on ``device``; is resumed when a case has been measured.

        Raises:
          BenchError: when something needed is not there.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and range over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Spread:
        """Returns the spread of the values of all rounds."""
        return cls(statistics.median(values), min(values), max(values))


@dataclasses.dataclass(frozen=True)
class Measured:
    """A figure over all rounds."""

    name: str
    unit: str
    spread: Spread


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """What one case gave; see ``Case``.

    Attributes:
      fastest: the ratio of each variant's fastest run: on a busy machine, nearer to what it would
        be alone than the median is.
      seconds: of one run, by variant.
    """

    name: str
    ratio_name: str
    ratio: Spread
    fastest: float
    limit: float | None
    limit_note: str
    paper: str
    seconds: dict[str, Spread]
    figures: tuple[Measured, ...]


@dataclasses.dataclass(frozen=True)
class RowResult:
    """What one row gave, with the settings it was measured with."""

    name: str
    claim: str
    paper: str
    source: str
    settings: dict[str, Any]
    rounds: int
    cases: tuple[CaseResult, ...]


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where and with what the figures were measured.

    Attributes:
      load: processes that wanted a core, on average over the minute before (Unix): with more than
        the cores have room for, times are those of a shared machine.
    """

    date: str
    platform: str
    device: str
    processor: str
    cores: int
    load: float | None
    python: str
    versions: dict[str, str]


def environment(device: jax.Device) -> Environment:
    """Describes the device, the machine and the installed versions."""
    names = ("jaxeff", "jax", "jaxlib", "flax", "optax", "torch")
    return Environment(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        platform=device.platform,
        device=device.device_kind,
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        python=platform.python_version(),
        versions={name: version for name in names if (version := _version(name))},
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure_case(case: Case, rounds: int) -> CaseResult:
    """Prepares every variant, warms them up, and measures them in interleaved rounds.

    Raises:
      ValueError: for fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; expected at least 1")
    runs = {variant.name: variant.prepare() for variant in case.variants}
    repeats = {name: _warm_up(run) for name, run in runs.items()}
    measured = []
    for index in range(rounds):
        # Garbage of one variant must not be collected in the time of another.
        gc.collect()
        order = list(runs) if index % 2 == 0 else list(runs)[::-1]
        samples = {name: _sample(runs[name], repeats[name]) for name in order}
        measured.append(
            Round(
                seconds={name: samples[name].seconds for name in runs},
                values={name: samples[name].values for name in runs},
            )
        )
    seconds = {name: Spread.over([r.seconds[name] for r in measured]) for name in runs}
    fastest = Round({name: spread.low for name, spread in seconds.items()}, measured[-1].values)
    return CaseResult(
        name=case.name,
        ratio_name=case.name_of_ratio(),
        ratio=Spread.over([case.ratio_of(r) for r in measured]),
        fastest=case.ratio_of(fastest),
        limit=case.limit,
        limit_note=case.limit_note,
        paper=case.paper,
        seconds=seconds,
        figures=tuple(
            Measured(f.name, f.unit, Spread.over([f.of(r) for r in measured])) for f in case.figures
        ),
    )


def _warm_up(run: Run) -> int:
    """Runs twice (the first run compiles); returns how often to repeat it within a round."""
    _sample(run, 1)
    seconds = _sample(run, 1).seconds
    return max(1, round(SHORTEST_SECONDS / max(seconds, 1e-7)))


def _sample(run: Run, repeats: int) -> Sample:
    """Times ``repeats`` calls together; returns the seconds of one."""
    # An accelerator runs its queue in order, so that waiting for the last call is enough; a CPU may
    # run calls that do not depend on one another at the same time.
    wait_for_each = jax.default_backend() == "cpu"
    own = []
    started = time.perf_counter()
    for _ in range(repeats):
        result = run()
        if isinstance(result, Sample):
            own.append(result)
        elif wait_for_each:
            jax.block_until_ready(result)
    if not own:
        jax.block_until_ready(result)
    seconds = (time.perf_counter() - started) / repeats
    if not own:
        return Sample(seconds)
    stated = [sample.seconds for sample in own if sample.seconds is not None]
    return Sample(statistics.fmean(stated) if stated else seconds, own[-1].values)
