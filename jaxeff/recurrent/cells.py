"""ParaGRU and ParaLSTM steps with their Jacobians in closed form (arXiv 2510.21450, section 3).

Elementwise functions that broadcast over leading axes: all steps of a sequence are one call. The
Jacobians are those of the steps with logistic gates and hyperbolic tangents.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def gru_step(
    params: dict,
    u: jax.Array,
    h: jax.Array,
    *,
    gate: Callable = jax.nn.sigmoid,
    candidate: Callable = jnp.tanh,
) -> jax.Array:
    """Next state (..., H) from `u` (..., 3, H), rows z, r, h, and `params["a"]` (3, H)."""
    z, _, c = _gru_gates(params["a"], u, h, gate, candidate)
    return (1 - z) * h + z * c


def gru_jacobian(params: dict, u: jax.Array, h: jax.Array, after: jax.Array) -> jax.Array:
    """Diagonal (..., H) of the derivative of `gru_step` in `h`; `after` is not used."""
    a = params["a"]
    z, r, c = _gru_gates(a, u, h)
    through_update = (c - h) * z * (1 - z) * a[0]
    through_candidate = z * (1 - c * c) * a[2] * (r + h * r * (1 - r) * a[1])
    return (1 - z) + through_update + through_candidate


def lstm_step(
    params: dict,
    u: jax.Array,
    state: jax.Array,
    *,
    gate: Callable = jax.nn.sigmoid,
    candidate: Callable = jnp.tanh,
    squash: Callable = jnp.tanh,
) -> jax.Array:
    """Next state (..., 2, H), rows c, h, from `u` (..., 3, H), rows f, o, c.

    `params` holds `a` (3, H), rows f, o, c, and `peephole` (2, H), rows f, o. The forget gate
    looks at the old c, the output gate at the new one; h is the output gate times `squash` of c.
    """
    a, peephole = params["a"], params["peephole"]
    c, h = state[..., 0, :], state[..., 1, :]
    f, g = _lstm_gates(a, peephole, u, c, h, gate, candidate)
    c = f * c + (1 - f) * g
    o = gate(a[1] * h + u[..., 1, :] + peephole[1] * c)
    return jnp.stack([c, o * squash(c)], axis=-2)


def lstm_jacobian(params: dict, u: jax.Array, state: jax.Array, after: jax.Array) -> jax.Array:
    """Blocks (..., 2, 2, H) of the derivative of `lstm_step` in `state`.

    The new c is read from `after`, the solver's iterate at the same step, not computed again: at
    the solution they are equal, and before it they differ by the residual.
    """
    a, peephole = params["a"], params["peephole"]
    c, h, new = state[..., 0, :], state[..., 1, :], after[..., 0, :]
    f, g = _lstm_gates(a, peephole, u, c, h)
    o = jax.nn.sigmoid(a[1] * h + u[..., 1, :] + peephole[1] * new)
    squashed, gate = jnp.tanh(new), f * (1 - f)
    cc = f + (c - g) * gate * peephole[0]
    ch = (c - g) * gate * a[0] + (1 - f) * (1 - g * g) * a[2]
    through_c = squashed * o * (1 - o) * peephole[1] + o * (1 - squashed * squashed)
    hh = squashed * o * (1 - o) * a[1] + through_c * ch
    rows = [jnp.stack([cc, ch], -2), jnp.stack([through_c * cc, hh], -2)]
    return jnp.stack(rows, axis=-3)


def _gru_gates(a, u, h, gate=jax.nn.sigmoid, candidate=jnp.tanh):
    z = gate(a[0] * h + u[..., 0, :])
    r = gate(a[1] * h + u[..., 1, :])
    return z, r, candidate(a[2] * h * r + u[..., 2, :])


def _lstm_gates(a, peephole, u, c, h, gate=jax.nn.sigmoid, candidate=jnp.tanh):
    f = gate(a[0] * h + u[..., 0, :] + peephole[0] * c)
    return f, candidate(a[2] * h + u[..., 2, :])
