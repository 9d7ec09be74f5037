"""Fused ParaGRU and ParaLSTM: golden arrays, the exact adjoint, tiles."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fused_gru, fused_lstm

GOLDEN = Path(__file__).parents[1] / "golden" / "pararnn"
SMALL = ["gru_t1", "gru_t64", "gru_t257_h4", "lstm_t2", "lstm_t64", "lstm_t257_h4"]
LARGE = ["gru_large_a", "lstm_large_a"]


def run(cell, operands, first=None, **options):
    """States of either cell, (m, B, T, H)."""
    if cell == "gru":
        h0 = None if first is None else first[0]
        return fused_gru(*operands, h0=h0, **options)[None]
    return jnp.stack(fused_lstm(*operands, state0=first, **options))


def golden(name):
    """A file's arrays, the names of the operands among them, and a cell's states from these."""
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))

    def states(x, b, bias, *weights, **options):
        heads, width, _, out = b.shape
        by_head = x.reshape(*x.shape[:2], heads, width)
        u = jnp.einsum("btki,kivj->btvkj", by_head, b, precision="highest")
        u = u.reshape(*x.shape[:2], 3, heads * out) + bias
        return run(name.split("_")[0], (u, *weights), **options)

    names = ["x", "B", "bias", "A"] + (["C"] if name.startswith("lstm") else [])
    return arrays, names, states


def concatenated(states):
    return np.concatenate(list(states), axis=-1)


def random_operands(cell, seed, batch, steps, width, dtype=jnp.float32, scale=0.5):
    rng = np.random.default_rng(seed)
    u = jnp.asarray(rng.normal(size=(batch, steps, 3, width)), dtype)
    weights = [jnp.asarray(rng.uniform(-scale, scale, (3, width)), jnp.float32)]
    if cell == "lstm":
        weights.append(jnp.asarray(rng.uniform(-scale, scale, (2, width)), jnp.float32))
    parts = 1 if cell == "gru" else 2
    first = jnp.asarray(rng.uniform(-0.9, 0.9, (parts, batch, width)), jnp.float32)
    return (u, *weights), tuple(first)


@pytest.mark.parametrize("name", SMALL)
def test_newton_over_the_whole_sequence_makes_the_golden_iterates(name):
    arrays, names, states = golden(name)
    operands = [arrays[key] for key in names]
    for k in (1, 2, 3):
        found = states(*operands, method="newton", num_iterations=k, tile=1000)
        np.testing.assert_allclose(concatenated(found), arrays[f"state_newton{k}"], atol=2e-6)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("method", ["newton", "sequential"])
def test_states_and_gradients_are_the_golden_ones(name, method):
    arrays, names, states = golden(name)
    operands = [arrays[key] for key in names]

    def loss(*operands):
        h = states(*operands, method=method)[-1]
        return (h * arrays["w"]).sum(), h

    grads, h = jax.grad(loss, argnums=range(len(operands)), has_aux=True)(*operands)
    np.testing.assert_allclose(h, arrays["y_seq"], atol=2e-5)
    for key, grad in zip(names, grads, strict=True):
        expected = arrays[f"g{key}"]
        error = np.abs(grad - expected).max()
        assert error <= 1e-4 * np.abs(expected).max(), key


@pytest.mark.parametrize("name", LARGE)
def test_large_weights_are_served_step_by_step(name):
    arrays, names, states = golden(name)
    operands = [arrays[key] for key in names]
    h = states(*operands, method="sequential")[-1]
    np.testing.assert_allclose(h, arrays["y_seq"], atol=1e-4)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("method", ["newton", "sequential"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_the_adjoint_is_the_gradient_through_the_loop(cell, method, steps):
    operands, first = random_operands(cell, 0, 2, steps, 5)
    weight = np.random.default_rng(1).normal(size=(len(first), 2, steps, 5))

    def by_hand(operands, first):
        return (run(cell, operands, first, method=method, num_iterations=6, tile=4) * weight).sum()

    def through_the_loop(operands, first):
        cell_step = importlib.import_module(f"pallas_kernels.fused_{cell}.reference").step
        u, rows = operands[0], tuple(jnp.concatenate(operands[1:]))
        state, total = first, 0.0
        for t in range(steps):
            state = cell_step(tuple(jnp.moveaxis(u[:, t], 1, 0)), rows, state)
            total += (jnp.stack(state) * weight[:, :, t]).sum()
        return total

    found = jax.grad(by_hand, argnums=(0, 1))(operands, first)
    expected = jax.grad(through_the_loop, argnums=(0, 1))(operands, first)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), found, expected)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_after_k_iterations_the_first_steps_of_a_sequence_are_exact(cell):
    operands, first = random_operands(cell, 2, 2, 8, 5, scale=2.0)
    exact = run(cell, operands, first, method="sequential")
    for k in (1, 2, 7):
        found = run(cell, operands, first, method="newton", num_iterations=k)
        np.testing.assert_allclose(found[:, :, : k + 1], exact[:, :, : k + 1], atol=1e-5)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_bf16_projections_are_computed_in_float32(cell):
    operands, _ = random_operands(cell, 3, 2, 40, 5, jnp.bfloat16)
    found = run(cell, operands)
    exact = run(cell, (operands[0].astype(jnp.float32), *operands[1:]), method="sequential")
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "scan"}, "method='scan'"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"damping": 2.0}, "damping=2.0"),
        ({"tile": 0}, "tile=0"),
        ({"h0": jnp.zeros((1, 5))}, "h0 has shape"),
        ({"implementation": "cuda"}, "implementation='cuda'"),
    ],
)
def test_bad_options_are_named(change, message):
    (u, a), _ = random_operands("gru", 4, 2, 3, 5)
    with pytest.raises(ValueError, match=message):
        fused_gru(u, a, **change)


def test_operands_that_do_not_fit_are_named():
    (u, a), _ = random_operands("gru", 5, 2, 3, 5)
    with pytest.raises(ValueError, match="a has shape"):
        fused_gru(u, a[:2])
    with pytest.raises(ValueError, match="T at least 1"):
        fused_gru(u[:, :0], a)
    with pytest.raises(ValueError, match="u has dtype"):
        fused_gru(u.astype(jnp.int32), a)
