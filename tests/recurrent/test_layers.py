"""The linen modules: parameters, step by step against all at once, dtypes, clipping, refusals."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxeff.recurrent import NewtonConfig, ParaGRU, ParaLSTM, clip_recurrent

CELLS = [ParaGRU, ParaLSTM]
slow = pytest.mark.slow


def init(model, x):
    """Variables, by way of a single step: there is no solver to compile."""
    start = functools.partial(model.init, method="step")
    return jax.jit(start)(jax.random.key(1), model.initial_state(x.shape[0]), x[:, 0])


@pytest.mark.parametrize("cell", CELLS)
def test_parameters_and_solve_info(cell):
    model = cell(6, num_heads=2)
    x = jnp.ones((3, 5, 4))
    params = init(model, x)["params"]
    expected = {"a": (3, 6), "b": (2, 2, 3, 3), "bias": (3, 6)}
    expected |= {"peephole": (2, 6)} if cell is ParaLSTM else {}
    assert {k: v.shape for k, v in params.items()} == expected
    assert np.abs(params["a"]).max() <= 0.5
    run = jax.jit(functools.partial(model.apply, mutable="intermediates"))
    _, sown = run({"params": params}, x)
    (info,) = sown["intermediates"]["solve_info"]
    assert info.residual.shape == (3,) and info.iterations == 3


@pytest.mark.parametrize("cell", [ParaGRU, pytest.param(ParaLSTM, marks=slow)])
def test_a_bfloat16_model_solves_in_float32(cell):
    x = jax.random.normal(jax.random.key(0), (2, 33, 8))
    half, full = cell(8, dtype=jnp.bfloat16), cell(8, method="sequential")
    variables = init(half, x)
    # The inputs are rounded for both; the weights and the projection for the half one only.
    x = x.astype(jnp.bfloat16)
    y, sown = jax.jit(functools.partial(half.apply, mutable="intermediates"))(variables, x)
    assert y.dtype == jnp.bfloat16
    assert sown["intermediates"]["solve_info"][0].residual.max() <= 1e-4
    np.testing.assert_allclose(y.astype(jnp.float32), jax.jit(full.apply)(variables, x), atol=1e-2)


@pytest.mark.parametrize("cell", [pytest.param(ParaGRU, marks=slow), ParaLSTM])
def test_documents_in_one_row_are_as_if_run_apart(cell):
    model = cell(6, num_heads=2)
    x = jax.random.normal(jax.random.key(0), (2, 12, 4))
    variables = init(model, x)
    state = jax.tree.map(lambda s: s + 0.3, model.initial_state(2))
    reset = jnp.zeros((2, 12), bool).at[:, 5].set(True).at[0, 6].set(True)

    def packed(variables, x, state):
        y = model.apply(variables, x, state, reset=reset)
        return jnp.sum(jnp.sin(y)), y

    loop = model.clone(method="sequential")

    def apart(variables, x, state):
        first = loop.apply(variables, x[:, :5], state)
        short = loop.apply(variables, x[:1, 5:6])
        long = loop.apply(variables, x[:1, 6:])
        other = loop.apply(variables, x[1:, 5:])
        rest = jnp.concatenate([jnp.concatenate([short, long], axis=1), other])
        y = jnp.concatenate([first, rest], axis=1)
        return jnp.sum(jnp.sin(y)), y

    run = jax.jit(jax.grad(packed, (0, 1, 2), has_aux=True))
    grads, y = run(variables, x, state)
    graded = jax.jit(jax.grad(apart, (0, 1, 2), has_aux=True))
    expected_grads, expected = graded(variables, x, state)
    sequential = jax.jit(functools.partial(loop.apply, reset=reset))(variables, x, state)
    np.testing.assert_allclose(sequential, expected, atol=1e-5)
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(g, e, atol=1e-4 * np.abs(e).max())
    # What follows a beginning does not hear of what came before it, to the last bit.
    moved = run(variables, x.at[:, :5].add(1.0), state)[1]
    np.testing.assert_array_equal(moved[:, 5:], y[:, 5:])


@pytest.mark.parametrize(
    ("cell", "method", "dtype"),
    [
        (ParaGRU, "newton", jnp.float32),
        pytest.param(ParaLSTM, "newton", jnp.bfloat16, marks=slow),
        (ParaLSTM, "fused", jnp.bfloat16),
        pytest.param(ParaGRU, "newton", jnp.bfloat16, marks=slow),
        pytest.param(ParaLSTM, "newton", jnp.float32, marks=slow),
        pytest.param(ParaGRU, "fused", jnp.float32, marks=slow),
        pytest.param(ParaLSTM, "fused", jnp.float32, marks=slow),
    ],
)
def test_a_prompt_at_once_and_then_step_by_step_is_the_whole(cell, method, dtype):
    model = cell(6, num_heads=2, method=method, dtype=dtype)
    x = jax.random.normal(jax.random.key(0), (3, 12, 4))
    variables = init(model, x)
    lengths, start = jnp.array([0, 4, 9]), model.initial_state(3)

    @jax.jit
    def prompt(variables, x):
        return model.apply(
            variables, x, start, return_carry=True, lengths=lengths, return_info=True
        )  # fmt: skip

    whole = jax.jit(model.clone(method="sequential").apply)(variables, x).astype(jnp.float32)
    step = jax.jit(lambda state, x_t: model.apply(variables, state, x_t, method="step"))
    out, state, info = prompt(variables, x[:, :9])
    assert out.dtype == dtype and all(s.dtype == jnp.float32 for s in jax.tree.leaves(state))
    atol = 1e-5 if dtype == jnp.float32 else 1e-2
    assert info.residual.max() <= (1e-2 if method == "fused" and dtype == jnp.bfloat16 else 1e-4)
    rows = jnp.arange(3)
    for t in range(3):
        state, out = step(state, x[rows, lengths + t])
        np.testing.assert_allclose(out.astype(jnp.float32), whole[rows, lengths + t], atol=atol)


@slow
def test_without_lengths_the_state_is_that_after_the_last_step():
    model = ParaLSTM(6, num_heads=2, method="sequential")
    x = jax.random.normal(jax.random.key(0), (2, 5, 4))
    run = jax.jit(functools.partial(model.apply, init(model, x), return_carry=True))
    y, (c, h) = run(x)
    np.testing.assert_array_equal(h, y[:, -1])
    jax.tree.map(np.testing.assert_array_equal, (c, h), run(x, lengths=jnp.full(2, 5))[1])


@slow
@pytest.mark.parametrize("cell", CELLS)
def test_fused_kernels_compute_the_same_layer(cell):
    x = jax.random.normal(jax.random.key(0), (2, 20, 4))
    model = cell(6, num_heads=2)
    variables = init(model, x)
    state = jax.tree.map(lambda s: s + 0.3, model.initial_state(2))

    def loss(variables, state, method):
        y = model.clone(method=method).apply(variables, x, state)
        return jnp.sum(jnp.sin(y)), y

    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
    (grads, y), (expected_grads, expected) = (
        run(variables, state, method) for method in ("fused", "sequential")
    )
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(g, e, atol=1e-4 * np.abs(e).max())


def test_partitioned_parameters_carry_their_axes():
    model = ParaLSTM(6, num_heads=2, partitioned=True)
    x = jnp.ones((1, 3, 4))
    boxed = init(model, x)
    axes = nn.get_partition_spec(boxed)["params"]
    assert axes["a"] == axes["bias"] == axes["peephole"] == PartitionSpec(None, "heads")
    assert axes["b"] == PartitionSpec("heads", "embed", None, None)
    plain = init(model.clone(partitioned=False), x)
    jax.tree.map(np.testing.assert_array_equal, nn.unbox(boxed), plain)
    run = jax.jit(functools.partial(model.apply, method="step"))
    state = model.initial_state(1)
    np.testing.assert_array_equal(run(boxed, state, x[:, 0])[1], run(plain, state, x[:, 0])[1])


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
        (ParaGRU(6, method="fast"), jnp.ones((1, 2, 8)), "method"),
        (
            ParaGRU(6, newton=NewtonConfig(tolerance=1e-3), method="fused"),
            jnp.ones((1, 2, 8)),
            "tolerance",
        ),
        (ParaGRU(6), jnp.ones((1, 2, 8), int), "dtype"),
        (ParaGRU(6), jnp.ones((1, 8)), "x has shape"),
        (ParaLSTM(6), jnp.ones((1, 0, 8)), "T = 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(model, x, message):
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), x)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"lengths": jnp.ones(1, int)}, "return_carry"),
        ({}, {"lengths": jnp.ones(2, int), "return_carry": True}, "lengths"),
        ({}, {"lengths": jnp.ones(1), "return_carry": True}, "lengths"),
        ({}, {"reset": jnp.zeros((1, 3), bool)}, "reset"),
        ({}, {"reset": jnp.zeros((1, 2))}, "reset"),
        ({"method": "fused"}, {"reset": jnp.zeros((1, 2), bool)}, "reset"),
        ({"method": "fused", "axis_name": "time"}, {}, "axis_name"),
        ({"method": "fused", "newton": NewtonConfig(fallback="sequential")}, {}, "fallback"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        ParaGRU(6, **options).init(jax.random.key(0), jnp.ones((1, 2, 8)), **arguments)
