"""An interpolated n-gram model over tokens: the baseline a trained language model must beat.

Modified Kneser-Ney smoothing (Kneser and Ney, "Improved backing-off for m-gram language modeling",
1995; Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", 1998,
section 3 and appendix on discounts). With c the count of context h followed by token w,

    P_k(w | h) = (max(c(h, w) - D(c), 0) + g(h) P_{k-1}(w | h')) / sum_v c(h, v)

where h' is h without its oldest token, D(c) is one of three discounts D1, D2, D3+ by the size of
the count, g(h) = D1 N1(h) + D2 N2(h) + D3 N3+(h) is the mass they free, and P_{-1} is uniform. The
longest context uses counts; every shorter one in the chain uses the number of different tokens
seen before (h, w) instead of how often it was seen. A context never seen passes on to h'.

On Python sources, with bytes as tokens, it came out ahead of Witten-Bell and of a single discount
at every order from 1 to 5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

MISSING = -1  # stands in a context for a token before the beginning of the document
_DISCOUNT_WITHOUT_ESTIMATE = 0.5
_SMALLEST_DISCOUNT = 0.1  # keeps the probability of what was never seen above zero


@dataclasses.dataclass(frozen=True, eq=False)
class _Level:
    """One order's counts, discounted, as sorted tables. A code is a number in base vocab_size."""

    grams: np.ndarray  # (types,) codes of context + token, increasing
    discounted: np.ndarray  # (types,) count - discount
    contexts: np.ndarray  # (contexts,) codes, increasing
    totals: np.ndarray  # (contexts,) sum of counts
    freed: np.ndarray  # (contexts,) sum of discounts


@dataclasses.dataclass(frozen=True, eq=False)
class NgramModel:
    """A fitted model; see ``fit_ngram``.

    Attributes:
      order: number of previous tokens the model looks at.
      vocab_size: number of token ids; probabilities are over all of them.
    """

    order: int
    vocab_size: int
    _by_count: tuple[_Level, ...] = dataclasses.field(repr=False)  # context lengths 0 .. order
    _by_variety: tuple[_Level, ...] = dataclasses.field(repr=False)  # 0 .. order - 1

    def log_prob(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Returns log P(target | context) in nats, float64, of the shape of ``targets``.

        Args:
          contexts: (..., order) integers, the oldest token first. Where a document has fewer
            tokens before the target, the places on the left hold ``MISSING`` (-1), and the model
            of that shorter order answers.
          targets: (...) integers in [0, vocab_size).

        Raises:
          ValueError: shapes do not fit, an id is outside the vocabulary, or a ``MISSING`` stands
            to the right of a token.
        """
        contexts, targets = np.asarray(contexts, np.int64), np.asarray(targets, np.int64)
        if contexts.shape != (*targets.shape, self.order):
            raise ValueError(
                f"contexts has shape {contexts.shape}; expected {(*targets.shape, self.order)}: "
                f"targets' shape and order={self.order}"
            )
        _check_ids("contexts", contexts, MISSING, self.vocab_size)
        _check_ids("targets", targets, 0, self.vocab_size)
        present = contexts != MISSING
        if np.any(present[..., :-1] & ~present[..., 1:]):
            raise ValueError(f"contexts has {MISSING} (no token) to the right of a token")
        lengths = np.sum(present, axis=-1)
        log_probs = np.zeros(targets.shape)
        for length in range(self.order + 1):
            chosen = lengths == length
            if np.any(chosen):
                recent = contexts[chosen][:, self.order - length :]
                log_probs[chosen] = np.log(self._prob(recent, targets[chosen]))
        return log_probs

    def _prob(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """P(target | context) for contexts of one length: (n, length) and (n,) -> (n,)."""
        length = contexts.shape[1]
        levels = (*self._by_variety[:length], self._by_count[length])
        code, scale = np.zeros_like(targets), 1  # of the most recent 0, 1, ... tokens
        prob = np.full(targets.shape, 1.0 / self.vocab_size)
        for k, level in enumerate(levels):
            if k:
                code = code + contexts[:, length - k] * scale
                scale *= self.vocab_size
            total = _look_up(level.contexts, level.totals, code)
            seen = _look_up(level.grams, level.discounted, code * self.vocab_size + targets)
            freed = _look_up(level.contexts, level.freed, code)
            known = total > 0
            prob = np.where(known, (seen + freed * prob) / np.where(known, total, 1), prob)
        return prob

    def bits_per_byte(
        self, batches: Iterable[Mapping[str, np.ndarray]], bytes_per_target: float = 1.0
    ) -> float:
        """Returns the mean cost of the targets that ``loss_mask`` counts, in bits per byte.

        A target's context is what a decoder sees too: the tokens before it in the same row and
        the same document.

        Args:
          batches: dicts with ``tokens``, ``targets``, ``positions`` (0 where a document begins in
            the row) and ``loss_mask``, all (rows, seq_len).
          bytes_per_target: bytes of text for each counted target; 1 gives bits per target.

        Raises:
          ValueError: no target counts.
        """
        total, weight = 0.0, 0.0
        for batch in batches:
            mask = np.asarray(batch["loss_mask"], np.float64)
            counted = mask > 0
            contexts = contexts_in_rows(batch["tokens"], batch["positions"], self.order)
            log_probs = self.log_prob(contexts[counted], np.asarray(batch["targets"])[counted])
            total -= float(log_probs @ mask[counted])
            weight += float(mask.sum())
        if not weight:
            raise ValueError("no target to score: every loss_mask is 0, or there are no batches")
        return total / weight / math.log(2) / bytes_per_target


def contexts_in_rows(tokens: np.ndarray, positions: np.ndarray, order: int) -> np.ndarray:
    """Returns (rows, seq_len, order): the last ``order`` inputs up to each place, oldest first.

    Inputs of another document, or before the row, are ``MISSING``.
    """
    tokens, positions = np.asarray(tokens, np.int64), np.asarray(positions)
    contexts = np.full((*tokens.shape, order), MISSING, np.int64)
    for back in range(min(order, tokens.shape[1])):
        shifted = tokens[:, : tokens.shape[1] - back]
        contexts[:, back:, order - 1 - back] = np.where(
            positions[:, back:] >= back, shifted, MISSING
        )
    return contexts


def fit_ngram(
    tokens: np.ndarray, order: int = 2, *, vocab_size: int, offsets: np.ndarray | None = None
) -> NgramModel:
    """Counts the n-grams of a token stream and returns the smoothed model.

    The targets are the tokens a decoder is trained to predict: all but the first of each document.
    No context reaches into another document.

    Args:
      tokens: (num_tokens,) integers in [0, vocab_size).
      order: previous tokens in a context, >= 0.
      vocab_size: number of token ids; ``vocab_size ** (order + 1)`` must fit 63 bits.
      offsets: (num_documents + 1,) integers; document ``i`` is
        ``tokens[offsets[i]:offsets[i + 1]]``. ``None``: one document.

    Raises:
      ValueError: an argument is out of its range, or there is no target.
    """
    if order < 0:
        raise ValueError(f"order is {order}; expected >= 0")
    if vocab_size < 1 or vocab_size ** (order + 1) >= 2**63:
        raise ValueError(
            f"vocab_size={vocab_size} with order={order}: vocab_size ** (order + 1) must be in "
            "[1, 2**63)"
        )
    tokens = np.asarray(tokens)
    _check_ids("tokens", tokens, 0, vocab_size)
    offsets = np.asarray([0, len(tokens)] if offsets is None else offsets, np.int64)
    if offsets[0] != 0 or offsets[-1] != len(tokens) or np.any(np.diff(offsets) < 0):
        raise ValueError(f"offsets must increase from 0 to {len(tokens)}, the number of tokens")
    if len(tokens) - np.count_nonzero(np.diff(offsets)) < 1:
        raise ValueError("no token to predict: every document has at most one token")
    counts = [_count_grams(tokens, offsets, k, vocab_size) for k in range(order + 1)]
    by_variety = []
    for k in range(order):
        # Each different longer gram is one more token seen before its ending.
        endings = counts[k + 1][0] % vocab_size ** (k + 1)
        by_variety.append(_level(*np.unique(endings, return_counts=True), vocab_size))
    return NgramModel(
        order, vocab_size, tuple(_level(*c, vocab_size) for c in counts), tuple(by_variety)
    )


def _count_grams(
    tokens: np.ndarray, offsets: np.ndarray, length: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns codes (increasing) and counts of the targets with ``length`` tokens before them."""
    codes = np.zeros(max(0, len(tokens) - length), np.int64)
    for k in range(length + 1):
        codes *= vocab_size
        codes += tokens[k : k + len(codes)]
    keep = np.ones(len(tokens), bool)
    # Targets too near the beginning of their document; the first token is never one.
    for k in range(max(1, length)):
        starts = offsets[:-1] + k
        keep[starts[starts < offsets[1:]]] = False
    codes = codes[keep[length:]]
    num_codes = vocab_size ** (length + 1)
    if num_codes > len(codes):
        return np.unique(codes, return_counts=True)
    counts = np.bincount(codes, minlength=num_codes)
    present = np.flatnonzero(counts)
    return present, counts[present]


def _level(grams: np.ndarray, counts: np.ndarray, vocab_size: int) -> _Level:
    discounts = _discounts(counts)[np.minimum(counts, 3) - 1]
    contexts, first = np.unique(grams // vocab_size, return_index=True)
    if not len(grams):
        return _Level(grams, discounts, contexts, counts, discounts)
    return _Level(
        grams=grams,
        discounted=counts - discounts,
        contexts=contexts,
        totals=np.add.reduceat(counts, first),
        freed=np.add.reduceat(discounts, first),
    )


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Returns (3,): what to take from counts of 1, of 2, and of 3 and more."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == c)) for c in (1, 2, 3, 4))
    if not min(n1, n2, n3, n4):
        return np.full(3, _DISCOUNT_WITHOUT_ESTIMATE)
    y = n1 / (n1 + 2 * n2)
    estimate = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    return np.clip(estimate, _SMALLEST_DISCOUNT, [1, 2, 3])


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the value of each wanted key, 0 where it is absent; ``keys`` are increasing."""
    if not len(keys):
        return np.zeros(wanted.shape)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


def _check_ids(name: str, ids: np.ndarray, lowest: int, stop: int) -> None:
    if ids.size and not lowest <= ids.min() <= ids.max() < stop:
        raise ValueError(
            f"{name} holds values from {ids.min()} to {ids.max()}; expected [{lowest}, {stop})"
        )
