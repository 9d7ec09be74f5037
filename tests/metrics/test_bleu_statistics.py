"""What counts as a sentence, a reference and a length; and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bleu_cases import assert_statistics_equal

from jaxeff.metrics.bleu import BleuStats, bleu_from_statistics, bleu_statistics, sentence_bleu

count = jax.jit(
    functools.partial(bleu_statistics, method="sort"), static_argnames=("max_order", "pad_id")
)


def lengths_of(candidate_length, reference_lengths):
    """The statistics of a candidate of ones and references of twos, of these lengths."""
    candidates = np.arange(9) < candidate_length
    references = 2 * (np.arange(9) < np.array(reference_lengths)[:, None])
    return count(candidates.astype(int), references)


@pytest.mark.parametrize(
    ("candidate_length", "reference_lengths", "closest"),
    [
        (5, [6, 4], 4),  # as near as each other: the shorter, wherever it stands
        (5, [4, 6], 4),
        (5, [9, 6], 6),
        (5, [5, 4], 5),
        (1, [0, 3], 3),  # an absent reference is not one of length 0
        (2, [4, 0], 4),
        (0, [3, 2], 2),
        (5, [0, 0], 0),
    ],
)
def test_reference_length_is_that_of_the_closest_present_one(
    candidate_length, reference_lengths, closest
):
    stats = lengths_of(candidate_length, reference_lengths)
    assert int(stats.candidate_length) == candidate_length
    assert int(stats.reference_length) == closest


def test_matches_are_clipped_by_each_reference_by_itself():
    """Not by the sum over references, nor once for every distinct n-gram."""
    candidates = np.array([[7, 7, 7, 8]])
    references = np.array([[[7, 7, 9, 0], [7, 8, 7, 7]]])
    stats = count(candidates, references)
    assert_statistics_equal(
        stats,
        {
            "numerators": [[4, 2, 0, 0]],
            "denominators": [[4, 3, 2, 1]],
            "candidate_length": [4],
            "reference_length": [4],
        },
    )


def test_no_ngram_reaches_from_one_sentence_into_another():
    candidates = np.array([[1, 2, 3, 4]])
    references = np.array([[[1, 2], [3, 4]]])
    assert count(candidates, references).numerators.tolist() == [[4, 2, 0, 0]]


def test_with_lengths_the_pad_id_is_a_token_like_others():
    candidates, references = np.array([[0, 0, 5, 0]]), np.array([[0, 0, 5, 5]])
    lengths = {name: np.array([3]) for name in ("candidate_lengths", "reference_lengths")}
    with_lengths = count(candidates, references, **lengths)
    assert with_lengths.numerators.tolist() == [[3, 2, 1, 0]]
    assert with_lengths.denominators.tolist() == [[3, 2, 1, 0]]
    by_pad_id = count(candidates, references)
    assert by_pad_id.numerators.tolist() == [[1, 0, 0, 0]]
    assert by_pad_id.candidate_length.tolist() == [1]
    by_sign = count(candidates, references - 2 * (references == 5), pad_id=None)
    assert by_sign.candidate_length.tolist() == [4]
    assert by_sign.reference_length.tolist() == [4]


def test_padding_in_the_middle_breaks_ngrams_and_has_no_length():
    stats = count(np.array([[3, 0, 4, 5]]), np.array([[3, 4, 5]]))
    assert stats.numerators.tolist() == [[3, 1, 0, 0]]
    assert stats.candidate_length.tolist() == [3]


def test_leading_axes_are_kept_and_one_reference_needs_no_axis():
    random = np.random.default_rng(0)
    candidates = random.integers(0, 4, (2, 3, 7))
    references = random.integers(0, 4, (2, 3, 1, 9))
    whole = count(candidates, references)
    assert whole.numerators.shape == (2, 3, 4) and whole.candidate_length.shape == (2, 3)
    without_axis = count(candidates, references[:, :, 0])
    of_one = count(candidates[1, 2], references[1, 2])
    assert of_one.numerators.shape == (4,) and of_one.reference_length.shape == ()
    for field in ("numerators", "denominators", "candidate_length", "reference_length"):
        np.testing.assert_array_equal(getattr(whole, field), getattr(without_axis, field))
        np.testing.assert_array_equal(getattr(whole, field)[1, 2], getattr(of_one, field))


@pytest.mark.parametrize(
    ("candidates", "references"),
    [((0, 5), (0, 2, 5)), ((3, 0), (3, 2, 5)), ((3, 5), (3, 0, 5)), ((3, 5), (3, 2, 0))],
)
def test_empty_axes_count_nothing_and_score_0(candidates, references):
    stats = count(np.ones(candidates, int), np.ones(references, int))
    assert not np.any(stats.numerators)
    assert not np.any(stats.reference_length) or not candidates[1]
    scores = bleu_from_statistics(stats, smoothing="add-k")
    assert scores.shape == candidates[:1] and not np.any(scores)


@pytest.mark.parametrize("max_order", [1, 9])
def test_any_order_can_be_counted(max_order):
    stats = count(np.arange(1, 8)[None], np.arange(1, 9)[None], max_order=max_order)
    expected = np.maximum(7 - np.arange(max_order), 0)
    assert stats.max_order == max_order
    np.testing.assert_array_equal(stats.numerators[0], expected)
    np.testing.assert_array_equal(stats.denominators[0], expected)


TOKENS = {"candidates": np.ones((2, 4), int), "references": np.ones((2, 3, 5), int)}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"references": np.ones((3, 3, 5), int)}, r"references \(3, 3, 5\).*\(2, 4\)"),
        ({"references": np.ones((1, 2, 3, 5), int)}, r"references \(1, 2, 3, 5\)"),
        ({"references": np.ones(5, int)}, r"references \(5,\)"),
        ({"candidates": np.ones((2, 4))}, "candidates has dtype float.*expected integers"),
        ({"references": np.ones((2, 5), bool)}, "references has dtype bool, expected integers"),
        ({"candidates": np.array(3)}, "candidates is a scalar"),
        ({"max_order": 0}, "max_order=0 must be at least 1"),
        ({"candidate_lengths": [1, 5]}, "candidate_lengths range from 1 to 5, expected 0 to 4"),
        ({"candidate_lengths": jnp.array([-1, 2])}, "candidate_lengths range from -1 to 2"),
        ({"reference_lengths": [[1, 2, 6]] * 2}, "reference_lengths range from 1 to 6.* 0 to 5"),
        ({"candidate_lengths": [1]}, r"candidates have shape \(1,\), expected \(2,\)"),
        ({"reference_lengths": [1, 1]}, r"references have shape \(2,\), expected \(2, 3\)"),
        ({"candidate_lengths": [1.0, 2.0]}, "candidates have dtype float.*expected integers"),
        ({"method": "pallas"}, "method='pallas' is not one of 'auto', 'sort', 'pairwise'"),
        ({"implementation": "cuda"}, "implementation='cuda' is not one of"),
    ],
)
def test_counting_refuses_what_cannot_work(changes, complaint):
    for function in (bleu_statistics, sentence_bleu):
        if "max_order" in changes and function is sentence_bleu:
            continue
        with pytest.raises(ValueError, match=complaint):
            function(**(TOKENS | changes))


def test_a_named_kernel_that_cannot_run_here_is_refused_with_the_reason():
    with pytest.raises(NotImplementedError, match="implementation='mosaic_tpu' cannot serve"):
        sentence_bleu(**TOKENS, implementation="mosaic_tpu")


def test_lengths_being_traced_are_not_looked_at_but_cut():
    lengths = np.array([-1, 9])
    stats = count(**TOKENS, candidate_lengths=lengths)
    assert stats.candidate_length.tolist() == [0, 4]


def stats_of(max_order):
    orders = np.ones((2, max_order), np.int32)
    return BleuStats(orders, orders, np.full(2, max_order), np.full(2, max_order))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"weights": ()}, r"weights are empty, of shape \(0,\)"),
        ({"weights": np.ones((0, 4))}, r"weights are empty, of shape \(0, 4\)"),
        ({"weights": np.ones((2, 2, 2))}, r"weights have shape \(2, 2, 2\), expected \(N,\) or"),
        ({"weights": 0.25}, r"weights have shape \(\), expected"),
        ({"weights": [(0.5, 0.5), (1.0,)]}, r"weights=\[\(0.5, 0.5\), \(1.0,\)\] must be numbers"),
        ({"weights": "abc"}, "weights='abc' must be numbers"),
        ({"weights": (0.5, np.nan)}, r"weights=\[0.5, nan\] must be finite"),
        ({"weights": (0.2,) * 5}, "max_order=4, but 5 weights and smoothing='none' need .*=5"),
        ({"smoothing": "nltk5"}, "max_order=4, but 4 weights and smoothing='nltk5' need .*=5"),
        ({"smoothing": "nltk7", "weights": (1,)}, "max_order=4, but 1 weights .* need max_order=5"),
        ({"smoothing": "nltk8"}, "smoothing='nltk8' is not one of 'none', 'floor'"),
        ({"smoothing": None}, "smoothing=None is not one of"),
        ({"convention": "moses"}, "convention='moses' is not one of 'nltk', 'sacrebleu'"),
        ({"smoothing": "nltk4", "convention": "sacrebleu"}, 'exists only under convention="nltk"'),
        ({"smoothing": "floor", "epsilon": 0}, "epsilon=0 must be above 0"),
        ({"epsilon": float("nan")}, "epsilon=nan must be above 0"),
        ({"smoothing": "add-k", "k": -1}, "k=-1 must be above 0"),
        ({"smoothing": "nltk6", "alpha": 0.0}, "alpha=0.0 must be above 0"),
        ({"smoothing": "nltk4", "nltk_k": 0}, "nltk_k=0 must be above 0"),
        ({"effective_order": True}, "effective_order=True has a meaning only under"),
        (
            {"convention": "sacrebleu", "weights": (0.4, 0.3, 0.2, 0.1)},
            r'weights=\[0.4.*\]: convention="sacrebleu" weighs all orders alike, expected \(1/4,\)',
        ),
        ({"convention": "sacrebleu", "weights": (1.0, 1.0)}, r"expected \(1/2,\) \* 2"),
    ],
)
def test_scoring_refuses_what_cannot_work(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        bleu_from_statistics(stats_of(4), **options)


def test_sacrebleu_refuses_weights_it_cannot_check():
    def score(weights):
        return bleu_from_statistics(stats_of(4), weights=weights, convention="sacrebleu")

    with pytest.raises(ValueError, match="traced weights cannot be checked"):
        jax.jit(score)(jnp.full(4, 0.25))
    assert score(jnp.full(4, 0.25)).shape == (2,)
