"""The key/value cache: an explicit pytree with one length per batch row.

Keys are stored after RoPE. New keys are written at slots `lengths + arange(T)`, so that ragged
batches need no left padding: prompts are padded on the right and `roll_back` to their lengths.
A slot at or beyond `lengths` is never read.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxeff.language.config import DecoderConfig
from jaxeff.language.sharding import free_axes, mesh_axes, target_platform


@flax.struct.dataclass
class KVCache:
    """Keys and values of every layer.

    Attributes:
      k, v: (num_layers, batch, capacity, num_kv_heads, head_dim).
      lengths: (batch,) int32, slots in use; it keeps counting past the capacity, where writes are
        dropped, so that an overflow shows.
    """

    k: jax.Array
    v: jax.Array
    lengths: jax.Array

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self.k.shape[2]

    @property
    def overflow(self) -> jax.Array:
        """(batch,) bool: rows that were given more tokens than the cache can hold."""
        return self.lengths > self.capacity


class CachedKeys(NamedTuple):
    """One layer's view of the cache, as attention takes it."""

    k: jax.Array  # (batch, capacity, num_kv_heads, head_dim)
    v: jax.Array
    lengths: jax.Array  # (batch,)


def init_cache(cfg: DecoderConfig, batch: int, capacity: int, dtype=None) -> KVCache:
    """An empty cache; `dtype` defaults to the config's compute dtype.

    Raises:
      ValueError: if batch or capacity is less than 1.
    """
    for name, value in (("batch", batch), ("capacity", capacity)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    shape = (cfg.num_layers, batch, capacity, cfg.num_kv_heads, cfg.resolved_head_dim)
    dtype = dtype or cfg.dtype
    return KVCache(
        k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), lengths=jnp.zeros(batch, jnp.int32)
    )


def check_room(cache: KVCache, num_tokens: int) -> None:
    """Refuse a write that cannot fit.

    Raises:
      ValueError: if `num_tokens` exceeds the capacity, or, when the lengths are concrete (outside
        jit), the room left in some row. Under jit the write is dropped and `overflow` is set.
    """
    if num_tokens > cache.capacity:
        raise ValueError(f"{num_tokens} new tokens exceed the cache's capacity={cache.capacity}")
    if isinstance(cache.lengths, jax.core.Tracer):
        return
    if isinstance(cache.lengths, jax.Array) and not cache.lengths.is_fully_addressable:
        return
    longest = int(np.asarray(cache.lengths).max())
    if longest + num_tokens > cache.capacity:
        raise ValueError(
            f"{num_tokens} new tokens after length {longest} exceed the cache's "
            f"capacity={cache.capacity}"
        )


def write(cache: KVCache, k: jax.Array, v: jax.Array) -> KVCache:
    """Append keys and values (num_layers, batch, T, num_kv_heads, head_dim) to every row.

    Raises:
      ValueError: see `check_room`.
    """
    num_tokens = k.shape[2]
    check_room(cache, num_tokens)
    place = _write_by_slices if target_platform() == "tpu" else _write_by_scatter
    k, v = place((cache.k, cache.v), (k, v), cache.lengths)
    return KVCache(k, v, cache.lengths + num_tokens)


def _write_by_scatter(old, new, lengths):
    slots = lengths[:, None] + jnp.arange(new[0].shape[2])  # (batch, T)
    rows = jnp.arange(slots.shape[0])[:, None]

    def scatter(old, new):
        new = new.astype(old.dtype)
        return old.at[:, rows, slots].set(new, mode="drop", unique_indices=True)

    return jax.tree.map(scatter, old, new)


def _write_by_slices(old, new, lengths):
    """One slice update for each row, in place.

    A scatter makes XLA:TPU store the cache with the layers innermost, and then copy every layer's
    keys at every decoding step.
    """
    batch = mesh_axes("act_batch", lengths.shape[0])
    heads = mesh_axes("act_kv_heads", new[0].shape[3])
    if not (batch or heads):
        return _update_rows(old, new, lengths)
    spec = PartitionSpec(None, batch or None, None, heads or None)
    return jax.shard_map(
        _update_rows,
        in_specs=(spec, spec, PartitionSpec(batch or None)),
        out_specs=spec,
        axis_names=set(free_axes()),
    )(old, new, lengths)


def _update_rows(old, new, lengths):
    num_tokens, capacity = new[0].shape[2], old[0].shape[2]

    def update_row(row, caches):
        # A slice update past the end would be moved back over older keys, so move it here, and
        # keep what is there in its first slots.
        start = jnp.minimum(lengths[row], capacity - num_tokens)
        token = start + jnp.arange(num_tokens) - lengths[row]
        real = (token >= 0)[None, None, :, None, None]

        def update(cached, new):
            new = jax.lax.dynamic_slice_in_dim(new, row, 1, axis=1).astype(cached.dtype)
            if num_tokens > 1:
                new = jnp.take(new, jnp.maximum(token, 0), axis=2)
            at = (0, row, start, 0, 0)
            kept = jax.lax.dynamic_slice(cached, at, new.shape)
            return jax.lax.dynamic_update_slice(cached, jnp.where(real, new, kept), at)

        return jax.tree.map(update, caches, new)

    return jax.lax.fori_loop(0, lengths.shape[0], update_row, old)


def roll_back(cache: KVCache, lengths: jax.Array) -> KVCache:
    """Forget everything from slot `lengths` (batch,) on; longer lengths change nothing."""
    return cache.replace(lengths=jnp.minimum(cache.lengths, jnp.asarray(lengths, jnp.int32)))


def compact(
    cache: KVCache, start: jax.Array, accepted: jax.Array, num_accepted: jax.Array
) -> KVCache:
    """Keep only chosen slots of a span, moved to its front (after tree verification).

    Args:
      cache: the cache.
      start: (batch,) int32, first slot of the span, such as the lengths before the span's write.
      accepted: (batch, N) int32, offsets from `start` of the slots to keep, in their new order.
      num_accepted: (batch,) int32, how many of the N are real; lengths become start + num_accepted.
    """
    steps = jnp.arange(accepted.shape[1])
    rows = jnp.arange(accepted.shape[0])[:, None]
    sources = jnp.minimum(start[:, None] + accepted, cache.capacity - 1)
    real = steps < num_accepted[:, None]
    targets = jnp.where(real, start[:, None] + steps, cache.capacity)  # out of bounds: dropped

    def move(x):
        return x.at[:, rows, targets].set(x[:, rows, sources], mode="drop")

    lengths = (start + num_accepted).astype(jnp.int32)
    return KVCache(move(cache.k), move(cache.v), lengths)


def slice_span(cache: KVCache, start: int, stop: int) -> KVCache:
    """Slots start..stop-1 of every row as a cache of their own (copied, positions unchanged).

    Raises:
      ValueError: if the span is empty or reaches outside the capacity.
    """
    if not 0 <= start < stop <= cache.capacity:
        raise ValueError(f"span {start}..{stop} must lie in 0..{cache.capacity} and not be empty")
    lengths = jnp.clip(cache.lengths - start, 0, stop - start)
    return KVCache(cache.k[:, :, start:stop], cache.v[:, :, start:stop], lengths)


def concat_spans(spans: list[KVCache], capacity: int | None = None) -> KVCache:
    """Lay the used slots of several caches behind one another, row by row.

    The keys keep the positions they were rotated to: move them with `rope.rerotate` first.
    `capacity` defaults to the sum of the capacities.

    Raises:
      ValueError: for no spans, or a capacity that is smaller than that sum.
    """
    if not spans:
        raise ValueError("spans is empty, expected at least one cache")
    total = sum(span.capacity for span in spans)
    capacity = total if capacity is None else capacity
    if capacity < total:
        raise ValueError(f"capacity={capacity} is smaller than the spans' {total} slots")
    first = spans[0]
    shape = (*first.k.shape[:2], capacity, *first.k.shape[3:])
    k, v = jnp.zeros(shape, first.k.dtype), jnp.zeros(shape, first.v.dtype)
    lengths = jnp.zeros_like(first.lengths)
    rows = jnp.arange(shape[1])[:, None]
    for span in spans:
        steps = jnp.arange(span.capacity)
        used = steps < span.lengths[:, None]
        slots = jnp.where(used, lengths[:, None] + steps, capacity)
        k = k.at[:, rows, slots].set(span.k.astype(k.dtype), mode="drop")
        v = v.at[:, rows, slots].set(span.v.astype(v.dtype), mode="drop")
        lengths = lengths + jnp.minimum(span.lengths, span.capacity)
    return KVCache(k, v, lengths)
