"""From counts to BLEU: brevity penalty, smoothing, and the weighted mean of log precisions.

    BLEU = BP exp(sum_n w_n log p_n)

(Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", ACL 2002,
section 2.3). What p_n is where an order has no match is a matter of smoothing (Chen and Cherry, "A
Systematic Comparison of Smoothing Techniques for Sentence-Level BLEU", WMT 2014), on which NLTK and
sacrebleu (Post, "A Call for Clarity in Reporting BLEU Scores", arXiv 1804.08771) differ in detail.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

UNIFORM = (0.25, 0.25, 0.25, 0.25)

NLTK_SMOOTHING = ("none", "floor", "add-k", "exp", *(f"nltk{i}" for i in range(8)))
SACREBLEU_SMOOTHING = ("none", "floor", "add-k", "exp")
CONVENTIONS = {"nltk": NLTK_SMOOTHING, "sacrebleu": SACREBLEU_SMOOTHING}

# Methods 5 and 7 look at the precision of 5-grams whatever the longest weighted order is.
FIFTH_ORDER = 5


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How counts become a score; the fields are the arguments of `bleu_from_statistics`.

    Raises:
      ValueError: for an unknown name, a parameter that is not positive, a smoothing the convention
        does not have, or `effective_order` outside sacrebleu's.
    """

    smoothing: str = "none"
    convention: str = "nltk"
    epsilon: float = 0.1
    k: float = 1
    alpha: float = 5.0
    nltk_k: float = 5.0
    effective_order: bool = False

    def __post_init__(self):
        check_name("convention", self.convention, CONVENTIONS)
        if self.convention == "sacrebleu" and self.smoothing in NLTK_SMOOTHING[4:]:
            names = ", ".join(map(repr, SACREBLEU_SMOOTHING))
            raise ValueError(
                f'smoothing={self.smoothing!r} exists only under convention="nltk"; sacrebleu has '
                f"{names}"
            )
        check_name("smoothing", self.smoothing, CONVENTIONS[self.convention])
        if self.effective_order and self.convention != "sacrebleu":
            raise ValueError(
                f'effective_order=True has a meaning only under convention="sacrebleu", got '
                f"convention={self.convention!r}"
            )
        for name in ("epsilon", "k", "alpha", "nltk_k"):
            value = getattr(self, name)
            if is_known(value) and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")

    def orders_to_count(self, num_orders: int) -> int:
        """Returns the longest n-grams whose counts the score of `num_orders` orders looks at."""
        if self.smoothing in ("nltk5", "nltk7"):
            return max(num_orders, FIFTH_ORDER)
        return num_orders


def check_name(argument: str, value: Any, names) -> None:
    """Raises ValueError unless `value` is one of `names`."""
    if value not in names:
        raise ValueError(f"{argument}={value!r} is not one of {', '.join(map(repr, names))}")


def is_known(x) -> bool:
    """Whether the values can be looked at: not while tracing, not if other processes hold some."""
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def as_weights(weights, convention: str = "nltk"):
    """Returns the weights as float32, (N,) or (K, N).

    Raises:
      ValueError: if they are empty, not numbers, of another rank, or, under sacrebleu's convention,
        not known to be uniform.
    """
    if not isinstance(weights, jax.Array):
        try:
            weights = np.asarray(weights, np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"weights={weights!r} must be numbers (N,), or (K, N) with zeros for the orders a "
                "shorter vector does not have"
            ) from error
    if weights.ndim not in (1, 2):
        raise ValueError(f"weights have shape {weights.shape}, expected (N,) or (K, N)")
    if 0 in weights.shape:
        raise ValueError(f"weights are empty, of shape {weights.shape}: expected an order or more")
    if is_known(weights) and not np.all(np.isfinite(np.asarray(weights, np.float32))):
        raise ValueError(f"weights={np.asarray(weights).tolist()} must be finite")
    if convention == "sacrebleu":
        _check_uniform(weights)
    return weights.astype(np.float32)


def _check_uniform(weights):
    num_orders = weights.shape[-1]
    if not is_known(weights):
        raise ValueError(
            'traced weights cannot be checked: convention="sacrebleu" expects the uniform '
            f"(1/{num_orders},) * {num_orders}, known when tracing"
        )
    if not np.allclose(np.asarray(weights), 1 / num_orders, rtol=1e-5, atol=0):
        raise ValueError(
            f'weights={np.asarray(weights).tolist()}: convention="sacrebleu" weighs all orders '
            f"alike, expected (1/{num_orders},) * {num_orders}"
        )


def brevity_penalty(candidate_length: jax.Array, reference_length: jax.Array) -> jax.Array:
    """exp(1 - r / c) where the candidate is shorter, otherwise 1; 0 for an empty candidate."""
    c, r = candidate_length.astype(jnp.float32), reference_length.astype(jnp.float32)
    shorter = jnp.exp(1 - r / jnp.maximum(c, 1))
    return jnp.where(c == 0, 0.0, jnp.where(c >= r, 1.0, shorter))


class Counts(NamedTuple):
    """What NLTK's score looks at, of one sentence or of a corpus, float32.

    Attributes:
      matches: (..., N) clipped matches.
      totals: (..., N) n-grams of the candidate, where a sentence without any counts for one.
      candidate_length, reference_length: (...).
      ngrams: (..., N) n-grams of the candidate as method 6 counts them.
      fifth: (...) precision of 5-grams as methods 5 and 7 take it, or None.
    """

    matches: jax.Array
    totals: jax.Array
    candidate_length: jax.Array
    reference_length: jax.Array
    ngrams: jax.Array
    fifth: jax.Array | None


def nltk_score(counts: Counts, weights: jax.Array, scoring: Scoring) -> jax.Array:
    """Returns NLTK's BLEU, (...) for weights (N,), (..., K) for weights (K, N), float32.

    0 where no unigram matches. Precisions that are 0 after smoothing are left out of the mean,
    except without smoothing: then the score is 0 if an order of non-zero weight has no match. (NLTK
    puts 2.2e-308 for that precision: the same in float32 for weights above 0.15.) NaN for method 6
    without a matching trigram, where NLTK raises.
    """
    precisions = _SMOOTHED[scoring.smoothing](counts, scoring)
    positive = precisions > 0
    logs = jnp.log(jnp.where(positive, precisions, 1.0))
    matches = counts.matches
    penalty = brevity_penalty(counts.candidate_length, counts.reference_length)
    if weights.ndim == 2:
        matches, logs, penalty = matches[..., None, :], logs[..., None, :], penalty[..., None]
    score = penalty * jnp.exp(jnp.sum(weights * logs, axis=-1))
    zero = matches[..., 0] == 0
    if scoring.smoothing in ("none", "nltk0"):
        zero |= jnp.any((matches == 0) & (weights != 0), axis=-1)
    if scoring.smoothing == "nltk6":
        # Only here: a compiler's logarithm need not be NaN for NaN.
        has_trigram = matches.shape[-1] > 2 and matches[..., 2] > 0
        score = jnp.where(has_trigram, score, jnp.nan)
    return jnp.where(zero, 0.0, score)


def _unsmoothed(counts, scoring):
    """Method 0."""
    del scoring
    return counts.matches / counts.totals


def _floor(counts, scoring):
    """Method 1: epsilon matches where there are none."""
    return jnp.where(counts.matches == 0, scoring.epsilon, counts.matches) / counts.totals


def _add_k(counts, scoring):
    """Lin and Och (COLING 2004): k more of matches and n-grams, from bigrams on."""
    return _add(counts, scoring.k)


def _add_one(counts, scoring):
    """Method 2."""
    del scoring
    return _add(counts, 1)


def _add(counts, k):
    more = jnp.where(jnp.arange(counts.matches.shape[-1]) > 0, k, 0).astype(jnp.float32)
    return (counts.matches + more) / (counts.totals + more)


def _halved(counts, scoring):
    """Method 3, NIST's: the j-th order without matches has 2^-j of them."""
    del scoring
    zero = counts.matches == 0
    return jnp.where(zero, _halves(zero), counts.matches) / counts.totals


def _halves(zero):
    """2^-j at the j-th order where `zero`."""
    return jnp.exp2(-jnp.cumsum(zero, axis=-1, dtype=jnp.float32))


def _halved_by_length(counts, scoring):
    """Method 4: less for short candidates, ln(length) / (2^j k); nothing for one token."""
    zero = counts.matches == 0
    logs = jnp.log(jnp.maximum(counts.candidate_length, 1))[..., None]
    return jnp.where(zero, _halves(zero) * logs / scoring.nltk_k, counts.matches) / counts.totals


def _averaged(counts, scoring):
    """Method 5."""
    return _average(_unsmoothed(counts, scoring), counts.fifth)


def _halved_and_averaged(counts, scoring):
    """Method 7: 4, then 5."""
    return _average(_halved_by_length(counts, scoring), counts.fifth)


def _average(precisions, fifth):
    """Each order's mean with its neighbours, the lower one already averaged."""
    upper = jnp.concatenate([precisions[..., 1:], fifth[..., None]], axis=-1)
    lower, averaged = precisions[..., 0] + 1, []
    for n in range(precisions.shape[-1]):
        lower = (lower + precisions[..., n] + upper[..., n]) / 3
        averaged.append(lower)
    return jnp.stack(averaged, axis=-1)


def _interpolated(counts, scoring):
    """Method 6 (Gao and He, NAACL 2013): trigrams and longer are drawn to p_{n-1}^2 / p_{n-2}."""
    plain = _unsmoothed(counts, scoring)
    precisions = [plain[..., n] for n in range(plain.shape[-1])]
    for n in range(2, len(precisions)):
        before, last = precisions[n - 2], precisions[n - 1]
        prior = jnp.where(before == 0, 0.0, last**2 / jnp.where(before == 0, 1.0, before))
        matches = counts.matches[..., n] + scoring.alpha * prior
        precisions[n] = matches / (counts.ngrams[..., n] + scoring.alpha)
    return jnp.stack(precisions, axis=-1)


_SMOOTHED = {
    "none": _unsmoothed,
    "floor": _floor,
    "add-k": _add_k,
    "exp": _halved,
    "nltk0": _unsmoothed,
    "nltk1": _floor,
    "nltk2": _add_one,
    "nltk3": _halved,
    "nltk4": _halved_by_length,
    "nltk5": _averaged,
    "nltk6": _interpolated,
    "nltk7": _halved_and_averaged,
}


def sacrebleu_score(
    matches: jax.Array,
    totals: jax.Array,
    candidate_length: jax.Array,
    reference_length: jax.Array,
    scoring: Scoring,
) -> jax.Array:
    """Returns sacrebleu's BLEU divided by 100, (...) float32.

    Orders are looked at from unigrams up to the first without any n-gram in the candidate; the rest
    have precision 0, or are left out under `effective_order`. "add-k" gives every order from
    bigrams on k n-grams more, so that there one the candidate is too short for counts as k / k.

    Args:
      matches, totals: (..., N) clipped matches, and n-grams of the candidate.
      candidate_length, reference_length: (...).
      scoring: under convention "sacrebleu".
    """
    matches, totals = matches.astype(jnp.float32), totals.astype(jnp.float32)
    orders = jnp.arange(matches.shape[-1])
    any_match = jnp.any(matches > 0, axis=-1)
    if scoring.smoothing == "add-k":
        more = jnp.where(orders > 0, scoring.k, 0)
        matches, totals = matches + more, totals + more
    reached = jnp.cumprod(totals > 0, axis=-1) > 0
    zero = reached & (matches == 0)
    if scoring.smoothing == "floor":
        matches = jnp.where(zero, scoring.epsilon, matches)
    elif scoring.smoothing == "exp":
        matches = jnp.where(zero, _halves(zero), matches)
    counted = reached if scoring.effective_order else jnp.ones_like(reached)
    positive = reached & (matches > 0)
    ratios = jnp.where(positive, matches, 1) / jnp.where(positive, totals, 1)
    num_counted = jnp.maximum(jnp.sum(counted, axis=-1), 1)
    mean = jnp.sum(jnp.log(ratios), axis=-1) / num_counted
    score = brevity_penalty(candidate_length, reference_length) * jnp.exp(mean)
    return jnp.where(any_match & jnp.all(positive | ~counted, axis=-1), score, 0.0)
