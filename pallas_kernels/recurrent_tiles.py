"""What the fused recurrent cells share: Newton's method tile by tile, and the exact adjoint.

"ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models" (arXiv
2510.21450), section 3: the states of T steps solve one system of equations; each Newton iteration
solves a linear recurrence. Here the system is that of one tile of time, whose incoming state is the
last one of the tile before; a tile as long as the sequence is the plain method.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import doors
from pallas_kernels.linear_recurrence import reference as recurrence
from pallas_kernels.linear_recurrence.sharded import varying_alike

METHODS = ("auto", "newton", "sequential")
MOST_TRITON_STEPS = 256  # of a tile, what fits into registers


class Cell(NamedTuple):
    """A recurrent cell whose Jacobian has m x m blocks of diagonals.

    Its functions take tuples of arrays that broadcast against one another: three input projections,
    the weights, the m parts of the state before and after the step.
    """

    name: str
    num_states: int
    num_weights: int
    step: Callable  # (u, weights, prev) -> new
    jacobian: Callable  # (u, weights, prev, new) -> m rows of m
    gradients: Callable  # (u, weights, prev, new, grad) -> (of u, of weights)


class Config(NamedTuple):
    """How a call is computed: all that is static."""

    cell: Cell
    method: str
    implementation: str
    num_iterations: int
    damping: float
    tile: int
    channel_axes: tuple[str, ...] = doors.CHANNEL_AXES


def sigmoid(x: jax.Array) -> jax.Array:
    """The logistic function by one tanh: an exponential and a division fewer on every chip."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def newton(config: Config, u: jax.Array, weights: jax.Array, first: jax.Array) -> jax.Array:
    """The states after `num_iterations` Newton steps in each tile of time.

    The first guess of a tile takes zero for every state but the incoming one.

    Args:
      config: cell, iterations, damping and tile.
      u: (B, T, 3, H).
      weights: (num_weights, H).
      first: (m, B, H), the initial state.

    Returns:
      (m, B, T, H).
    """
    steps = u.shape[1]
    tile = min(config.tile, steps)
    tiles = -(-steps // tile)
    padded = jnp.pad(u, ((0, 0), (0, tiles * tile - steps), (0, 0), (0, 0)))
    by_tile = jnp.moveaxis(padded.reshape(u.shape[0], tiles, tile, *u.shape[2:]), 1, 0)

    def solve(incoming, u):
        states = _solve_tile(config, u, weights, incoming)
        return states[:, :, -1], states

    _, states = lax.scan(solve, first, by_tile)  # (tiles, m, B, tile, H)
    states = jnp.moveaxis(states, 0, 2)
    return states.reshape(*states.shape[:2], tiles * tile, -1)[:, :, :steps]


def _solve_tile(config, u, weights, incoming):
    cell, weights = config.cell, tuple(weights)
    u = tuple(jnp.moveaxis(u, 2, 0))
    zeros = jnp.zeros((*incoming.shape[:2], *u[0].shape[1:]), incoming.dtype)
    new = jnp.stack(cell.step(u, weights, tuple(_after(incoming, zeros))))
    for _ in range(config.num_iterations):
        prev = tuple(_after(incoming, new))
        residual = jnp.stack(cell.step(u, weights, prev)) - new
        correction = _linear(cell.jacobian(u, weights, prev, tuple(new)), residual)
        new = new + config.damping * correction
    return new


def _linear(jacobian, b, reverse=False):
    """Solves d_t = J_t d_(t-1) + b_t with d_0 = 0, over axis 2 of b (m, B, T, H)."""
    a = jnp.stack([jnp.stack(row) for row in jacobian])  # (m, m, B, T, H)
    if a.shape[0] == 1:
        return recurrence.scan(a[0, 0], b[0], jnp.zeros_like(b[0, :, 0]), reverse=reverse)[None]
    a, b = jnp.moveaxis(a, (0, 1), (2, 3)), jnp.moveaxis(b, 0, 2)
    return jnp.moveaxis(recurrence.scan(a, b, jnp.zeros_like(b[:, 0]), reverse=reverse), 2, 0)


def sequential(config: Config, u: jax.Array, weights: jax.Array, first: jax.Array) -> jax.Array:
    """The exact states, step by step; arguments and result as for `newton`."""
    weights = tuple(weights)

    def step(state, u_t):
        state = config.cell.step(tuple(jnp.moveaxis(u_t, 1, 0)), weights, state)
        return state, jnp.stack(state)

    _, states = lax.scan(step, tuple(first), jnp.moveaxis(u, 1, 0))
    return jnp.moveaxis(states, 0, 2)


def adjoint(config: Config, u, weights, first, states, grad):
    """The exact gradients of the recurrence at its stored states.

    Args:
      config: the cell.
      u: (B, T, 3, H).
      weights: (num_weights, H).
      first: (m, B, H).
      states: (m, B, T, H).
      grad: (m, B, T, H), the gradient of the loss with respect to each state by itself.

    Returns:
      the gradients of `u`, `weights` and `first`.
    """
    cell, rows = config.cell, tuple(weights)
    parts, prev = tuple(jnp.moveaxis(u, 2, 0)), tuple(_after(first, states))
    jacobian = cell.jacobian(parts, rows, prev, tuple(states))
    transposed = tuple(zip(*jacobian, strict=True))
    # Step t hears of its successor through the successor's Jacobian; the last one of nobody.
    ahead = tuple(tuple(_next(x) for x in row) for row in transposed)
    total = _linear(ahead, grad, reverse=True)
    of_u, of_weights = cell.gradients(parts, rows, prev, tuple(states), tuple(total))
    of_first = [
        sum(j[:, 0] * g[:, 0] for j, g in zip(row, total, strict=True)) for row in transposed
    ]
    of_weights = jnp.stack([x.sum((0, 1)) for x in of_weights])
    return jnp.stack(of_u, 2), of_weights, jnp.stack(of_first)


def _after(first, states):
    """The state before each step."""
    return jnp.concatenate([first[:, :, None], states[:, :, :-1]], axis=2)


def _next(x):
    return jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)


def solve(config: Config, u: jax.Array, weights: jax.Array, first: jax.Array):
    """The states of a cell, m arrays (B, T, H) in u's dtype; their gradient is the exact adjoint.

    Args: as for `newton`.
    """
    return _solve(config, *varying_alike(u, weights, first))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(config, u, weights, first):
    if config.implementation != "xla":
        return _kernel(config, "forward")(u, *_by_row(u, weights, first))
    dtype = recurrence.compute_dtype(u, weights)
    run = newton if config.method == "newton" else sequential
    operands = (x.astype(dtype) for x in (u, weights, first))
    return tuple(run(config, *operands).astype(u.dtype))


def _forward(config, u, weights, first):
    states = _solve(config, u, weights, first)
    return states, (u, weights, first, states)


def _backward(config, saved, grad):
    u, weights, first, states = saved
    if config.implementation != "xla":
        by_row = _by_row(u, weights, first)
        of_u, of_weights, of_first = _kernel(config, "adjoint")(u, *by_row, *states, *grad)
        found = of_u, of_weights.sum(0), jnp.moveaxis(of_first, 1, 0)
    else:
        dtype = recurrence.compute_dtype(u, weights)
        operands = (u, weights, first, jnp.stack(states), jnp.stack(grad))
        found = adjoint(config, *(x.astype(dtype) for x in operands))
    return tuple(x.astype(y.dtype) for x, y in zip(found, (u, weights, first), strict=True))


_solve.defvjp(_forward, _backward)


def _by_row(u, weights, first):
    """The weights, a copy for each row of the batch, and the initial states with the batch first.

    Only so can a kernel's operands be vmapped and split over devices all alike, and its gradients
    summed outside.
    """
    return jnp.broadcast_to(weights, (u.shape[0], *weights.shape)), jnp.moveaxis(first, 0, 1)


@functools.lru_cache(maxsize=64)
def _kernel(config, direction):
    """A kernel module's `forward` or `adjoint`, batchable and shardable.

    forward(config, u (B, T, 3, H), weights (B, num_weights, H), first (B, m, H)) makes m arrays of
    states (B, T, H) in u's dtype. adjoint(config, u, weights, first, *states, *grads), with m
    arrays each of states and their gradients, makes those of u, weights and first.
    """
    if config.implementation == "triton":
        from pallas_kernels import recurrent_tiles_gpu as kernels
    else:
        from pallas_kernels import recurrent_tiles_tpu as kernels

    run = functools.partial(getattr(kernels, direction), config)
    return doors.over_batch(run, channel_axes=config.channel_axes)


def checked(u, weights, first, *, method, num_iterations, damping, tile):
    """Raises ValueError for operands that do not fit one another or options out of range.

    Args:
      u: the input projections.
      weights: name -> (array, expected rows).
      first: name -> initial state or None.
      method: one of METHODS.
      num_iterations: at least 1.
      damping: between 0 and 2.
      tile: at least 1.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, METHODS))}")
    if num_iterations < 1:
        raise ValueError(f"num_iterations={num_iterations} must be at least 1")
    if not 0 < damping < 2:
        raise ValueError(f"damping={damping} must lie between 0 and 2")
    if tile < 1:
        raise ValueError(f"tile={tile} must be at least 1")
    if u.ndim != 4 or u.shape[2] != 3 or u.shape[1] == 0:
        raise ValueError(f"u has shape {u.shape}, expected (B, T, 3, H) with T at least 1")
    width = u.shape[-1]
    expected = {name: (x, (rows, width)) for name, (x, rows) in weights.items()}
    expected |= {name: (x, (u.shape[0], width)) for name, x in first.items() if x is not None}
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}, expected {shape} for u {u.shape}")
    for name, x in {"u": u, **{name: x for name, (x, _) in expected.items()}}.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {x.dtype}, expected a floating one")


def configure(
    cell,
    u,
    *,
    method,
    implementation,
    num_iterations,
    damping,
    tile,
    channel_axes=doors.CHANNEL_AXES,
    float64=False,
) -> Config:
    """Chooses implementation and method of a call on the projections `u`."""
    from pallas_kernels import recurrent_tiles_tpu  # it needs this module's names

    refusals = {
        "xla": lambda: None,
        "mosaic_tpu": lambda: recurrent_tiles_tpu.refusal(u, method, tile, float64=float64),
        "triton": lambda: _triton_refusal(u, method, tile, float64=float64),
    }
    choice = doors.choose_implementation(implementation, refusals)
    if method == "auto":
        # On TPU one pass of whole registers takes a third of the cycles of three iterations. On GPU
        # it issues a fifth as many instructions (LSTM: a seventh), each step waiting for the one
        # before, which by their count pays from some ten thousand channels (of all rows) on a
        # device, as in training; and it is exact for all weights. No GPU has timed it yet.
        method = "newton" if choice == "xla" else "sequential"
    numbers = int(num_iterations), float(damping), int(tile)
    return Config(cell, method, choice, *numbers, tuple(channel_axes))


def _triton_refusal(u, method, tile, *, float64):
    """Returns why the Triton kernels cannot serve a call, if so."""
    if method == "newton":
        if tile < u.shape[1] and tile & (tile - 1):
            return f"tile={tile} is not a power of two"
        if min(tile, u.shape[1]) > MOST_TRITON_STEPS:
            return f"tile={tile} is above {MOST_TRITON_STEPS}"
    if float64:
        return "its arithmetic is float32, and an operand is float64"
    if u.size == 0:
        return f"u of shape {u.shape} is empty"
    return doors.triton_refusal()
