"""A corpus is the sum of its sentences' statistics, in whatever parts and on whatever devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bleu_cases import NLTK_METHODS, Batch, nltk_corpus, nltk_scores
from jax.sharding import Mesh, PartitionSpec

from jaxeff.metrics.bleu import (
    BleuAccumulator,
    BleuStats,
    bleu_from_statistics,
    bleu_statistics,
    corpus_bleu,
    sentence_bleu,
)

pytestmark = pytest.mark.filterwarnings("ignore:\\nThe hypothesis contains 0 counts:UserWarning")

BATCH, LENGTH, ORDERS = 32, 10, 5


def sentences(seed=0, batch=BATCH):
    """Lengths from 0; the first is perfect, rows 3 and 7 and the last two are padding."""
    random = np.random.default_rng(seed)
    candidates = random.integers(1, 4, (batch, LENGTH))
    references = random.integers(1, 4, (batch, 2, LENGTH))
    candidates *= np.arange(LENGTH) < random.integers(0, LENGTH + 1, (batch, 1))
    references *= np.arange(LENGTH) < random.integers(1, LENGTH + 1, (batch, 2, 1))
    candidates[0] = references[0] = np.arange(LENGTH) % 3 + 1
    for row in (3, 7, -2, -1):
        candidates[row] = references[row] = 0
    return candidates, references


@jax.jit
def corpus_of(stats):
    return BleuAccumulator.empty(ORDERS).update(stats)


@pytest.fixture(scope="module")
def stats():
    return jax.jit(functools.partial(bleu_statistics, max_order=ORDERS))(*sentences())


@pytest.fixture(scope="module")
def whole(stats):
    return corpus_of(stats)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def ragged(candidates, references):
    rows = [
        ([t for t in c if t], [[t for t in r if t] for r in refs])
        for c, refs in zip(candidates.tolist(), references.tolist(), strict=True)
        if any(map(any, refs))
    ]
    return Batch(*map(list, zip(*rows, strict=True)))


def test_sums_are_those_of_the_sentences(stats, whole):
    numerators = np.asarray(stats.numerators)
    np.testing.assert_array_equal(whole.total.numerators, numerators.sum(0))
    assert int(whole.total.candidate_length) == int(np.sum(stats.candidate_length))
    there = np.asarray(stats.reference_length) > 0
    too_short = there[:, None] & (np.asarray(stats.denominators) == 0)
    np.testing.assert_array_equal(whole.too_short, too_short.sum(0))
    assert too_short.sum() > 0 and there.sum() == BATCH - 4
    assert_equal(whole.last, jax.tree.map(lambda x: x[BATCH - 3], stats))


def test_parts_in_a_scan_are_the_whole(stats, whole):
    parts = jax.tree.map(lambda x: x.reshape(8, 4, *x.shape[1:]), stats)

    @jax.jit
    def in_parts(parts):
        def step(corpus, part):
            return corpus.update(part), None

        return jax.lax.scan(step, BleuAccumulator.empty(ORDERS), parts)[0]

    assert_equal(in_parts(parts), whole)
    assert_equal(corpus_of(parts), whole)  # all leading axes


def test_merging_is_associative_and_the_empty_corpus_changes_nothing(stats, whole):
    host, cuts = jax.device_get(stats), [0, 5, 6, BATCH - 2, BATCH]
    slices = [slice(*ends) for ends in itertools.pairwise(cuts)]
    a, b, c, padding = (corpus_of(jax.tree.map(lambda x, s=s: x[s], host)) for s in slices)
    empty = BleuAccumulator.empty(ORDERS)
    assert_equal(a.merge(b).merge(c).merge(padding), whole)
    assert_equal(a.merge(b.merge(c.merge(padding))), whole)
    assert_equal(empty.merge(whole), whole)
    assert_equal(whole.merge(empty), whole)
    assert_equal(padding, empty)


@pytest.mark.parametrize("axes", [("data",), ("data", "model")])
def test_psum_over_eight_devices_is_exact(stats, whole, axes):
    devices = np.array(jax.devices()[:8]).reshape((8,) if len(axes) == 1 else (4, 2))
    mesh = Mesh(devices, axes)
    spec = PartitionSpec(axes)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=PartitionSpec())
    def summed(stats):
        return BleuAccumulator.empty(ORDERS).update(stats).psum(axes)

    assert_equal(summed(stats), whole)


def test_parts_in_a_scan_on_each_device_are_the_whole(stats, whole):
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    parts = jax.tree.map(lambda x: x.reshape(8, 2, 2, *x.shape[1:]), stats)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec()
    )
    def summed(parts):
        start = jax.lax.pcast(BleuAccumulator.empty(ORDERS), "data", to="varying")
        of_device = jax.tree.map(lambda x: x[0], parts)
        corpus, _ = jax.lax.scan(lambda c, part: (c.update(part), None), start, of_device)
        return corpus.psum("data")

    assert_equal(summed(parts), whole)


def test_psum_over_a_vmapped_axis_is_exact(stats, whole):
    parts = jax.tree.map(lambda x: x.reshape(8, 4, *x.shape[1:]), stats)
    summed = jax.vmap(
        lambda part: BleuAccumulator.empty(ORDERS).update(part).psum("parts"), axis_name="parts"
    )(parts)
    assert_equal(jax.tree.map(lambda x: x[5], summed), whole)


def test_rows_of_padding_leave_no_trace_in_nltks_score(stats):
    batch = ragged(*sentences())
    assert len(batch.candidates) == BATCH - 4
    weights = ((0.25,) * 4, (0.5, 0.5, 0.0, 0.0))
    for method, (_, found) in nltk_scores(stats, np.float32(weights)).items():
        expected = nltk_corpus(batch, weights, method)
        np.testing.assert_allclose(found, expected, rtol=2e-6, err_msg=method)


def pooled_precisions(corpus):
    """Matches, n-grams as NLTK counts them, n-grams as they are, and 5-gram precision."""
    matches, ngrams = (np.float64(x) for x in (corpus.total.numerators, corpus.total.denominators))
    totals = ngrams + np.asarray(corpus.too_short)
    return matches[:4], totals[:4], ngrams[:4], matches[4] / totals[4]


def pooled_score(corpus, smoothing):
    """NLTK's methods 5 to 7 in float64 with the corpus in the last sentence's place."""
    matches, totals, ngrams, fifth = pooled_precisions(corpus)
    p = matches / totals
    if smoothing == "nltk7":
        length = float(corpus.total.candidate_length)
        zeros = np.cumsum(matches == 0)
        p = np.where(matches == 0, np.log(length) / (2.0**zeros * 5 * totals), p)
    if smoothing in ("nltk5", "nltk7"):
        upper, lower = [*p[1:], fifth], p[0] + 1
        for n in range(4):
            p[n] = lower = (lower + p[n] + upper[n]) / 3
    else:
        for n in (2, 3):
            p[n] = (matches[n] + 5 * p[n - 1] ** 2 / p[n - 2]) / (ngrams[n] + 5)
    ratio = float(corpus.total.reference_length) / float(corpus.total.candidate_length)
    return min(1, np.exp(1 - ratio)) * np.exp(np.mean(np.log(p)))


@pytest.mark.parametrize("smoothing", ["nltk5", "nltk6", "nltk7"])
def test_without_parity_no_order_of_sentences_matters(stats, whole, smoothing):
    turned = corpus_of(jax.tree.map(lambda x: x[::-1], stats))
    score = whole.compute(smoothing=smoothing)
    assert float(turned.compute(smoothing=smoothing)) == float(score)
    np.testing.assert_allclose(score, pooled_score(whole, smoothing), rtol=2e-6)
    scores = [c.compute(smoothing=smoothing, corpus_parity="nltk") for c in (whole, turned)]
    assert abs(float(scores[0] - scores[1])) > 1e-3


def test_parity_changes_no_other_method(whole):
    for smoothing in NLTK_METHODS[:5]:
        scores = [whole.compute(smoothing=smoothing, corpus_parity=p) for p in (None, "nltk")]
        assert float(scores[0]) == float(scores[1])


def test_the_mean_of_sentence_scores_is_not_the_corpus_score(stats, whole):
    mean = jnp.mean(bleu_from_statistics(stats, smoothing="exp"))
    assert abs(float(mean - whole.compute(smoothing="exp"))) > 0.02


def test_the_conventions_differ_by_what_too_short_sentences_add(whole):
    nltk = whole.compute(smoothing="none")
    sacrebleu = whole.compute(smoothing="none", convention="sacrebleu")
    totals = np.float64(whole.total.denominators[:4])
    ratios = totals / (totals + np.asarray(whole.too_short[:4]))
    np.testing.assert_allclose(nltk / sacrebleu, np.prod(ratios) ** 0.25, rtol=1e-5)
    assert float(nltk) < float(sacrebleu)


def test_an_empty_corpus_scores_0():
    for options in ({}, {"smoothing": "exp"}, {"smoothing": "nltk6"}, {"convention": "sacrebleu"}):
        assert float(BleuAccumulator.empty().compute(**options)) == 0
    assert float(BleuAccumulator.empty(5).compute(smoothing="nltk7", corpus_parity="nltk")) == 0


def test_corpus_bleu_counts_and_sums_in_one_call(whole):
    weights = ((0.25,) * 4, (0.0, 0.5, 0.25, 0.0))

    def scores(candidates, references):
        options = {"weights": weights, "smoothing": "nltk5"}
        return (
            corpus_bleu(candidates, references, **options),
            jnp.mean(sentence_bleu(candidates, references, **options), axis=0),
        )

    corpus, mean = jax.jit(scores)(*sentences())
    assert corpus.shape == mean.shape == (2,) and corpus.dtype == jnp.float32
    np.testing.assert_allclose(corpus, whole.compute(weights=weights, smoothing="nltk5"), rtol=1e-6)
    assert np.all(np.abs(corpus - mean) > 1e-3)


def test_counts_of_a_large_corpus_are_exact():
    """2**24 + 1 is no float32."""
    one = BleuStats(np.ones((1, 1)), np.ones((1, 1)), np.ones(1), np.ones(1))
    corpus = BleuAccumulator.empty(1).update(jax.tree.map(np.int32, one))
    most = jax.tree.map(lambda x: x * 2**24, corpus)
    assert int(most.merge(corpus).total.numerators[0]) == 2**24 + 1


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: BleuAccumulator.empty(0), "max_order=0 must be at least 1"),
        (
            lambda: BleuAccumulator.empty(4).merge(BleuAccumulator.empty(5)),
            "max_order=5 of what is added must be the accumulator's, 4",
        ),
        (
            lambda: BleuAccumulator.empty().compute(smoothing="nltk5"),
            "max_order=4, but 4 weights and smoothing='nltk5' need max_order=5",
        ),
        (
            lambda: BleuAccumulator.empty().compute(corpus_parity="sacrebleu"),
            "corpus_parity='sacrebleu' is not one of None, 'nltk'",
        ),
        (
            lambda: BleuAccumulator.empty().compute(corpus_parity="nltk", convention="sacrebleu"),
            "corpus_parity='nltk' is only for convention='nltk', got convention='sacrebleu'",
        ),
    ],
)
def test_what_cannot_work_is_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()
