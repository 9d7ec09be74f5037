"""Batches that are generated: a function of (seed, step) alone, so that any step can be resumed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxeff.data.loader import DataStateError, Shard

Batch = dict[str, np.ndarray]


def check(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raises ValueError, naming a setting, its value and what was expected, unless it holds."""
    if not condition:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


class GeneratedIterator:
    """An endless iterator over the generated batches of one process.

    A subclass defines `whole_batch`. Of ``P`` processes, number ``p`` holds rows
    ``[p * batch_size / P, (p + 1) * batch_size / P)`` of it.

    Args:
      config: a dataclass of settings with ``batch_size`` and ``seed`` (None or an integer).
      seed: used where ``config.seed`` is None.
      process_index, process_count: which part of each batch to hold.

    Raises:
      ValueError: the batch cannot be divided among the processes, or the seed is out of range.

    Attributes:
      step: the batch that ``next()`` returns.
      wait_seconds: total time spent in ``next()``.
    """

    # Settings that no training batch depends on.
    EVALUATION_SETTINGS: tuple[str, ...] = ()

    def __init__(self, config: Any, *, seed: int, process_index: int = 0, process_count: int = 1):
        self.step = 0
        self.wait_seconds = 0.0
        self.config = config
        self.seed = seed if config.seed is None else config.seed
        check(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2**63)")
        self._rows = Shard(config.batch_size, process_index, process_count).rows()

    def whole_batch(self, step: int) -> Batch:
        """Builds all rows of the batch of a step, from ``self.seed`` and ``step``."""
        raise NotImplementedError(f"{type(self).__name__} does not say what a batch is")

    def batch(self, step: int) -> Batch:
        """Builds this process's rows of the batch of any step."""
        return {name: rows[self._rows] for name, rows in self.whole_batch(step).items()}

    def __iter__(self) -> GeneratedIterator:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = self.batch(self.step)
        self.step += 1
        self.wait_seconds += time.perf_counter() - started
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position and what it is a position in; can be written as JSON."""
        return {"step": self.step, **self._identity()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where an iterator with this ``get_state()`` was.

        Raises:
          DataStateError: the state was taken from other data; the message lists what differs.
        """
        differences = [
            f"{name} changed (saved {state.get(name)!r}, now {value!r})"
            for name, value in self._identity().items()
            if state.get(name) != value
        ]
        if differences or "step" not in state:
            raise DataStateError(
                f"cannot continue at step {state.get('step')} of the saved data: "
                + "; ".join(differences or ["it has no step"])
            )
        self.step = int(state["step"])

    def _identity(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.config) | {"seed": int(self.seed)}
        return {k: v for k, v in settings.items() if k not in self.EVALUATION_SETTINGS}

    def close(self) -> None:
        """Nothing to stop: batches are built when they are asked for."""
