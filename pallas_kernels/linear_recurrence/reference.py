"""Linear recurrences in plain JAX: the definition, and what runs where no kernel does.

The rank of `a` tells the structure of its transitions: (B, T, H) is diagonal, (B, T, m, m, H) has
m x m blocks of diagonals, (B, T, H, H) is dense. States are (B, T, H), or (B, T, m, H) for blocks.
"""

import jax
import jax.numpy as jnp
from jax import lax

DIAGONAL, DENSE, BLOCK = 3, 4, 5  # ranks of `a`


def compute_dtype(*arrays: jax.Array):
    """The dtype of the arithmetic: float64 where an operand has it, else float32."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def apply(a: jax.Array, h: jax.Array, rank: int) -> jax.Array:
    """The product of transitions with states; `rank` is that of a whole `a`, here any axis of time
    and batch may be missing."""
    if rank == DIAGONAL:
        return a * h
    if rank == DENSE:
        return jnp.einsum("...ij,...j->...i", a, h, precision="highest")
    return sum(a[..., j, :] * h[..., j, None, :] for j in range(a.shape[-2]))


def compose(later: jax.Array, earlier: jax.Array, rank: int) -> jax.Array:
    """The transition that is `earlier` and then `later`."""
    if rank == DIAGONAL:
        return later * earlier
    if rank == DENSE:
        return jnp.einsum("...ij,...jk->...ik", later, earlier, precision="highest")
    size = later.shape[-2]
    return sum(later[..., :, j, None, :] * earlier[..., None, j, :, :] for j in range(size))


def transposed(a: jax.Array, rank: int) -> jax.Array:
    """Transposes every transition."""
    if rank == DIAGONAL:
        return a
    return jnp.swapaxes(a, -1, -2) if rank == DENSE else jnp.swapaxes(a, -2, -3)


def outer(x: jax.Array, y: jax.Array, rank: int) -> jax.Array:
    """The gradient of x . (a y) with respect to `a`."""
    if rank == DIAGONAL:
        return x * y
    if rank == DENSE:
        return x[..., :, None] * y[..., None, :]
    return x[..., :, None, :] * y[..., None, :, :]


def scan(a: jax.Array, b: jax.Array, h0: jax.Array, *, reverse: bool = False) -> jax.Array:
    """The states by an associative scan, of depth log T.

    Args:
      a: transitions, of any of the three structures.
      b: what each step adds.
      h0: the state before the first step, or behind the last one with `reverse`.
      reverse: run from the last step to the first.

    Returns:
      like `b`.
    """
    rank, dtype, first = a.ndim, compute_dtype(a, b), _first(reverse)
    a, h = a.astype(dtype), b.astype(dtype)
    h = h.at[:, first].add(apply(a[:, first], h0.astype(dtype), rank))

    def combine(earlier, later):
        a, h = later
        return compose(a, earlier[0], rank), apply(a, earlier[1], rank) + h

    return lax.associative_scan(combine, (a, h), axis=1, reverse=reverse)[1].astype(b.dtype)


def sequential(a: jax.Array, b: jax.Array, h0: jax.Array, *, reverse: bool = False) -> jax.Array:
    """The same states step by step."""
    rank, dtype = a.ndim, compute_dtype(a, b)

    def step(h, inputs):
        a_t, b_t = inputs
        h = apply(a_t.astype(dtype), h, rank) + b_t.astype(dtype)
        return h, h.astype(b.dtype)

    time_first = jnp.moveaxis(a, 1, 0), jnp.moveaxis(b, 1, 0)
    _, h = lax.scan(step, h0.astype(dtype), time_first, reverse=reverse)
    return jnp.moveaxis(h, 0, 1)


def shifted(x: jax.Array, first: jax.Array, *, reverse: bool) -> jax.Array:
    """Each step's value moved to the step that runs next; the first step gets `first`."""
    first = jnp.expand_dims(first, 1).astype(x.dtype)
    parts = [x[:, 1:], first] if reverse else [first, x[:, :-1]]
    return jnp.concatenate(parts, axis=1)


def adjoint_operands(a: jax.Array, *, reverse: bool) -> jax.Array:
    """The transitions of the adjoint recurrence that runs in the direction given.

    Its step t multiplies with the transposed transition of the step that ran before it, and its
    first step with nothing.
    """
    return shifted(transposed(a, a.ndim), jnp.zeros_like(a[:, 0]), reverse=reverse)


def _first(reverse):
    return -1 if reverse else 0
