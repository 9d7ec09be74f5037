"""Random ragged batches: statistics against dictionaries, scores against NLTK and sacrebleu."""

import functools

import jax
import numpy as np
import pytest
from bleu_cases import (
    NLTK_METHODS,
    ORDERS,
    ROWS,
    Batch,
    assert_statistics_equal,
    batches,
    nltk_corpus,
    nltk_scores,
    nltk_sentences,
    oracle_statistics,
    present,
    repeatable,
    sacrebleu_corpus,
    sacrebleu_scores,
    sacrebleu_sentences,
)
from hypothesis import given
from hypothesis import strategies as st

from jaxeff.metrics.bleu import bleu_from_statistics, bleu_statistics

pytestmark = pytest.mark.filterwarnings("ignore:\\nThe hypothesis contains 0 counts:UserWarning")

TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}


@functools.partial(jax.jit, static_argnames="method")
def count(method, **arrays):
    return bleu_statistics(**arrays, max_order=ORDERS, method=method)


def with_references(batch, stats):
    """The sentences that have one, of which alone the packages know; the others become padding."""
    keep = np.array([bool(present(r)) for r in batch.references])
    kept = [[x for x, k in zip(column, keep, strict=True) if k] for column in batch]
    return Batch(*kept), jax.tree.map(lambda x: (x.T * keep).T, stats)


# Weights are 0 or large enough for NLTK's stand-in for 0 to vanish.
weight = st.one_of(st.just(0.0), st.floats(0.2, 1.5))
weight_vectors = st.lists(
    st.lists(weight, min_size=4, max_size=4).map(tuple), min_size=2, max_size=2
)


@pytest.mark.parametrize("method", ["sort", "pairwise"])
@repeatable(max_examples=150)
@given(batches())
def test_statistics_are_those_of_dictionaries(method, batch):
    stats = count(method, **batch.arrays())
    assert_statistics_equal(stats, oracle_statistics(batch, ORDERS))


@repeatable(max_examples=150)
@given(batches(), weight_vectors)
def test_scores_are_those_of_nltk(batch, weights):
    stats = count("sort", **batch.arrays())
    found = nltk_scores(stats, np.float32(weights))
    corpus, stats = with_references(batch, stats)
    of_corpus = nltk_scores(stats, np.float32(weights))
    for method in NLTK_METHODS:
        expected = nltk_sentences(batch, weights, method)
        np.testing.assert_allclose(found[method][0], expected, err_msg=method, **TOLERANCE)
        if corpus.candidates:
            expected = nltk_corpus(corpus, weights, method)
            np.testing.assert_allclose(of_corpus[method][1], expected, err_msg=method, **TOLERANCE)


@repeatable(max_examples=150)
@given(batches())
def test_scores_are_those_of_sacrebleu(batch):
    stats = count("sort", **batch.arrays())
    found = sacrebleu_scores(stats, 4)
    corpus, stats = with_references(batch, stats)
    of_corpus = sacrebleu_scores(stats, 4)
    for options in found:
        expected = sacrebleu_sentences(batch, *options)
        np.testing.assert_allclose(found[options][0], expected, err_msg=str(options), **TOLERANCE)
        if corpus.candidates:
            expected = sacrebleu_corpus(corpus, *options)
            score = of_corpus[options][1]
            np.testing.assert_allclose(score, expected, err_msg=str(options), **TOLERANCE)


@jax.jit
def parametrised_scores(stats):
    score = functools.partial(bleu_from_statistics, stats)
    nltk = {"epsilon": 0.03, "alpha": 2.0, "nltk_k": 3.0}
    sacrebleu = {"convention": "sacrebleu", "weights": (0.5, 0.5), "effective_order": True}
    return {
        "nltk1": score(smoothing="nltk1", **nltk),
        "nltk4": score(smoothing="nltk4", **nltk),
        "nltk6": score(smoothing="nltk6", **nltk),
        "floor": score(smoothing="floor", epsilon=0.3, **sacrebleu),
        "add-k": score(smoothing="add-k", k=0.3, **sacrebleu),
    }


@repeatable(max_examples=25)
@given(batches())
def test_parameters_mean_what_they_mean_there(batch):
    found = parametrised_scores(count("sort", **batch.arrays()))
    for method, scores in found.items():
        if method.startswith("nltk"):
            parameters = {"epsilon": 0.03, "alpha": 2, "k": 3}
            expected = nltk_sentences(batch, [(0.25,) * 4], method, **parameters)[:, 0]
        else:
            expected = sacrebleu_sentences(batch, method, True, max_order=2, value=0.3)
        np.testing.assert_allclose(scores, expected, err_msg=method, **TOLERANCE)


@repeatable(max_examples=60)
@given(batches(), st.randoms(use_true_random=False))
def test_neither_order_of_references_nor_of_sentences_matters(batch, random):
    order = random.sample(range(ROWS), ROWS)
    rows = [random.sample(batch.references[i], len(batch.references[i])) for i in order]
    shuffled = Batch([batch.candidates[i] for i in order], rows)
    stats, moved = (count("sort", **b.arrays()) for b in (batch, shuffled))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[np.array(order)], b), stats, moved)


@repeatable(max_examples=60)
@given(batches(vocabularies=((1, 2), (5, 9, 7))), st.sampled_from(["sort", "pairwise"]))
def test_neither_more_padding_nor_how_it_is_marked_matters(batch, method):
    arrays = batch.arrays()
    expected = count(method, **arrays)
    candidates = np.pad(arrays["candidates"], ((0, 0), (0, 3)))
    references = np.pad(arrays["references"], ((0, 0), (0, 1), (0, 5)))
    for padded in (
        {"candidates": candidates, "references": references},
        {"candidates": candidates - (candidates == 0), "references": references},
    ):
        stats = count(method, **padded)
        jax.tree.map(np.testing.assert_array_equal, stats, expected)
