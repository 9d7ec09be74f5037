"""Synthetic sequences that isolate what a recurrence can remember and track.

The four tasks of "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models"
(arXiv 2510.21450), appendix C.2: parity, keep-n-th, multi-query associative recall (Zoology, arXiv
2312.04927) and k-hop induction (arXiv 2402.09268, section 4). Every function here is a function of
its arguments alone: the same key gives the same sequences, on every machine.

The batch of step ``s`` has the key ``(seed, s)``. Of ``P`` processes, number ``p`` holds rows
``[p * batch_size / P, (p + 1) * batch_size / P)``, so the global batch does not depend on ``P``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxeff.data.generated import Batch, GeneratedIterator, check
from jaxeff.data.loader import Shard

Key = tuple[int, int]

# The first half of the key of evaluation sequences; seeds of runs are below 2**63.
_EVALUATION = 2**64 - 1


def parity(key: Key, count: int, length: int) -> Batch:
    """Returns bits, and at each of them whether the ones so far are odd in number.

    Args:
      key: two integers in [0, 2**64).
      count, length: of the sequences.

    Returns:
      ``tokens`` and ``targets`` (count, length) int32, and ``loss_mask`` (count, length) float32,
      1 at the positions that have a target; here all of them.
    """
    tokens = _uniform(_generator(key), 2, (count, length))
    return _batch(tokens, np.cumsum(tokens, axis=1) % 2, np.ones_like(tokens))


def keep_nth(key: Key, count: int, length: int, *, vocab_size: int = 128, n: int = 5) -> Batch:
    """Returns uniformly random tokens; the target is the n-th (from 1), at it and behind it.

    Arguments and arrays as for `parity`; ``vocab_size`` tokens.

    Raises:
      ValueError: unless 1 <= n <= length.
    """
    check(1 <= n <= length, "n", n, f"from 1 to the length of the sequence, {length}")
    tokens = _uniform(_generator(key), vocab_size, (count, length))
    behind = np.broadcast_to(np.arange(length) >= n - 1, tokens.shape)
    return _batch(tokens, np.where(behind, tokens[:, n - 1 : n], 0), behind)


def mqar(key: Key, count: int, length: int, *, vocab_size: int = 128, num_pairs: int = 2) -> Batch:
    """Returns multi-query associative recall: pairs of key and value, then queries among noise.

    The first half of the vocabulary are keys, the second half values. A sequence begins with
    ``num_pairs`` pairs of different keys and any values. Behind them each of its keys comes once
    more, at uniformly random positions; the target there is its value. The other positions are
    noise, uniform over all tokens but the sequence's keys, which would be queries too. (Zoology
    draws the gaps between queries from a power law and does not except the keys.)

    Arguments and arrays as for `parity`.

    Raises:
      ValueError: when the vocabulary or the sequence is too short for the pairs.
    """
    keys_there, most = vocab_size // 2, min(vocab_size // 2, length // 3)
    expected = f"1 to {most}: {length} tokens of {vocab_size} hold no more pairs and queries"
    check(1 <= num_pairs <= most, "num_pairs", num_pairs, expected)
    random = _generator(key)
    keys = _choose(random, keys_there, count, num_pairs)
    values = keys_there + _uniform(random, vocab_size - keys_there, (count, num_pairs))
    places = 2 * num_pairs + _choose(random, length - 2 * num_pairs, count, num_pairs)
    tokens = _uniform(random, vocab_size - num_pairs, (count, length))
    for column in np.sort(keys, axis=1).T:  # leave the keys out, from the smallest on
        tokens += tokens >= column[:, None]
    tokens[:, 0 : 2 * num_pairs : 2] = keys
    tokens[:, 1 : 2 * num_pairs : 2] = values
    targets, mask = np.zeros_like(tokens), np.zeros_like(tokens)
    np.put_along_axis(tokens, places, keys, axis=1)
    np.put_along_axis(targets, places, values, axis=1)
    np.put_along_axis(mask, places, 1, axis=1)
    return _batch(tokens, targets, mask)


def k_hop(key: Key, count: int, length: int, *, vocab_size: int = 10, num_hops: int = 1) -> Batch:
    """Returns uniformly random tokens, and at each of them where ``num_hops`` hops back lead.

    A hop goes from a position to the one after the previous occurrence of its token: the first is
    the induction head's. The target is the token where the last hop ends; a position without one
    has no target.

    Arguments and arrays as for `parity`; ``vocab_size`` tokens.
    """
    tokens = _uniform(_generator(key), vocab_size, (count, length))
    hop, rows = np.empty((count, length), np.int64), np.arange(count)
    seen = np.full((count, vocab_size), -1, np.int64)
    for t in range(length):
        hop[:, t] = seen[rows, tokens[:, t]] + 1  # 0 where the token is new: no hop leads there
        seen[rows, tokens[:, t]] = t
    ends = np.broadcast_to(np.arange(length), hop.shape)
    for _ in range(num_hops):
        # Where a hop has failed the end is 0, whose token is new, so the next one fails as well.
        ends = np.take_along_axis(hop, ends, axis=1)
    targets = np.take_along_axis(tokens, ends, axis=1)
    return _batch(tokens, np.where(ends > 0, targets, 0), ends > 0)


def _generator(key: Key) -> np.random.Philox:
    # Its raw output is what numpy promises never to change.
    return np.random.Philox(key=np.array(key, np.uint64))


def _uniform(random: np.random.Philox, size: int, shape: tuple[int, int]) -> np.ndarray:
    return (random.random_raw(shape) % np.uint64(size)).astype(np.int64)


def _choose(random: np.random.Philox, size: int, count: int, number: int) -> np.ndarray:
    """``number`` different integers below ``size`` in random order, (count, number)."""
    return np.argsort(random.random_raw((count, size)), axis=1, kind="stable")[:, :number]


def _batch(tokens: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> Batch:
    return {
        "tokens": tokens.astype(np.int32),
        "targets": targets.astype(np.int32),
        "loss_mask": mask.astype(np.float32),
    }


# Each task and the fields of the config that its function takes.
TASKS = {
    "parity": (parity, ()),
    "keep_nth": (keep_nth, ("vocab_size", "n")),
    "mqar": (mqar, ("vocab_size", "num_pairs")),
    "k_hop": (k_hop, ("vocab_size", "num_hops")),
}


@dataclasses.dataclass(frozen=True)
class SyntheticSequenceConfig:
    """A task, and how its sequences become batches.

    Attributes:
      task: ``"parity"``, ``"keep_nth"``, ``"mqar"`` or ``"k_hop"``.
      seq_len: tokens of a training sequence.
      batch_size: sequences of one step over *all* processes.
      vocab_size: tokens of the task; always 2 for parity.
      n: which token to keep, from 1.
      num_pairs: of keys and values, of mqar.
      num_hops: of k_hop.
      seed: of the training sequences; ``None`` uses the seed of the run.

    Raises:
      ValueError: when a value cannot work; the message names the field, the value and the rule.
    """

    task: str = "parity"
    seq_len: int = 32
    batch_size: int = 32
    vocab_size: int = 2
    n: int = 5
    num_pairs: int = 2
    num_hops: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        check(self.task in TASKS, "task", self.task, f"one of {tuple(TASKS)}")
        for name in ("seq_len", "batch_size", "n", "num_pairs", "num_hops"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.vocab_size >= 2, "vocab_size", self.vocab_size, "at least 2")
        binary = self.task != "parity" or self.vocab_size == 2
        check(binary, "vocab_size", self.vocab_size, "2: parity is that of bits")
        check(self.seed is None or 0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2**63)")
        self.draw((0, 0), 1, self.seq_len)

    def draw(self, key: Key, count: int, length: int) -> Batch:
        """Returns ``count`` sequences of the task; see its function for the arrays."""
        function, fields = TASKS[self.task]
        return function(key, count, length, **{name: getattr(self, name) for name in fields})


class SyntheticSequenceIterator(GeneratedIterator):
    """The training batches of a `SyntheticSequenceConfig`; see `GeneratedIterator`."""

    def whole_batch(self, step: int) -> Batch:
        """Draws the sequences of a step."""
        return self.config.draw((self.seed, step), self.config.batch_size, self.config.seq_len)


def evaluation_batches(
    config: SyntheticSequenceConfig,
    count: int,
    length: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields sequences to evaluate on, the same ones in every run, in batches of ``batch_size``.

    They are drawn like those of training, with a key that no step has. The last batch is filled up
    with rows without targets.

    Args:
      config: the task; its ``seq_len`` and ``seed`` are not used.
      count, length: of the sequences.
      process_index, process_count: which part of each batch to hold.

    Raises:
      ValueError: the batch cannot be divided, or the length is too short for the task.
    """
    rows = Shard(config.batch_size, process_index, process_count).rows()
    whole = config.draw((_EVALUATION, length), count, length)
    for start in range(0, count, config.batch_size):
        part = {name: x[start : start + config.batch_size] for name, x in whole.items()}
        missing = config.batch_size - len(part["tokens"])
        yield {name: np.pad(x, ((0, missing), (0, 0)))[rows] for name, x in part.items()}
