"""One optimiser step as a pure function of state and batch; the cache of its compiled forms."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxeff.training.controllers import Plan
from jaxeff.training.state import TrainState
from jaxeff.training.task import Task

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Any, dict[str, Any]], tuple[TrainState, Metrics]]


def build_train_step(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    accumulation_steps: int = 1,
    ema_rates: tuple[float, ...] = (),
    static: Hashable = (),
) -> TrainStep:
    """Returns ``step(state, batch, dynamic) -> (state, metrics)``.

    The metrics are the task's, and ``loss``, ``grad_norm`` (before clipping), ``weight`` (the
    amount of data in the batch, e.g. target tokens).

    Args:
      task: what to minimise.
      optimizer: its ``update`` receives the entries of ``dynamic`` as keyword arguments.
      accumulation_steps: micro-batches; their gradients are combined in proportion to their
        weights, so that the result is the gradient of the mean over the global batch.
      ema_rates: rates of the averages in ``state.ema``.
      static: the static half of the controller's plan.
    """

    def train_step(state: TrainState, batch: Any, dynamic: dict[str, Any]):
        planned = task
        if hasattr(task, "with_plan"):
            planned = task.with_plan(Plan(static, dynamic))

        def loss_fn(params, extra, micro_batch, key):
            return planned.loss(params, extra, micro_batch, key, state.step)

        key = state.step_key()
        if accumulation_steps == 1:
            (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.params, state.extra, batch, key
            )
            extra = state.extra if aux.extra is None else aux.extra
            weight = jnp.asarray(aux.weight, jnp.float32)
            metrics = {"loss": loss, **aux.metrics}
        else:
            grads, extra, weight, metrics = _accumulate(
                loss_fn, state, batch, key, accumulation_steps
            )
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads), "weight": weight}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **dynamic)
        params = optax.apply_updates(state.params, updates)
        ema = {
            str(rate): jax.tree.map(
                lambda average, p, r=rate: (r * average + (1 - r) * p).astype(average.dtype),
                state.ema[str(rate)],
                params,
            )
            for rate in ema_rates
        }
        state = state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, extra=extra, ema=ema
        )
        return state, {name: jnp.asarray(v, jnp.float32) for name, v in metrics.items()}

    return train_step


def _accumulate(loss_fn, state: TrainState, batch: Any, key: jax.Array, count: int):
    """Scans over micro-batches; returns the weighted means of gradients and metrics."""

    def split(x):
        if x.shape[0] % count:
            raise ValueError(
                f"batch of {x.shape[0]} rows is not divisible by accumulation_steps={count}"
            )
        # Strided rather than contiguous micro-batches: every device keeps the rows it has.
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    def body(carry, inputs):
        grads, extra, total = carry
        micro_batch, index = inputs
        (loss, aux), new_grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, extra, micro_batch, jax.random.fold_in(key, index)
        )
        weight = jnp.asarray(aux.weight, jnp.float32)
        grads = jax.tree.map(lambda a, g: a + weight * g.astype(a.dtype), grads, new_grads)
        extra = extra if aux.extra is None else aux.extra
        weighted = jax.tree.map(lambda m: weight * m, {"loss": loss, **aux.metrics})
        return (grads, extra, total + weight), weighted

    zeros = jax.tree.map(
        lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), state.params
    )
    micro_batches = jax.tree.map(split, batch)
    (grads, extra, weight), weighted = jax.lax.scan(
        body, (zeros, state.extra, jnp.float32(0)), (micro_batches, jnp.arange(count))
    )
    # A batch without any data (weight 0) has zero gradients, not 0 / 0.
    scale = 1 / jnp.maximum(weight, 1e-30)
    grads = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grads, state.params)
    return grads, extra, weight, jax.tree.map(lambda m: m.sum(0) * scale, weighted)


class CompiledSteps:
    """Compiled train steps, one for each static plan and batch shape.

    Attributes:
      num_compilations: how many times a step was compiled.
      compile_seconds: time spent on that.
    """

    def __init__(self, build: Callable[[Hashable], TrainStep], state_shardings: Any):
        self._build = build
        self._shardings = state_shardings
        self._compiled: dict[Hashable, Any] = {}
        self.num_compilations = 0
        self.compile_seconds = 0.0

    def lower(self, state: Any, batch: Any, plan: Plan) -> Any:
        """Returns the lowered step for arguments that may be abstract."""
        jitted = jax.jit(
            self._build(plan.static),
            donate_argnums=0,
            in_shardings=(self._shardings, None, None),
            out_shardings=(self._shardings, None),
        )
        return jitted.lower(state, batch, dict(plan.dynamic))

    def __call__(self, state: Any, batch: Any, plan: Plan) -> tuple[Any, Metrics]:
        """Runs the step of ``plan``, compiling it if this plan and these shapes are new."""
        shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(batch))
        signature = (plan.static, shapes)
        if signature not in self._compiled:
            started = time.perf_counter()
            self._compiled[signature] = self.lower(state, batch, plan).compile()
            self.num_compilations += 1
            self.compile_seconds += time.perf_counter() - started
        return self._compiled[signature](state, batch, dict(plan.dynamic))
