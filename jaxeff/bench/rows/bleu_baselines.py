"""What BLEU on the device is compared with: two packages on the host, and one dictionary a batch.

The dictionary is the method of "TensorBLEU" (arXiv 2510.05485): for each order, the distinct
n-grams of the whole batch are numbered, and each sentence's counts are a row as long as that
dictionary.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.bench.measure import BenchError, Sample
from jaxeff.metrics.bleu import BleuStats, bleu_from_statistics

MAX_ORDER = 4


@dataclasses.dataclass(frozen=True)
class HostBaseline:
    """A package that scores sentence by sentence, on inputs that are ready for it.

    Attributes:
      name: of the package.
      score: of the sentence with an index, as a share of one.
      sentences: how many there are.
    """

    name: str
    score: Callable[[int], float]
    sentences: int

    def scores(self) -> np.ndarray:
        """Returns the scores of all sentences, (sentences,)."""
        return np.array([self.score(index) for index in range(self.sentences)])

    def timed(self, batch: int) -> Sample:
        """Scores all sentences; the time stated is that of `batch` of them."""
        started = time.perf_counter()
        self.scores()
        return Sample((time.perf_counter() - started) * batch / self.sentences)

    def variant_name(self, batch: int) -> str:
        """Returns the package's name and, where its time is scaled, from how many sentences."""
        return self.name if self.sentences == batch else f"{self.name} (from {self.sentences})"


def nltk_baseline(candidates: np.ndarray, references: np.ndarray) -> HostBaseline:
    """NLTK's `sentence_bleu` with its smoothing method 1, on lists of ids.

    Args:
      candidates: (S, L) ids, negative behind the end.
      references: (S, R, L), the same.

    Raises:
      BenchError: when NLTK is not installed.
    """
    try:
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    except ImportError as error:
        raise BenchError(_missing("nltk")) from error
    sentences = _lists(candidates)
    of_each = [_lists(rows) for rows in references]
    smoothing = SmoothingFunction().method1

    def score(index):
        return sentence_bleu(of_each[index], sentences[index], smoothing_function=smoothing)

    return HostBaseline("NLTK", score, len(sentences))


def sacrebleu_baseline(candidates: np.ndarray, references: np.ndarray) -> HostBaseline:
    """sacrebleu's `sentence_score` with smoothing "floor", on strings of ids.

    Arguments are those of `nltk_baseline`.

    Raises:
      BenchError: when sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise BenchError(_missing("sacrebleu")) from error
    # It recommends effective_order for sentences; both sides here leave it off.
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    metric = BLEU(tokenize="none", effective_order=False, smooth_method="floor")
    sentences = _strings(candidates)
    of_each = [_strings(rows) for rows in references]

    def score(index):
        return metric.sentence_score(sentences[index], of_each[index]).score / 100

    return HostBaseline("sacrebleu", score, len(sentences))


def _missing(package):
    return f'{package} is not installed: pip install "jaxeff[test]"'


def _lists(rows):
    return [row[row >= 0].tolist() for row in rows]


def _strings(rows):
    return [" ".join(map(str, tokens)) for tokens in _lists(rows)]


def distinct_ngrams(candidates: np.ndarray, references: np.ndarray) -> tuple[int, ...]:
    """Returns how many distinct n-grams a batch has for each order, padding as one of them.

    Arguments are those of `nltk_baseline`.
    """
    tokens = _all_sentences(candidates, references, np).astype(np.int64)
    # Numbers stand for the n-grams so far, so that a longer one is a pair of integers.
    ids, sizes = tokens, []
    for order in range(1, MAX_ORDER + 1):
        if order > 1:
            last = tokens[..., order - 1 :]
            pairs = ids[..., : last.shape[-1]] * (int(tokens.max()) + 1) + last
            ids = np.where((ids[..., : last.shape[-1]] >= 0) & (last >= 0), pairs, -1)
        values, inverse = np.unique(ids, return_inverse=True)
        sizes.append(len(values) + (values[0] >= 0))
        # Padding, the least value if there is any, stays negative.
        ids = inverse.reshape(ids.shape) - (values[0] < 0)
    return tuple(int(size) for size in sizes)


def dictionary_bytes(batch: int, num_references: int, sizes: Sequence[int]) -> int:
    """Returns the bytes of the count tensors that live at once, in the largest of the orders.

    They are those of the candidates, of a reference and, from two references on, of the largest
    counts so far: (batch, size) int32 each.
    """
    return min(num_references + 1, 3) * batch * max(sizes) * 4


def dictionary_bleu(candidates: jax.Array, references: jax.Array, sizes: Sequence[int]) -> Any:
    """BLEU with a dictionary of the whole batch and smoothing "floor".

    Args:
      candidates: (B, L) int32, negative behind the end.
      references: (B, R, L) int32, the same.
      sizes: of the dictionary of each order, at least `distinct_ngrams`.

    Returns:
      float32 (B,).
    """
    lengths = jnp.sum(candidates >= 0, axis=-1, dtype=jnp.int32)
    of_references = jnp.sum(references >= 0, axis=-1, dtype=jnp.int32)
    distance = jnp.abs(of_references - lengths[:, None])
    closest = distance == jnp.min(distance, axis=-1, keepdims=True)
    orders = jnp.arange(1, len(sizes) + 1)
    stats = BleuStats(
        numerators=jnp.stack(
            [_matches(candidates, references, n, size) for n, size in enumerate(sizes, 1)], axis=-1
        ),
        denominators=jnp.maximum(lengths[:, None] - orders + 1, 0),
        candidate_length=lengths,
        reference_length=jnp.min(jnp.where(closest, of_references, 2**30), axis=-1),
    )
    return bleu_from_statistics(stats, smoothing="floor")


def _matches(candidates, references, order, size):
    """(B,) clipped matches of one order."""
    tokens = _all_sentences(candidates, references, jnp)
    batch, sources, length = tokens.shape
    positions = length - order + 1
    ngrams = jnp.stack([tokens[..., i : i + positions] for i in range(order)], axis=-1)
    real = jnp.all(ngrams >= 0, axis=-1)
    rows = jnp.where(real[..., None], ngrams, -1).reshape(-1, order)
    _, ids = jnp.unique(rows, axis=0, size=size, return_inverse=True, fill_value=-1)
    ids = ids.reshape(batch, sources, positions)

    def counts(source):
        empty = jnp.zeros((batch, size), jnp.int32)
        sentence = jnp.arange(batch)[:, None]
        return empty.at[sentence, ids[:, source]].add(real[:, source].astype(jnp.int32))

    most = counts(1)
    for source in range(2, sources):
        most = jnp.maximum(most, counts(source))
    return jnp.sum(jnp.minimum(counts(0), most), axis=-1)


def _all_sentences(candidates, references, module):
    """(B, 1 + R, L): each candidate before its references."""
    return module.concatenate([candidates[:, None], references], axis=1)
