"""What a training step of the solver holds in memory, and that it does not loop over time."""

import jax
import jax.numpy as jnp
import pytest

from jaxeff.recurrent import NewtonConfig, parallel_rnn
from jaxeff.recurrent.cells import gru_step


def gradient(num_iterations, steps, width):
    """The gradient of a ParaGRU with automatic Jacobians, and its abstract arguments."""

    def loss(a, u, h0):
        newton = NewtonConfig(num_iterations)
        return jnp.sum(parallel_rnn(gru_step, {"a": a}, u, h0, newton=newton)[0] ** 2)

    shapes = [(3, width), (1, steps, 3, width), (1, width)]
    return jax.grad(loss, (0, 1)), [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]


def temporaries(*sizes):
    function, arguments = gradient(*sizes)
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_peak_memory_does_not_grow_with_the_iterations():
    assert temporaries(8, 256, 128) == pytest.approx(temporaries(2, 256, 128), rel=0.01)


def test_no_temporary_is_quadratic_in_the_width():
    # One dense Jacobian for each step would be 4 GiB; a whole trajectory is 4 MiB.
    assert temporaries(3, 1024, 1024) < 64 * 1024 * 1024


def test_nothing_loops_over_time():
    function, arguments = gradient(3, 257, 8)
    assert "length=257" not in str(jax.make_jaxpr(function)(*arguments))
    assert "length=3" in str(jax.make_jaxpr(function)(*arguments))
