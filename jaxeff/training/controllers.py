"""Steering a run from the host: one protocol for schedules, depths, shapes, ranks and layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a controller wants of the next step.

    Attributes:
      static: hashable; part of the program (shapes, depths). A new value compiles a new step.
      dynamic: traced scalars and arrays (learning rate, ranks, tables), ``learning_rate`` among
        them. Their shapes and dtypes must stay the same while ``static`` does.
    """

    static: Hashable = ()
    dynamic: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Controller(Protocol):
    """Proposes a plan for each step and learns from the metrics of the steps that ran.

    ``observe`` is called once for every step, in order, with host floats. The loop reads metrics
    back in groups so as not to stall the device; ``observe_every`` is the largest group the
    controller can accept (1: every step is observed before the next is proposed; None: whenever
    the loop logs, evaluates or saves).
    """

    observe_every: int | None

    def propose(self, step: int) -> Plan: ...
    def observe(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class ScheduleController:
    """The default controller: an optax schedule for the learning rate, and nothing else.

    Args:
      schedule: maps a step to a learning rate.
    """

    observe_every: int | None = None

    def __init__(self, schedule: optax.Schedule):
        self._schedule = schedule
        self._cpu = jax.local_devices(backend="cpu")[0]
        self._jitted = jax.jit(schedule)

    def propose(self, step: int) -> Plan:
        # On the CPU: a schedule is a few scalar operations, not worth a trip to an accelerator.
        with jax.default_device(self._cpu):
            rate = np.float32(self._jitted(np.int32(step)))
        return Plan(dynamic={"learning_rate": rate})

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """A fixed schedule learns nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(
                f"a ScheduleController has no state, but the checkpoint holds {sorted(state)}; "
                "was the run started with another controller?"
            )
