"""Cross-entropy, whole and chunked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxeff.language import chunked_cross_entropy, cross_entropy


def problem(batch=3, length=7, width=5, vocab=11, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (batch, length, width), dtype)
    kernel = jax.random.normal(keys[1], (width, vocab), "float32")
    targets = jax.random.randint(keys[2], (batch, length), 0, vocab)
    mask = jnp.ones((batch, length)).at[0, 3:].set(0).at[2, 0].set(0)
    return hidden, kernel, targets, mask


def test_sum_and_weight_are_those_of_the_unmasked_tokens():
    hidden, kernel, targets, mask = problem()
    logits = np.asarray(hidden @ kernel, np.float64)
    total = 0.0
    for row, step in np.argwhere(np.asarray(mask)):
        shifted = np.exp(logits[row, step] - logits[row, step].max())
        total -= np.log(shifted[targets[row, step]] / shifted.sum())
    loss, weight = cross_entropy(jnp.asarray(logits, jnp.float32), targets, mask)
    assert loss.dtype == weight.dtype == jnp.float32
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    assert weight == mask.sum()


def test_z_loss_adds_the_squared_log_partition():
    hidden, kernel, targets, mask = problem()
    logits = hidden @ kernel
    plain, _ = cross_entropy(logits, targets, mask)
    with_z, _ = cross_entropy(logits, targets, mask, z_loss=0.1)
    z = jax.nn.logsumexp(logits, axis=-1)
    np.testing.assert_allclose(with_z - plain, 0.1 * jnp.sum(mask * z**2), rtol=1e-4)


def test_masked_targets_and_logits_are_ignored_even_when_they_are_garbage():
    hidden, kernel, targets, mask = problem()
    logits = hidden @ kernel
    spoiled = jnp.where(mask[..., None] > 0, logits, jnp.inf)
    wrong = jnp.where(mask > 0, targets, -100)
    expected = cross_entropy(logits, targets, mask)
    np.testing.assert_array_equal(cross_entropy(spoiled, wrong, mask), expected)


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.zeros((1, 4096, 8), jnp.bfloat16)
    loss, weight = cross_entropy(logits, jnp.zeros((1, 4096), jnp.int32))
    np.testing.assert_allclose(loss / weight, np.log(8), rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 3, 6, 7, 21, 1000])
def test_chunks_equal_the_whole_with_gradients(chunk_size):
    hidden, kernel, targets, mask = problem()

    def whole(hidden, kernel):
        return cross_entropy(hidden @ kernel, targets, mask, z_loss=0.01)[0]

    def chunked(hidden, kernel):
        return chunked_cross_entropy(hidden, kernel, targets, mask, chunk_size, z_loss=0.01)[0]

    expected = jax.value_and_grad(whole, argnums=(0, 1))(hidden, kernel)
    found = jax.value_and_grad(chunked, argnums=(0, 1))(hidden, kernel)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )
    weight = chunked_cross_entropy(hidden, kernel, targets, mask, chunk_size)[1]
    assert weight == mask.sum()


def test_chunks_never_hold_all_logits():
    hidden, kernel, targets, mask = problem(batch=2, length=64, vocab=501)

    def loss(hidden, kernel):
        return chunked_cross_entropy(hidden, kernel, targets, mask, chunk_size=16)[0]

    def largest(jaxpr):
        sizes = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
        inner = [largest(sub) for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params)]
        return max(sizes + inner)

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, kernel).jaxpr
    assert largest(jaxpr) <= 16 * 501


def test_no_mask_counts_every_token():
    hidden, kernel, targets, _ = problem()
    ones = jnp.ones(targets.shape)
    expected = cross_entropy(hidden @ kernel, targets, ones)
    np.testing.assert_array_equal(cross_entropy(hidden @ kernel, targets), expected)
    np.testing.assert_allclose(chunked_cross_entropy(hidden, kernel, targets), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"targets": jnp.zeros((3, 6), jnp.int32)}, "targets"),
        ({"mask": jnp.ones((3, 6))}, "mask"),
    ],
)
def test_wrong_arguments_are_named(wrong, named):
    hidden, kernel, targets, mask = problem()
    call = {"targets": targets, "mask": mask} | wrong
    with pytest.raises(ValueError, match=named):
        chunked_cross_entropy(hidden, kernel, **call)
