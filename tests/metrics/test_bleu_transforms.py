"""BLEU under jit, vmap, grad and sharding; what its program holds and what it does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxeff.metrics.bleu import (
    bleu_from_statistics,
    bleu_statistics,
    corpus_bleu,
    sentence_bleu,
)

BATCH, REFERENCES, LENGTH = 16, 2, 12


def tokens(batch=BATCH, length=LENGTH, first_id=1):
    random = np.random.default_rng(0)

    def sentences(*shape):
        ids = random.integers(first_id, first_id + 3, (*shape, length))
        return np.where(np.arange(length) < random.integers(0, length + 1, (*shape, 1)), ids, 0)

    return sentences(batch), sentences(batch, REFERENCES)


def everything(candidates, references, method="auto"):
    """Statistics, sentence scores and corpus scores."""
    both = candidates, references
    return {
        "statistics": bleu_statistics(*both, method=method),
        "sentences": sentence_bleu(*both, smoothing="exp", method=method),
        "corpus": corpus_bleu(*both, convention="sacrebleu", smoothing="exp", method=method),
    }


@functools.cache
def compiled(method):
    return jax.jit(functools.partial(everything, method=method))


@pytest.mark.parametrize("method", ["sort", "pairwise"])
def test_eight_devices_give_what_one_gives(method):
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    by_batch = NamedSharding(mesh, PartitionSpec("data"))
    expected = compiled(method)(*tokens())
    sharded = compiled(method)(*(jax.device_put(x, by_batch) for x in tokens()))
    assert sharded["sentences"].sharding.is_equivalent_to(by_batch, 1)
    exact = expected.pop("statistics"), sharded.pop("statistics")
    jax.tree.map(np.testing.assert_array_equal, *exact)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), sharded, expected)


def test_vmap_gives_what_the_batch_gives():
    def one(candidate, references):
        found = everything(candidate, references, "sort")
        return found["statistics"], found["sentences"]

    stats, scores = jax.jit(jax.vmap(one))(*tokens())
    expected = compiled("sort")(*tokens())
    jax.tree.map(np.testing.assert_array_equal, stats, expected["statistics"])
    np.testing.assert_array_equal(scores, expected["sentences"])


def test_scores_weigh_a_loss_without_a_gradient_of_their_own():
    candidates, references = tokens()

    def loss(logits):
        scores = sentence_bleu(jnp.argmax(logits, -1), references, smoothing="floor")
        return jnp.sum(scores * jax.nn.logsumexp(logits, axis=(1, 2))), scores

    logits = 5.0 * jax.nn.one_hot(candidates, 4)
    gradient, scores = jax.jit(jax.grad(loss, has_aux=True))(logits)
    expected = scores[:, None, None] * jax.nn.softmax(logits, axis=(1, 2))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    assert np.any(scores > 0)


def test_traced_weights_score_as_known_ones():
    weights = np.array([[0.25] * 4, [0.9, 0.3, 0.0, 0.2]], np.float32)
    stats = compiled("sort")(*tokens())["statistics"]
    score = functools.partial(bleu_from_statistics, smoothing="nltk3")
    scores = score(stats, weights=weights)
    assert scores.shape == (BATCH, 2) and scores.dtype == jnp.float32
    traced = jax.jit(lambda w: score(stats, weights=w))(weights)
    np.testing.assert_allclose(traced, scores, rtol=1e-6)
    for k in range(2):
        alone = score(stats, weights=tuple(weights[k].tolist()))
        np.testing.assert_allclose(alone, scores[:, k], rtol=1e-6)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def program(batch, length, method):
    shapes = [(batch, length), (batch, REFERENCES, length)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    return list(
        equations(jax.make_jaxpr(functools.partial(everything, method=method))(*arguments).jaxpr)
    )


@pytest.mark.parametrize("method", ["sort", "pairwise"])
def test_the_program_calls_no_host_and_does_not_grow_with_the_batch(method):
    few, many = (program(batch, LENGTH, method) for batch in (4, 512))
    assert len(few) == len(many)
    assert not [e.primitive.name for e in few if "callback" in e.primitive.name]


@pytest.mark.parametrize("method", ["sort", "pairwise"])
def test_no_array_is_larger_than_a_few_times_the_tokens(method):
    """Ids up to 2**31 - 1 are told apart, so nothing here grows with a vocabulary."""
    batch, length = 64, 128
    num_tokens = batch * length * (1 + REFERENCES)
    sizes = [v.aval.size for e in program(batch, length, method) for v in e.outvars]
    assert max(sizes) <= 4 * num_tokens
    largest, small = (compiled(method)(*tokens(first_id=first)) for first in (2**31 - 3, 1))
    jax.tree.map(np.testing.assert_array_equal, largest, small)


def test_compiled_scoring_moves_nothing_between_host_and_device():
    arrays = [jax.device_put(np.int32(x)) for x in tokens()]
    compiled("sort")(*arrays)
    with jax.transfer_guard("disallow"):
        scores = compiled("sort")(*arrays)
    assert np.all(np.isfinite(scores["sentences"]))
