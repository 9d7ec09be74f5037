"""The device mesh, and how logical axis names become shardings.

The mesh always has the five axes ``(data, fsdp, expert, context, tensor)``, of size 1 where unused,
so that a partition spec never depends on the machine. Models name the axes of their parameters and
activations ("embed", "heads", "act_batch", ...); one table of rules maps names to mesh axes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxeff.training.config import ConfigError, MeshConfig
from jaxeff.trees import unbox

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

DEFAULT_RULES: Rules = (
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("expert", "expert"),
    ("layers", None),
    ("head_dim", None),
    ("norm", None),
    ("act_batch", BATCH_AXES),
    ("act_seq", "context"),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_kv_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
    ("act_expert", "expert"),
)

# Too few of these to go round is normal (grouped-query attention): they are copied instead.
REPLICABLE = ("kv_heads", "act_kv_heads")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Returns the sizes of the five axes, with -1 filled in.

    Raises:
      ConfigError: when the sizes do not multiply to ``num_devices``.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if num_devices % known:
            raise ConfigError(
                f"mesh {dict(zip(AXES, sizes))}: {num_devices} devices cannot be divided by the "
                f"fixed axes (product {known})"
            )
        sizes[sizes.index(-1)] = num_devices // known
    if math.prod(sizes) != num_devices:
        raise ConfigError(
            f"mesh {dict(zip(AXES, sizes))} needs {math.prod(sizes)} devices; there are "
            f"{num_devices}. Set one axis to -1 to use them all"
        )
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of ``config`` over ``devices`` (default: all devices of all processes).

    On TPU slices the devices are laid out so that neighbouring mesh positions are neighbouring
    chips, where the mesh allows it: an axis may have to share a dimension of the torus with another
    (16 x 4 on a torus of 8 x 8).
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(devices))
    layout = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    return Mesh(layout, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fit_rules(
    mesh: Mesh, logical_sizes: Mapping[str, int] | None = None, rules: Rules = DEFAULT_RULES
) -> Rules:
    """Returns ``rules`` adapted to the mesh, after checking that axis sizes divide.

    Args:
      mesh: the mesh of the run.
      logical_sizes: number of units along a logical axis (heads, experts, ...): a mesh axis must
        divide it, which the shape of a flattened parameter alone would not show.
      rules: logical axis to mesh axis or axes.

    Raises:
      ConfigError: when a mesh axis does not divide a logical axis, naming both. Key/value heads
        are replicated instead, and the log says so.
    """
    sizes = dict(logical_sizes or {})
    sizes |= {f"act_{name}": size for name, size in sizes.items()}
    fitted = []
    for name, axes in rules:
        ways = axis_size(mesh, axes)
        if name in sizes and sizes[name] % ways:
            if name not in REPLICABLE:
                raise ConfigError(
                    f"mesh axis {axes!r} has size {ways}, which does not divide the {sizes[name]} "
                    f"units of model axis {name!r}"
                )
            if not name.startswith("act_"):
                log.warning(
                    "%d %s do not divide over mesh axis %s of size %d: they are replicated",
                    sizes[name], name, axes, ways,
                )  # fmt: skip
            axes = None
        fitted.append((name, axes))
    return tuple(fitted)


def axis_size(mesh: Mesh, axes: str | Sequence[str] | None) -> int:
    """Returns the number of devices along one mesh axis, or the product over several."""
    if axes is None:
        return 1
    names = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
    """Makes mesh and rules current, for tracing and running sharded functions."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def param_shardings(boxed: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Returns a ``NamedSharding`` for every parameter.

    Args:
      boxed: abstract parameters as ``init`` returns them: leaves boxed with logical axis names,
        or plain (then replicated).
      mesh: the mesh.
      rules: logical axis to mesh axes.

    Raises:
      ConfigError: when a mesh axis does not divide a dimension, naming both.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), rules)
    shapes = unbox(boxed)

    def to_sharding(path, leaf, spec):
        spec = spec if isinstance(spec, PartitionSpec) else PartitionSpec()
        for size, axes in zip(leaf.shape, spec):
            if size % axis_size(mesh, axes):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ConfigError(
                    f"mesh axis {axes!r} has size {axis_size(mesh, axes)}, which does not divide "
                    f"dimension {size} of parameter {name} {tuple(leaf.shape)}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(to_sharding, shapes, specs)


def state_shardings(abstract_state: Any, params: Any, mesh: Mesh) -> Any:
    """Returns shardings for a whole ``TrainState``.

    A leaf of the state (moments, averages) that has the path and the shape of a parameter is
    sharded like it; everything else is replicated.

    Args:
      abstract_state: the state as ``jax.ShapeDtypeStruct``.
      params: the parameters' shardings.
      mesh: the mesh.
    """
    known = {
        _names(path): sharding for path, sharding in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    shapes = {
        _names(path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_state.params)[0]
    }
    longest = max((len(names) for names in known), default=0)
    replicated = NamedSharding(mesh, PartitionSpec())

    def find(path, leaf):
        names = _names(path)
        for start in range(max(0, len(names) - longest), len(names)):
            suffix = names[start:]
            if suffix in known and shapes[suffix] == leaf.shape:
                return known[suffix]
        return replicated

    return jax.tree_util.tree_map_with_path(find, abstract_state)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Returns the sharding of a batch leaf: rows over the data axes, positions over ``context``."""
    if ndim == 0:
        return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, *(["context"] if ndim > 1 else [])))


@dataclasses.dataclass(frozen=True)
class MeshPlacement:
    """Puts host batches onto a mesh; each process holds the rows its devices need.

    Attributes:
      mesh: the mesh.
      shard_index: which of the ``shard_count`` equal blocks of rows this process holds.
      shard_count: number of different blocks. Processes whose devices differ only along
        ``tensor`` or ``context`` hold the same block.
    """

    mesh: Mesh
    shard_index: int
    shard_count: int

    @classmethod
    def for_batch(cls, mesh: Mesh, batch_size: int) -> MeshPlacement:
        """Returns the placement of batches of ``batch_size`` rows.

        Raises:
          ConfigError: when the data axes do not divide the batch.
        """
        ways = axis_size(mesh, BATCH_AXES)
        if batch_size % ways:
            raise ConfigError(
                f"batch size {batch_size} is not divisible by the mesh axes {BATCH_AXES} "
                f"(product {ways})"
            )
        indices = batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,))
        rows = sorted({index[0].indices(batch_size)[:2] for index in indices.values()})
        first, last = rows[0][0], rows[-1][1]
        block = sum(stop - start for start, stop in rows)
        if block != last - first or first % block:
            raise ConfigError(
                f"the rows of process {jax.process_index()} are not one block of the batch: {rows};"
                " order the mesh axes so that each process holds neighbouring data shards"
            )
        return cls(mesh, first // block, batch_size // block)

    def __call__(self, batch: Any) -> Any:
        """Returns global arrays made of every process's rows."""
        return jax.tree.map(self._place, batch)

    def _place(self, rows: np.ndarray) -> jax.Array:
        rows = np.asarray(rows)
        sharding = batch_sharding(self.mesh, rows.ndim)
        if rows.ndim == 0:
            return jax.device_put(rows, sharding)
        shape = (rows.shape[0] * self.shard_count, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)
