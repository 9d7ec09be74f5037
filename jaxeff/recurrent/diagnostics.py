"""How fast Newton's method converges on a recurrence, and what decides it.

"ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models" (arXiv
2510.21450), section 4 and figure 4.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxeff.recurrent import time_axis
from jaxeff.recurrent.clip import NAMES, is_recurrent
from jaxeff.recurrent.newton import (
    Cell,
    NewtonConfig,
    newton_iteration,
    parallel_rnn,
)


class Convergence(NamedTuple):
    """Newton's iterations on one batch.

    Attributes:
      iterations: int32 (), the first number of iterations after which `errors` is at most the
        tolerance, -1 if none is.
      residual_iterations: the same of `residuals`.
      errors: float32 (K + 1,), the largest difference to the states of the loop over time, after 0
        (the first guess) to K iterations.
      residuals: float32 (K + 1,), the largest |f(h_{t-1}, x_t) - h_t|.
    """

    iterations: jax.Array
    residual_iterations: jax.Array
    errors: jax.Array
    residuals: jax.Array


class LayerDiagnosis(NamedTuple):
    """Of one layer on one batch: its convergence, exponents (B,) and largest recurrent weight."""

    convergence: Convergence
    lyapunov_exponent: jax.Array
    max_recurrent_weight: jax.Array


def iterations_to_tolerance(
    step_fn: Callable,
    params: Any,
    inputs: Any,
    h0: jax.Array,
    *,
    structure: str = "diagonal",
    tolerance: float = 1e-5,
    max_iterations: int = 20,
    jacobian_fn: Callable | None = None,
    damping: float = 1.0,
) -> Convergence:
    """Follows Newton's method against the states of the loop over time.

    Args:
      step_fn, params, inputs, h0, structure, jacobian_fn: as for `parallel_rnn`.
      tolerance: above zero. In float32 the two computations differ by some 1e-6 of the states at
        best, and by more where small differences grow along the sequence.
      max_iterations: K.
      damping: of each correction.

    Raises:
      ValueError: as `parallel_rnn`; for a tolerance that is not above zero.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance}, expected above zero")
    config = NewtonConfig(max_iterations, damping=damping)
    exact, _ = parallel_rnn(
        step_fn, params, inputs, h0, structure=structure, jacobian_fn=jacobian_fn,
        newton=config, method="sequential",
    )  # fmt: skip
    cell = Cell(step_fn, structure, jacobian_fn)
    params, inputs, h0 = jax.tree.map(lambda x: jnp.asarray(x, exact.dtype), (params, inputs, h0))
    guess, iterate = newton_iteration(cell, damping, None, params, inputs, h0)

    def follow(carry, _):
        return iterate(*carry), sizes(*carry)

    def sizes(h, r):
        largest = jnp.stack([time_axis.largest(x, None) for x in (h - exact, r)])
        return jnp.max(largest, axis=1)

    last, found = jax.lax.scan(follow, guess, length=max_iterations)
    history = jnp.concatenate([found, sizes(*last)[None]])
    small = history <= tolerance
    first = jnp.where(small.any(0), jnp.argmax(small, axis=0), -1).astype(jnp.int32)
    return Convergence(first[0], first[1], history[:, 0], history[:, 1])


def largest_lyapunov_exponent(step_fn: Callable, params: Any, inputs: Any, h0: jax.Array):
    """The mean over time of log |J_t v_{t-1}| for each row, (B,) in the dtype of the states.

    v starts as a random direction, is carried along the trajectory by the Jacobians J_t of the
    steps, and is scaled to length one after each. Below zero, differences between states die out
    along the sequence, and Newton's method converges fast; above, they grow.

    Args:
      step_fn, params, inputs, h0: as for `parallel_rnn`.
    """
    inputs = jax.tree.map(lambda x: jnp.moveaxis(jnp.asarray(x), 1, 0), inputs)
    axes = tuple(range(1, h0.ndim))

    def unit(v):
        size = jnp.sqrt(jnp.sum(v * v, axis=axes, keepdims=True))
        return v / jnp.where(size > 0, size, 1), jnp.log(size.reshape(-1))

    def step(carry, x):
        h, v = carry
        h, v = jax.jvp(lambda h: step_fn(params, x, h).astype(h.dtype), (h,), (v,))
        v, growth = unit(v)
        return (h, v), growth

    v, _ = unit(jax.random.normal(jax.random.key(0), h0.shape, h0.dtype))
    return jnp.mean(jax.lax.scan(step, (h0, v), inputs)[1], axis=0)


def max_recurrent_weight(params: Any) -> jax.Array:
    """The largest |entry| of all leaves named `a` or `peephole`, boxed or not.

    Raises:
      ValueError: if there is no such leaf.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    largest = [jnp.max(jnp.abs(leaf)) for path, leaf in leaves if is_recurrent(path)]
    if not largest:
        raise ValueError(f"params has no leaf named {' or '.join(NAMES)}")
    return jnp.max(jnp.stack(largest))


def diagnose_layer(
    layer: Any,
    variables: Any,
    x: jax.Array,
    h0: Any = None,
    *,
    tolerance: float = 1e-5,
    max_iterations: int = 20,
) -> LayerDiagnosis:
    """All of the above for a ParaGRU or ParaLSTM on inputs `x` (B, T, D).

    Args:
      layer: the module, not bound.
      variables: its own: {"params": {"a": ...}}.
      x, h0: as its call takes them.
      tolerance, max_iterations: of `iterations_to_tolerance`.
    """
    system = layer.apply(variables, x, h0, method="system")
    convergence = iterations_to_tolerance(
        **system._asdict(), tolerance=tolerance, max_iterations=max_iterations,
        damping=layer.newton.damping,
    )  # fmt: skip
    exponent = largest_lyapunov_exponent(*system[:4])
    return LayerDiagnosis(convergence, exponent, max_recurrent_weight(system.params))
