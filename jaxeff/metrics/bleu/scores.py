"""BLEU of sentences, and of a corpus seen whole or in parts, from their statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxeff.metrics.bleu.smoothing import (
    FIFTH_ORDER,
    UNIFORM,
    Counts,
    Scoring,
    as_weights,
    check_name,
    nltk_score,
    sacrebleu_score,
)
from jaxeff.metrics.bleu.statistics import BleuStats, bleu_statistics


def sentence_bleu(
    candidates: jax.Array,
    references: jax.Array,
    *,
    weights=UNIFORM,
    smoothing: str = "none",
    convention: str = "nltk",
    epsilon: float = 0.1,
    k: float = 1,
    alpha: float = 5.0,
    nltk_k: float = 5.0,
    effective_order: bool = False,
    pad_id: int | None = 0,
    candidate_lengths: jax.Array | None = None,
    reference_lengths: jax.Array | None = None,
    method: str = "auto",
    implementation: str | None = None,
) -> jax.Array:
    """Returns the BLEU of each candidate, float32, (...) or (..., K) for K weight vectors.

    Their mean is not `corpus_bleu`. Arguments and errors are those of `bleu_statistics` and
    `bleu_from_statistics`.
    """
    weights = as_weights(weights, convention)
    scoring = Scoring(smoothing, convention, epsilon, k, alpha, nltk_k, effective_order)
    stats = bleu_statistics(
        candidates,
        references,
        max_order=scoring.orders_to_count(weights.shape[-1]),
        pad_id=pad_id,
        candidate_lengths=candidate_lengths,
        reference_lengths=reference_lengths,
        method=method,
        implementation=implementation,
    )
    return _score_sentences(stats, weights, scoring)


def corpus_bleu(
    candidates: jax.Array,
    references: jax.Array,
    *,
    weights=UNIFORM,
    smoothing: str = "none",
    convention: str = "nltk",
    epsilon: float = 0.1,
    k: float = 1,
    alpha: float = 5.0,
    nltk_k: float = 5.0,
    effective_order: bool = False,
    corpus_parity: str | None = None,
    pad_id: int | None = 0,
    candidate_lengths: jax.Array | None = None,
    reference_lengths: jax.Array | None = None,
    method: str = "auto",
    implementation: str | None = None,
) -> jax.Array:
    """Returns the BLEU of all candidates as one corpus, float32, () or (K,) for K weight vectors.

    Arguments and errors are those of `bleu_statistics` and `BleuAccumulator.compute`.
    """
    weights = as_weights(weights, convention)
    scoring = Scoring(smoothing, convention, epsilon, k, alpha, nltk_k, effective_order)
    stats = bleu_statistics(
        candidates,
        references,
        max_order=scoring.orders_to_count(weights.shape[-1]),
        pad_id=pad_id,
        candidate_lengths=candidate_lengths,
        reference_lengths=reference_lengths,
        method=method,
        implementation=implementation,
    )
    corpus = BleuAccumulator.empty(stats.max_order).update(stats)
    return _score_corpus(corpus, weights, scoring, corpus_parity)


def bleu_from_statistics(
    stats: BleuStats,
    *,
    weights=UNIFORM,
    smoothing: str = "none",
    convention: str = "nltk",
    epsilon: float = 0.1,
    k: float = 1,
    alpha: float = 5.0,
    nltk_k: float = 5.0,
    effective_order: bool = False,
) -> jax.Array:
    """Scores each sentence's statistics.

    Without a candidate token, a present reference or a matching unigram the score is 0.

    Args:
      stats: of leading shape (...). For the statistics of a corpus see `BleuAccumulator`: their
        sums alone do not tell NLTK's denominators.
      weights: (N,) of the orders 1 .. N, or (K, N) for K scores at once. They need not sum to one.
      smoothing: "none", "floor" (`epsilon` matches where there are none), "add-k" (`k` more matches
        and n-grams from bigrams on) or "exp" (NIST's, 2^-j matches at the j-th order without any),
        under NLTK's convention also "nltk0" .. "nltk7", its methods, of which 0, 1 and 3 are the
        same as "none", "floor" and "exp", and 2 as "add-k" with k = 1. "nltk5" and "nltk7" need
        statistics up to order 5. "nltk6" is NaN where a unigram matches but no trigram (where NLTK
        raises), and where N < 3.
      convention: "nltk" counts one n-gram where a sentence is too short for any; "sacrebleu" does
        not, weighs orders uniformly, and here returns its score divided by 100.
      epsilon: of "floor" and "nltk1".
      k: of "add-k".
      alpha: of "nltk6".
      nltk_k: of "nltk4" and "nltk7", the k of their definition.
      effective_order: sacrebleu's option to leave out orders the candidate is too short for.

    Returns:
      float32 (...), or (..., K).

    Raises:
      ValueError: for weights that are empty, not (N,) or (K, N), or not uniform under sacrebleu's
        convention; `stats` of fewer orders than needed; parameters that are not positive; unknown
        names; or an option of the other convention.
    """
    weights = as_weights(weights, convention)
    scoring = Scoring(smoothing, convention, epsilon, k, alpha, nltk_k, effective_order)
    return _score_sentences(stats, weights, scoring)


def _score_sentences(stats, weights, scoring):
    _check_orders(stats, weights, scoring)
    if scoring.convention == "sacrebleu":
        return _score_sacrebleu(stats, weights, scoring)
    totals = jnp.maximum(stats.denominators, 1)
    return _score_nltk(stats, totals, stats, totals, weights, scoring)


def _score_corpus(corpus, weights, scoring, corpus_parity):
    check_name("corpus_parity", corpus_parity, (None, "nltk"))
    if corpus_parity and scoring.convention != "nltk":
        raise ValueError(
            f"corpus_parity={corpus_parity!r} is only for convention='nltk', got "
            f"convention={scoring.convention!r}"
        )
    _check_orders(corpus.total, weights, scoring)
    if scoring.convention == "sacrebleu":
        return _score_sacrebleu(corpus.total, weights, scoring)
    # An empty corpus scores 0, without a division by its 0 n-grams.
    totals = jnp.maximum(corpus.total.denominators + corpus.too_short, 1)
    if not corpus_parity:
        return _score_nltk(corpus.total, totals, corpus.total, totals, weights, scoring)
    last_totals = jnp.maximum(corpus.last.denominators, 1)
    return _score_nltk(corpus.total, totals, corpus.last, last_totals, weights, scoring)


def _check_orders(stats, weights, scoring):
    needed = scoring.orders_to_count(weights.shape[-1])
    if stats.max_order < needed:
        raise ValueError(
            f"the statistics have max_order={stats.max_order}, but {weights.shape[-1]} weights and "
            f"smoothing={scoring.smoothing!r} need max_order={needed}"
        )


def _score_nltk(stats, totals, smoothed_by, smoothed_by_totals, weights, scoring):
    """Scores `stats`; methods 5 to 7 take what they take beside the precisions of `smoothed_by`."""
    num_orders = weights.shape[-1]
    fifth = None
    if smoothed_by.max_order >= FIFTH_ORDER:
        at = FIFTH_ORDER - 1
        fifth = smoothed_by.numerators[..., at] / smoothed_by_totals[..., at]
    counts = Counts(
        matches=stats.numerators[..., :num_orders].astype(jnp.float32),
        totals=totals[..., :num_orders].astype(jnp.float32),
        candidate_length=stats.candidate_length.astype(jnp.float32),
        reference_length=stats.reference_length.astype(jnp.float32),
        ngrams=smoothed_by.denominators[..., :num_orders].astype(jnp.float32),
        fifth=fifth,
    )
    return nltk_score(counts, weights, scoring)


def _score_sacrebleu(stats, weights, scoring):
    num_orders = weights.shape[-1]
    score = sacrebleu_score(
        stats.numerators[..., :num_orders],
        stats.denominators[..., :num_orders],
        stats.candidate_length,
        stats.reference_length,
        scoring,
    )
    if weights.ndim == 1:
        return score
    return jnp.broadcast_to(score[..., None], (*score.shape, weights.shape[0]))


@struct.dataclass
class BleuAccumulator:
    """Statistics of a corpus seen in parts: integer sums, so that no order of summing matters.

        def step(corpus, batch):
            return corpus.update(bleu_statistics(*batch)), None

        corpus, _ = jax.lax.scan(step, BleuAccumulator.empty(), batches)
        score = corpus.compute(smoothing="exp", convention="sacrebleu")

    Inside `jax.shard_map` such a scan starts from what differs between devices,
    `jax.lax.pcast(BleuAccumulator.empty(), axis_name, to="varying")`, and ends with `psum`.

    A sentence with neither a candidate token nor a reference is padding of the batch and leaves no
    trace. One with candidate tokens but no reference counts as tokens without a match. Sums are
    int32: a corpus may have 2**31 - 1 tokens.

    Attributes:
      total: sums over sentences; numerators and denominators (N,), lengths ().
      too_short: (N,) int32, sentences with a reference whose candidate has no n-gram of order n,
        for which NLTK counts one all the same.
      last: the statistics of the last sentence, which decide for `corpus_parity="nltk"`.
    """

    total: BleuStats
    too_short: jax.Array
    last: BleuStats

    @classmethod
    def empty(cls, max_order: int = 4) -> BleuAccumulator:
        """Returns the accumulator of no sentence, for orders 1 .. max_order.

        Raises:
          ValueError: for `max_order` below 1.
        """
        if max_order < 1:
            raise ValueError(f"max_order={max_order} must be at least 1")

        def nothing():  # distinct arrays: donation forbids two leaves to share a buffer
            orders = [jnp.zeros(max_order, jnp.int32) for _ in range(2)]
            return BleuStats(*orders, *(jnp.zeros((), jnp.int32) for _ in range(2)))

        return cls(nothing(), jnp.zeros(max_order, jnp.int32), nothing())

    def update(self, stats: BleuStats) -> BleuAccumulator:
        """Returns the accumulator with the sentences of `stats`, of any leading axes, added.

        Raises:
          ValueError: if `stats` have another max_order.
        """
        return self.merge(_accumulate(stats))

    def merge(self, other: BleuAccumulator) -> BleuAccumulator:
        """Returns the accumulator of both corpora, the sentences of `other` after one's own.

        Raises:
          ValueError: if `other` has another max_order.
        """
        if other.total.max_order != self.total.max_order:
            raise ValueError(
                f"max_order={other.total.max_order} of what is added must be the accumulator's, "
                f"{self.total.max_order}"
            )
        use_other = _is_sentence(other.last)
        return BleuAccumulator(
            total=jax.tree.map(jnp.add, self.total, other.total),
            too_short=self.too_short + other.too_short,
            last=jax.tree.map(lambda a, b: jnp.where(use_other, b, a), self.last, other.last),
        )

    def psum(self, axis_name) -> BleuAccumulator:
        """Returns the accumulator of all devices along a mapped axis (or axes), in its order."""
        index = jnp.where(_is_sentence(self.last), lax.axis_index(axis_name), -1)
        chosen = index == lax.pmax(index, axis_name)
        last = jax.tree.map(lambda x: jnp.where(chosen & (index >= 0), x, 0), self.last)
        return lax.psum(self.replace(last=last), axis_name)

    def compute(
        self,
        *,
        weights=UNIFORM,
        smoothing: str = "none",
        convention: str = "nltk",
        epsilon: float = 0.1,
        k: float = 1,
        alpha: float = 5.0,
        nltk_k: float = 5.0,
        effective_order: bool = False,
        corpus_parity: str | None = None,
    ) -> jax.Array:
        """Returns the corpus' BLEU, float32 () or, for weights (K, N), (K,); 0 for an empty corpus.

        Args:
          corpus_parity: NLTK's methods 5 to 7 take the 5-gram precision and the number of n-grams
            of the last sentence, so that its score of a corpus depends on the order of sentences.
            "nltk" does so too; None takes the corpus'. Other methods do not depend on it.

        The other arguments and errors are those of `bleu_from_statistics`.
        """
        weights = as_weights(weights, convention)
        scoring = Scoring(smoothing, convention, epsilon, k, alpha, nltk_k, effective_order)
        return _score_corpus(self, weights, scoring, corpus_parity)


def _is_sentence(stats):
    """Whether there is anything in it: what has neither candidate nor reference is padding."""
    return (stats.candidate_length > 0) | (stats.reference_length > 0)


def _accumulate(stats):
    """The accumulator of the sentences of `stats` alone."""
    flat = BleuStats(
        numerators=stats.numerators.reshape(-1, stats.max_order),
        denominators=stats.denominators.reshape(-1, stats.max_order),
        candidate_length=stats.candidate_length.reshape(-1),
        reference_length=stats.reference_length.reshape(-1),
    )
    too_short = (flat.denominators == 0) & (flat.reference_length > 0)[:, None]
    rows = jnp.arange(flat.candidate_length.shape[0])
    is_last = rows == jnp.max(jnp.where(_is_sentence(flat), rows, -1), initial=-1)

    def take_last(x):
        # A sum over one row that is not 0: where the batch is sharded, no device gathers all of it.
        return jnp.sum(jnp.where(is_last.reshape(-1, *[1] * (x.ndim - 1)), x, 0), 0, jnp.int32)

    return BleuAccumulator(
        total=jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=jnp.int32), flat),
        too_short=jnp.sum(too_short, axis=0, dtype=jnp.int32),
        last=jax.tree.map(take_last, flat),
    )
