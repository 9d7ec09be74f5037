"""What the loop needs to know of a task: how to start, what to minimise, how to evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from flax import struct

Params = Any
Extra = Any
Batch = Any


class Aux(struct.PyTreeNode):
    """What a loss returns beside its value.

    Attributes:
      weight: float32 scalar: the amount of data the loss is a mean over (for a language model the
        number of unmasked target tokens). Micro-batches are combined in proportion to it, so
        the result is the mean over the whole global batch whatever the split.
      metrics: float scalars, means over the same weight.
      extra: the new non-trained state; None leaves it as it was.
    """

    weight: jax.Array | float = 1.0
    metrics: Mapping[str, jax.Array] = struct.field(default_factory=dict)
    extra: Extra = None


class BatchIterator(Protocol):
    """An endless iterator over host batches whose position can be saved and restored.

    ``wait_seconds`` is the total time ``__next__`` has spent waiting for data.
    """

    wait_seconds: float

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class Placement(Protocol):
    """Puts a host batch onto the mesh, and says which rows of the global batch this host holds."""

    shard_index: int
    shard_count: int

    def __call__(self, batch: Batch) -> Batch: ...


@runtime_checkable
class Task(Protocol):
    """One kind of run. The loop calls these and knows nothing else of models or data.

    A task may also define

    * ``with_plan(plan) -> Task``: a task that uses a controller's plan (static shapes and depths,
      traced rates and tables); called while the step is traced;
    * ``param_labels(params) -> tree``: a label for each parameter, for optimisers that treat
      groups of parameters differently;
    * ``final_transform() -> optax.GradientTransformationExtraArgs or None``: what changes the
      optimiser's updates last, after learning rate and weight decay, such as a bound that
      parameters must keep;
    * ``logical_sizes() -> dict``: sizes of logical axes that a mesh axis must divide;
    * ``flops_per_step() -> float``: model flops of one step, for model flops utilisation;
    * ``initial_params(shardings) -> params or None``: parameters a new run starts from instead of
      those of ``init``, already on their shardings (fine-tuning);
    * ``report(params, evaluation) -> str``: a closing text, such as a sample.
    """

    def batch_spec(self) -> Any:
        """Returns the global training batch as a tree of ``jax.ShapeDtypeStruct``."""
        ...

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        """Returns parameters (boxed with logical axis names, or plain) and non-trained state."""
        ...

    def loss(
        self, params: Params, extra: Extra, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Returns the mean loss over the batch (float32 scalar) and its ``Aux``."""
        ...

    def train_iterator(self, shard_index: int, shard_count: int) -> BatchIterator:
        """Returns this host's part of the training data."""
        ...

    def evaluate(self, params: Params, extra: Extra, place: Placement) -> dict[str, float]:
        """Returns evaluation metrics; runs on the host, on every process alike."""
        ...
