"""Batches in a random order that depends on (seed, step) alone, built ahead in the background.

The rows of a corpus are visited in epochs, each in a new permutation made from (seed, epoch). The
permutations follow one another without a gap, and the batch of step ``s`` is entries
``[s * batch_size, (s + 1) * batch_size)`` of that endless sequence: every row is used exactly once
per epoch, no batch is short, and any step's batch can be built without those before it. Of ``P``
processes, number ``p`` holds rows ``[p * batch_size / P, (p + 1) * batch_size / P)`` of each
batch, so the global batch does not depend on ``P``.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxeff.data.config import DataConfig
from jaxeff.data.packing import TokenStream, Windows

Batch = dict[str, np.ndarray]

# What two runs must share for the data of one to continue in the other, and why it may differ.
_STATE_FIELDS = {
    "fingerprint": "the corpus or the tokenizer changed",
    "seed": "the seed changed",
    "batch_size": "batch_size changed",
    "seq_len": "seq_len changed",
    "packing": "packing changed",
}


class DataStateError(ValueError):
    """A saved data position belongs to other data than those of this run."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """The rows of each global batch that one process holds.

    Raises:
      ValueError: the batch cannot be divided among the processes, or there is no such process.
    """

    batch_size: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if self.process_count < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be divided among "
                f"process_count={self.process_count} processes; expected a multiple of it"
            )
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index is {self.process_index}; expected 0 <= process_index < "
                f"process_count={self.process_count}"
            )

    def rows(self) -> slice:
        size = self.batch_size // self.process_count
        return slice(self.process_index * size, (self.process_index + 1) * size)


class ShuffledRows:
    """The endless sequence of rows: one permutation of ``range(num_rows)`` after the other.

    Entry ``i`` is a function of ``(seed, i)``; safe to use from several threads.
    """

    def __init__(self, num_rows: int, seed: int):
        self.num_rows = num_rows
        self.seed = seed
        self._recent: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def entries(self, start: int, stop: int) -> np.ndarray:
        """Returns entries [start, stop) of the sequence, int64."""
        epochs, places = np.divmod(np.arange(start, stop), self.num_rows)
        pieces = [self._epoch(int(e))[places[epochs == e]] for e in np.unique(epochs)]
        return np.concatenate(pieces)

    def _epoch(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._recent:
                # The raw output of a bit generator is what numpy promises never to change;
                # Generator.permutation may differ between versions.
                keys = np.random.Philox(key=[self.seed, epoch]).random_raw(self.num_rows)
                self._recent[epoch] = np.argsort(keys, kind="stable")
                while len(self._recent) > 2:
                    del self._recent[min(self._recent)]
            return self._recent[epoch]


class TrainIterator:
    """An endless iterator over the batches of one process; see ``make_train_iterator``.

    Attributes:
      step: the batch that ``next()`` returns.
      wait_seconds: total time spent in ``next()``.
    """

    def __init__(
        self,
        windows: Windows,
        shard: Shard,
        *,
        seed: int,
        num_workers: int = 1,
        prefetch: int = 4,
    ):
        self.step = 0
        self.wait_seconds = 0.0
        self._windows = windows
        self._shard = shard
        self._order = ShuffledRows(len(windows), seed)
        self._prefetch = prefetch
        self._pending: collections.deque[Future[Batch]] = collections.deque()
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(num_workers, "jaxeff-data")
        self._submit()

    def batch(self, step: int) -> Batch:
        """Builds this process's rows of the batch of any step."""
        start = step * self._shard.batch_size
        rows = self._shard.rows()
        return self._windows.rows(self._order.entries(start + rows.start, start + rows.stop))

    def __iter__(self) -> TrainIterator:
        return self

    def __next__(self) -> Batch:
        if self._pool is None:
            raise ValueError("next() on a data iterator that was closed")
        started = time.perf_counter()
        try:
            return self._next()
        finally:
            self.wait_seconds += time.perf_counter() - started

    def _next(self) -> Batch:
        try:
            batch = self._pending[0].result() if self._pending else self.batch(self.step)
        except Exception as error:
            self.seek(self.step)
            raise RuntimeError(f"building the batch of step {self.step} failed: {error}") from error
        # Only now, so that an interrupt while waiting loses nothing.
        if self._pending:
            self._pending.popleft()
        self.step += 1
        self._submit()
        return batch

    def _submit(self) -> None:
        while len(self._pending) < self._prefetch:
            self._pending.append(self._pool.submit(self.batch, self.step + len(self._pending)))

    def seek(self, step: int) -> None:
        """Continues with the batch of ``step``, at once wherever that is."""
        if self._pool is None:
            raise ValueError("seek() on a data iterator that was closed")
        for future in self._pending:
            future.cancel()
        self._pending.clear()
        self.step = step
        self._submit()

    def get_state(self) -> dict[str, Any]:
        """Returns the position and what it is a position in; can be written as JSON."""
        return {"step": self.step, **self._identity()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where an iterator with this ``get_state()`` was.

        The number of processes may differ.

        Raises:
          DataStateError: the state was taken from other data or another order; the message lists
            what differs. ``seek(state["step"])`` continues regardless.
        """
        here = self._identity()
        missing = [name for name in ("step", *here) if name not in state]
        if missing:
            raise DataStateError(f"the saved data position has no {', '.join(missing)}: {state!r}")
        differences = [
            f"{reason} (saved {name}={state[name]!r}, now {here[name]!r})"
            for name, reason in _STATE_FIELDS.items()
            if state[name] != here[name]
        ]
        if differences:
            raise DataStateError(
                f"cannot continue at step {state['step']} of the saved data: "
                + "; ".join(differences)
            )
        self.seek(int(state["step"]))

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self._windows.stream.fingerprint,
            "seed": self._order.seed,
            "batch_size": int(self._shard.batch_size),
            "seq_len": int(self._windows.seq_len),
            "packing": self._windows.packing,
        }

    def close(self) -> None:
        """Stops and joins the background threads; may be called twice."""
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        self._pending.clear()
        pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> TrainIterator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def make_train_iterator(
    stream: TokenStream,
    config: DataConfig,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainIterator:
    """Returns the training batches of one process.

    Args:
      stream: the tokenised training split.
      config: its ``seq_len``, ``batch_size`` (global), ``packing``, ``num_workers``, ``prefetch``.
      seed: of the shuffling, in [0, 2**63), used where ``config.seed`` is ``None``.
      process_index: which part of each batch to hold.
      process_count: number of parts; must divide ``config.batch_size``.

    Returns:
      An endless iterator over dicts of (batch_size / process_count, seq_len) arrays, described at
      ``Windows.rows``, with ``get_state``, ``set_state``, ``seek`` and ``close``.

    Raises:
      ValueError: the corpus has not even one full row, the batch cannot be divided among the
        processes, or the seed is out of range.
    """
    if stream.num_tokens < config.seq_len + 1:
        raise ValueError(
            f"seq_len={config.seq_len} is longer than the training corpus: a row needs "
            f"{config.seq_len + 1} tokens and there are {stream.num_tokens}"
        )
    seed = seed if config.seed is None else config.seed
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; expected 0 <= seed < 2**63")
    return TrainIterator(
        Windows(stream, config.seq_len, packing=config.packing),
        Shard(config.batch_size, process_index, process_count),
        seed=int(seed),
        num_workers=config.num_workers,
        prefetch=config.prefetch,
    )


class EvalBatches:
    """Held-out batches in a fixed order; can be iterated again and again (see ``eval_batches``).

    Attributes:
      bytes_per_target: bytes of held-out text for each predicted token.
    """

    def __init__(self, windows: Windows, shard: Shard, num_batches: int | None):
        size, available = shard.batch_size, len(windows)
        wanted = available if num_batches is None else min(available, num_batches * size)
        # Evenly spread, because the first documents alone would be an odd sample.
        rows = np.arange(wanted) * available // wanted
        self._rows = np.full((-(-wanted // size), size), -1)
        self._rows.reshape(-1)[:wanted] = rows
        self._windows = windows
        self._shard = shard
        self.bytes_per_target = windows.stream.bytes_per_target

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._rows:
            yield self._windows.rows(rows[self._shard.rows()])


def eval_batches(
    stream: TokenStream,
    config: DataConfig,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> EvalBatches:
    """Returns the batches of the held-out split, always the same ones.

    All batches have the same shape: the last one is filled up with rows of padding, whose
    ``loss_mask`` is 0. Every held-out pair of tokens is in exactly one batch, unless
    ``config.eval_batches`` asks for fewer rows than there are. The rows of a batch are divided
    among processes as in training.

    Args:
      stream: the tokenised held-out split; it may be shorter than one row.
      config: its ``seq_len``, ``packing``, ``eval_batches`` and ``eval_batch_size`` (global;
        ``None``: ``batch_size``).
      process_index: which part of each batch to hold.
      process_count: number of parts; must divide the evaluation batch.

    Raises:
      ValueError: there are no held-out documents, or the batch cannot be divided.
    """
    if stream.num_documents == 0:
        raise ValueError(
            f"no held-out documents to evaluate on: heldout_fraction is {config.heldout_fraction}"
        )
    size = config.batch_size if config.eval_batch_size is None else config.eval_batch_size
    return EvalBatches(
        Windows(stream, config.seq_len, packing=config.packing),
        Shard(size, process_index, process_count),
        config.eval_batches,
    )
