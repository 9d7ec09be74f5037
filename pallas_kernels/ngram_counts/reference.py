"""Clipped n-gram matches in plain jnp: pairwise comparison, and one lexicographic sort.

Both take candidates (B, Lc) and references (B, R, Lr), int32, negative where there is no token,
and return (B, max_order) int32. Nothing depends on the values of the ids, so any vocabulary will
do, and memory is O(B (Lc + R Lr)).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.ngram_counts.fields import Fields

# Keys compared in one pass over the counters: on a CPU the counters' way through the cache then
# costs little beside the comparisons.
KEYS_PER_PASS = 16

# Padding of candidates and of references must never agree.
CANDIDATE_PADDING, REFERENCE_PADDING = -1, -2


def pairwise(candidates: jax.Array, references: jax.Array, *, max_order: int) -> jax.Array:
    """Counts by comparing every candidate position with every key position.

    num_n is the number of candidate n-grams whose occurrence number in the candidate is below
    max_k count_{r_k}: an occurrence is clipped away exactly when the references are exhausted. The
    number of comparisons is B Lc (Lc + R Lr).
    """
    windows = _windows(candidates, max_order, CANDIDATE_PADDING)
    ranks = _count_agreeing(windows, candidates, earlier_only=True)

    def maximum(best, reference):
        counts = _count_agreeing(windows, reference, earlier_only=False)
        return [jnp.maximum(a, b) for a, b in zip(best, counts, strict=True)], None

    start = [jnp.zeros_like(candidates)] * max_order
    best, _ = lax.scan(maximum, start, jnp.moveaxis(references, 1, 0))
    matched = [
        jnp.sum(real & (rank < most), axis=-1)
        for real, rank, most in zip(_real(windows), ranks, best, strict=True)
    ]
    return jnp.stack(matched, axis=-1).astype(jnp.int32)


def _windows(tokens, max_order, padding):
    """The tokens at every position and at the max_order - 1 positions after it."""
    length = tokens.shape[-1]
    tokens = jnp.where(tokens < 0, padding, tokens)
    widths = [(0, 0)] * (tokens.ndim - 1) + [(0, max_order - 1)]
    padded = jnp.pad(tokens, widths, constant_values=padding)
    return [padded[..., shift : shift + length] for shift in range(max_order)]


def _real(windows):
    """For each order, which n-grams have no padding in them."""
    return [functools.reduce(jnp.logical_and, [w >= 0 for w in windows[: n + 1]])
            for n in range(len(windows))]  # fmt: skip


def _count_agreeing(windows, keys, *, earlier_only):
    """For each order, how many key positions hold the n-gram of each candidate position.

    Args:
      windows: of the candidates.
      keys: (B, Lk).
      earlier_only: count only key positions before the candidate position.

    Returns:
      a (B, Lc) int32 array for each order.
    """
    max_order = len(windows)
    fields = Fields(max_order)
    step = min(KEYS_PER_PASS, fields.capacity)
    passes = -(-keys.shape[-1] // step)
    padding = passes * step - keys.shape[-1] + max_order - 1
    keys = jnp.where(keys < 0, REFERENCE_PADDING, keys)
    keys = jnp.pad(keys, ((0, 0), (0, padding)), constant_values=REFERENCE_PADDING)
    positions = jnp.arange(windows[0].shape[-1], dtype=jnp.int32)

    def compare(index, packed):
        start = index * step
        block = lax.dynamic_slice_in_dim(keys, start, step + max_order - 1, axis=1)
        for key in range(step):
            increment = jnp.int32(fields.increments[max_order])
            for shift in reversed(range(max_order)):
                agree = windows[shift] == block[:, key + shift, None]
                if shift == 0 and earlier_only:
                    agree &= positions > start + key
                increment = jnp.where(agree, increment, jnp.int32(fields.increments[shift]))
            packed += increment
        return packed

    def until_full(index, counts):
        first = index * passes_until_full
        last = jnp.minimum(first + passes_until_full, passes)
        packed = lax.fori_loop(first, last, compare, jnp.zeros_like(windows[0]))
        return [a + b for a, b in zip(counts, fields.unpack(packed), strict=True)]

    passes_until_full = fields.capacity // step
    counts = [jnp.zeros_like(windows[0])] * max_order
    return lax.fori_loop(0, -(-passes // passes_until_full), until_full, counts)


def sort(candidates: jax.Array, references: jax.Array, *, max_order: int) -> jax.Array:
    """Counts in one lexicographic sort of all positions' windows of `max_order` tokens.

    In that order the equal n-grams of every order n <= max_order stand side by side, each run of
    them a segment; running counts of each sentence at a segment's two ends give its count there.
    num_n = sum over segments of min(count_c, max_k count_{r_k}).
    """
    batch, num_references, reference_length = references.shape
    windows = [
        jnp.concatenate([c, r.reshape(batch, -1)], axis=1)
        for c, r in zip(
            _windows(candidates, max_order, CANDIDATE_PADDING),
            _windows(references, max_order, CANDIDATE_PADDING),
            strict=True,
        )
    ]
    # Made on the host: XLA would fold the same operations at compile time, for minutes.
    lengths = [candidates.shape[1]] + [reference_length] * num_references
    sources = np.repeat(np.arange(1 + num_references, dtype=np.int32), lengths)
    sources = jnp.broadcast_to(sources, windows[0].shape)
    *windows, sources = lax.sort(
        [*windows, sources], dimension=1, is_stable=False, num_keys=max_order
    )
    running = _running_counts(sources, 1 + num_references)
    first = jnp.zeros(sources.shape, bool)
    matched = []
    for real, window in zip(_real(windows), windows, strict=True):
        first |= jnp.pad(window[:, 1:] != window[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        last = jnp.pad(first[:, 1:], ((0, 0), (0, 1)), constant_values=True)
        in_candidate, *in_references = _counts_of_segments(running, first)
        best = functools.reduce(jnp.maximum, in_references)
        matched.append(jnp.sum(jnp.where(last & real, jnp.minimum(in_candidate, best), 0), axis=1))
    return jnp.stack(matched, axis=-1).astype(jnp.int32)


def _running_counts(sources, num_sources):
    """How many positions of each source come before each position, and which source it is.

    Two sources share an int32 where their counts fit into 15 bits each: all counts grow along the
    axis, so the packed ones do, and differences borrow nothing.

    Returns:
      (exclusive running counts, own contribution, shift and mask of each source) for every array.
    """
    packs = 2 if sources.shape[1] < 2**15 else 1
    running = []
    for start in range(0, num_sources, packs):
        shifts = [16 * i for i in range(min(packs, num_sources - start))]
        own = sum(
            (sources == start + i).astype(jnp.int32) << shift for i, shift in enumerate(shifts)
        )
        running.append((lax.cumsum(own, axis=1) - own, own, shifts))
    return running


def _counts_of_segments(running, first):
    """For every source, its count from the start of the segment up to each position."""
    counts = []
    for before, own, shifts in running:
        at_start = lax.cummax(jnp.where(first, before, 0), axis=1)
        packed = before + own - at_start
        mask = 0xFFFF if len(shifts) > 1 else -1
        counts += [(packed >> shift) & mask for shift in shifts]
    return counts
