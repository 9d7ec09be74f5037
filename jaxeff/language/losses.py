"""Cross-entropy over tokens, whole and in chunks that never hold all logits.

Both return a sum and a weight, so that a mean over a global batch (devices, accumulated
micro-batches) is one division of two sums.
"""

import jax
import jax.numpy as jnp


def cross_entropy(
    logits: jax.Array, targets: jax.Array, mask: jax.Array | None = None, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Summed next-token loss.

    Args:
      logits: (..., V), taken to float32.
      targets: (...) integer ids; ignored where the mask is 0.
      mask: (...) weight of each token; None counts all.
      z_loss: adds z_loss * logsumexp(logits)^2 to each token's loss (PaLM, arXiv 2204.02311).

    Returns:
      loss_sum () float32 in nats, weight () float32 = sum of the mask.
    """
    logits = logits.astype(jnp.float32)
    weights = _weights(targets, mask)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum instead of a gather: it fuses, and it stays local when V is sharded.
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    losses = log_z - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    if z_loss:
        losses += z_loss * log_z**2
    return jnp.sum(jnp.where(weights > 0, losses * weights, 0.0)), jnp.sum(weights)


def chunked_cross_entropy(
    hidden: jax.Array,
    head_kernel: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    chunk_size: int = 4096,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy(hidden @ head_kernel, ...)`, with the logits of one chunk at a time.

    The sequence is cut, not the batch, so that a batch sharded over devices keeps all of them busy
    in every chunk. The backward pass computes each chunk's logits again.

    Args:
      hidden: (B, T, d).
      head_kernel: (d, V), cast to hidden's dtype; products accumulate in float32.
      targets, mask: (B, T).
      chunk_size: tokens of the whole batch whose logits are held at once (at least one position
        of every row).
      z_loss: as in `cross_entropy`.

    Raises:
      ValueError: for a chunk_size below 1 or shapes that do not fit.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    if hidden.ndim != 3 or targets.shape != hidden.shape[:2]:
        raise ValueError(f"hidden {hidden.shape} must be (B, T, d), targets {targets.shape} (B, T)")
    batch, length, _ = hidden.shape
    steps = min(max(chunk_size // batch, 1), length)
    num_chunks = -(-length // steps)
    kernel = head_kernel.astype(hidden.dtype)

    def chunks(x):
        padding = [(0, 0), (0, num_chunks * steps - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding).reshape(batch, num_chunks, steps, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    @jax.checkpoint
    def add_chunk(total, chunk):
        hidden, targets, weights = chunk
        logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        loss, _ = cross_entropy(logits, targets, weights, z_loss)
        return total + loss, None

    weights = _weights(targets, mask)
    total, _ = jax.lax.scan(
        add_chunk, jnp.zeros((), jnp.float32), (chunks(hidden), chunks(targets), chunks(weights))
    )
    return total, jnp.sum(weights)


def _weights(targets, mask):
    if mask is None:
        return jnp.ones(targets.shape, jnp.float32)
    if mask.shape != targets.shape:
        raise ValueError(f"mask {mask.shape} must have the shape of targets {targets.shape}")
    return mask.astype(jnp.float32)
