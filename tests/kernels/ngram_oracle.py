"""Clipped n-gram matches with dictionaries, and ragged batches to count them in."""

from collections import Counter

import numpy as np


def clipped_matches(candidates, references, max_order):
    """(B, max_order) counts; sentences hold no padding in between their tokens."""
    return np.array(
        [
            [_matches(candidate, row, n) for n in range(1, max_order + 1)]
            for candidate, row in zip(np.asarray(candidates), np.asarray(references), strict=True)
        ]
    )


def _matches(candidate, references, n):
    most = Counter()
    for reference in references:
        most |= _ngrams(reference, n)
    return sum((_ngrams(candidate, n) & most).values())


def _ngrams(tokens, n):
    tokens = [int(token) for token in tokens if token >= 0]
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def ragged_batch(
    seed, batch, length, num_references=1, reference_length=None, vocabulary=4, first_id=0
):
    """Sentences of random lengths from 0 up, padded on the right with -1."""
    random = np.random.default_rng(seed)
    reference_length = reference_length or length

    def sentences(*shape):
        tokens = random.integers(first_id, first_id + vocabulary, shape)
        lengths = random.integers(0, shape[-1] + 1, shape[:-1])
        lengths.flat[0] = shape[-1]
        return np.where(np.arange(shape[-1]) < lengths[..., None], tokens, -1).astype(np.int32)

    return sentences(batch, length), sentences(batch, num_references, reference_length)
