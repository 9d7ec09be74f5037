"""Attention of the decoder, through one door.

`attention` is grouped-query attention (arXiv 2305.13245) with a float32 softmax. Repeated keys and
values are never materialised. Three implementations:

* "xla": plain jnp, every kind of call; the definition.
* "mosaic_tpu": JAX's splash attention kernel, for whole sequences without a cache.
* "cudnn": cuDNN's fused attention on NVIDIA GPUs, for whole sequences without a cache.

None takes the kernel of the platform the program is traced for (`sharding.target_platform`: the
chips of the mesh set with `jax.set_mesh`, else the default backend) where the kernel serves the
call, and "xla" otherwise.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import NamedSharding, PartitionSpec

from jaxeff.language.cache import CachedKeys
from jaxeff.language.config import ATTENTION_IMPLEMENTATIONS
from jaxeff.language.sharding import axis_product, free_axes, mesh_axes, target_platform

MASKED = -1e30  # finite, so that a fully masked row stays free of NaN
LANES = 128


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
    cache: CachedKeys | None = None,
    sliding_window: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(q k^T scale + mask) v, causal.

    Args:
      q: (B, T, H, D) queries.
      k, v: (B, T, K, D) keys and values of the same tokens, H a multiple of K.
      positions: (B or 1, T) integers; a query sees new keys at its own and smaller positions, and
        cached slots up to its own position. None: the order of the tokens (behind the cache).
        With `segment_ids` the positions must rise within a segment, as packing makes them: the
        kernels rely on it.
      segment_ids: (B, T) integers, not with a cache; tokens of different segments are hidden from
        one another.
      mask: (B, T, T) bool, True where query i sees new key j, in place of causality between the
        new tokens (tree verification).
      cache: keys and values of earlier tokens, slots at and beyond its lengths are not seen.
      sliding_window: W, a query at position p sees positions above p - W only.
      scale: None takes 1 / sqrt(D).
      implementation: None | "xla" | "mosaic_tpu" | "cudnn".

    Returns:
      (B, T, H, D) in q's dtype; zeros for a query that sees nothing.

    Raises:
      ValueError: for shapes that do not fit one another, or an unknown implementation.
      NotImplementedError: if a named implementation cannot serve the call, with the reason.
    """
    _check(q, k, v, positions, segment_ids, mask, cache, implementation)
    whole = {"segment_ids": segment_ids, "sliding_window": sliding_window}
    whole["scale"] = q.shape[-1] ** -0.5 if scale is None else scale
    irregular = _irregular(positions, segment_ids, mask, cache)
    if implementation is None:
        implementation = _kernel_of_platform(q, k, irregular, **whole)
    elif reason := _UNSERVED[implementation](q, k, irregular, **whole):
        raise NotImplementedError(
            f"implementation={implementation!r} cannot serve this call: {reason}"
        )
    if implementation == "mosaic_tpu":
        return splash_attention(q, k, v, **whole)
    if implementation == "cudnn":
        out = _cudnn_attention(q, k, v, **whole)
    else:
        out = _xla_attention(q, k, v, positions=positions, mask=mask, cache=cache, **whole)
    return checkpoint_name(out, "attn_out")


def _check(q, k, v, positions, segment_ids, mask, cache, implementation):
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        allowed = ", ".join(map(repr, ATTENTION_IMPLEMENTATIONS))
        raise ValueError(f"implementation={implementation!r} is not one of {allowed}")
    batch, length, heads, head_dim = q.shape
    if k.shape != v.shape or k.shape[:2] != (batch, length) or k.shape[3] != head_dim:
        raise ValueError(f"k {k.shape} and v {v.shape} do not fit q {q.shape}")
    if heads % k.shape[2]:
        raise ValueError(f"{heads} query heads are not a multiple of {k.shape[2]} kv heads")
    if positions is not None and positions.shape not in ((batch, length), (1, length)):
        raise ValueError(f"positions {positions.shape} must be {(batch, length)}")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids {segment_ids.shape} must be {(batch, length)}")
    if mask is not None and mask.shape != (batch, length, length):
        raise ValueError(f"mask {mask.shape} must be {(batch, length, length)}")
    if cache is not None and segment_ids is not None:
        raise ValueError("segment_ids cannot go with a cache: cached keys carry no segment")
    if cache is not None and (cache.k.shape[0], *cache.k.shape[2:]) != (batch, *k.shape[2:]):
        raise ValueError(f"cache.k {cache.k.shape} does not fit k {k.shape}")


def _irregular(positions, segment_ids, mask, cache) -> str | None:
    """Why the call is not plain causal attention over whole sequences in order, if it is not."""
    if cache is not None:
        return "it has a cache"
    if mask is not None:
        return "it has a mask"
    if positions is not None and segment_ids is None:
        return "it has positions without segment_ids, so their order is not known"
    return None


def _kernel_of_platform(q, k, irregular, **whole) -> str:
    kernel = {"tpu": "mosaic_tpu", "gpu": "cudnn"}.get(target_platform())
    if kernel is None or _UNSERVED[kernel](q, k, irregular, **whole):
        return "xla"
    return kernel


# --- xla ------------------------------------------------------------------------------------------


def _xla_attention(q, k, v, *, positions, segment_ids, mask, cache, sliding_window, scale):
    length = q.shape[1]
    order = jnp.arange(length)[None]
    if positions is None:
        positions = order if cache is None else cache.lengths[:, None] + order
    seen = mask if mask is not None else positions[:, :, None] >= positions[:, None, :]
    if segment_ids is not None:
        seen &= segment_ids[:, :, None] == segment_ids[:, None, :]
    if sliding_window is not None:
        seen &= positions[:, :, None] - positions[:, None, :] < sliding_window
    parts = [(k, v, seen)]
    if cache is not None:
        parts.append((cache.k, cache.v, _seen_slots(positions, cache, sliding_window)))
    return _softmax_over(q, parts, scale)


def _seen_slots(positions, cache, sliding_window):
    """(B, T, S) bool: a cached slot is its own position."""
    slots = jnp.arange(cache.k.shape[1])
    seen = (slots < cache.lengths[:, None])[:, None] & (slots <= positions[:, :, None])
    if sliding_window is not None:
        seen &= positions[:, :, None] - slots < sliding_window
    return seen


def _softmax_over(q, parts, scale):
    """One softmax over several sets of keys, without joining them in memory.

    Batch and kv heads are moved to the front and the queries of a group are folded together, so
    that every product is a plain batched matmul (on CPU 2.7 times faster than leaving it to XLA).
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = parts[0][0].shape[2]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    logits = [_logits(q, k, seen, scale) for k, _, seen in parts]
    peaks = [jnp.max(part, axis=-1, keepdims=True) for part in logits]
    # Above MASKED, so that exp(MASKED - peak) is 0 even in a row that sees nothing.
    peak = jax.lax.stop_gradient(functools.reduce(jnp.maximum, peaks, MASKED / 2))
    weights = [jnp.exp(part - peak) for part in logits]
    total = sum(jnp.sum(part, axis=-1, keepdims=True) for part in weights)
    out = sum(
        jnp.einsum(
            "bkqs,bksd->bkqd",
            part.astype(v.dtype),
            jnp.swapaxes(v, 1, 2),
            preferred_element_type=jnp.float32,
        )
        for part, (_, v, _) in zip(weights, parts, strict=True)
    )
    out = (out / jnp.where(total == 0, 1, total)).astype(q.dtype)
    out = out.reshape(batch, kv_heads, heads // kv_heads, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def _logits(q, k, seen, scale):
    """(B, K, G * T, S) float32 logits, MASKED where `seen` (B or 1, T, S) is False."""
    logits = jnp.einsum(
        "bkqd,bksd->bkqs", q, jnp.swapaxes(k, 1, 2), preferred_element_type=jnp.float32
    )
    grouped = logits.reshape(*logits.shape[:2], -1, *seen.shape[1:])
    return jnp.where(seen[:, None, None], scale * grouped, MASKED).reshape(logits.shape)


# --- mosaic_tpu -----------------------------------------------------------------------------------


def _splash_unserved(q, k, irregular, *, segment_ids, sliding_window, scale) -> str | None:
    del k, segment_ids, sliding_window, scale
    if target_platform() != "tpu":
        return f"it runs on TPU, and this program is traced for {target_platform()}"
    if irregular:
        return irregular
    length = q.shape[1] // axis_product(mesh_axes("act_seq", q.shape[1]))
    if length % LANES:
        return f"the length on each device, {length}, is not a multiple of {LANES}"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the dtype is {q.dtype}, not bfloat16 or float32"
    return None


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None,
    sliding_window: int | None,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """JAX's splash attention kernel on `attention`'s arguments, split over the set mesh.

    Batch and heads are split by the axes of "act_batch" and "act_heads"; along those of "act_seq"
    each device keeps its queries and gathers the keys. Fewer kv heads than devices are repeated,
    one for each device. `interpret` runs it without a TPU, for tests.
    """
    batch, seq = mesh_axes("act_batch", q.shape[0]), mesh_axes("act_seq", q.shape[1])
    heads = _head_axes(q.shape[2], k.shape[2])
    if k.shape[2] % axis_product(heads):
        k, v = (jnp.repeat(a, axis_product(heads) // a.shape[2], axis=2) for a in (k, v))
    kernel = _splash_kernel(
        q.shape[2] // axis_product(heads), q.shape[1], axis_product(seq), sliding_window, interpret
    )
    if segment_ids is None:
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
    operands = ((q * scale).astype(q.dtype), k, v, segment_ids, segment_ids)
    if not free_axes():
        return _run_splash(kernel, *operands)

    queries = PartitionSpec(batch or None, seq or None, heads or None)
    keys = PartitionSpec(batch or None, None, heads or None)
    mesh = jax.sharding.get_abstract_mesh()
    masks = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, seq or None)))
    specs = (queries, keys, keys, PartitionSpec(batch or None, seq or None))
    return jax.shard_map(
        _run_splash,
        in_specs=(masks, *specs, PartitionSpec(batch or None)),
        out_specs=queries,
        axis_names=set(free_axes()),
        check_vma=False,  # the kernel does not say how its outputs vary
    )(kernel, *operands)


def _run_splash(kernel, q, k, v, q_segments, kv_segments):
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    segments = splash_kernel.SegmentIds(q_segments, kv_segments)
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v, segments), 1, 2)


def _splash_kernel(num_heads, length, seq_shards, sliding_window, interpret):
    shape = (length, length)
    if sliding_window is None:
        mask = splash_mask.CausalMask(shape, shard_count=seq_shards)
    else:
        mask = splash_mask.LocalMask(shape, (sliding_window - 1, 0), 0, shard_count=seq_shards)
    local = length // seq_shards
    return splash_kernel.make_splash_mha(
        mask=splash_mask.MultiHeadMask([mask] * num_heads),
        block_sizes=_splash_blocks(local, 1024 if sliding_window is None else 512),
        head_shards=1,
        q_seq_shards=seq_shards,
        residual_checkpoint_name="attn_out",
        interpret=interpret,
    )


def _splash_blocks(length: int, largest: int) -> splash_kernel.BlockSizes:
    """Tile sizes; static schedules for v5e and v6e at 4096 tokens are 7 to 12 % under 512 x 512."""
    sizes = (1024, 512, 384, 256, LANES)
    block = next(size for size in sizes if size <= largest and length % size == 0)
    step = min(block, 512)
    return splash_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=step,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=step,
        block_q_dq=block,
        block_kv_dq=block,
    )


def _head_axes(num_heads: int, num_kv_heads: int) -> tuple[str, ...]:
    """Mesh axes over the heads such that every device holds the kv heads of its queries."""
    axes = mesh_axes("act_heads", num_heads)
    while num_kv_heads % axis_product(axes) and axis_product(axes) % num_kv_heads:
        axes = axes[:-1]
    return axes


# --- cudnn ----------------------------------------------------------------------------------------


def _cudnn_unserved(q, k, irregular, *, segment_ids, sliding_window, scale) -> str | None:
    del k, sliding_window, scale
    if target_platform() != "gpu":
        return f"it runs on NVIDIA GPUs, and this program is traced for {target_platform()}"
    if irregular:
        return irregular
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the dtype is {q.dtype}, not bfloat16 or float16"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"head_dim={q.shape[3]} is not a multiple of 8 up to 128"
    if segment_ids is not None and q.shape[1] % 2:
        return f"it has segment_ids and an odd length, {q.shape[1]}"
    return None


def _cudnn_attention(q, k, v, *, segment_ids, sliding_window, scale):
    window = None if sliding_window is None else (sliding_window - 1, 0)
    mask = None
    if segment_ids is not None:
        # One (T, T) mask for all heads: the only form in which cuDNN takes packed documents here.
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=window,
        implementation="cudnn",
    )


def _xla_unserved(*_, **__) -> None:
    return None


_UNSERVED = {"xla": _xla_unserved, "mosaic_tpu": _splash_unserved, "cudnn": _cudnn_unserved}
