"""Many processes: starting them, and stopping them together when one gets a signal."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import threading
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxeff.training.config import ConfigError

log = logging.getLogger(__name__)


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    automatic: bool = False,
) -> None:
    """Joins the processes of a run; must be called before the first use of a device.

    Args:
      coordinator_address: ``host:port`` of process 0. Default: ``JAX_COORDINATOR_ADDRESS``.
      num_processes: how many there are. Default: ``JAX_NUM_PROCESSES``.
      process_id: which one this is. Default: ``JAX_PROCESS_ID``.
      automatic: let JAX find the three on a cluster it knows (TPU pods, SLURM, Open MPI).

    Raises:
      ConfigError: when only some of the three are given.
    """
    if automatic:
        jax.distributed.initialize()
        return
    env = os.environ
    address = coordinator_address or env.get("JAX_COORDINATOR_ADDRESS")
    count = num_processes if num_processes is not None else env.get("JAX_NUM_PROCESSES")
    index = process_id if process_id is not None else env.get("JAX_PROCESS_ID")
    given = {"coordinator_address": address, "num_processes": count, "process_id": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        return
    if missing:
        raise ConfigError(f"{', '.join(missing)} not given, but the others are: {given}")
    jax.distributed.initialize(address, int(count), int(index))


def any_process(flag: bool) -> bool:
    """Returns whether the flag is set on any process; every process must call it."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def check_same_everywhere(what: str, value: Any) -> None:
    """Checks that all processes hold the same JSON-able value; every process must call it.

    Raises:
      ConfigError: when they do not.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    different = [i for i, other in enumerate(digests) if not np.array_equal(other, digests[0])]
    if different:
        raise ConfigError(
            f"{what} of processes {different} is not that of process 0: all hosts must read the "
            "same files"
        )


class StopRequest:
    """Turns SIGTERM and Ctrl-C into a request to save and stop, while the context is open.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self):
        self._signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self):
        # Python allows signal handlers in the main thread only; elsewhere the caller keeps control.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *unused):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        del frame
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        log.warning("%s: saving and stopping", signal.Signals(number).name)

    def check(self, step: int, every: int) -> bool:
        """Returns whether to stop after this step, the same answer on all processes.

        Args:
          step: steps done.
          every: processes compare notes at multiples of this step.
        """
        if jax.process_count() == 1:
            return self._signal is not None
        return step % every == 0 and any_process(self._signal is not None)
