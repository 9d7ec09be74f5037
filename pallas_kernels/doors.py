"""What the public functions of all operations share: which implementation, and how it is called.

A kernel's own code sees one flat batch on one device. `over_batch` makes of it a function that can
be vmapped and whose batch may be sharded over a mesh.
"""

import importlib.util
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, PartitionSpec

KERNEL_OF_PLATFORM = {"tpu": "mosaic_tpu", "gpu": "triton"}
CHANNEL_AXES = ("tensor",)  # the usual name of the mesh axis that splits channels
COMPUTE_CAPABILITIES = {"A100": 80, "H100": 90, "H200": 90, "B200": 100}


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
        served = kernel in refusals and not _partitioned_unseen() and not refusals[kernel]()
        return kernel if served else "xla"
    if implementation not in refusals:
        names = ", ".join(map(repr, (None, *refusals)))
        raise ValueError(f"implementation={implementation!r} is not one of {names}")
    if reason := refusals[implementation]():
        raise NotImplementedError(
            f"implementation={implementation!r} cannot serve this call: {reason}"
        )
    return implementation


def _partitioned_unseen() -> bool:
    """Whether the compiler might have to partition the program over devices we know nothing of.

    It cannot partition a kernel, and without a mesh we cannot do it ourselves.
    """
    return jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1


def not_on_platform(platform: str) -> str | None:
    """Returns why a kernel for `platform` cannot be part of the program being traced, if so."""
    if target_platform() == platform:
        return None
    return f"it runs on {platform.upper()}, and this program is traced for {target_platform()}"


def triton_refusal() -> str | None:
    """Returns why no Triton kernel can be part of the program being traced, if so."""
    if importlib.util.find_spec("jax_triton") is None:
        return "it needs jax-triton, which is not installed"
    return not_on_platform("gpu")


def compute_capability() -> int | None:
    """Compute capability of the GPU the program is traced for, times ten.

    None where the GPU is there: then jax-triton asks it. Compiling for one that is not there, the
    name of the mesh's devices tells.

    Raises:
      NotImplementedError: for a GPU that is neither there nor known by name.
    """
    if jax.default_backend() in ("gpu", "cuda"):
        return None
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else "no GPU"
    for name, capability in COMPUTE_CAPABILITIES.items():
        if name in kind:
            return capability
    known = ", ".join(COMPUTE_CAPABILITIES)
    raise NotImplementedError(f"cannot compile a Triton kernel for {kind!r}; known are {known}")


def over_batch(fn: Callable[..., Any], *, channel_axes: Collection[str] = ()) -> Callable[..., Any]:
    """Makes a kernel's function batchable and shardable.

    Args:
      fn: of arrays whose first axis is the batch, to one array or a tuple of arrays whose first
        axis is the batch.
      channel_axes: names of mesh axes; to name any says that the last axis of all operands and
        results is one of channels that do not depend on one another.

    Returns:
      the same function. A vmapped axis becomes part of the batch. Under `jax.set_mesh` every mesh
      axis that no enclosing `shard_map` has taken splits the channels if it is one of
      `channel_axes` and divides them, else the batch if it divides that: a kernel cannot be
      partitioned by the compiler. An axis that divides neither repeats the work.
    """

    @custom_vmap
    def batched(*operands):
        return _over_mesh(fn, operands, channel_axes)

    @batched.def_vmap
    def _(axis_size, in_batched, *operands):
        whole = [
            x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, is_batched in zip(operands, in_batched, strict=True)
        ]
        folded = batched(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        apart = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), folded)
        return apart, jax.tree.map(lambda _: True, folded)

    return batched


def _over_mesh(fn, operands, channel_axes):
    sizes = free_axes()
    if math.prod(sizes.values()) == 1:
        return _varying_as(operands, fn(*operands))
    batch, channels = _split(sizes, operands[0].shape, channel_axes)
    in_specs, out_specs = (PartitionSpec(batch),) * len(operands), PartitionSpec(batch)
    if channels:
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands)
        in_specs, out_specs = jax.tree.map(
            lambda x: PartitionSpec(batch, *[None] * (x.ndim - 2), channels),
            (shapes, jax.eval_shape(fn, *shapes)),
        )
    results = jax.shard_map(
        fn,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(sizes),
        check_vma=False,  # a kernel does not say how its result varies
    )(*operands)
    return _varying_as(operands, results)


def _split(sizes, shape, channel_axes):
    """Which mesh axes split the batch and which the channels of an operand of this shape."""
    split: dict[str, tuple[str, ...]] = {"batch": (), "channels": ()}

    def divides(what, length, size):
        return length % (size * math.prod(sizes[name] for name in split[what])) == 0

    for name, size in sizes.items():
        if name in channel_axes and divides("channels", shape[-1], size):
            split["channels"] += (name,)
        elif divides("batch", shape[0], size):
            split["batch"] += (name,)
    return split["batch"], split["channels"]


def _varying_as(operands, results):
    """Marks what a kernel made inside a `shard_map` as varying over the axes its operands do."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))

    def mark(result):
        missing = axes - jax.typeof(result).manual_axis_type.varying
        return jax.lax.pcast(result, tuple(sorted(missing)), to="varying") if missing else result

    return jax.tree.map(mark, results)


def free_axes() -> dict[str, int]:
    """Sizes of the mesh axes that no enclosing `shard_map` has taken; empty without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: size
        for name, size, kind in zip(
            mesh.axis_names, mesh.axis_sizes, mesh.axis_types or (), strict=True
        )
        if kind != AxisType.Manual
    }
