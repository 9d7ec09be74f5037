"""Settings of the data side of a run."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes batches.

    Attributes:
      corpus: ``"stdlib"`` (the Python standard library's sources on this machine), or a file, a
        directory, a glob, a ``*.jsonl`` file, or a tuple of those (see ``corpora.load_corpus``).
      text_field: the field of a JSON-lines document that holds its text.
      tokenizer: ``"bytes"``, or the path of a ``tokenizer.json``.
      seq_len: tokens in one row of a batch.
      batch_size: rows of one step over *all* processes.
      seed: seed of the shuffling; ``None`` uses the seed of the run.
      packing: ``True`` cuts the concatenated documents into full rows; ``False`` begins every
        document on a row of its own and pads its last row.
      heldout_fraction: share of the documents kept for evaluation, in [0, 1).
      num_workers: background threads that build batches.
      prefetch: batches built ahead of the one being consumed; 0 builds them on demand.
      cache_dir: directory that keeps the tokenised corpus between runs; ``None`` keeps nothing.
      eval_batch_size: rows of one evaluation batch over all processes; ``None``: ``batch_size``.
      eval_batches: number of evaluation batches, their rows spread evenly over the held-out
        text; ``None`` evaluates all of it.

    Raises:
      ValueError: when a value cannot work; the message names the field, the value and the rule.
    """

    corpus: str | tuple[str, ...] = "stdlib"
    text_field: str = "text"
    tokenizer: str = "bytes"
    seq_len: int = 128
    batch_size: int = 32
    seed: int | None = None
    packing: bool = True
    heldout_fraction: float = 0.05
    num_workers: int = 1
    prefetch: int = 4
    cache_dir: str | None = None
    eval_batch_size: int | None = None
    eval_batches: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.corpus, list):
            object.__setattr__(self, "corpus", tuple(self.corpus))
        sources = self.corpus if isinstance(self.corpus, tuple) else (self.corpus,)
        if not sources or not all(isinstance(s, str) and s for s in sources):
            raise ValueError(
                f"corpus is {self.corpus!r}; expected 'stdlib', a path, a glob, or a tuple of them"
            )
        for name in ("text_field", "tokenizer"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a non-empty string")
        for name in ("seq_len", "batch_size", "num_workers"):
            _check_int(name, getattr(self, name), minimum=1)
        _check_int("prefetch", self.prefetch, minimum=0)
        for name, minimum in (("eval_batch_size", 1), ("eval_batches", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), minimum=minimum)
        _check_fraction("heldout_fraction", self.heldout_fraction)


def _check_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise ValueError(f"{name} is {value!r}; expected an integer >= {minimum}")


def _check_fraction(name: str, value: Any) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or math.isnan(value) or not 0 <= value < 1:
        raise ValueError(f"{name} is {value!r}; expected a number in [0, 1)")
