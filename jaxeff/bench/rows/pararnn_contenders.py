"""Ways to run a nonlinear recurrence over all steps, from the same projections and weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxeff.recurrent import cells, parallel_rnn
from pallas_kernels import fused_gru, fused_lstm, linear_recurrence

FUSED, FUSED_SEQUENTIAL = "fused Newton", "fused sequential"
ASSOCIATIVE, KERNEL_SCAN = "associative-scan Newton", "kernel-scan Newton"
SCAN, LINEAR, PYTHON = "lax.scan", "linear recurrence", "Python loop"

Run = Callable[..., Any]


class RecurrentCell(NamedTuple):
    """A cell under all its forms.

    Attributes:
      name: of the cell.
      num_states: m, the parts of its state.
      num_weights: rows of its weights (num_weights, H): a, then the peepholes if it has some.
      step, jacobian: as `jaxeff.recurrent.parallel_rnn` takes them.
      params: weights -> params of the two.
      fused: (u (B, T, 3, H), weights, **options) -> states (B, T, H).
    """

    name: str
    num_states: int
    num_weights: int
    step: Callable
    jacobian: Callable
    params: Callable
    fused: Callable

    @property
    def structure(self) -> str:
        """Of its Jacobian."""
        return "diagonal" if self.num_states == 1 else "block"

    def start(self, u: jax.Array) -> jax.Array:
        """The zero state for projections (B, T, 3, H)."""
        blocks = () if self.num_states == 1 else (self.num_states,)
        return jnp.zeros((u.shape[0], *blocks, u.shape[-1]), jnp.float32)

    def output(self, states: jax.Array) -> jax.Array:
        """What the cell gives away of its states: h."""
        return states if self.num_states == 1 else states[..., -1, :]


def _lstm_fused(u, weights, **options):
    return fused_lstm(u, weights[:3], weights[3:], **options)[1]


GRU = RecurrentCell("GRU", 1, 3, cells.gru_step, cells.gru_jacobian, lambda w: {"a": w}, fused_gru)
LSTM = RecurrentCell(
    "LSTM", 2, 5, cells.lstm_step, cells.lstm_jacobian,
    lambda w: {"a": w[:3], "peephole": w[3:]}, _lstm_fused,
)  # fmt: skip


def contenders(cell: RecurrentCell, steps: int, kernels: str | None) -> dict[str, Run]:
    """All ways that are compiled as a whole, the one that is claimed to be good first.

    They take projections (B, T, 3, H) and weights (num_weights, H), return states (B, T, H), and
    raise `NotImplementedError`, with the reason, where their kernel cannot serve.

    Args:
      cell: what is run.
      steps: T.
      kernels: the implementation that is a kernel on the device. None where there is none: then the
        fused forms are XLA's, Newton by the same tiles, and the kernel scan is missing.
    """
    implementation = kernels or "xla"

    def fused(method, **options):
        return functools.partial(cell.fused, method=method, **options)

    found = {
        FUSED: fused("newton", implementation=implementation),
        FUSED_SEQUENTIAL: fused("sequential", implementation=implementation),
        ASSOCIATIVE: fused("newton", implementation="xla", tile=steps),
        SCAN: functools.partial(_loop, cell),
    }
    if kernels:
        found[KERNEL_SCAN] = functools.partial(_kernel_scan, cell, kernels)
    return found


def _parallel(cell, u, weights, method):
    states, _ = parallel_rnn(
        cell.step,
        cell.params(weights),
        u,
        cell.start(u),
        structure=cell.structure,
        jacobian_fn=cell.jacobian,
        method=method,
    )
    return cell.output(states)


def _loop(cell, u, weights):
    return _parallel(cell, u, weights, "sequential")


def _kernel_scan(cell, kernels, u, weights):
    # The solver chooses the kernel by itself; where it would not, this says why.
    batch, steps, _, width = u.shape
    blocks = () if cell.num_states == 1 else (cell.num_states,)
    a = jax.ShapeDtypeStruct((batch, steps, *blocks * 2, width), jnp.float32)
    b = jax.ShapeDtypeStruct((batch, steps, *blocks, width), jnp.float32)
    jax.eval_shape(functools.partial(linear_recurrence, implementation=kernels), a, b)
    return _parallel(cell, u, weights, "newton")


def python_loop(cell: RecurrentCell, u: jax.Array, weights: jax.Array) -> jax.Array:
    """The states step by step, every operation dispatched by Python on its own.

    Args:
      cell: what is run.
      u: (B, T, 3, H).
      weights: (num_weights, H).

    Returns:
      (B, T, H).
    """
    params, state, states = cell.params(weights), cell.start(u), []
    for t in range(u.shape[1]):
        state = cell.step(params, u[:, t], state)
        states.append(cell.output(state))
    return jnp.stack(states, axis=1)


def with_gradients(run: Run) -> Run:
    """Makes of a function one that takes its result's cotangent last, and returns the result and
    the gradients of all operands."""

    def both(*operands):
        *operands, cotangent = operands
        result, pull = jax.vjp(run, *operands)
        return result, *pull(cotangent)

    return both


def least_arrays(num_states: int, *, gradients: bool) -> int:
    """Arrays (B, T, H) that a cell must read or write: each projection and each state once.

    With gradients the projections and states are read once more, the cotangent of h is read and
    the gradients of the projections are written.
    """
    forward = 3 + num_states
    return forward + (3 + num_states + 1 + 3) if gradients else forward


def least_arrays_linear(*, gradients: bool) -> int:
    """The same for a diagonal linear recurrence: a, b and h.

    With gradients a, h and the cotangent are read and the gradients of a and b are written.
    """
    return 3 + 5 if gradients else 3
