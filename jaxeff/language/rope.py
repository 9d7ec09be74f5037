"""Rotary position embedding and its long-context variants, always computed in float32.

"Half-split" convention: the two halves of a head are the two coordinates of its rotated pairs.
RoFormer arXiv 2104.09864; YaRN arXiv 2309.00071; LongRoPE arXiv 2402.13753.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.language.config import RopeConfig


def rope_frequencies(
    rope: RopeConfig, head_dim: int, length: int | None = None
) -> tuple[np.ndarray, float]:
    """Angular frequency of every rotated pair.

    Args:
      rope: the variant and its settings.
      head_dim: D, even.
      length: the longest sequence of the call, a static integer; "dynamic" and "longrope" depend
        on it (None: `rope.max_position_embeddings`), the others ignore it.

    Returns:
      inv_freq (D/2,) float32 in radians per position, and the factor on cos and sin.

    Raises:
      ValueError: for an odd head_dim, or a variant without the context lengths it needs.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even: RoPE rotates pairs")
    inv_freq, scaling = _VARIANTS[rope.rope_type](rope, head_dim, length)
    return inv_freq.astype(np.float32), float(scaling)


def rope_table(
    positions: jax.Array, inv_freq: np.ndarray | jax.Array, scaling: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """cos and sin (..., T, D/2) float32 at integer positions (..., T)."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inv_freq, jnp.float32)
    return jnp.cos(angles) * scaling, jnp.sin(angles) * scaling


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x (..., T, heads, D) by tables (..., T, D/2); the tables are cast to x's dtype."""
    cos, sin = (table[..., None, :].astype(x.dtype) for table in (cos, sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def apply_rope(
    x: jax.Array,
    positions: jax.Array,
    inv_freq: np.ndarray | jax.Array,
    scaling: float = 1.0,
) -> jax.Array:
    """Rotate queries or keys to their positions.

    Args:
      x: (..., T, heads, D), any float dtype, which is also the result's.
      positions: (..., T) integers.
      inv_freq, scaling: from `rope_frequencies`.
    """
    return rotate(x, *rope_table(positions, inv_freq, scaling))


def rerotate(
    keys: jax.Array,
    delta: jax.Array | int,
    inv_freq: np.ndarray | jax.Array,
    *,
    rope: RopeConfig | None = None,
) -> jax.Array:
    """Move cached keys by `delta` positions: a pure rotation, without the attention scaling.

    The scaling is already in the keys; applying it again would be wrong (it shows with YaRN).

    Args:
      keys: (..., T, heads, D), rotated before.
      delta: integer, or integers broadcastable to (..., T).
      inv_freq: (D/2,), the frequencies the keys were rotated with.
      rope: when given, refused if keys of this variant cannot be moved.

    Raises:
      ValueError: for a variant whose frequencies change with the sequence's length.
    """
    if rope is not None and rope.rope_type == "dynamic":
        raise ValueError(
            "rope.rope_type='dynamic' cannot be re-rotated: the frequencies of a cached key "
            "depend on the length at the time it was written"
        )
    delta = jnp.broadcast_to(jnp.asarray(delta), keys.shape[:-2])
    rotated = rotate(keys.astype(jnp.float32), *rope_table(delta, inv_freq))
    return rotated.astype(keys.dtype)


def _default(rope, head_dim, length):
    del length
    return _geometric(rope.theta, head_dim), 1.0


def _linear(rope, head_dim, length):
    del length
    return _geometric(rope.theta, head_dim) / rope.factor, 1.0


def _dynamic(rope, head_dim, length):
    trained = _required(rope, "max_position_embeddings")
    longest = max(length or trained, trained)
    stretch = rope.factor * longest / trained - (rope.factor - 1)
    theta = rope.theta * stretch ** (head_dim / (head_dim - 2)) if head_dim > 2 else rope.theta
    return _geometric(theta, head_dim), 1.0


def _llama3(rope, head_dim, length):
    """Long wavelengths are interpolated, short ones kept, and a band between is blended."""
    del length
    original = _required(rope, "original_max_position_embeddings")
    inv_freq = _geometric(rope.theta, head_dim)
    turns = original * inv_freq / (2 * math.pi)
    band = rope.high_freq_factor - rope.low_freq_factor
    keep = np.clip((turns - rope.low_freq_factor) / band, 0.0, 1.0)
    return (1 - keep) * inv_freq / rope.factor + keep * inv_freq, 1.0


def _yarn(rope, head_dim, length):
    del length
    original = rope.original_max_position_embeddings or _required(rope, "max_position_embeddings")
    inv_freq = _geometric(rope.theta, head_dim)

    def pair_with(turns):
        return head_dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_with(rope.beta_fast)), 0)
    high = min(math.ceil(pair_with(rope.beta_slow)), head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    scaling = rope.attention_factor
    if scaling is None:
        scaling = 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
    return ramp * inv_freq / rope.factor + (1 - ramp) * inv_freq, scaling


def _longrope(rope, head_dim, length):
    longest = _required(rope, "max_position_embeddings")
    original = rope.original_max_position_embeddings or longest
    divisors = rope.long_factor if (length or longest) > original else rope.short_factor
    if len(divisors) != head_dim // 2:
        raise ValueError(
            f"longrope needs head_dim / 2 = {head_dim // 2} factors, got {len(divisors)}"
        )
    scaling = rope.attention_factor
    if scaling is None:
        stretch = longest / original
        scaling = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return _geometric(rope.theta, head_dim) / np.asarray(divisors, np.float64), scaling


_VARIANTS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _geometric(theta: float, head_dim: int) -> np.ndarray:
    return theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _required(rope: RopeConfig, name: str) -> int:
    value = getattr(rope, name)
    if value is None:
        raise ValueError(f"rope.rope_type={rope.rope_type!r} needs rope.{name}")
    return value
