"""What the solver needs of time: on one device, or split in order over the devices of a mesh axis.

All functions take `axis_name`, None on one device; on several they run inside a `shard_map` and see
the device's own steps. What travels is one step's state or Jacobian to a neighbour, and each
device's total for the recurrence: nothing that grows with the number of steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_recurrence import (
    linear_recurrence,
    reference,
    sharded,
    sharded_linear_recurrence,
)


def recurrence(a: jax.Array, b: jax.Array, axis_name: str | None, *, reverse: bool = False):
    """All states of the linear recurrence from zero, as `linear_recurrence` returns them."""
    if axis_name is None:
        return linear_recurrence(a, b, reverse=reverse)
    return sharded_linear_recurrence(a, b, axis_name, reverse=reverse)


def before(states: jax.Array, h0: jax.Array, axis_name: str | None) -> jax.Array:
    """The state before each step: `h0` before the first of all."""
    return reference.shifted(states, handed_on(states[:, -1], h0, axis_name), reverse=False)


def handed_on(last: jax.Array, h0: jax.Array, axis_name: str | None) -> jax.Array:
    """The last state of the device before; `h0` on the first one."""
    if axis_name is None:
        return h0
    pairs = [(i, i + 1) for i in range(lax.axis_size(axis_name) - 1)]
    received = lax.ppermute(last, axis_name, pairs)
    return jnp.where(lax.axis_index(axis_name) == 0, h0, received)


def behind(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Each step gets what belongs to the step behind it; the last of all gets zeros."""
    first = x[:, 0]
    if axis_name is None:
        first = jnp.zeros_like(first)
    else:
        pairs = [(i + 1, i) for i in range(lax.axis_size(axis_name) - 1)]
        first = lax.ppermute(first, axis_name, pairs)
    return reference.shifted(x, first, reverse=True)


def largest(residual: jax.Array, axis_name: str | None) -> jax.Array:
    """The largest magnitude of each row (B,) float32, over the steps of all devices."""
    size = jnp.max(jnp.abs(residual), axis=tuple(range(1, residual.ndim))).astype(jnp.float32)
    if axis_name is None:
        return size
    # A maximum over devices need not keep what is not a number.
    return lax.pmax(jnp.where(jnp.isnan(size), jnp.inf, size), axis_name)


def anywhere(flag: jax.Array, like: jax.Array, axis_name: str | None) -> jax.Array:
    """Whether a flag is set on any device that computes together with this one.

    Devices that talk to one another inside of a branch have to agree to take it, also those that
    hold other rows of the batch; `like` is an array that varies over the axes of all of them.
    """
    if axis_name is None:
        return flag
    axes = jax.typeof(like).manual_axis_type.varying or jax.sharding.get_abstract_mesh().manual_axes
    flag, _ = sharded.varying_alike(flag.astype(jnp.int32), like)
    return lax.pmax(flag, tuple(axes)) > 0


def in_turn(run: Callable, h0: jax.Array, axis_name: str | None) -> jax.Array:
    """The states `run(first)` of a loop over time, the devices one after the other.

    In every round all devices run their steps, each from the state that its predecessor reached in
    the round before: after as many rounds as devices the last one has started from the right state.
    """
    if axis_name is None:
        return run(h0)

    def hand_on(_, first):
        return handed_on(run(first)[:, -1], h0, axis_name)

    return run(lax.fori_loop(1, lax.axis_size(axis_name), hand_on, h0))


def check_lengths(lengths: jax.Array | None, batch: int, return_carry: bool) -> None:
    """Raises ValueError for lengths that are not integers (batch,), or that nobody asks for."""
    if lengths is None:
        return
    if not return_carry:
        raise ValueError("lengths says which state to return, and needs return_carry=True")
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths is {lengths.dtype} {lengths.shape}, expected integers {(batch,)}"
        )


def after(
    states: jax.Array, h0: jax.Array, lengths: jax.Array | None, axis_name: str | None
) -> jax.Array:
    """The state after `lengths` (B,) steps of each row, None for all of them; `h0` after none.

    On several devices lengths count the steps of all, and all get the result.
    """
    steps = states.shape[1]
    if axis_name is None and lengths is None:
        return states[:, -1]
    if lengths is None:
        lengths = jnp.full(states.shape[0], steps * lax.axis_size(axis_name))
    own = lengths if axis_name is None else lengths - lax.axis_index(axis_name) * steps
    at = jnp.clip(own - 1, 0, steps - 1).reshape(-1, *[1] * (states.ndim - 1))
    found = jnp.take_along_axis(states, at, axis=1)[:, 0]
    rows = [-1, *[1] * (h0.ndim - 1)]
    if axis_name is not None:
        mine = (own >= 1) & (own <= steps)
        found = lax.psum(jnp.where(mine.reshape(rows), found, 0), axis_name)
    return jnp.where((lengths > 0).reshape(rows), found, h0)
