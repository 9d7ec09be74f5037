"""Recorded results of NLTK 3.10.4 and sacrebleu 2.6.0 on seven batches of token ids."""

import functools

import jax
import numpy as np
import pytest
from bleu_cases import (
    ORDERS,
    SACREBLEU_METHODS,
    golden_cases,
    load_golden,
    nltk_scores,
    sacrebleu_scores,
)

from jaxeff.metrics.bleu import (
    bleu_from_statistics,
    bleu_statistics,
    corpus_bleu,
    sentence_bleu,
)

TOLERANCE = {"rtol": 0, "atol": 2e-6}
ROWS, REFERENCES, LENGTH = 16, 3, 256  # the largest of the cases
METHODS = ("sort", "pairwise")


@functools.partial(jax.jit, static_argnames="method")
def count(candidates, references, method):
    return bleu_statistics(candidates, references, max_order=ORDERS, method=method)


@functools.cache
def statistics(case, method="sort"):
    """Counted at one padded shape for all cases: rows of padding come after the sentences."""
    golden = load_golden(case)

    def padded(tokens, shape):
        missing = np.subtract(shape, tokens.shape)
        return np.pad(tokens, [(0, n) for n in missing])

    return count(
        padded(golden["candidates"], (ROWS, LENGTH)),
        padded(golden["references"], (ROWS, REFERENCES, LENGTH)),
        method=method,
    )


def assert_close(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    np.testing.assert_allclose(
        found[: len(expected)] if expected.ndim else found, expected, **TOLERANCE
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", golden_cases())
def test_statistics_are_those_recorded(case, method):
    golden, stats = load_golden(case), statistics(case, method)
    orders = len(golden["weights"])
    rows = len(golden["candidates"])
    found = jax.tree.map(lambda x: np.asarray(x)[:rows], stats)
    np.testing.assert_array_equal(found.numerators[:, :orders], golden["numerators"])
    np.testing.assert_array_equal(found.denominators[:, :orders], golden["denominators"])
    np.testing.assert_array_equal(found.candidate_length, golden["hyp_len"])
    np.testing.assert_array_equal(found.reference_length, golden["closest_ref_len"])
    assert not any(np.any(x[rows:]) for x in jax.tree.leaves(stats))


@pytest.mark.parametrize("case", golden_cases())
def test_scores_are_those_of_nltk(case):
    golden = load_golden(case)
    for smoothing, (sentences, corpus) in nltk_scores(statistics(case), golden["weights"]).items():
        name = smoothing.replace("nltk", "method")
        assert_close(sentences, golden[f"nltk_sentence_{name}"])
        assert_close(corpus, golden[f"nltk_corpus_{name}"])


@pytest.mark.parametrize("case", [case for case in golden_cases() if case != "bleu2_weights"])
def test_scores_are_those_of_sacrebleu(case):
    golden = load_golden(case)
    scores = sacrebleu_scores(statistics(case), len(golden["weights"]))
    for (smoothing, effective_order), (sentences, corpus) in scores.items():
        name = smoothing.replace("-", "")
        assert_close(sentences, golden[f"sacrebleu_sentence_{name}_eff{effective_order:d}"])
        assert_close(corpus, golden[f"sacrebleu_corpus_{name}"])


@pytest.mark.parametrize(
    ("case", "method"), [("edge_cases", "sort"), ("bleu2_weights", "pairwise")]
)
def test_sentence_and_corpus_in_one_call_give_the_recorded_scores(case, method):
    golden = load_golden(case)

    @jax.jit
    def scores(candidates, references):
        options = {"weights": golden["weights"], "pad_id": int(golden["pad_id"]), "method": method}
        both = candidates, references
        return (
            sentence_bleu(*both, smoothing="nltk5", **options),
            corpus_bleu(*both, smoothing="nltk7", corpus_parity="nltk", **options),
        )

    sentences, corpus = scores(golden["candidates"], golden["references"])
    assert_close(sentences, golden["nltk_sentence_method5"])
    assert_close(corpus, golden["nltk_corpus_method7"])


@pytest.mark.parametrize("index", range(4))
def test_names_shared_by_both_conventions_are_nltks_methods_0_to_3(index):
    stats = statistics("edge_cases")
    named = bleu_from_statistics(stats, smoothing=SACREBLEU_METHODS[index])
    np.testing.assert_array_equal(named, bleu_from_statistics(stats, smoothing=f"nltk{index}"))
