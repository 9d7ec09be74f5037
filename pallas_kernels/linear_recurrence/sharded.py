"""Linear recurrences whose steps are split over devices."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_recurrence import reference


def varying_alike(*arrays: jax.Array, axis_name: str | None = None) -> list[jax.Array]:
    """Inside a `shard_map`, marks all arrays as varying over the axes that any of them does.

    With `axis_name`, over that axis too. The gradient of an array that was the same on the devices
    of an axis is thereby summed over them.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*varying, () if axis_name is None else (axis_name,))
    return [
        lax.pcast(x, tuple(sorted(union - own)), to="varying") if union - own else x
        for x, own in zip(arrays, varying, strict=True)
    ]


def carried_in(
    a: jax.Array, b: jax.Array, h0: jax.Array, axis_name: str, *, reverse: bool = False
) -> jax.Array:
    """The state in which a device's own steps start.

    Each device reduces its steps to one transition and one offset, these totals are gathered, and
    those of the devices that come before are applied to `h0`: what travels does not grow with the
    number of steps.

    Args:
      a, b: the device's own steps.
      h0: the state before the first step of the first device (behind the last of the last, with
        `reverse`).
      axis_name: of the mesh axis along which the steps are split.
      reverse: run from the last device to the first.

    Returns:
      like `h0`.
    """
    rank, dtype = a.ndim, h0.dtype
    totals = lax.all_gather(_total(a.astype(dtype), b.astype(dtype), reverse=reverse), axis_name)

    def step(h, total):
        return reference.apply(total[0], h, rank) + total[1], h

    _, before = lax.scan(step, h0, totals, reverse=reverse)
    return jnp.take(before, lax.axis_index(axis_name), axis=0)


def _total(a, b, *, reverse):
    """All steps as one: neighbours are composed until a single one is left."""
    rank = a.ndim
    while a.shape[1] > 1:
        even = a.shape[1] // 2 * 2
        (a0, a1), (b0, b1) = ((x[:, 0:even:2], x[:, 1:even:2]) for x in (a, b))
        if reverse:
            (a0, a1), (b0, b1) = (a1, a0), (b1, b0)
        composed = reference.compose(a1, a0, rank), reference.apply(a1, b0, rank) + b1
        a, b = (
            jnp.concatenate([x, rest[:, even:]], axis=1)
            for x, rest in zip(composed, (a, b), strict=True)
        )
    return a[:, 0], b[:, 0]
