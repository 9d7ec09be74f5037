"""Cross-entropy, whole and chunked."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import RULES, make_mesh
from flax import linen as nn
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

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


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}, {"tensor": 8}],
    ids=["batch and vocabulary", "sequence", "vocabulary"],
)
def test_chunks_on_a_mesh_equal_one_device(sizes):
    hidden, kernel, targets, mask = problem(batch=4, length=8, width=8, vocab=16)
    mask = mask.at[3].set(0)  # one device has nothing to count

    def loss(hidden, kernel):
        total, weight = chunked_cross_entropy(hidden, kernel, targets, mask, 8, z_loss=0.01)
        return total / weight

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    expected = gradient(hidden, kernel)
    with jax.set_mesh(make_mesh(**sizes)), nn.logical_axis_rules(RULES):
        found = jax.jit(gradient)(hidden, kernel)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found, expected)


def collectives_inside_loops(text):
    """Collective instructions of compiled HLO that are not in its entry computation."""
    before_entry = text.split("\nENTRY ")[0]
    return re.findall(r" (all-reduce|reduce-scatter|all-gather)\(", before_entry)


def test_the_heads_gradient_travels_once_not_once_a_chunk():
    hidden, kernel, targets, mask = problem(batch=4, length=64, width=8, vocab=16)
    mesh = make_mesh(fsdp=4)
    placed = [
        jax.device_put(a, NamedSharding(mesh, PartitionSpec("fsdp"))) for a in (hidden, kernel)
    ]

    def loss(hidden, kernel):
        return chunked_cross_entropy(hidden, kernel, targets, mask, 16)[0]

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*placed).compile()
    text = compiled.as_text()
    assert "while" in text and not collectives_inside_loops(text)
    assert "all-gather" in text and ("reduce-scatter" in text or "all-reduce" in text)


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
