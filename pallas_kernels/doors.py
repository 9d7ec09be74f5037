"""What the public functions of all operations share: which implementation, and how it is called.

A kernel's own code sees one flat batch on one device. `over_batch` makes of it a function that can
be vmapped and whose batch may be sharded over a mesh.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

KERNEL_OF_PLATFORM = {"tpu": "mosaic_tpu", "gpu": "triton"}


def target_platform() -> str:
    """The platform the program being traced will run on: "cpu", "tpu" or "gpu".

    The mesh set with `jax.set_mesh` decides, so that compiling on a CPU host for the chips of a
    topology chooses their kernels; without a mesh it is the default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def choose_implementation(
    implementation: str | None, refusals: Mapping[str, Callable[[], str | None]]
) -> str:
    """Returns the implementation that serves a call.

    Args:
      implementation: what the caller named, or None.
      refusals: every implementation's reason not to serve this call, or None if it serves it; asked
        only where it matters.

    Raises:
      ValueError: for a name that is not in `refusals`.
      NotImplementedError: when the named implementation cannot serve the call, saying why.
    """
    if implementation is None:
        kernel = KERNEL_OF_PLATFORM.get(target_platform())
        return "xla" if kernel not in refusals or refusals[kernel]() else kernel
    if implementation not in refusals:
        names = ", ".join(map(repr, (None, *refusals)))
        raise ValueError(f"implementation={implementation!r} is not one of {names}")
    if reason := refusals[implementation]():
        raise NotImplementedError(
            f"implementation={implementation!r} cannot serve this call: {reason}"
        )
    return implementation


def not_on_platform(platform: str) -> str | None:
    """Returns why a kernel for `platform` cannot be part of the program being traced, if so."""
    if target_platform() == platform:
        return None
    return f"it runs on {platform.upper()}, and this program is traced for {target_platform()}"


def over_batch(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Makes a kernel's function batchable and shardable along the first axis.

    Args:
      fn: of arrays whose first axis is the batch, to one array whose first axis is the batch.

    Returns:
      the same function. A vmapped axis becomes part of the batch; where the batch is sharded over a
      mesh, every device runs `fn` on its own part, and all other axes are gathered.
    """
    sharded = _shardable(fn)

    @custom_vmap
    def batched(*operands):
        return sharded(*operands)

    @batched.def_vmap
    def _(axis_size, in_batched, *operands):
        whole = [
            x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, is_batched in zip(operands, in_batched, strict=True)
        ]
        folded = batched(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        return folded.reshape(axis_size, -1, *folded.shape[1:]), True

    return batched


def _shardable(fn):
    # custom_partitioning takes no keywords, and a partial function has some.
    partitioned = custom_partitioning(lambda *operands: fn(*operands))

    def batch_axes(operands):
        spec = getattr(operands[0].sharding, "spec", None) or (None,)
        return spec[0]

    def result_sharding(mesh, operands, result):
        return NamedSharding(mesh, PartitionSpec(batch_axes(operands)))

    def partition(mesh, operands, result):
        axes = batch_axes(operands)
        shards = _shards(mesh, axes)
        if operands[0].shape[0] % shards:
            axes = None
        whole = NamedSharding(mesh, PartitionSpec(axes))
        return mesh, fn, whole, (whole,) * len(operands)

    def rule(mesh, operand_types, result_types):
        del mesh
        names = iter(f"f{i}" for i in range(1000))

        def axes(value):
            return " ".join(["batch", *(next(names) for _ in value.shape[1:])])

        inputs = ", ".join(axes(value) for value in operand_types)
        return f"{inputs} -> {', '.join(axes(value) for value in result_types)}"

    partitioned.def_partition(
        partition=partition, infer_sharding_from_operands=result_sharding, sharding_rule=rule
    )
    return partitioned


def _shards(mesh, axes) -> int:
    names = (axes,) if isinstance(axes, str) else tuple(axes or ())
    return math.prod(mesh.shape[name] for name in names)
