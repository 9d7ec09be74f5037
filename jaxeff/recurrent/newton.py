"""A nonlinear recurrence solved for all steps at once by Newton's method.

"ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models" (arXiv
2510.21450), sections 2 and 3: h_t = f(h_{t-1}, x_t) for all t is one system of equations. A Newton
iteration on it is a linear recurrence in the correction, and so is its gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxeff.recurrent import time_axis
from pallas_kernels.linear_recurrence import MOST_BLOCKS, reference, sharded

STRUCTURES = ("diagonal", "block", "dense")
METHODS = ("newton", "sequential")
FALLBACKS = ("none", "sequential")
_LARGEST_RESIDUAL = 1e-4  # above it the fallback is taken where no tolerance is given


@dataclasses.dataclass(frozen=True)
class NewtonConfig:
    """How the system is solved.

    `num_iterations` are run, or fewer once every residual is at most `tolerance` if that is above
    zero. `damping` scales each correction. With `fallback="sequential"` a row of the batch whose
    residual ends above `tolerance` (1e-4 if that is zero) is computed step by step instead.
    """

    num_iterations: int = 3
    tolerance: float = 0.0
    damping: float = 1.0
    fallback: str = "none"

    def __post_init__(self):
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations={self.num_iterations}, expected at least 1")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance={self.tolerance}, expected at least 0")
        if not 0 < self.damping < 2:
            raise ValueError(f"damping={self.damping}, expected between 0 and 2, exclusive")
        if self.fallback not in FALLBACKS:
            raise ValueError(f"fallback={self.fallback!r} is not 'none' or 'sequential'")


class SolveInfo(NamedTuple):
    """`residual` float32 (B,), Newton's own largest |f(h_{t-1}, x_t) - h_t| of each row, also where
    the fallback replaced its answer; `iterations` int32 (); `fallback` bool (B,)."""

    residual: jax.Array
    iterations: jax.Array
    fallback: jax.Array


class System(NamedTuple):
    """The equations h_t = f(h_{t-1}, x_t) of all steps: arguments of `parallel_rnn`."""

    step_fn: Callable
    params: Any
    inputs: Any
    h0: jax.Array
    structure: str
    jacobian_fn: Callable | None = None


def parallel_rnn(
    step_fn: Callable[[Any, Any, jax.Array], jax.Array],
    params: Any,
    inputs: Any,
    h0: jax.Array,
    *,
    structure: str = "diagonal",
    newton: NewtonConfig = NewtonConfig(),
    method: str = "newton",
    jacobian_fn: Callable | None = None,
    reset: jax.Array | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, SolveInfo]:
    """Runs h_t = step_fn(params, x_t, h_{t-1}) over all steps.

    Differentiable in `params`, `inputs` and `h0` in reverse mode: the gradient of the recurrence
    at the states found, from one linear recurrence; inputs and states are all that is saved.

    Args:
      step_fn: takes x_t (B, ...) and h (B, H), or (B, m, H) for "block", and keeps the rows of the
        batch apart; it must not close over traced values.
      params: any pytree of floating arrays.
      inputs: a pytree of floating arrays (B, T, ...).
      h0: (B, H), or (B, m, H) for "block": the state before the first step.
      structure: what df/dh is: "diagonal", "block" (m x m blocks of diagonals, m up to 4) or
        "dense". That the entries left out are zero is for `check_structure` to say, once, on a
        small case; here only shapes are looked at.
      newton: iterations, tolerance, damping and fallback.
      method: "newton", or "sequential" for a loop over time.
      jacobian_fn: (params, x, before, after) -> Jacobians; None takes 1, m or H forward
        derivatives of `step_fn`. If it is given, both functions get whole sequences at once, and
        `step_fn` single steps besides.
      reset: bool (B, T): where it is true the state before that step is zero, whatever the steps
        before it led to. Nothing, and no gradient, passes such a step.
      axis_name: of the mesh axis over which time is split, inside a `shard_map`: `inputs`, `reset`
        and the states are the device's own steps, as many on each, and `h0` is the same on all.
        Only what one step hands to the next travels, and the totals of the linear recurrences. A
        loop over time ("sequential", and the fallback) runs the devices one after the other.

    Returns:
      the states (B, T, H) or (B, T, m, H), float32 (float64 if an operand is), and the SolveInfo.

    Raises:
      ValueError: for an unknown structure or method, T == 0, dtypes that are not floating, or
        shapes of h0, inputs, reset and the functions' results that do not fit one another.
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure={structure!r} is not one of {STRUCTURES}")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {METHODS}")
    params, inputs, h0 = _checked(params, inputs, h0, structure)
    cell = Cell(step_fn, structure, jacobian_fn, reset is not None)
    _check_results(cell, params, inputs, h0)
    if reset is not None:
        inputs = inputs, _kept(reset, inputs, h0.dtype)
    leaves, tree = jax.tree.flatten((params, inputs, h0))
    leaves = sharded.varying_alike(*leaves, axis_name=axis_name)
    params, inputs, h0 = jax.tree.unflatten(tree, leaves)
    if method == "newton":
        return _solve(cell, newton, axis_name, params, inputs, h0)
    batch = h0.shape[0]
    info = SolveInfo(jnp.zeros(batch), jnp.int32(0), jnp.zeros(batch, bool))
    return sequential_states(cell, axis_name, params, inputs, h0), info


def _checked(params, inputs, h0, structure):
    params, inputs, h0 = jax.tree.map(jnp.asarray, (params, inputs, h0))
    for name, tree in (("params", params), ("inputs", inputs), ("h0", h0)):
        for x in jax.tree.leaves(tree):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(f"{name} has dtype {x.dtype}, expected a floating one")
    rank = 3 if structure == "block" else 2
    if h0.ndim != rank:
        raise ValueError(f"h0 has shape {h0.shape}, expected {rank} axes for {structure!r}")
    if structure == "block" and not 1 <= h0.shape[1] <= MOST_BLOCKS:
        raise ValueError(f"h0 has m = {h0.shape[1]} parts, expected 1 to {MOST_BLOCKS}")
    leading = {x.shape[:2] for x in jax.tree.leaves(inputs)}
    if len(leading) != 1 or len(next(iter(leading))) != 2:
        raise ValueError(f"inputs begin with {leading}, expected one (B, T)")
    batch, steps = leading.pop()
    if batch != h0.shape[0]:
        raise ValueError(f"h0 has {h0.shape[0]} rows, expected {batch} as inputs")
    if steps == 0:
        raise ValueError("inputs have T = 0 steps, expected at least one")
    leaves = jax.tree.leaves((params, inputs, h0))
    dtype = jnp.result_type(jnp.float32, *(x.dtype for x in leaves))
    return jax.tree.map(lambda x: x.astype(dtype), (params, inputs, h0))


def _check_results(cell, params, inputs, h0):
    """What the functions return, by shape."""
    result = jax.eval_shape(cell.step_fn, params, jax.tree.map(lambda x: x[:, 0], inputs), h0)
    if getattr(result, "shape", None) != h0.shape:
        raise ValueError(f"step_fn returns {result}, expected one array of shape {h0.shape}")
    if cell.jacobian_fn is None:
        return
    shape = (*jax.tree.leaves(inputs)[0].shape[:2], *h0.shape[1:])
    states = jax.ShapeDtypeStruct(shape, h0.dtype)
    result = jax.eval_shape(cell.jacobian_fn, params, inputs, states, states)
    middle = () if cell.structure == "diagonal" else shape[2:3]
    expected = (*shape[:2], *middle, *shape[2:])
    if getattr(result, "shape", None) != expected:
        raise ValueError(
            f"jacobian_fn returns {result}, expected shape {expected} for {cell.structure!r}"
        )


def _kept(reset, inputs, dtype):
    reset = jnp.asarray(reset)
    expected = jax.tree.leaves(inputs)[0].shape[:2]
    if reset.dtype != jnp.bool_ or reset.shape != expected:
        raise ValueError(f"reset is {reset.dtype} {reset.shape}, expected bool {expected}")
    return jnp.where(reset, 0, 1).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A step and its Jacobian; with `resets` the inputs are pairs of x and what is kept, 0 or 1."""

    step_fn: Callable
    structure: str
    jacobian_fn: Callable | None
    resets: bool = False

    def step(self, params, inputs, before):
        """One step, or all of them if `step_fn` takes whole sequences."""
        if not self.resets:
            return self.step_fn(params, inputs, before)
        inputs, kept = inputs
        return self.step_fn(params, inputs, _cut(kept, before))

    def steps(self, params, inputs, before):
        """All steps, from the states before them."""
        if self.jacobian_fn is not None:
            return self.step(params, inputs, before)
        return jax.vmap(self.step, in_axes=(None, 1, 1), out_axes=1)(params, inputs, before)

    def jacobians(self, params, inputs, before, after):
        """The derivatives of all steps in the states before them; `after` are the iterates."""
        if self.jacobian_fn is not None and self.resets:
            inputs, kept = inputs
            return _cut(kept, self.jacobian_fn(params, inputs, _cut(kept, before), after))
        if self.jacobian_fn is not None:
            return self.jacobian_fn(params, inputs, before, after)

        def along(direction):
            tangent = jnp.broadcast_to(direction, before.shape).astype(before.dtype)
            return jax.jvp(lambda h: self.steps(params, inputs, h), (before,), (tangent,))[1]

        if self.structure == "diagonal":
            return along(jnp.ones(()))
        if self.structure == "block":
            eye = jnp.eye(before.shape[2])
            return jnp.stack([along(row[:, None]) for row in eye], axis=3)
        return jax.vmap(along, out_axes=3)(jnp.eye(before.shape[2]))


def solved(system: System, states: jax.Array, newton: NewtonConfig) -> SolveInfo:
    """The SolveInfo of states that were found elsewhere by the iterations `newton` asks for.

    `system.step_fn` gets whole sequences.
    """
    step, *operands, _, _ = system
    params, inputs, h0, states = jax.lax.stop_gradient((*operands, states))
    residual = step(params, inputs, time_axis.before(states, h0, None)) - states
    info = time_axis.largest(residual, None), jnp.int32(newton.num_iterations)
    return SolveInfo(*info, jnp.zeros(len(states), bool))


def _cut(kept, x):
    return jnp.where(kept.reshape(*kept.shape, *[1] * (x.ndim - kept.ndim)) > 0, x, 0)


def sequential_states(cell, axis_name, params, inputs, h0):
    """The exact states by a loop over time."""
    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)

    def step(h, x):
        h = cell.step(params, x, h).astype(h0.dtype)
        return h, h

    def run(first):
        return jnp.moveaxis(jax.lax.scan(step, first, by_time)[1], 0, 1)

    return time_axis.in_turn(run, h0, axis_name)


def newton_iteration(cell, damping, axis_name, params, inputs, h0):
    """The first guess and its residual, and the function from one such pair to the next."""

    def residual(h):
        return cell.steps(params, inputs, time_axis.before(h, h0, axis_name)) - h

    def iterate(h, r):
        jacobians = cell.jacobians(params, inputs, time_axis.before(h, h0, axis_name), h)
        h = h + damping * time_axis.recurrence(jacobians, r, axis_name)
        return h, residual(h)

    steps = jax.tree.leaves(inputs)[0].shape[1]
    like = jnp.broadcast_to(h0[:, None], (h0.shape[0], steps, *h0.shape[1:]))
    guess = cell.steps(params, inputs, time_axis.before(jnp.zeros_like(like), h0, axis_name))
    return (guess, residual(guess)), iterate


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _solve(cell, newton, axis_name, params, inputs, h0):
    guess, iterate = newton_iteration(cell, newton.damping, axis_name, params, inputs, h0)
    iterations, h, r = _iterate(iterate, newton, *guess, axis_name)
    largest = time_axis.largest(r, axis_name)
    if newton.fallback == "none":
        return h, SolveInfo(largest, iterations, jnp.zeros(h.shape[0], bool))
    failed = ~(largest <= (newton.tolerance or _LARGEST_RESIDUAL))  # true for NaN

    def replaced(h):
        rows = failed.reshape(-1, *[1] * (h.ndim - 1))
        return jnp.where(rows, sequential_states(cell, axis_name, params, inputs, h0), h)

    h = jax.lax.cond(time_axis.anywhere(jnp.any(failed), h, axis_name), replaced, lambda h: h, h)
    return h, SolveInfo(largest, iterations, failed)


def _iterate(iterate, newton, h, r, axis_name):
    """As many iterations as `newton` says, from states and residuals; their number first."""
    most = jnp.int32(newton.num_iterations)
    if newton.tolerance == 0:
        h, r = jax.lax.fori_loop(0, newton.num_iterations, lambda _, c: iterate(*c), (h, r))
        return most, h, r

    def unfinished(k, r):
        large = ~jnp.all(time_axis.largest(r, axis_name) <= newton.tolerance)  # true for NaN
        return (k < most) & time_axis.anywhere(large, r, axis_name)

    def body(carry):
        _, k, h, r = carry
        h, r = iterate(h, r)
        return unfinished(k + 1, r), k + 1, h, r

    # Apart, the devices of a `shard_map` need not run as many.
    first = jnp.int32(0) if axis_name else sharded.varying_alike(jnp.int32(0), r)[0]
    carry = jax.lax.while_loop(lambda c: c[0], body, (unfinished(first, r), first, h, r))
    return carry[1:]


def _forward(cell, newton, axis_name, params, inputs, h0):
    h, info = _solve(cell, newton, axis_name, params, inputs, h0)
    return (h, info), (params, inputs, h0, h)


def _backward(cell, newton, axis_name, saved, cotangents):
    params, inputs, h0, h = saved
    before = time_axis.before(h, h0, axis_name)
    jacobians = cell.jacobians(params, inputs, before, h)
    jacobians = reference.transposed(jacobians, jacobians.ndim)
    following = time_axis.behind(jacobians, axis_name)
    adjoint = time_axis.recurrence(following, cotangents[0], axis_name, reverse=True)
    _, pull = jax.vjp(cell.steps, params, inputs, before)
    grad_params, grad_inputs, grad_before = pull(adjoint)
    grad_h0 = grad_before[:, 0]
    if axis_name is not None:
        grad_h0 = jnp.where(jax.lax.axis_index(axis_name) == 0, grad_h0, 0)
    return grad_params, grad_inputs, grad_h0


_solve.defvjp(_forward, _backward)
