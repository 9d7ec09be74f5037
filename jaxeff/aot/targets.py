"""Chips and slices that a program can be compiled for without being there.

Everything here is plain data: importing this module does not import jax, because the environment of
jax has to be set (`jaxeff.aot.environment`) before it is imported.

A *device* is what ``jax.devices()`` lists: one chip on v4 (its two cores joined), v5e, v5p and v6e;
one of the chip's two halves on tpu7x; one GPU. All figures are per device.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re

GIB = 2**30


class TargetError(ValueError):
    """A target is unknown, or its topology cannot exist."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Vendor data sheet of one device.

    Attributes:
      name: short name, as in ``--target``.
      description: name in full.
      platform: "tpu" or "cuda".
      peak_flops: dense bfloat16 flops per second.
      hbm_bytes: memory a program may use. For TPUs this is what the compiler itself reports as
        available (the data sheet's capacity less its own reserve).
      hbm_bandwidth: bytes per second.
      link_bandwidth: bytes per second in one direction, of one interconnect link (TPU) or of all
        NVLinks together (GPU).
      num_dims: dimensions of a slice's torus; 0 for a GPU.
      wrap: a torus dimension closes into a ring when its size is a multiple of this.
      devices_per_chip: 2 where jax lists a chip's halves as devices.
      flops_per_cycle: bfloat16 flops per cycle of all matrix units; with ``peak_flops`` it gives
        the clock. Agrees with the compiler's own cycle estimates of large matrix products.
      mxu_size: rows and columns of one systolic array (TPU).
      num_mxus: systolic arrays (TPU).
      num_cores: tensor cores that share the device's work (2 on v4 and v5p).
      vmem_bytes: vector memory of one core (TPU), or shared memory of one multiprocessor (GPU).
      num_sms: streaming multiprocessors (GPU).
    """

    name: str
    description: str
    platform: str
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    num_dims: int = 0
    wrap: int = 1
    devices_per_chip: int = 1
    flops_per_cycle: int = 0
    mxu_size: int = 0
    num_mxus: int = 0
    num_cores: int = 1
    vmem_bytes: int = 0
    num_sms: int = 0

    @property
    def clock(self) -> float:
        """Cycles per second of the matrix units at peak."""
        return self.peak_flops / self.flops_per_cycle


# Peaks, bandwidths and link counts: vendor data sheets ("system architecture" pages of the cloud's
# TPU versions; H100 SXM and H200 SXM data sheets). Half of a bidirectional figure is one direction.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4", "TPU v4", "tpu", 275e12, 30.75 * GIB, 1228e9, 50e9,
            num_dims=3, wrap=4, flops_per_cycle=2 * 4 * 128 * 128 * 2,
            mxu_size=128, num_mxus=8, num_cores=2, vmem_bytes=16 * 2**20,
        ),
        Chip(
            "v5e", "TPU v5e", "tpu", 197e12, 15.75 * GIB, 819e9, 50e9,
            num_dims=2, wrap=16, flops_per_cycle=4 * 128 * 128 * 2,
            mxu_size=128, num_mxus=4, vmem_bytes=128 * 2**20,
        ),
        Chip(
            "v5p", "TPU v5p", "tpu", 459e12, 95.73 * GIB, 2765e9, 100e9,
            num_dims=3, wrap=4, flops_per_cycle=2 * 4 * 128 * 128 * 2,
            mxu_size=128, num_mxus=8, num_cores=2, vmem_bytes=64 * 2**20,
        ),
        # An array of 256 x 256 takes two rows a cycle on v6e and tpu7x.
        Chip(
            "v6e", "TPU v6e", "tpu", 918e12, 31.24 * GIB, 1640e9, 100e9,
            num_dims=2, wrap=16, flops_per_cycle=2 * 2 * 256 * 256 * 2,
            mxu_size=256, num_mxus=2, vmem_bytes=128 * 2**20,
        ),
        # Half a chip: half of its flops, memory and links.
        Chip(
            "tpu7x", "TPU7x", "tpu", 1153.5e12, 94.74 * GIB, 3690e9, 50e9,
            num_dims=3, wrap=4, devices_per_chip=2, flops_per_cycle=2 * 2 * 256 * 256 * 2,
            mxu_size=256, num_mxus=2, vmem_bytes=64 * 2**20,
        ),
        # 4096 dense bfloat16 flops per cycle and multiprocessor.
        Chip(
            "h100", "NVIDIA H100 80GB HBM3", "cuda", 989.4e12, 79.6 * GIB, 3352e9, 450e9,
            flops_per_cycle=132 * 4096, vmem_bytes=228 * 2**10, num_sms=132,
        ),
        Chip(
            "h200", "NVIDIA H200", "cuda", 989.4e12, 140.4 * GIB, 4800e9, 450e9,
            flops_per_cycle=132 * 4096, vmem_bytes=228 * 2**10, num_sms=132,
        ),
    )
}  # fmt: skip

ALIASES = {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "v6lite": "v6e",
    "trillium": "v6e",
    "v7x": "tpu7x",
    "7x": "tpu7x",
    "ironwood": "tpu7x",
}

MAX_GPUS = 8  # GPUs that share one NVLink switch


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip and how many of them, arranged how.

    Attributes:
      chip: the chip.
      topology: chips along each torus dimension; ``(n,)`` for n GPUs of one machine.
    """

    chip: Chip
    topology: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        return math.prod(self.topology)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices_per_chip

    @property
    def is_tpu(self) -> bool:
        return self.chip.platform == "tpu"

    @property
    def topology_name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.topology))}"

    def __str__(self) -> str:
        return self.topology_name if self.is_tpu or self.num_chips > 1 else self.chip.name


def parse_target(text: str | Target) -> Target:
    """Returns the target that ``text`` names: ``v5p:4x4x4``, ``v5e`` (one chip), ``h100``.

    Args:
      text: ``<chip>`` or ``<chip>:<topology>``; the topology is ``AxB`` for v5e and v6e, ``AxBxC``
        for v4, v5p and tpu7x (a last dimension of 1 may be left out), and a number of GPUs of one
        machine for h100 and h200.

    Raises:
      TargetError: for an unknown chip (with the nearest known one) or a topology that cannot exist.
    """
    if isinstance(text, Target):
        return text
    name, _, shape = text.strip().lower().partition(":")
    chip = _find_chip(name, text)
    if not shape:
        return Target(chip, (1,) * max(chip.num_dims, 1))
    if not re.fullmatch(r"\d+(x\d+)*", shape):
        raise TargetError(
            f"target {text!r}: topology {shape!r} is not of the form {_shape_hint(chip)}"
        )
    topology = tuple(int(size) for size in shape.split("x"))
    return Target(chip, _check_topology(chip, topology, text))


def _find_chip(name: str, text: str) -> Chip:
    key = ALIASES.get(name, name)
    if key in CHIPS:
        return CHIPS[key]
    known = sorted(CHIPS)
    close = difflib.get_close_matches(name, [*known, *ALIASES], n=1, cutoff=0.4)
    hint = f"; did you mean {ALIASES.get(close[0], close[0])!r}?" if close else ""
    raise TargetError(f"unknown chip {name!r} in target {text!r}{hint} Known: {', '.join(known)}")


def _shape_hint(chip: Chip) -> str:
    if chip.num_dims == 0:
        return f"{chip.name}:N (N GPUs of one machine)"
    return f"{chip.name}:{'x'.join('ABC'[: chip.num_dims])} (chips along each dimension)"


def _check_topology(chip: Chip, topology: tuple[int, ...], text: str) -> tuple[int, ...]:
    if chip.num_dims == 0:
        if len(topology) != 1 or not 1 <= topology[0] <= MAX_GPUS:
            raise TargetError(
                f"target {text!r}: expected {_shape_hint(chip)} with N from 1 to {MAX_GPUS}"
            )
        return topology
    if len(topology) == chip.num_dims - 1:
        topology = (*topology, 1)
    if len(topology) != chip.num_dims or min(topology) < 1:
        raise TargetError(f"target {text!r}: expected a topology of the form {_shape_hint(chip)}")
    # A host carries 2 x 2 chips; slices are whole hosts, or part of one.
    plane, depth = topology[:2], math.prod(topology[2:])
    part_of_host = max(plane) <= 2 and depth == 1
    if not part_of_host and any(size % 2 for size in plane):
        raise TargetError(
            f"target {text!r}: the first two dimensions are {plane[0]}x{plane[1]}; expected even "
            "sizes (a host carries 2x2 chips)"
        )
    return topology
