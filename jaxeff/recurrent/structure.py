"""Whether a step has the Jacobian it is said to have."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.recurrent.newton import STRUCTURES


def check_structure(
    step_fn: Callable, params: Any, x: Any, h: jax.Array, structure: str, *, tolerance: float = 1e-6
) -> None:
    """Compares the whole Jacobian of one step with the structure claimed for `parallel_rnn`.

    To be called once for a new cell, outside of `jit` and at a small size: the Jacobian has
    (B m H)^2 entries. An entry can vanish at a special state, such as zero: take a random one.

    Args:
      step_fn, params: as for `parallel_rnn`.
      x: one step's inputs, (B, ...).
      h: a state (B, H), or (B, m, H) for "block"; with B of at least 2 it is also seen whether
        the rows of the batch are kept apart.
      structure: "diagonal", "block" or "dense".
      tolerance: how large an entry that should be zero may be beside the largest of all.

    Raises:
      ValueError: for an entry outside the structure that is not zero, or an unknown structure.
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure={structure!r} is not one of {STRUCTURES}")
    rank = 3 if structure == "block" else 2
    if h.ndim != rank:
        raise ValueError(f"h has shape {h.shape}, expected {rank} axes for {structure!r}")
    jacobian = jnp.abs(jax.jit(jax.jacfwd(lambda h: step_fn(params, x, h)))(h))
    if jacobian.shape != h.shape * 2:
        raise ValueError(
            f"step_fn maps {h.shape} to {jacobian.shape[: -h.ndim]}, expected the same"
        )
    whole = (h.shape[0], h[0].size // h.shape[-1], h.shape[-1])  # rows, parts, channels
    jacobian = jacobian.reshape(whole * 2)
    rows = ~jnp.eye(h.shape[0], dtype=bool)[:, None, None, :, None, None]
    channels = ~jnp.eye(h.shape[-1], dtype=bool)[:, None, None, :]
    allowed = tolerance * jnp.max(jacobian)
    apart = jnp.max(jnp.where(rows, jacobian, 0))
    if apart > allowed:
        raise ValueError(f"step_fn mixes the rows of the batch: a derivative is {apart:.3g}")
    outside = jnp.max(jnp.where(channels, jacobian, 0))
    if structure != "dense" and outside > allowed:
        raise ValueError(
            f"structure={structure!r}, but step_fn mixes channels: a derivative outside of it is "
            f"{outside:.3g}"
        )
