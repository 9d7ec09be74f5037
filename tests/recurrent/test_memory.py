"""What a training step of the solver holds in memory, and that it does not loop over time."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from jaxeff.recurrent import NewtonConfig, parallel_rnn
from jaxeff.recurrent.cells import gru_step, lstm_jacobian, lstm_step

STEPS = WIDTH = 1024
CELLS = ["gru", pytest.param("lstm", marks=pytest.mark.slow)]


def gradient(cell, num_iterations, steps, width):
    """The gradient of one row's loss (GRU: automatic Jacobians) and its abstract arguments."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params, h0 = {"a": shape((3, width))}, shape((1, width))
    step, options = gru_step, {"newton": NewtonConfig(num_iterations)}
    if cell == "lstm":
        params["peephole"], h0 = shape((2, width)), shape((1, 2, width))
        step, options = lstm_step, options | {"structure": "block", "jacobian_fn": lstm_jacobian}

    def loss(params, u, h0):
        return jnp.sum(parallel_rnn(step, params, u, h0, **options)[0] ** 2)

    return jax.grad(loss, (0, 1)), (params, shape((1, steps, 3, width)), h0)


@functools.cache
def compiled(cell, num_iterations):
    function, arguments = gradient(cell, num_iterations, STEPS, WIDTH)
    return jax.jit(function).lower(*arguments).compile()


def trajectories(cell, num_iterations):
    """Temporary memory in units of one float32 for each step and channel."""
    memory = compiled(cell, num_iterations).memory_analysis().temp_size_in_bytes
    return memory / (4 * STEPS * WIDTH)


@pytest.mark.parametrize("cell", CELLS)
def test_memory_is_a_few_trajectories(cell):
    # GRU: states, residuals, Jacobians and correction are 4, the halves of its associative scan 4
    # more. LSTM: the first are 2 + 2 + 4 + 2, each of the scan's halves of (A, b) is 6, and the
    # transposed and shifted Jacobians of the adjoint 8.
    assert trajectories(cell, 3) < {"gru": 11, "lstm": 34}[cell]


@pytest.mark.parametrize("cell", CELLS)
def test_peak_memory_does_not_grow_with_the_iterations(cell):
    assert trajectories(cell, 8) == pytest.approx(trajectories(cell, 3), rel=0.01)


@pytest.mark.parametrize("cell", CELLS)
def test_the_compiled_step_loops_over_iterations_only(cell):
    program = compiled(cell, 3).as_text()
    loops = len(re.findall(r"\bwhile\(", program))
    assert re.findall(r'"known_trip_count":\{"n":"(\d+)"\}', program) == ["3"] * loops == ["3"]


def sizes(jaxpr):
    """The sizes of all intermediate results, at any depth."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_nothing_is_quadratic_in_the_width(cell):
    """At 8 steps a matrix H x H would stand out: it is 128 trajectories."""
    function, arguments = gradient(cell, 3, 8, WIDTH)
    largest = max(sizes(jax.make_jaxpr(function)(*arguments).jaxpr)) / (8 * WIDTH)
    assert largest == {"gru": 3, "lstm": 4}[cell]  # the projections; the blocks of the Jacobians
