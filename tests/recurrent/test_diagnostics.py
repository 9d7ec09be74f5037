"""Convergence, exponents and weights of recurrences for which they are known."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.recurrent import (
    NewtonConfig,
    ParaGRU,
    ParaLSTM,
    diagnose_layer,
    iterations_to_tolerance,
    largest_lyapunov_exponent,
    max_recurrent_weight,
    parallel_rnn,
)
from jaxeff.recurrent.cells import gru_jacobian, gru_step


def linear_step(w, x, h):
    return w * h + x


follow = jax.jit(
    iterations_to_tolerance, static_argnums=0, static_argnames=("max_iterations", "jacobian_fn")
)
exponent = jax.jit(largest_lyapunov_exponent, static_argnums=0)


def problem(scale):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": scale * jax.random.normal(keys[0], (3, 4))}
    return params, jax.random.normal(keys[1], (2, 20, 3, 4)), jax.random.normal(keys[2], (2, 4))


def test_a_linear_cell_converges_in_one_iteration():
    x, h0 = jax.random.normal(jax.random.key(0), (2, 9, 4)), jnp.ones((2, 4))
    found = follow(linear_step, jnp.full(4, 0.5), x, h0)
    assert found.iterations == found.residual_iterations == 1
    assert found.errors[0] > 0.1 and found.errors.shape == found.residuals.shape == (21,)


def test_the_history_is_that_of_the_solver():
    arguments = problem(1.0)
    found = follow(gru_step, *arguments, max_iterations=12, jacobian_fn=gru_jacobian)
    run = functools.partial(parallel_rnn, gru_step, *arguments)
    exact, _ = jax.jit(lambda: run(method="sequential"))()
    states, info = jax.jit(lambda: run(newton=NewtonConfig(3)))()
    np.testing.assert_allclose(found.errors[3], np.abs(states - exact).max(), atol=1e-6)
    np.testing.assert_allclose(found.residuals[3], info.residual.max(), atol=1e-6)
    k = int(found.iterations)
    assert found.errors[k] <= 1e-5 < found.errors[k - 1]


def test_larger_weights_need_more_iterations_and_may_never_arrive():
    follow_gru = functools.partial(follow, gru_step, jacobian_fn=gru_jacobian)
    counts = [
        int(follow_gru(*problem(scale), max_iterations=k).iterations)
        for scale, k in ((0.3, 12), (1.5, 12), (6.0, 2))
    ]
    assert 1 < counts[0] < counts[1] and counts[2] == -1


def test_exponent_of_a_linear_cell_is_the_logarithm_of_its_largest_weight():
    x = jax.random.normal(jax.random.key(0), (2, 400, 3))
    found = exponent(linear_step, jnp.array([0.5, -0.9, 0.1]), x, jnp.ones((2, 3)))
    # What the first steps lose to the other directions is divided by all of them.
    np.testing.assert_allclose(found, np.log(0.9), atol=1e-2)


def test_exponent_is_that_of_the_product_of_the_jacobians():
    params, u, h0 = problem(1.0)
    states, _ = parallel_rnn(gru_step, params, u, h0, method="sequential")
    before = jnp.concatenate([h0[:, None], states[:, :-1]], axis=1)
    product = np.prod(np.asarray(gru_jacobian(params, u, before, states), np.float64), axis=1)
    v = np.asarray(jax.random.normal(jax.random.key(0), h0.shape), np.float64)
    growth = np.linalg.norm(product * v, axis=1) / np.linalg.norm(v, axis=1)
    found = exponent(gru_step, params, u, h0)
    np.testing.assert_allclose(found, np.log(growth) / u.shape[1], rtol=1e-4)


def test_largest_weight_looks_at_recurrent_leaves_only():
    params = {
        "one": {"a": jnp.array([0.1, -0.3]), "b": jnp.array([9.0])},
        "two": {"peephole": nn.LogicallyPartitioned(jnp.array([-0.7, 0.2]), ("heads",))},
    }
    np.testing.assert_allclose(max_recurrent_weight(params), 0.7)
    with pytest.raises(ValueError, match="peephole"):
        max_recurrent_weight({"b": jnp.ones(2)})


@pytest.mark.parametrize("cell", [ParaGRU, pytest.param(ParaLSTM, marks=pytest.mark.slow)])
def test_a_layer_is_diagnosed_with_its_own_weights(cell):
    layer = cell(6, num_heads=2)
    x = jax.random.normal(jax.random.key(0), (2, 20, 4))
    start = functools.partial(layer.init, method="step")
    variables = jax.jit(start)(jax.random.key(1), layer.initial_state(2), x[:, 0])
    found = jax.jit(lambda variables: diagnose_layer(layer, variables, x))(variables)
    assert 1 <= found.convergence.iterations <= 5
    assert found.lyapunov_exponent.shape == (2,) and (found.lyapunov_exponent < 0).all()
    assert found.max_recurrent_weight == max_recurrent_weight(variables["params"])
    assert 0 < found.max_recurrent_weight <= 0.5


def test_a_tolerance_of_zero_is_refused():
    with pytest.raises(ValueError, match="tolerance"):
        iterations_to_tolerance(gru_step, *problem(1.0), tolerance=0.0)
