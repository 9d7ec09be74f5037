"""What a compiled program will need on its target."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxeff.aot.costs import Costs
from jaxeff.aot.gpu_kernels import KernelResources
from jaxeff.aot.schedule import KernelSchedule
from jaxeff.aot.targets import GIB, Target


@dataclasses.dataclass(frozen=True)
class Memory:
    """Device memory of one execution, bytes per device.

    Attributes:
      arguments, outputs, temporaries, code: as allocated.
      aliased: outputs that take the place of donated arguments.
      capacity: what the chip has.
      largest: the largest buffers, as (bytes, shape).
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    capacity: float
    largest: tuple[tuple[float, str], ...] = ()

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    @property
    def headroom(self) -> float:
        """Bytes left; negative when the program does not fit."""
        return self.capacity - self.total

    @property
    def fits(self) -> bool:
        return self.headroom >= 0


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time of one execution, in seconds: each resource alone at its peak.

    Attributes:
      compute: matrix products at the bfloat16 peak; of kernels only what their authors state.
      hbm: traffic with device memory.
      collectives: traffic between devices.
      estimate: the compiler's own estimate of the time on the cores, with kernels by their static
        schedules, nothing overlapping; None where it gives none (GPU).
    """

    compute: float
    hbm: float
    collectives: float
    estimate: float | None

    @property
    def seconds(self) -> float:
        """The bound when everything overlaps perfectly."""
        return max(self.compute, self.hbm, self.collectives)

    @property
    def limit(self) -> str:
        """Which resource sets the bound."""
        return max(("compute", "hbm", "collectives"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """A Pallas or Triton kernel; identical calls are one entry.

    Attributes:
      name: name of the instruction.
      count: calls per execution of the program.
      flops: of one call, by its author's estimate, or None.
      nbytes: of one call.
      schedule: static schedule (TPU), if the compiler wrote one.
      resources: registers, spills and occupancy (GPU), if the kernel's PTX is at hand.
    """

    name: str
    count: float
    flops: float | None
    nbytes: float
    schedule: KernelSchedule | None = None
    resources: KernelResources | None = None


@dataclasses.dataclass(frozen=True)
class CompiledReport:
    """What a compiled program will need on its target.

    Attributes:
      name: of the program.
      target: what it was compiled for.
      num_devices: devices the program runs on.
      memory, costs, roofline: per device and execution.
      collective_seconds: time of each collective in ``costs.collectives``.
      kernels: Pallas and Triton kernels.
      xla_flops: what ``cost_analysis`` says, loop bodies counted once; None if it says nothing.
      model_flops: flops of the computation as the model defines it (no recomputation), over all
        devices; None if not given.
      compile_seconds: time the compiler took.
      hlo: text of the optimised module.
      executable: the compiled program; None when it does not fit.
    """

    name: str
    target: Target
    num_devices: int
    memory: Memory
    costs: Costs
    roofline: Roofline
    collective_seconds: tuple[float, ...]
    kernels: tuple[KernelReport, ...]
    xla_flops: float | None
    model_flops: float | None
    compile_seconds: float
    hlo: str = dataclasses.field(repr=False, compare=False)
    executable: Any = dataclasses.field(repr=False, compare=False)

    @property
    def mfu_bound(self) -> float | None:
        """Model flops utilisation if the roofline is reached."""
        if self.model_flops is None or not self.roofline.seconds:
            return None
        available = self.num_devices * self.target.chip.peak_flops * self.roofline.seconds
        return self.model_flops / available

    @property
    def unstated_kernels(self) -> tuple[KernelReport, ...]:
        """Kernels whose flops are not known, and so not in the roofline."""
        return tuple(kernel for kernel in self.kernels if kernel.flops is None)

    @property
    def estimated_cycles(self) -> float | None:
        """The compiler's estimate in cycles, kernels by their static schedules (TPU)."""
        if self.roofline.estimate is None:
            return None
        return self.roofline.estimate * self.target.chip.clock

    def kernel(self, name: str) -> KernelReport:
        """Returns the kernel whose name starts with ``name``.

        Raises:
          KeyError: if there is none, naming those there are.
        """
        for kernel in self.kernels:
            if kernel.name.startswith(name):
                return kernel
        names = ", ".join(k.name for k in self.kernels) or "none"
        raise KeyError(f"the program has no kernel {name!r}; its kernels: {names}")


class DoesNotFitError(RuntimeError):
    """The compiler found that the program needs more device memory than there is.

    Attributes:
      report: the report, as far as the compiler got: no executable, kernels without schedules.
    """

    def __init__(self, report: CompiledReport):
        self.report = report
        required, available = report.memory.total / GIB, report.memory.capacity / GIB
        super().__init__(
            f"{report.name} needs {required:.2f} GiB of memory on each {report.target.chip.name}, "
            f"which has {available:.2f} GiB: {required - available:.2f} GiB too much"
        )
