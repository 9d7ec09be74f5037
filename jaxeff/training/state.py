"""The state of a run: everything a step reads and writes, as one pytree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


class TrainState(struct.PyTreeNode):
    """Parameters, optimiser state and what else changes from step to step.

    Attributes:
      step: int32 scalar, optimiser steps done.
      params: trained parameters.
      opt_state: optax state.
      extra: the task's non-trained state (statistics, caches), possibly empty.
      ema: exponential moving averages of ``params``, keyed by their rate written as text.
      rng: uint32 key data of the run's seed; the key of a step is ``fold_in(rng, step)``.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any
    ema: dict[str, Any]
    rng: jax.Array

    @classmethod
    def create(
        cls,
        params: Any,
        extra: Any,
        optimizer: optax.GradientTransformation,
        seed: int,
        ema_rates: tuple[float, ...] = (),
    ) -> TrainState:
        """Returns the state before the first step."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            extra=extra,
            # A copy, since donation forbids two leaves of the state to share a buffer.
            ema={str(rate): jax.tree.map(jnp.copy, params) for rate in ema_rates},
            rng=jax.random.key_data(jax.random.key(seed)),
        )

    def step_key(self) -> jax.Array:
        """Returns the key of the current step, a function of seed and step alone."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.rng), self.step)
