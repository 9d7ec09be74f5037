"""Ragged sentences on the host, packed into the rectangles that `jaxeff.metrics.bleu` takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_LARGEST_ID = 2**31 - 1


class PackedSentences(NamedTuple):
    """Ids and how many of them are real.

    Attributes:
      tokens: (B, L) int32, or (B, R, L) for references.
      lengths: (B,) int32, or (B, R); 0 where a reference is absent.
    """

    tokens: np.ndarray
    lengths: np.ndarray


def pack_sentences(
    sentences: Sequence,
    *,
    length: int | None = None,
    multiple_of: int = 1,
    truncate: bool = False,
    pad_id: int = 0,
) -> PackedSentences:
    """Pads sentences of token ids on the right to one length.

    Hand `lengths` on as `candidate_lengths` or `reference_lengths`; then every id, `pad_id` too,
    may be a token.

        candidates = pack_sentences([[5, 6, 7], [8]])
        references = pack_sentences([[[5, 6], [5, 7, 7]], [[8, 9]]])
        sentence_bleu(
            candidates.tokens,
            references.tokens,
            candidate_lengths=candidates.lengths,
            reference_lengths=references.lengths,
        )

    Args:
      sentences: B sequences of ids (lists or arrays), or B sequences of references, which are
        sequences of ids. R is the largest number of references.
      length: L; None takes the longest sentence's, rounded up to `multiple_of`.
      multiple_of: few different lengths are few compilations.
      truncate: cuts sentences longer than `length` instead of refusing them.
      pad_id: fills what is left of a row; -1 is padding for every function here, even without
        lengths.

    Raises:
      ValueError: for ids outside 0 to 2**31 - 1 or not integers, sentences longer than `length`
        without `truncate`, or an argument out of its range.
    """
    if multiple_of < 1:
        raise ValueError(f"multiple_of={multiple_of} must be at least 1")
    if length is not None and (length < 0 or length % multiple_of):
        raise ValueError(
            f"length={length} must be 0 or more, and a multiple of multiple_of={multiple_of}"
        )
    if not -(2**31) <= pad_id <= _LARGEST_ID:
        raise ValueError(f"pad_id={pad_id} must be an int32")
    nested = any(_holds_sequences(row) for row in sentences)
    rows = [list(row) if nested else [row] for row in sentences]
    per_row = max(map(len, rows), default=0) if nested else 1
    arrays = [
        [_as_ids(ids, f"sentences[{i}][{k}]" if nested else f"sentences[{i}]")
         for k, ids in enumerate(row)]
        for i, row in enumerate(rows)
    ]  # fmt: skip
    longest = max((len(ids) for row in arrays for ids in row), default=0)
    if length is None:
        length = -(-longest // multiple_of) * multiple_of
    elif longest > length and not truncate:
        raise ValueError(
            f"the longest of sentences has {longest} tokens, length={length}: expected at most "
            "that, or truncate=True"
        )
    tokens = np.full((len(rows), per_row, length), pad_id, np.int32)
    lengths = np.zeros((len(rows), per_row), np.int32)
    for i, row in enumerate(arrays):
        for k, ids in enumerate(row):
            ids = ids[:length]
            tokens[i, k, : len(ids)] = ids
            lengths[i, k] = len(ids)
    return (
        PackedSentences(tokens, lengths) if nested else PackedSentences(tokens[:, 0], lengths[:, 0])
    )


def _holds_sequences(row) -> bool:
    """Whether a row is a sequence of references, not of ids."""
    return any(np.iterable(x) and not isinstance(x, str) for x in row)


def _as_ids(ids, name: str) -> np.ndarray:
    """Returns int32 ids (L,), checked."""
    array = np.asarray(ids)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name}={_short(ids)} must be a sequence of integer ids")
    if array.min() < 0 or array.max() > _LARGEST_ID:
        raise ValueError(
            f"{name} holds ids from {array.min()} to {array.max()}, expected 0 to {_LARGEST_ID}"
        )
    return array.astype(np.int32)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
