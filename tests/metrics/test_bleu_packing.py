"""Ragged lists of ids become rectangles with lengths."""

import numpy as np
import pytest

from jaxeff.metrics.bleu import pack_sentences


def test_sentences_are_padded_on_the_right():
    packed = pack_sentences([[5, 6, 7], [], np.array([8])])
    assert packed.tokens.tolist() == [[5, 6, 7], [0, 0, 0], [8, 0, 0]]
    assert packed.lengths.tolist() == [3, 0, 1]
    assert packed.tokens.dtype == packed.lengths.dtype == np.int32


def test_lists_of_references_get_an_axis_and_absent_ones_length_0():
    packed = pack_sentences([[[1, 2], [3]], [], [np.array([4, 5, 6])]], pad_id=-1)
    assert packed.tokens.tolist() == [
        [[1, 2, -1], [3, -1, -1]],
        [[-1, -1, -1], [-1, -1, -1]],
        [[4, 5, 6], [-1, -1, -1]],
    ]
    assert packed.lengths.tolist() == [[2, 1], [0, 0], [3, 0]]


def test_an_empty_reference_in_front_is_still_a_reference():
    packed = pack_sentences([[[], [1, 2]], [[3]]])
    assert packed.tokens.shape == (2, 2, 2)
    assert packed.lengths.tolist() == [[0, 2], [1, 0]]


@pytest.mark.parametrize(
    ("options", "length"),
    [({}, 5), ({"multiple_of": 4}, 8), ({"multiple_of": 5}, 5), ({"length": 7}, 7)],
)
def test_the_length_is_the_longest_a_multiple_or_the_given_one(options, length):
    packed = pack_sentences([[1, 2], [1, 2, 3, 4, 5]], **options)
    assert packed.tokens.shape == (2, length)
    assert packed.lengths.tolist() == [2, 5]


def test_too_long_sentences_are_cut_where_asked():
    packed = pack_sentences([[1, 2, 3], [4]], length=2, truncate=True)
    assert packed.tokens.tolist() == [[1, 2], [4, 0]]
    assert packed.lengths.tolist() == [2, 1]
    assert pack_sentences([[1, 2, 3]], length=4, truncate=True).lengths.tolist() == [3]


@pytest.mark.parametrize(
    ("sentences", "shape"), [([], (0, 0)), ([[], []], (2, 0)), ([[[]], []], (2, 1, 0))]
)
def test_nothing_can_be_packed(sentences, shape):
    packed = pack_sentences(sentences)
    assert packed.tokens.shape == shape
    assert packed.lengths.shape == shape[:-1]


def test_every_id_of_int32_is_kept():
    assert pack_sentences([[2**31 - 1, 0]]).tokens.tolist() == [[2**31 - 1, 0]]


@pytest.mark.parametrize(
    ("sentences", "options", "complaint"),
    [
        ([[1], [2, -1]], {}, r"sentences\[1\] holds ids from -1 to 2, expected 0 to 2147483647"),
        ([[[1], [2**31]]], {}, r"sentences\[0\]\[1\] holds ids from 2147483648"),
        ([[2**64]], {}, r"sentences\[0\]=\[18446744073709551616\] must be a sequence of integer"),
        ([[1.5, 2.0]], {}, r"sentences\[0\]=\[1.5, 2.0\] must be a sequence of integer ids"),
        ([[1], "ab"], {}, r"sentences\[1\]='ab' must be a sequence of integer ids"),
        ([[[1], 2]], {}, r"sentences\[0\]\[1\]=2 must be a sequence of integer ids"),
        ([[1, 2, 3]], {"length": 2}, "the longest of sentences has 3 tokens, length=2"),
        ([[1]], {"length": 3, "multiple_of": 2}, "length=3 must be 0 or more, and a multiple of"),
        ([[1]], {"length": -1}, "length=-1 must be 0 or more"),
        ([[1]], {"multiple_of": 0}, "multiple_of=0 must be at least 1"),
        ([[1]], {"pad_id": 2**31}, "pad_id=2147483648 must be an int32"),
    ],
)
def test_what_cannot_be_packed_is_refused(sentences, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        pack_sentences(sentences, **options)
