"""The Newton solver against the published arrays, against a loop over time, and its refusals."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.recurrent import NewtonConfig, parallel_rnn
from jaxeff.recurrent.cells import gru_jacobian, gru_step, lstm_jacobian, lstm_step

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "pararnn"
CELLS = {"gru": (gru_step, gru_jacobian), "lstm": (lstm_step, lstm_jacobian)}
SHORT = ["gru_t1", "gru_t64", "lstm_t2", "lstm_t64"]
LONG = [pytest.param(f"{kind}_t257_h4", marks=pytest.mark.slow) for kind in ("gru", "lstm")]
DIVERGING = ["gru_large_a", "lstm_large_a"]


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


@pytest.mark.parametrize(
    "name", ["lstm_t64", pytest.param("gru_t64", marks=pytest.mark.slow), *LONG]
)
def test_the_iterates_are_the_published_ones(name):
    data, x, weights = load(name)
    for k in (1, 2):
        states, _ = run(name, x, weights, NewtonConfig(k))
        expected = data[f"state_newton{k}"]
        assert error(states.reshape(expected.shape), expected) <= 2e-5


@functools.partial(jax.jit, static_argnames=("name", "newton"))
def graded(name, x, weights, w, newton=NewtonConfig()):  # noqa: B008
    """Gradients of sum(y * w) in x and weights, the states and the SolveInfo."""

    def loss(x, weights):
        states, info = run(name, x, weights, newton)
        return jnp.sum(output(name, states) * w), (states, info)

    return jax.grad(loss, (0, 1), has_aux=True)(x, weights)


@pytest.mark.parametrize("name", SHORT + LONG)
def test_three_iterations_give_states_and_gradients_of_the_loop_over_time(name):
    data, x, weights = load(name)
    (gx, gw), (states, _) = graded(name, x, weights, data["w"])
    expected = data["state_newton3"]
    assert error(states.reshape(expected.shape), expected) <= 2e-5
    assert error(output(name, states), data["y_seq"]) <= 2e-5
    for key, g in {"x": gx, **gw}.items():
        expected = data[f"g{key}"]
        assert np.abs(g - expected).max() <= 1e-4 * max(np.abs(expected).max(), 1e-3), key


@pytest.mark.parametrize("name", DIVERGING)
def test_divergence_is_reported_and_the_fallback_answers(name):
    data, x, weights = load(name)
    fallback = NewtonConfig(fallback="sequential")
    (gx, gw), (states, info) = graded(name, x, weights, data["w"], fallback)
    assert info.residual.max() >= 1e-2
    failed = np.asarray(info.fallback)
    assert failed.any()
    np.testing.assert_array_equal(failed, info.residual > 1e-4)
    assert error(output(name, states), data["y_seq"]) <= 2e-5
    for key, g in {"x": gx, **gw}.items():
        expected = data[f"g{key}"]
        assert np.abs(g - expected).max() <= 1e-4 * np.abs(expected).max(), key


SLOW_LENGTHS = [*itertools.product(("gru", "lstm"), (127, 128, 257, 1000)), ("lstm", 129)]
LENGTHS = [*itertools.product(("gru", "lstm"), (1, 2, 3)), ("gru", 129)]
LENGTHS += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_LENGTHS]


def some_problem(kind):
    """A sequence of 1000 steps of a GRU (automatic Jacobians) or an LSTM (by hand)."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": 0.4 * jax.random.normal(keys[0], (3, 5))}
    u, h0 = jax.random.normal(keys[1], (2, 1000, 3, 5)), jax.random.normal(keys[2], (2, 5))
    if kind == "gru":
        return params, u, h0, gru_step, {}
    params["peephole"] = params["a"][:2] / 2
    h0 = jnp.stack([h0, jnp.tanh(h0)], axis=1)
    return params, u, h0, lstm_step, {"jacobian_fn": lstm_jacobian, "structure": "block"}


@functools.cache
def differentiated(kind, method):
    """A jitted (u, weights of the steps) -> states, and gradients in params, u and h0."""
    params, _, h0, step, options = some_problem(kind)
    options = options | {"method": method, "newton": NewtonConfig(6)}

    def loss(params, u, h0, weights):
        states, _ = parallel_rnn(step, params, u, h0, **options)
        return jnp.einsum("bt...,t->", jnp.sin(states), weights), states

    graded = jax.grad(loss, (0, 1, 2), has_aux=True)
    return jax.jit(lambda u, weights: graded(params, u, h0, weights))


@pytest.mark.parametrize(("kind", "steps"), LENGTHS)
def test_states_and_gradients_agree_with_the_loop_for_any_length_and_initial_state(kind, steps):
    _, u, *_ = some_problem(kind)
    (params, gu, h0), states = differentiated(kind, "newton")(u[:, :steps], jnp.ones(steps))
    # A loop over the whole sequence of which only the first steps count, to compile it once.
    counted = (jnp.arange(1000) < steps).astype(jnp.float32)
    (params_, gu_, h0_), states_ = differentiated(kind, "sequential")(u, counted)
    np.testing.assert_allclose(states, states_[:, :steps], atol=1e-5)
    grads, expected = (params, gu, h0), (params_, gu_[:, :steps], h0_)
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert np.abs(g - e).max() <= 1e-4 * np.abs(e).max()


def test_a_width_that_is_not_a_whole_number_of_lanes():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": 0.2 * jax.random.normal(keys[0], (3, 131))}
    u, h0 = jax.random.normal(keys[1], (1, 9, 3, 131)), jax.random.normal(keys[2], (1, 131))
    run = functools.partial(parallel_rnn, gru_step, params, u, h0, jacobian_fn=gru_jacobian)
    states, expected = jax.jit(lambda: (run()[0], run(method="sequential")[0]))()
    np.testing.assert_allclose(states, expected, atol=2e-5)


def test_one_iteration_more_makes_one_step_more_exact():
    _, x, weights = load("gru_large_a")
    x = x[:, :8]  # the steps that are exact so soon do not hear of the others
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


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_in_float64_as_many_iterations_as_steps_but_one_are_exact(kind):
    params, u, h0, step, options = some_problem(kind)
    with jax.enable_x64(True):
        # Weights with which a few iterations are far from enough.
        params, u, h0 = jax.tree.map(lambda x: jnp.float64(np.asarray(x)), (params, u[:, :9], h0))
        params = jax.tree.map(lambda a: 6 * a, params)
        run = functools.partial(parallel_rnn, step, params, u, h0, **options)
        few, states = (jax.jit(lambda k=k: run(newton=NewtonConfig(k))[0])() for k in (3, 8))
        expected = jax.jit(lambda: run(method="sequential")[0])()
        assert states.dtype == jnp.float64 and np.abs(few - expected).max() > 1e-4
        np.testing.assert_allclose(states, expected, rtol=0, atol=1e-12)
