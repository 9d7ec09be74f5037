"""The linen modules: parameters, step by step against all at once, dtypes, clipping, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff.recurrent import NewtonConfig, ParaGRU, ParaLSTM, clip_recurrent

CELLS = [ParaGRU, ParaLSTM]


@pytest.mark.parametrize("cell", CELLS)
def test_steps_continue_what_was_solved_in_parallel(cell):
    model = cell(6, num_heads=2, newton=NewtonConfig(6))
    x = jax.random.normal(jax.random.key(0), (2, 12, 4))
    variables = model.init(jax.random.key(1), x)
    y = jax.jit(model.apply)(variables, x)
    step = jax.jit(lambda state, x_t: model.apply(variables, state, x_t, method="step"))
    state, outputs = model.initial_state(2), []
    for t in range(12):
        if t == 7:
            halfway = state
        state, out = step(state, x[:, t])
        outputs.append(out)
    np.testing.assert_allclose(jnp.stack(outputs, 1), y, atol=1e-5)
    np.testing.assert_allclose(model.apply(variables, x[:, 7:], halfway), y[:, 7:], atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_parameters_and_solve_info(cell):
    model = cell(6, num_heads=2)
    x = jnp.ones((3, 5, 4))
    params = model.init(jax.random.key(1), x)["params"]
    expected = {"a": (3, 6), "b": (2, 2, 3, 3), "bias": (3, 6)}
    expected |= {"peephole": (2, 6)} if cell is ParaLSTM else {}
    assert {k: v.shape for k, v in params.items()} == expected
    assert np.abs(params["a"]).max() <= 0.5
    _, sown = model.apply({"params": params}, x, mutable="intermediates")
    (info,) = sown["intermediates"]["solve_info"]
    assert info.residual.shape == (3,) and info.iterations == 3


@pytest.mark.parametrize("cell", CELLS)
def test_a_bfloat16_model_solves_in_float32(cell):
    x = jax.random.normal(jax.random.key(0), (2, 65, 8))
    half, full = cell(8, dtype=jnp.bfloat16), cell(8)
    variables = half.init(jax.random.key(1), x)
    # The inputs are rounded for both; the weights and the projection for the half one only.
    x = x.astype(jnp.bfloat16)
    y, sown = half.apply(variables, x, mutable="intermediates")
    assert y.dtype == jnp.bfloat16
    assert sown["intermediates"]["solve_info"][0].residual.max() <= 1e-4
    np.testing.assert_allclose(y.astype(jnp.float32), full.apply(variables, x), atol=1e-2)


def test_clipping_lands_in_the_interval_and_leaves_other_weights_alone():
    params = {"cell": {"a": jnp.array([0.4, -0.4]), "b": jnp.array([0.4])}}
    optimizer = optax.chain(optax.sgd(1.0), clip_recurrent(0.5))
    grads = {"cell": {"a": jnp.array([-1.0, 1.0]), "b": jnp.array([-1.0])}}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)["cell"]
    np.testing.assert_allclose(after["a"], [0.5, -0.5], rtol=1e-6)
    np.testing.assert_allclose(after["b"], [1.4], rtol=1e-6)
    with pytest.raises(ValueError, match="params"):
        optimizer.update(grads, optimizer.init(params))
    with pytest.raises(ValueError, match="max_abs"):
        clip_recurrent(0.0)


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (ParaGRU(6, num_heads=4), jnp.ones((1, 2, 8)), "features"),
        (ParaLSTM(6, num_heads=3), jnp.ones((1, 2, 8)), "width of x"),
        (ParaGRU(6, method="fused"), jnp.ones((1, 2, 8)), "method"),
        (ParaGRU(6), jnp.ones((1, 2, 8), int), "dtype"),
        (ParaGRU(6), jnp.ones((1, 8)), "x has shape"),
        (ParaLSTM(6), jnp.ones((1, 0, 8)), "T = 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(model, x, message):
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), x)
