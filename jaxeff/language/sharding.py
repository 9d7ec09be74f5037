"""What the traced program knows of its mesh: axes, constraints and the chip it is compiled for."""

import math

import jax
from flax import linen as nn
from jax.sharding import PartitionSpec

from pallas_kernels.doors import free_axes, target_platform

__all__ = ["axis_product", "constrain", "free_axes", "mesh_axes", "target_platform"]


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
