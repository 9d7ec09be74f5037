"""The Newton solver against the published arrays, against a loop over time, and its refusals."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.recurrent import NewtonConfig, parallel_rnn
from jaxeff.recurrent.cells import gru_jacobian, gru_step, lstm_jacobian, lstm_step

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "pararnn"
CELLS = {"gru": (gru_step, gru_jacobian), "lstm": (lstm_step, lstm_jacobian)}
CONVERGING = ["gru_t1", "gru_t64", "gru_t257_h4", "lstm_t2", "lstm_t64", "lstm_t257_h4"]


@functools.partial(jax.jit, static_argnames=("name", "newton", "method"))
def run(name, x, weights, newton=NewtonConfig(), method="newton"):  # noqa: B008
    kind = name.split("_")[0]
    step, jacobian = CELLS[kind]
    heads = weights["B"].shape[0]
    u = jnp.einsum("btki,kivj->btvkj", x.reshape(*x.shape[:2], heads, -1), weights["B"])
    u = u.reshape(*x.shape[:2], 3, -1) + weights["bias"]
    params = {"a": weights["A"]}
    h0 = jnp.zeros((x.shape[0], u.shape[-1]))
    if kind == "lstm":
        params["peephole"] = weights["C"]
        h0 = jnp.zeros((x.shape[0], 2, u.shape[-1]))
    return parallel_rnn(
        step, params, u, h0, newton=newton, method=method, jacobian_fn=jacobian,
        structure="block" if kind == "lstm" else "diagonal",
    )  # fmt: skip


def load(name):
    data = np.load(GOLDEN / f"{name}.npz")
    return data, jnp.asarray(data["x"]), {k: jnp.asarray(data[k]) for k in "ABC" if k in data} | {
        "bias": jnp.asarray(data["bias"])
    }  # fmt: skip


def error(actual, expected):
    return np.max(np.abs(actual - expected) / np.maximum(1, np.abs(expected)))


def output(name, states):
    return states[:, :, 1] if name.startswith("lstm") else states


@pytest.mark.parametrize("name", CONVERGING)
def test_every_iterate_is_the_published_one(name):
    data, x, weights = load(name)
    for k in (1, 2, 3):
        states, _ = run(name, x, weights, NewtonConfig(k))
        expected = data[f"state_newton{k}"]
        assert error(states.reshape(expected.shape), expected) <= 2e-5
    assert error(output(name, states), data["y_seq"]) <= 2e-5


@pytest.mark.parametrize("name", CONVERGING)
def test_gradients_are_those_of_the_loop_over_time(name):
    data, x, weights = load(name)

    def loss(x, weights):
        return jnp.sum(output(name, run(name, x, weights)[0]) * data["w"])

    gx, gw = jax.jit(jax.grad(loss, (0, 1)))(x, weights)
    for key, g in {"x": gx, **gw}.items():
        expected = data[f"g{key}"]
        assert np.abs(g - expected).max() <= 1e-4 * max(np.abs(expected).max(), 1e-3), key


@pytest.mark.parametrize("name", ["gru_large_a", "lstm_large_a"])
def test_divergence_is_reported_and_the_fallback_answers(name):
    data, x, weights = load(name)
    assert run(name, x, weights)[1].residual.max() >= 1e-2
    states, info = run(name, x, weights, NewtonConfig(fallback="sequential"))
    expected, _ = run(name, x, weights, method="sequential")
    failed = np.asarray(info.fallback)
    assert failed.any()
    np.testing.assert_array_equal(failed, info.residual > 1e-4)
    np.testing.assert_allclose(states[failed], expected[failed], rtol=1e-6, atol=1e-6)
    assert error(output(name, states), data["y_seq"]) <= 2e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 127, 128, 129, 257, 1000])
def test_automatic_jacobians_agree_with_the_loop_for_any_length_and_initial_state(steps):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": 0.4 * jax.random.normal(keys[0], (3, 5))}
    u, h0 = jax.random.normal(keys[1], (2, steps, 3, 5)), jax.random.normal(keys[2], (2, 5))

    def loss(params, u, h0, method):
        states, _ = parallel_rnn(gru_step, params, u, h0, method=method, newton=NewtonConfig(6))
        return jnp.sum(jnp.sin(states)), states

    def graded(method):
        graded = jax.value_and_grad(lambda *v: loss(*v, method), (0, 1, 2), has_aux=True)
        return jax.jit(graded)(params, u, h0)

    (_, states), grads = graded("newton")
    (_, expected), expected_grads = graded("sequential")
    np.testing.assert_allclose(states, expected, atol=1e-5)
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert np.abs(g - e).max() <= 1e-4 * np.abs(e).max()


def test_one_iteration_more_makes_one_step_more_exact():
    _, x, weights = load("gru_large_a")
    expected, _ = run("gru", x, weights, method="sequential")
    for k in (1, 2, 3):
        states, _ = run("gru", x, weights, NewtonConfig(k))
        np.testing.assert_allclose(states[:, : k + 1], expected[:, : k + 1], atol=2e-5)


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_a_linear_cell_needs_one_iteration(structure):
    weight = 0.3 * jax.random.normal(jax.random.key(0), (4, 4))
    weight = jnp.diag(jnp.diag(weight)) if structure == "diagonal" else weight
    x, h0 = jax.random.normal(jax.random.key(1), (2, 9, 4)), jnp.ones((2, 4))

    def step(w, x, h):
        return h @ w + x

    newton = NewtonConfig(10, tolerance=1e-5)
    states, info = parallel_rnn(step, weight, x, h0, structure=structure, newton=newton)
    expected, _ = parallel_rnn(step, weight, x, h0, structure=structure, method="sequential")
    np.testing.assert_allclose(states, expected, atol=1e-5)
    assert info.iterations == 1


@pytest.mark.parametrize(
    "fields",
    [{"num_iterations": 0}, {"damping": 2.0}, {"tolerance": -1.0}, {"fallback": "hope"}],
)
def test_settings_out_of_range_are_refused_by_name(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        NewtonConfig(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"structure": "banded"}, "structure"),
        ({"method": "fused"}, "method"),
        ({"h0": jnp.zeros((2, 2, 4))}, "h0"),
        ({"h0": jnp.zeros((3, 4))}, "h0"),
        ({"inputs": jnp.zeros((2, 0, 3, 4))}, "T = 0"),
        ({"inputs": jnp.zeros((2, 5, 3, 4), int)}, "inputs"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    arguments = {
        "params": {"a": jnp.zeros((3, 4))},
        "inputs": jnp.zeros((2, 5, 3, 4)),
        "h0": jnp.zeros((2, 4)),
    }
    with pytest.raises(ValueError, match=message):
        parallel_rnn(gru_step, **(arguments | change))


def test_in_float64_as_many_iterations_as_steps_but_one_are_exact():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0))
        params = {"a": 2 * jax.random.normal(keys[0], (3, 4), jnp.float64)}
        u, h0 = jax.random.normal(keys[1], (2, 12, 3, 4), jnp.float64), jnp.ones((2, 4))
        states, _ = parallel_rnn(gru_step, params, u, h0, newton=NewtonConfig(11))
        expected, _ = parallel_rnn(gru_step, params, u, h0, method="sequential")
        assert states.dtype == jnp.float64
        np.testing.assert_allclose(states, expected, rtol=0, atol=1e-12)
