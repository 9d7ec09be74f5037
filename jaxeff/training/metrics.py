"""Metrics between the device and the host: read back in groups, checked, averaged, observed."""

from __future__ import annotations

import math
from typing import Any

import jax

from jaxeff.training.controllers import Controller, Plan


class NonFiniteError(FloatingPointError):
    """A metric became NaN or infinite.

    Attributes:
      step: the step (0-based) whose metric it was.
      metric: its name.
    """

    def __init__(self, step: int, metric: str, value: float):
        super().__init__(
            f"{metric} is {value} at step {step}; training ended, and the last checkpoint is from "
            "before it. Lower optimizer.learning_rate or optimizer.max_grad_norm, or set "
            "training.stop_on_nonfinite=False to go on regardless"
        )
        self.step = step
        self.metric = metric


class MetricsBuffer:
    """Collects device metrics step by step without stalling the device.

    Args:
      controller: observes every step, in order, when metrics are read back.
      stop_on_nonfinite: raise ``NonFiniteError`` for the first step with a metric that is not
        finite.
    """

    def __init__(self, controller: Controller, stop_on_nonfinite: bool):
        self._controller = controller
        self._stop = stop_on_nonfinite
        self._waiting: list[tuple[int, dict[str, jax.Array], Plan]] = []
        self._read: list[dict[str, float]] = []

    @property
    def num_waiting(self) -> int:
        """Steps whose metrics are still on the device."""
        return len(self._waiting)

    def add(self, step: int, metrics: dict[str, jax.Array], plan: Plan) -> None:
        """Adds the metrics of one step, still being computed."""
        self._waiting.append((step, metrics, plan))

    def read_back(self) -> None:
        """Fetches what is waiting, checks it, and lets the controller observe it."""
        waiting, self._waiting = self._waiting, []
        fetched = jax.device_get([metrics for _, metrics, _ in waiting])
        for (step, _, plan), metrics in zip(waiting, fetched):
            values = {name: float(v) for name, v in metrics.items()}
            self._check(step, values)
            self._controller.observe(step, values)
            self._read.append(values | _scalars(plan))

    def _check(self, step: int, values: dict[str, float]) -> None:
        if not self._stop:
            return
        # The loss first: when it is not finite, neither is what was computed from it.
        for name, value in sorted(values.items(), key=lambda item: item[0] != "loss"):
            if not math.isfinite(value):
                raise NonFiniteError(step, name, value)

    def summary(self) -> tuple[dict[str, float], float]:
        """Returns the metrics since the last summary, and the sum of their weights.

        The task's metrics are means weighted by the amount of data; what the controller planned is
        given as of the last step.
        """
        read, self._read = self._read, []
        total = sum(values["weight"] for values in read)
        result = {}
        for name in read[-1]:
            if name == "weight":
                continue
            if name == "learning_rate" or total == 0:
                result[name] = read[-1][name]
            else:
                result[name] = sum(v[name] * v["weight"] for v in read if name in v) / total
        return result, total


def _scalars(plan: Plan) -> dict[str, Any]:
    return {name: float(v) for name, v in plan.dynamic.items() if getattr(v, "ndim", 0) == 0}
