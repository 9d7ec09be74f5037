"""Cells of one's own: automatic Jacobians, the nonlinearities to choose from, structure checks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.recurrent import (
    NONLINEARITIES,
    NewtonConfig,
    ParaGRU,
    ParallelRNN,
    ParaLSTM,
    check_structure,
    parallel_rnn,
)
from jaxeff.recurrent.cells import lstm_step

EXACT = NewtonConfig(8)


def three_part_step(w, x, h):
    """Three coupled states for each channel."""
    mixed = jnp.einsum("ij...,b...j->b...i", w, h.swapaxes(1, 2)).swapaxes(1, 2)
    return jnp.tanh(mixed + x["drive"]) * jax.nn.sigmoid(x["gate"])


def dense_step(params, x, h):
    return jnp.tanh(h @ params["w"] + x + params["bias"])


def block_problem():
    keys = jax.random.split(jax.random.key(0), 4)
    inputs = {"drive": jax.random.normal(keys[0], (2, 15, 3, 4))}
    inputs["gate"] = jax.random.normal(keys[1], (2, 15, 3, 4))
    return 0.5 * jax.random.normal(keys[2], (3, 3)), inputs, jax.random.normal(keys[3], (2, 3, 4))


def dense_problem():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": 0.4 * jax.random.normal(keys[0], (4, 4)), "bias": jnp.ones(4) / 4}
    return params, jax.random.normal(keys[1], (2, 15, 4)), jax.random.normal(keys[2], (2, 4))


def loop(step, params, inputs, h0):
    """The states by `lax.scan`, written down once more for jax.grad to go through."""
    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)

    def body(h, x):
        h = step(params, x, h)
        return h, h

    return jnp.moveaxis(jax.lax.scan(body, h0, by_time)[1], 0, 1)


@pytest.mark.parametrize(
    ("step", "structure", "problem", "damping"),
    [
        (three_part_step, "block", block_problem, 1.0),
        (dense_step, "dense", dense_problem, 0.8),
    ],
)
def test_gradients_are_those_through_a_loop(step, structure, problem, damping):
    arguments = problem()
    newton = NewtonConfig(8 if damping == 1 else 16, damping=damping)

    def solved(*arguments):
        return parallel_rnn(step, *arguments, structure=structure, newton=newton)[0]

    def graded(run):
        def loss(*arguments):
            states = run(*arguments)
            return jnp.sum(jnp.sin(states) * jnp.arange(states.shape[-1])), states

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arguments)

    (grads, states), (expected_grads, expected) = (
        graded(run) for run in (solved, functools.partial(loop, step))
    )
    np.testing.assert_allclose(states, expected, atol=1e-5)
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(g, e, atol=1e-5 * np.abs(e).max())


def test_damping_scales_every_correction():
    """One iteration with factor w is the guess and w times the way that a whole one goes."""
    arguments = dense_problem()
    one, half, over = (
        parallel_rnn(dense_step, *arguments, structure="dense", newton=NewtonConfig(1, damping=w))[
            0
        ]
        for w in (1.0, 0.5, 1.5)
    )
    params, inputs, h0 = arguments
    before = jnp.concatenate([h0[:, None], jnp.zeros_like(inputs)[:, 1:]], axis=1)
    guess = dense_step(params, inputs, before)
    np.testing.assert_allclose(half - guess, (one - guess) / 2, atol=1e-6)
    np.testing.assert_allclose(over - guess, 1.5 * (one - guess), atol=1e-6)


ORACLE = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)),
    "half_sigmoid": lambda x: 0.5 / (1 + np.exp(-x)),
    "exp": np.exp,
    "softplus": lambda x: np.log1p(np.exp(x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
}


def test_nonlinearities_are_what_their_names_say():
    assert set(NONLINEARITIES) == set(ORACLE)
    x = np.linspace(-3, 3, 25)
    for name, expected in ORACLE.items():
        actual = NONLINEARITIES[name](jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(actual, expected(x), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        (ParaGRU, {"gate_activation": "half_sigmoid", "candidate_activation": "softplus"}),
        pytest.param(
            ParaLSTM,
            {
                "gate_activation": "half_sigmoid",
                "candidate_activation": "silu",
                "state_activation": "identity",
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_other_activations_are_solved_with_automatic_jacobians(cell, options):
    model = cell(6, num_heads=2, newton=NewtonConfig(8), **options)
    x = jax.random.normal(jax.random.key(0), (2, 12, 4))
    start = functools.partial(model.init, method="step")
    variables = jax.jit(start)(jax.random.key(1), model.initial_state(2), x[:, 0])

    def loss(variables, method):
        y = model.clone(method=method).apply(variables, x)
        return jnp.sum(jnp.sin(y)), y

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (grads, y), (expected_grads, expected) = (run(variables, m) for m in ("newton", "sequential"))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(g, e, atol=1e-4 * np.abs(e).max())
    zero = model.initial_state(2)
    (_, first), (_, standard) = (
        jax.jit(functools.partial(m.apply, method="step"))(variables, zero, x[:, 0])
        for m in (model, cell(6, num_heads=2))
    )
    np.testing.assert_allclose(first, y[:, 0], atol=1e-5)
    assert np.abs(first - standard).max() > 1e-2


def test_activations_are_refused_where_they_cannot_be_had():
    x = jnp.ones((1, 2, 4))
    with pytest.raises(ValueError, match="swish"):
        ParaGRU(4, gate_activation="swish").init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="fused"):
        ParaLSTM(4, method="fused", state_activation="relu").init(jax.random.key(0), x)


def test_a_cell_of_ones_own_as_a_layer():
    def init(key, width):
        return {"w": 0.4 * jax.random.normal(key, (width, width)), "bias": jnp.zeros(width)}

    model = ParallelRNN(dense_step, init, (4,), "dense", newton=EXACT)
    x = jax.random.normal(jax.random.key(0), (2, 10, 4))
    variables = model.clone(method="sequential").init(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, variables["params"]) == {"cell": {"w": (4, 4), "bias": (4,)}}
    expected = loop(dense_step, variables["params"]["cell"], x, jnp.zeros((2, 4)))
    lengths = jnp.array([7, 0])
    run = jax.jit(functools.partial(model.apply, return_carry=True))
    states, carry = run(variables, x, lengths=lengths)
    np.testing.assert_allclose(states, expected, atol=1e-5)
    np.testing.assert_allclose(carry, [expected[0, 6], np.zeros(4)], atol=1e-5)
    _, out = model.apply(variables, carry, x[jnp.arange(2), lengths], method="step")
    np.testing.assert_allclose(out, [expected[0, 7], expected[1, 0]], atol=1e-5)
    with pytest.raises(ValueError, match="return_carry"):
        model.apply(variables, x, lengths=lengths)


def test_a_wrong_structure_is_found_on_a_small_case():
    params, x, h = dense_problem()
    check_structure(dense_step, params, x[:, 0], h, "dense")
    check_structure(dense_step, {**params, "w": jnp.eye(4)}, x[:, 0], h, "diagonal")
    with pytest.raises(ValueError, match="structure='diagonal'"):
        check_structure(dense_step, params, x[:, 0], h, "diagonal")
    w, inputs, h = block_problem()
    first = jax.tree.map(lambda x: x[:, 0], inputs)
    check_structure(three_part_step, w, first, h, "block")
    with pytest.raises(ValueError, match="structure='block'"):
        check_structure(lambda *v: jnp.cumsum(three_part_step(*v), -1), w, first, h, "block")
    with pytest.raises(ValueError, match="rows of the batch"):
        check_structure(lambda w, x, h: h + h[::-1], w, first, h, "block")
    with pytest.raises(ValueError, match="h has shape"):
        check_structure(three_part_step, w, first, h, "dense")


def test_shapes_of_what_the_functions_return_are_checked():
    params, inputs, h0 = dense_problem()
    with pytest.raises(ValueError, match="step_fn returns"):
        parallel_rnn(lambda w, x, h: h[:, :2], params, inputs, h0)
    with pytest.raises(ValueError, match="jacobian_fn returns"):
        parallel_rnn(
            dense_step, params, inputs, h0, structure="dense", jacobian_fn=lambda w, x, h, n: h
        )
    five = jnp.zeros((2, 5, 4))
    with pytest.raises(ValueError, match="m = 5"):
        parallel_rnn(lstm_step, params, jnp.zeros((2, 9, 3, 4)), five, structure="block")
