"""The baselines against loops over time; causality, positions, dtypes, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.recurrent.baselines import CausalAttention, DiagonalRecurrence

BASELINES = [DiagonalRecurrence, CausalAttention]


def build(cls, shape=(2, 9, 4), **fields):
    model = cls(**({"features": 8, "num_heads": 2} | fields))
    x = jax.random.normal(jax.random.key(0), shape)
    return model, jax.device_get(jax.jit(model.init)(jax.random.key(1), x)["params"]), x


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_the_recurrence_is_its_equation_step_by_step():
    model, params, x = build(DiagonalRecurrence)
    params["bias"] = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    b, h, expected = params["b"].astype(np.float64), np.zeros((2, 8)), []
    for x_t in np.moveaxis(np.asarray(x, np.float64), 1, 0):
        u = [
            np.concatenate([x_t[:, 2 * k : 2 * k + 2] @ b[k, :, row] for k in range(2)], axis=1)
            + params["bias"][row]
            for row in range(3)
        ]
        a = sigmoid(params["decay"]) ** (8 * sigmoid(u[0]))
        h = a * h + np.sqrt(1 - a**2) * sigmoid(u[1]) * u[2]
        expected.append(h)
    y = jax.jit(model.apply)({"params": params}, x)
    np.testing.assert_allclose(y, np.stack(expected, 1), atol=1e-5)


def test_the_recurrence_starts_slow_and_stays_bounded():
    model, params, x = build(DiagonalRecurrence, (1, 300, 4))
    decay = sigmoid(params["decay"])
    assert decay.min() >= 0.9 and decay.max() <= 0.999
    y = jax.jit(model.apply)({"params": params}, 100 * x)
    assert np.isfinite(y).all() and np.abs(y).max() < 2000
    grads = jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, 100 * x))))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_attention_is_a_softmax_over_the_past_of_rotated_heads():
    model, params, x = build(CausalAttention)
    q, k, v = np.einsum("btd,dvkh->vbtkh", x, params["qkv"])
    frequencies = 10000.0 ** -(np.arange(2) / 2)
    expected = np.zeros((2, 9, 2, 4))
    for t in range(9):
        for head in range(2):
            logits = []
            for s in range(t + 1):
                turned = np.exp(1j * frequencies * (t - s))
                pairs = [a[:, :2] + 1j * a[:, 2:] for a in (q[:, t, head], k[:, s, head])]
                logits.append(np.sum((pairs[0] * turned * pairs[1].conj()).real, -1) / 2)
            weights = np.exp(logits) / np.sum(np.exp(logits), axis=0)
            expected[:, t, head] = np.einsum("sb,bsh->bh", weights, v[:, : t + 1, head])
    expected = expected.reshape(2, 9, 8) @ params["out"]
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, x), expected, atol=1e-5)


@pytest.mark.parametrize("cls", BASELINES)
def test_an_output_does_not_see_what_comes_later(cls):
    model, params, x = build(cls)
    y = jax.jit(model.apply)({"params": params}, x)
    changed = jax.jit(model.apply)({"params": params}, x.at[:, 5].add(1.0))
    np.testing.assert_allclose(changed[:, :5], y[:, :5], atol=1e-6)
    assert np.abs(changed[:, 5:] - y[:, 5:]).max(axis=(0, 2)).min() > 1e-4


@pytest.mark.parametrize("cls", BASELINES)
def test_bfloat16_outputs_are_close_and_parameters_stay_float32(cls):
    model, params, x = build(cls, (2, 40, 4))
    half = build(cls, dtype=jnp.bfloat16)[0]
    y = jax.jit(half.apply)({"params": params}, x)
    assert y.dtype == jnp.bfloat16 and params[min(params)].dtype == np.float32
    np.testing.assert_allclose(y, jax.jit(model.apply)({"params": params}, x), atol=0.05)


@pytest.mark.parametrize("cls", BASELINES)
def test_what_does_not_fit_is_refused(cls):
    with pytest.raises(ValueError, match=r"features, 7, is not divisible by num_heads=2"):
        build(cls, features=7)
    with pytest.raises(ValueError, match=r"x is int32 \(2, 3, 4\), expected a floating"):
        cls(8).init(jax.random.key(0), jnp.ones((2, 3, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"expected a floating \(B, T, D\)"):
        cls(8).init(jax.random.key(0), jnp.ones((2, 4)))


def test_attention_refuses_heads_of_odd_width_and_recurrence_inputs_it_cannot_split():
    with pytest.raises(ValueError, match="head_dim=3 must be even"):
        build(CausalAttention, features=6)
    with pytest.raises(ValueError, match="the width of x, 5, is not divisible by num_heads=2"):
        build(DiagonalRecurrence, (2, 3, 5))
