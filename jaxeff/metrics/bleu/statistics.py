"""The sufficient statistics of BLEU: clipped matches, n-grams and lengths of each sentence.

Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation" (ACL 2002),
sections 2.1 and 2.2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxeff.metrics.bleu.smoothing import is_known
from pallas_kernels.ngram_counts import mark_padding, ngram_counts


@struct.dataclass
class BleuStats:
    """Sufficient statistics of BLEU, int32.

    Attributes:
      numerators: (..., N) clipped matches of n = 1 .. N.
      denominators: (..., N) n-grams in the candidate, max(length - n + 1, 0).
      candidate_length: (...).
      reference_length: (...) the length nearest the candidate's of the references that are there,
        the shorter of two as near; 0 if there is none.
    """

    numerators: jax.Array
    denominators: jax.Array
    candidate_length: jax.Array
    reference_length: jax.Array

    @property
    def max_order(self) -> int:
        return self.numerators.shape[-1]


def bleu_statistics(
    candidates: jax.Array,
    references: jax.Array,
    *,
    max_order: int = 4,
    pad_id: int | None = 0,
    candidate_lengths: jax.Array | None = None,
    reference_lengths: jax.Array | None = None,
    method: str = "auto",
    implementation: str | None = None,
) -> BleuStats:
    """Counts what BLEU needs of each candidate.

    Args:
      candidates: (..., Lc) integer ids.
      references: (..., R, Lr) integer ids, or (..., Lr) for one reference each.
      max_order: N, the longest n-grams to count.
      pad_id: the id that marks padding; None if only negative entries do. Padding in the middle
        breaks n-grams, and lengths do not count it. Not used for what has lengths.
      candidate_lengths: (...) integers, tokens of each candidate from the left.
      reference_lengths: (..., R), or (...) for one reference each.
      method: "sort" | "pairwise" | "auto", the algorithm of `ngram_counts`.
      implementation: None | "xla" | "mosaic_tpu" | "triton", the same.

    Raises:
      ValueError: for shapes that do not fit one another, a dtype that is not integer, `max_order`
        below 1, unknown names, or, outside a trace, lengths not in 0 to L.
      NotImplementedError: if a named implementation cannot serve the call.
    """
    check_lengths("candidate_lengths", candidate_lengths, candidates)
    check_lengths("reference_lengths", reference_lengths, references)
    candidates = mark_padding(candidates, pad_id, candidate_lengths, name="candidates")
    references = mark_padding(references, pad_id, reference_lengths, name="references")
    numerators = ngram_counts(
        candidates,
        references,
        max_order=max_order,
        pad_id=None,
        method=method,
        implementation=implementation,
    )
    if references.ndim == candidates.ndim:
        references = references[..., None, :]
    candidate_length = jnp.sum(candidates >= 0, axis=-1, dtype=jnp.int32)
    reference_lengths = jnp.sum(references >= 0, axis=-1, dtype=jnp.int32)
    shorter = jnp.arange(max_order, dtype=jnp.int32)
    return BleuStats(
        numerators=numerators,
        denominators=jnp.maximum(candidate_length[..., None] - shorter, 0),
        candidate_length=candidate_length,
        reference_length=_closest(reference_lengths, candidate_length),
    )


def check_lengths(name, lengths, tokens) -> None:
    """Raises ValueError for lengths that are known not to be in 0 to that of `tokens`."""
    if lengths is None or not is_known(lengths):
        return
    lengths, longest = np.asarray(lengths), np.shape(tokens)[-1]
    if lengths.size and (lengths.min() < 0 or lengths.max() > longest):
        raise ValueError(
            f"{name} range from {lengths.min()} to {lengths.max()}, expected 0 to {longest}"
        )


def _closest(reference_lengths, candidate_length):
    """(..., R) and (...) -> (...)."""
    most = jnp.iinfo(jnp.int32).max
    distance = jnp.abs(reference_lengths - candidate_length[..., None])
    distance = jnp.where(reference_lengths > 0, distance, most)
    closest = distance == jnp.min(distance, axis=-1, keepdims=True, initial=most)
    length = jnp.min(jnp.where(closest, reference_lengths, most), axis=-1, initial=most)
    return jnp.where(length == most, 0, length)
