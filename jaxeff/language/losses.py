"""Cross-entropy over tokens, whole and in chunks that never hold all logits.

Both return a sum and a weight, so that a mean over a global batch (devices, accumulated
micro-batches) is one division of two sums.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxeff.language.sharding import axis_product, mesh_axes

CHUNK_BYTES = 2**29  # of float32 logits on one device


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
    chunk_size: int | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy(hidden @ head_kernel, ...)`, with the logits of one chunk at a time.

    The sequence is cut, not the batch, so that a batch sharded over devices keeps all of them busy
    in every chunk. The backward pass computes each chunk's logits again. On a mesh every device
    gathers its part of the head once, sums over its own tokens, and the gradients of the head are
    reduced once, not once for every chunk.

    Args:
      hidden: (B, T, d).
      head_kernel: (d, V), cast to hidden's dtype; products accumulate in float32.
      targets, mask: (B, T).
      chunk_size: tokens whose logits each device holds at once (at least one position of every
        row it has); None takes as many as give half a gigabyte of logits.
      z_loss: as in `cross_entropy`.

    Raises:
      ValueError: for a chunk_size below 1 or shapes that do not fit.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    if hidden.ndim != 3 or targets.shape != hidden.shape[:2]:
        raise ValueError(f"hidden {hidden.shape} must be (B, T, d), targets {targets.shape} (B, T)")
    batch, length, _ = hidden.shape
    rows, columns = mesh_axes("act_batch", batch), mesh_axes("act_seq", length)
    axes = rows + columns
    if chunk_size is None:
        vocab_ways = axis_product(mesh_axes("act_vocab", head_kernel.shape[1]))
        chunk_size = max(CHUNK_BYTES * vocab_ways // (4 * head_kernel.shape[1]), 1)
    weights = _weights(targets, mask)
    kernel = head_kernel.astype(hidden.dtype)
    total = functools.partial(_sum_of_chunks, chunk_size=chunk_size, z_loss=z_loss, axes=axes)
    if axes:
        tokens = PartitionSpec(rows or None, columns or None)
        total = jax.shard_map(
            total,
            in_specs=(tokens, PartitionSpec(), tokens, tokens),
            out_specs=PartitionSpec(),
            axis_names=set(axes),
        )
    return total(hidden, kernel, targets, weights), jnp.sum(weights)


def _sum_of_chunks(hidden, kernel, targets, weights, *, chunk_size, z_loss, axes):
    """The loss summed over one device's tokens chunk by chunk, then over the mesh axes."""
    batch, length, _ = hidden.shape
    steps = min(max(chunk_size // batch, 1), length)
    num_chunks = -(-length // steps)

    def chunks(x):
        padding = [(0, 0), (0, num_chunks * steps - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding).reshape(batch, num_chunks, steps, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    @jax.checkpoint
    def add_chunk(total, chunk):
        hidden, targets, weights = chunk
        narrow = kernel.astype(hidden.dtype)
        logits = jnp.matmul(hidden, narrow, preferred_element_type=jnp.float32)
        loss, _ = cross_entropy(logits, targets, weights, z_loss)
        return total + loss, None

    # Widened, so that the scan adds up the gradient in float32; each chunk narrows it again.
    start, kernel = jnp.zeros((), jnp.float32), kernel.astype(jnp.float32)
    if axes:
        # Both differ between devices from here on. For the kernel this is what keeps the sum of
        # its gradient over devices out of the scan.
        start, kernel = (jax.lax.pcast(x, axes, to="varying") for x in (start, kernel))
    total, _ = jax.lax.scan(add_chunk, start, (chunks(hidden), chunks(targets), chunks(weights)))
    return jax.lax.psum(total, axes) if axes else total


def _weights(targets, mask):
    if mask is None:
        return jnp.ones(targets.shape, jnp.float32)
    if mask.shape != targets.shape:
        raise ValueError(f"mask {mask.shape} must have the shape of targets {targets.shape}")
    return mask.astype(jnp.float32)
