"""Sentences of a synthetic language and their translations, as many as wanted.

A source is a random sequence of words whose frequencies follow Zipf's law; its translation replaces
each word by its counterpart, the words in reversed, swapped or unchanged order. Whether a source
belongs to training or is held out is decided by a hash of its words, so that no sentence is ever
in both, whatever the seeds.

The batch of step ``s`` is a function of ``(seed, s)`` alone. Of ``P`` processes, number ``p`` holds
rows ``[p * batch_size / P, (p + 1) * batch_size / P)``, so the global batch does not depend on
``P``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxeff.data.generated import Batch, GeneratedIterator, check
from jaxeff.data.loader import Shard

PAD_ID, EOS_ID, SEPARATOR_ID = 0, 1, 2
FIRST_WORD_ID = 3

MAPPINGS = ("copy", "translate")
ORDERS = ("same", "swap_pairs", "reverse")

# Sources are drawn in blocks of this many times the number wanted, and this many blocks at most.
_BLOCK, _MAX_BLOCKS = 2, 64

_FRACTION_BITS = 53


@dataclasses.dataclass(frozen=True)
class TranslationConfig:
    """The language, and how its sentences become batches.

    Attributes:
      num_words: words of the language; their ids follow those of padding, end and separator.
      min_length, max_length: words of a source, uniform between the two, both included.
      mapping: ``"copy"`` (every word is its own counterpart) or ``"translate"`` (a permutation of
        the words).
      order: of the words of the translation: ``"same"``, ``"swap_pairs"`` (first and second,
        third and fourth, ... change places) or ``"reverse"``.
      zipf_exponent: the word of rank r is drawn with probability proportional to r ** -exponent;
        0 makes all words equally frequent.
      language_seed: of the permutation and of the choice of held-out sentences for evaluation.
      batch_size: sources of one step over *all* processes.
      seed: of the training sentences; ``None`` uses the seed of the run.
      heldout_fraction: share of all possible sources that are never trained on, in (0, 1).
      heldout_sentences: sources evaluated on, all different, the same in every evaluation.

    Raises:
      ValueError: when a value cannot work; the message names the field, the value and the rule.
    """

    num_words: int = 16
    min_length: int = 3
    max_length: int = 6
    mapping: str = "translate"
    order: str = "same"
    zipf_exponent: float = 1.0
    language_seed: int = 0
    batch_size: int = 64
    seed: int | None = None
    heldout_fraction: float = 0.1
    heldout_sentences: int = 256

    def __post_init__(self) -> None:
        for name in ("num_words", "min_length", "batch_size", "heldout_sentences"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        longest = self.max_length
        check(longest >= self.min_length, "max_length", longest, f">= {self.min_length}")
        check(self.mapping in MAPPINGS, "mapping", self.mapping, f"one of {MAPPINGS}")
        check(self.order in ORDERS, "order", self.order, f"one of {ORDERS}")
        check(self.zipf_exponent >= 0, "zipf_exponent", self.zipf_exponent, "at least 0")
        fraction = self.heldout_fraction
        check(0 < fraction < 1, "heldout_fraction", fraction, "between 0 and 1, both excluded")
        for name in ("language_seed", "seed"):
            seed = getattr(self, name)
            check(seed is None or 0 <= seed < 2**63, name, seed, "in [0, 2**63)")

    @property
    def vocab_size(self) -> int:
        """Token ids that may occur: the words, padding, end and separator."""
        return FIRST_WORD_ID + self.num_words


class Language:
    """Draws sources and translates them.

    Args:
      config: of the language; the fields about batches and seeds of a run are not used.
    """

    def __init__(self, config: TranslationConfig):
        self.config = config
        weights = np.arange(1, config.num_words + 1) ** -float(config.zipf_exponent)
        self._cumulative = np.cumsum(weights / weights.sum())[:-1]
        self._counterparts = np.arange(config.num_words)
        if config.mapping == "translate":
            keys = np.random.Philox(key=[config.language_seed, 0]).random_raw(config.num_words)
            self._counterparts = np.argsort(keys, kind="stable")

    def draw(
        self, generator: np.random.Philox, count: int, *, heldout: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns ``count`` sources of one side of the split.

        Args:
          generator: its raw output is what numpy promises never to change.
          count: sources wanted.
          heldout: whether sources that are held out, or those that are not, are wanted.

        Returns:
          Words (count, max_length) int32, ``PAD_ID`` after the last, and lengths (count,) int32.

        Raises:
          ValueError: that side of the language is empty, or so small that it was not met.
        """
        kept: list[tuple[np.ndarray, np.ndarray]] = []
        for _ in range(_MAX_BLOCKS):
            words, lengths = self._draw_any(generator, _BLOCK * count)
            chosen = self.is_heldout(words) == heldout
            kept.append((words[chosen], lengths[chosen]))
            if sum(len(lengths) for _, lengths in kept) >= count:
                words, lengths = (np.concatenate(part)[:count] for part in zip(*kept))
                return words, lengths
        found = sum(len(lengths) for _, lengths in kept)
        raise ValueError(
            f"only {found} of {count} {'held-out' if heldout else 'training'} sentences met: "
            f"heldout_fraction={self.config.heldout_fraction} of a language of "
            f"num_words={self.config.num_words}, lengths up to {self.config.max_length}"
        )

    def _draw_any(self, generator: np.random.Philox, count: int) -> tuple[np.ndarray, np.ndarray]:
        config = self.config
        raw = generator.random_raw((count, config.max_length + 1))
        spread = np.uint64(config.max_length - config.min_length + 1)
        lengths = config.min_length + (raw[:, 0] % spread).astype(np.int32)
        uniform = (raw[:, 1:] >> np.uint64(64 - _FRACTION_BITS)) * 2.0**-_FRACTION_BITS
        words = np.searchsorted(self._cumulative, uniform, side="right") + FIRST_WORD_ID
        words = np.where(np.arange(config.max_length) < lengths[:, None], words, PAD_ID)
        return words.astype(np.int32), lengths.astype(np.int32)

    def is_heldout(self, words: np.ndarray) -> np.ndarray:
        """Returns whether each of the sources (count, max_length) is never trained on, bool."""
        hashed = np.zeros(len(words), np.uint64)
        # Padding is hashed too, as any other position: max_length is part of the language.
        for column in words.T:
            hashed = _mix(hashed ^ (column.astype(np.uint64) + np.uint64(1)))
        return (hashed >> np.uint64(64 - _FRACTION_BITS)) * 2.0**-_FRACTION_BITS < (
            self.config.heldout_fraction
        )

    def translate(self, words: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Returns the translations of sources, in the same layout (count, max_length) int32."""
        places = np.arange(words.shape[1])[None]
        last = lengths[:, None] - 1
        if self.config.order == "reverse":
            places = last - places
        elif self.config.order == "swap_pairs":
            # The last word of an odd number of words stays where it is.
            places = np.minimum(places ^ 1, np.maximum(last, 0))
        real = np.arange(words.shape[1]) <= last
        ordered = np.take_along_axis(words, np.where(real, places, 0), axis=1)
        translated = self._counterparts[ordered - FIRST_WORD_ID] + FIRST_WORD_ID
        return np.where(real, translated, PAD_ID).astype(np.int32)

    def batch(self, words: np.ndarray, lengths: np.ndarray) -> Batch:
        """Returns sources and their translations as a batch.

        Returns:
          ``prompts`` (count, max_length + 1) int32: the source in a field of fixed width, then the
          separator, so that a translated word is equally far from its source in every row;
          ``references`` (count, max_length) int32, padded; ``lengths`` (count,) int32 of both.
        """
        separator = np.full((len(words), 1), SEPARATOR_ID, np.int32)
        return {
            "prompts": np.concatenate([words, separator], axis=1),
            "references": self.translate(words, lengths),
            "lengths": lengths,
        }


def _mix(x: np.ndarray) -> np.ndarray:
    """Scrambles 64 bits (the finaliser of SplitMix64, Steele, Lea and Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TranslationIterator(GeneratedIterator):
    """The training batches of a `TranslationConfig`; see `GeneratedIterator`, `Language.batch`."""

    EVALUATION_SETTINGS = ("heldout_sentences",)

    def __init__(self, config: TranslationConfig, **which: Any):
        super().__init__(config, **which)
        self._language = Language(config)

    def whole_batch(self, step: int) -> Batch:
        """Draws the sentences of a step."""
        generator = np.random.Philox(key=[self.seed, step])
        words, lengths = self._language.draw(generator, self.config.batch_size, heldout=False)
        return self._language.batch(words, lengths)


def heldout_batches(
    config: TranslationConfig, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Yields the held-out sentences, the same ones in every run, in batches of ``batch_size``.

    The last batch is filled up with rows of length 0. See ``Language.batch`` for the arrays.

    Raises:
      ValueError: the language has too few held-out sentences, or the batch cannot be divided.
    """
    rows = Shard(config.batch_size, process_index, process_count).rows()
    language = Language(config)
    words = _different_heldout(language)
    lengths = np.count_nonzero(words != PAD_ID, axis=1).astype(np.int32)
    for start in range(0, len(words), config.batch_size):
        missing = max(start + config.batch_size - len(words), 0)
        stop = start + config.batch_size
        padded_words = np.pad(words[start:stop], ((0, missing), (0, 0)))
        padded_lengths = np.pad(lengths[start:stop], (0, missing))
        yield language.batch(padded_words[rows], padded_lengths[rows])


def _different_heldout(language: Language) -> np.ndarray:
    """Returns ``heldout_sentences`` different held-out sources, in the order they were drawn."""
    config = language.config
    generator = np.random.Philox(key=[config.language_seed, 1])
    words, _ = language.draw(generator, 4 * config.heldout_sentences, heldout=True)
    _, first = np.unique(words, axis=0, return_index=True)
    if len(first) < config.heldout_sentences:
        raise ValueError(
            f"heldout_sentences is {config.heldout_sentences}; the language "
            f"(num_words={config.num_words}, lengths up to {config.max_length}) has too few: "
            f"{len(first)} different ones among {len(words)} drawn"
        )
    return words[np.sort(first)[: config.heldout_sentences]]
