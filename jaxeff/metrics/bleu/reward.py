"""Sentence BLEU as the reward of sampled sequences."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxeff.metrics.bleu.scores import sentence_bleu
from jaxeff.metrics.bleu.smoothing import UNIFORM
from jaxeff.metrics.bleu.statistics import check_lengths
from pallas_kernels.ngram_counts import mark_padding


def bleu_reward(
    samples: jax.Array,
    references: jax.Array,
    mask: jax.Array | None = None,
    *,
    eos_id: int | None = None,
    include_eos: bool = False,
    pad_id: int | None = 0,
    reference_lengths: jax.Array | None = None,
    smoothing: str = "floor",
    weights=UNIFORM,
    convention: str = "nltk",
    method: str = "auto",
    implementation: str | None = None,
) -> jax.Array:
    """Returns the sentence BLEU of sampled sequences, a reward to be computed inside a step.

    The candidate is what the mask leaves of the sample, closed up, up to the first `eos_id`. It is
    made of integers: no gradient flows through.

    Args:
      samples: (..., T) integer ids.
      references: (..., R, Lr) integer ids, or (..., Lr) for one reference each.
      mask: (..., T) bool, or numbers that are 0 where there is no token of the candidate (a prompt,
        the time after the end). Given, it alone decides; None leaves what is not `pad_id`.
      eos_id: ends the candidate; None: nothing does.
      include_eos: whether the first `eos_id` belongs to the candidate, for references with one.
      pad_id: of references without lengths, and of samples without a mask.
      reference_lengths: (..., R), or (...) for one reference each.
      smoothing, weights, convention: as in `bleu_from_statistics`.
      method, implementation: as in `bleu_statistics`.

    Raises:
      ValueError: for a mask of another shape, and as `sentence_bleu`.
    """
    samples = mark_padding(samples, pad_id if mask is None else None, name="samples")
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.shape != samples.shape:
            raise ValueError(f"mask {mask.shape} must have the shape of samples {samples.shape}")
        samples = jnp.where(mask != 0, samples, -1)
    if eos_id is not None:
        ends = jnp.cumsum(samples == eos_id, axis=-1)
        if include_eos:
            ends -= samples == eos_id
        samples = jnp.where(ends > 0, -1, samples)
    check_lengths("reference_lengths", reference_lengths, references)
    references = mark_padding(references, pad_id, reference_lengths, name="references")
    return sentence_bleu(
        samples if mask is None else _close_up(samples),
        references,
        weights=weights,
        smoothing=smoothing,
        convention=convention,
        pad_id=None,
        method=method,
        implementation=implementation,
    )


def _close_up(tokens):
    """Moves what is not padding to the left, in its order."""
    real = tokens >= 0
    places = jnp.where(real, jnp.cumsum(real, axis=-1) - 1, tokens.shape[-1])

    # A scatter: the sort that would do the same takes longer on a CPU than all the counting.
    @functools.partial(jnp.vectorize, signature="(t),(t)->(t)")
    def place(tokens, places):
        return jnp.full_like(tokens, -1).at[places].set(tokens, mode="drop")

    return place(tokens, places)
