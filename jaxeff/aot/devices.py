"""Devices of a target, which can be compiled for and not run on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxeff.aot.environment import check_compiler, prepare_compiler
from jaxeff.aot.targets import Chip, Target, TargetError, parse_target

CUDA_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: {num_sms} fpus_per_core: 128 clock_rate_ghz: {clock_ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{description}"
"""


def target_devices(target: str | Target) -> list[Any]:
    """Returns the devices of a target, which can be compiled for and not run on.

    Raises:
      CompilerMissingError: when libtpu or the CUDA wheels are not installed.
      TargetError: when the target is unknown or the compiler refuses its topology.
    """
    return list(_devices(parse_target(target)))


@functools.lru_cache(maxsize=32)
def _devices(target: Target) -> tuple[Any, ...]:
    check_compiler(target)
    prepare_compiler(target)
    try:
        if target.is_tpu:
            # Two cores joined into one device is what v4 machines run; v5p has it by default.
            joined = {"chip_config_name": "megacore"} if target.chip.name == "v4" else {}
            topology = topologies.get_topology_desc(
                platform="tpu", topology_name=target.topology_name, **joined
            )
        else:
            topology = topologies.get_topology_desc(
                platform="cuda",
                target_config=_cuda_description(target.chip),
                topology=f"1x1x{target.num_chips}",
            )
    except jax.errors.JaxRuntimeError as error:
        raise TargetError(f"the compiler refuses target {target}: {error}") from error
    devices = tuple(topology.devices)
    if len(devices) != target.num_devices:
        raise TargetError(
            f"target {target} has {len(devices)} devices; expected {target.num_devices}"
        )
    return devices


def _cuda_description(chip: Chip) -> str:
    return CUDA_TARGET.format(
        num_sms=chip.num_sms,
        clock_ghz=round(chip.clock / 1e9, 2),
        bandwidth=int(chip.hbm_bandwidth),
        memory=int(chip.hbm_bytes),
        description=chip.description,
    )


def target_mesh(
    target: str | Target, shape: Sequence[int] = (1,), axis_names: Sequence[str] = ("x",)
) -> Mesh:
    """Returns a mesh over the first devices of a target.

    Raises:
      TargetError: when the target has fewer devices than the mesh.
    """
    target = parse_target(target)
    devices = target_devices(target)
    needed = int(np.prod(shape))
    if needed > len(devices):
        raise TargetError(
            f"a mesh of shape {tuple(shape)} needs {needed} devices; {target} has {len(devices)}"
        )
    return jax.make_mesh(
        tuple(shape),
        tuple(axis_names),
        axis_types=(jax.sharding.AxisType.Auto,) * len(shape),
        devices=devices[:needed],
    )
