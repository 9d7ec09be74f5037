"""Gradients before they are reduced over replicas, for techniques that compress what travels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxeff.training.mesh import axis_size


def per_replica_gradients(
    loss_fn: Callable[..., Any],
    mesh: Mesh,
    axes: str | Sequence[str] = "data",
    *,
    has_aux: bool = False,
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Returns a function that gives every replica's own gradient, with no reduction between them.

    Args:
      loss_fn: ``loss_fn(params, batch) -> loss`` (``-> (loss, aux)`` with ``has_aux``), a mean over
        the rows it is given. It is called inside ``shard_map`` on one replica's rows.
      mesh: the mesh; axes other than ``axes`` must not split the parameters.
      axes: the mesh axes whose positions count as replicas.
      has_aux: whether ``loss_fn`` also returns auxiliary outputs.

    Returns:
      ``grads_fn(params, batch) -> (value, grads)``. Every leaf of both has a leading axis of
      length ``axis_size(mesh, axes)``, sharded over ``axes``: replica ``r``'s gradient lies on
      replica ``r``'s devices. The mean over that axis is the gradient that data-parallel training
      would have used (when replicas hold equally many rows).

    Raises:
      ValueError: when the rows of the batch cannot be divided over the replicas.
    """
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    replicas = axis_size(mesh, axes)

    def local(params, batch):
        # Marking the parameters as differing between replicas keeps the transpose of the
        # broadcast, a sum over replicas, out of the gradient.
        params = jax.tree.map(lambda p: jax.lax.pcast(p, axes, to="varying"), params)
        value, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(params, batch)
        return jax.tree.map(lambda x: x[None], (value, grads))

    def grads_fn(params, batch):
        for leaf in jax.tree.leaves(batch):
            if leaf.shape[0] % replicas:
                raise ValueError(
                    f"batch of {leaf.shape[0]} rows is not divisible over {replicas} replicas "
                    f"(mesh axes {axes})"
                )
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(axes)),
            out_specs=PartitionSpec(axes),
            axis_names=set(axes),
        )(params, batch)

    return grads_fn
