"""What the traced program knows of its mesh: axes, constraints and the chip it is compiled for."""

import math

import jax
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec


def target_platform() -> str:
    """The platform the program being traced will run on: "cpu", "tpu" or "gpu".

    The mesh set with `jax.set_mesh` decides, so that compiling on a CPU host for the chips of a
    topology chooses their kernels; without a mesh it is the default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def free_axes() -> dict[str, int]:
    """Sizes of the mesh axes that no enclosing `shard_map` has taken; empty without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: size
        for name, size, kind in zip(
            mesh.axis_names, mesh.axis_sizes, mesh.axis_types or (), strict=True
        )
        if kind != AxisType.Manual
    }


def mesh_axes(logical: str, dimension: int | None = None) -> tuple[str, ...]:
    """Free mesh axes of several devices which the active rules give to a logical axis.

    With `dimension`, trailing axes are left out until their product divides it.
    """
    sizes = free_axes()
    given = dict(reversed(nn.get_logical_axis_rules())).get(logical) or ()
    given = (given,) if isinstance(given, str) else tuple(given)
    axes = tuple(axis for axis in given if sizes.get(axis, 1) > 1)
    while dimension is not None and dimension % math.prod(sizes[axis] for axis in axes):
        axes = axes[:-1]
    return axes


def axis_product(axes: tuple[str, ...]) -> int:
    """Number of devices along some of the mesh axes."""
    sizes = free_axes()
    return math.prod(sizes[axis] for axis in axes)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pin the sharding of an activation by its logical axes; what does not divide is replicated."""
    if math.prod(free_axes().values()) == 1:
        return x
    names = [
        mesh_axes(name, dimension) if name else ()
        for name, dimension in zip(logical, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(axes or None for axes in names)))
