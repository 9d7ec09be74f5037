"""Placement of batches on the devices, ahead of their use."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def prefetch_to_device(
    iterator: Iterator[Any], place: Callable[[Any], Any], size: int = 2
) -> DevicePrefetcher:
    """Keeps ``size`` batches placed ahead of the one in use, in the background.

    Args:
      iterator: gives host batches; from now on only the returned iterator may use it. It may end.
      place: puts one batch on the devices. It runs in another thread, where context managers such
        as ``jax.set_mesh`` do not reach, so it must name its shardings.
      size: batches placed ahead; 0 places each when it is asked for.

    Returns:
      An iterator over the placed batches with ``wait_seconds`` and ``close``; with ``get_state``
      and ``set_state`` too where ``iterator`` has them. What the iterator or ``place`` raises is
      raised by the ``next()`` of that batch, and the call after it tries the same batch again
      (an iterator without a state goes on to the one after it).

    Raises:
      ValueError: ``size`` is negative.
    """
    if size < 0:
        raise ValueError(f"size is {size}; expected an integer >= 0")
    return DevicePrefetcher(iterator, place, size)


class DevicePrefetcher:
    """Places batches ahead of their use; see ``prefetch_to_device``.

    Attributes:
      wait_seconds: total time spent in ``next()``.
    """

    def __init__(self, iterator: Any, place: Callable[[Any], Any], size: int):
        self.wait_seconds = 0.0
        self._iterator = iterator
        self._place = place
        self._size = size
        self._state = self._inner_state()
        self._pending: collections.deque[Future[Any]] = collections.deque()
        # One thread, because the order of the batches is the order of its tasks.
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "jaxeff-place")
        self._submit()

    def _inner_state(self) -> Any:
        return self._iterator.get_state() if hasattr(self._iterator, "get_state") else None

    def _place_next(self) -> tuple[Any, Any]:
        batch = next(self._iterator)
        return self._place(batch), self._inner_state()

    def _submit(self) -> None:
        while len(self._pending) < self._size:
            self._pending.append(self._pool.submit(self._place_next))

    def __iter__(self) -> DevicePrefetcher:
        return self

    def __next__(self) -> Any:
        self._check_open("next()")
        started = time.perf_counter()
        try:
            batch, self._state = self._next()
        finally:
            self.wait_seconds += time.perf_counter() - started
        self._submit()
        return batch

    def _next(self) -> tuple[Any, Any]:
        if not self._pending:
            self._pending.append(self._pool.submit(self._place_next))
        try:
            result = self._pending[0].result()
        except StopIteration:
            raise
        except Exception:
            self._start_again()
            raise
        # Only now, so that an interrupt while waiting loses nothing.
        self._pending.popleft()
        return result

    def _start_again(self) -> None:
        """Goes back to the batch that failed: those behind it must not take its turn."""
        self._drain()
        if self._state is not None:
            self.set_state(self._state)

    def _check_open(self, call: str) -> None:
        if self._pool is None:
            raise ValueError(f"{call} on a data iterator that was closed")

    def get_state(self) -> Any:
        """Returns the position after the batch last *returned*, however many are placed ahead."""
        return self._state

    def set_state(self, state: Any) -> None:
        """Continues at a saved position; batches placed ahead are dropped."""
        self._check_open("set_state()")
        self._drain()
        self._iterator.set_state(state)
        self._state = self._inner_state()
        self._submit()

    def _drain(self) -> None:
        for future in self._pending:
            future.cancel()
        for future in self._pending:
            if not future.cancelled():
                future.exception()  # waits: the iterator is used by one thread at a time
        self._pending.clear()

    def close(self) -> None:
        """Joins the thread and closes the iterator; may be called twice."""
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        self._pending.clear()
        pool.shutdown(wait=True, cancel_futures=True)
        if hasattr(self._iterator, "close"):
            self._iterator.close()

    def __enter__(self) -> DevicePrefetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
