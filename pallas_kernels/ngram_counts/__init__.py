"""Clipped n-gram matches between candidates and references: the counting part of BLEU.

For each candidate and each order n, the sum over its distinct n-grams of
min(count in the candidate, largest count in one reference): the numerators of Papineni et al.,
"BLEU: a Method for Automatic Evaluation of Machine Translation" (ACL 2002), section 2.1, on token
ids, as in "TensorBLEU" (arXiv 2510.05485). Unlike there, the dictionary of n-grams is per sentence
or not needed at all, so memory grows with batch times length only.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import doors
from pallas_kernels.ngram_counts import reference, tpu
from pallas_kernels.ngram_counts.fields import MOST_ORDERS

__all__ = ["mark_padding", "ngram_counts"]

METHODS = ("auto", "sort", "pairwise")
IMPLEMENTATIONS = ("xla", "mosaic_tpu", "triton")

# Comparing costs a constant for each of Lc * M pairs (M = Lc + R Lr), sorting one for each of
# M log2(M) comparisons; their ratio, measured on a CPU and by static schedules for TPU. For GPU it
# is taken from the CPU.
PAIRS_PER_COMPARISON = {"cpu": 340, "tpu": 90, "gpu": 340}


def ngram_counts(
    candidates: jax.Array,
    references: jax.Array,
    *,
    max_order: int = 4,
    pad_id: int | None = 0,
    candidate_lengths: jax.Array | None = None,
    reference_lengths: jax.Array | None = None,
    method: str = "auto",
    implementation: str | None = None,
    block_sizes: Any = None,
) -> jax.Array:
    """Counts the n-grams of each candidate that its references have too, clipped.

    Runs under `jit` and `vmap`, sharded over batch axes, without a transfer to the host. Ids are
    0 to 2**31 - 1 and may be anything in this range: nothing is sized by a vocabulary. A negative
    entry is never a token. An n-gram that touches padding is not counted.

    Args:
      candidates: (..., Lc) integer ids.
      references: (..., R, Lr) integer ids, or (..., Lr) for one reference each; the leading axes
        are those of `candidates`. A reference without any token is absent.
      max_order: N, the longest n-grams to count.
      pad_id: the id that marks padding, anywhere; None if only negative entries do. Not used for
        what has lengths.
      candidate_lengths: (...) integers, tokens of each candidate from the left.
      reference_lengths: (..., R), or (...) for one reference each.
      method: "pairwise" compares all positions, "sort" sorts them, "auto" takes what is faster for
        these lengths.
      implementation: None | "xla" | "mosaic_tpu" | "triton".
      block_sizes: a `tpu.BlockSizes` or `gpu.BlockSizes` for the kernels; None takes the chip's.

    Returns:
      (..., max_order) int32.

    Raises:
      ValueError: for shapes that do not fit one another, a dtype that is not integer, ids beyond
        int32, `max_order` below 1, or an unknown method or implementation.
      NotImplementedError: if a named implementation cannot serve the call, with the reason.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, METHODS))}")
    if max_order < 1:
        raise ValueError(f"max_order={max_order} must be at least 1")
    candidates = mark_padding(candidates, pad_id, candidate_lengths, name="candidates")
    references = mark_padding(references, pad_id, reference_lengths, name="references")
    if references.ndim == candidates.ndim:
        references = references[..., None, :]
    if references.shape[:-2] != candidates.shape[:-1]:
        raise ValueError(
            f"references {references.shape} do not fit candidates {candidates.shape}: expected "
            f"{candidates.shape[:-1]} followed by (R, Lr)"
        )
    if method == "auto":
        # The kernels compare pairs; whoever names one has chosen.
        kernel_named = implementation not in (None, "xla")
        method = "pairwise" if kernel_named else _faster_method(candidates, references, max_order)
    implementation = doors.choose_implementation(
        implementation, _refusals(candidates, references, max_order, method)
    )
    leading = candidates.shape[:-1]
    if 0 in (*candidates.shape, *references.shape):
        return jnp.zeros((*leading, max_order), jnp.int32)
    count = _counter(method, implementation, max_order, block_sizes)
    batch = math.prod(leading)
    counts = count(candidates.reshape(batch, -1), references.reshape(batch, *references.shape[-2:]))
    return counts.reshape(*leading, max_order)


def mark_padding(
    tokens: jax.Array,
    pad_id: int | None = 0,
    lengths: jax.Array | None = None,
    *,
    name: str = "tokens",
) -> jax.Array:
    """Returns `tokens` as int32 with negative values where there is no token.

    Args:
      tokens: (..., L) integer ids.
      pad_id: the id that marks padding; None if only negative entries do.
      lengths: (...) integers; given, they alone say where sentences end, and `pad_id` is not used.
      name: of the argument, for errors.

    Raises:
      ValueError: for a dtype that is not integer or holds more than int32, ids beyond int32, a
        scalar, or lengths of another shape.
    """
    tokens = _as_ids(tokens, name)
    if lengths is None:
        return tokens if pad_id is None else jnp.where(tokens == pad_id, -1, tokens)
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths of {name} have dtype {lengths.dtype}, expected integers")
    if lengths.shape != tokens.shape[:-1]:
        raise ValueError(
            f"lengths of {name} have shape {lengths.shape}, expected {tokens.shape[:-1]}"
        )
    return jnp.where(jnp.arange(tokens.shape[-1]) < lengths[..., None], tokens, -1)


def _as_ids(tokens, name):
    if not isinstance(tokens, jax.Array):
        tokens = _host_ids(np.asarray(tokens), name)
    if not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.dtype in (jnp.uint32, jnp.uint64):
        raise ValueError(
            f"{name} has dtype {tokens.dtype}, expected integers within int32 (ids 0 to 2**31 - 1)"
        )
    if tokens.ndim == 0:
        raise ValueError(f"{name} is a scalar, expected an array of ids")
    return tokens.astype(jnp.int32)


def _host_ids(tokens, name):
    """Checks ids that are still on the host, where JAX would cut them to 32 bits in silence."""
    if tokens.size and np.issubdtype(tokens.dtype, np.integer):
        least, most = int(tokens.min()), int(tokens.max())
        if most >= 2**31 or least < -(2**31):
            raise ValueError(
                f"{name} holds ids from {least} to {most}, expected ids within int32 (2**31 - 1)"
            )
        tokens = tokens.astype(np.int32)
    return tokens


def _refusals(candidates, references, max_order, method):
    rows = candidates.shape[-1] + math.prod(references.shape[-2:])

    def kernel(reason):
        def refuse():
            if method == "sort":
                return 'method="sort" has no kernel; leave implementation=None'
            if max_order > MOST_ORDERS:
                return f"max_order={max_order} is more than {MOST_ORDERS}"
            return reason()

        return refuse

    def xla():
        if method == "pairwise" and max_order > MOST_ORDERS:
            return f'max_order={max_order} is more than {MOST_ORDERS}; take method="sort"'
        return None

    return {
        "xla": xla,
        "mosaic_tpu": kernel(functools.partial(tpu.refusal, rows)),
        "triton": kernel(doors.triton_refusal),
    }


def _faster_method(candidates, references, max_order):
    if max_order > MOST_ORDERS:
        return "sort"
    keys = candidates.shape[-1] + math.prod(references.shape[-2:])
    limit = PAIRS_PER_COMPARISON[doors.target_platform()] * math.log2(max(keys, 2))
    return "pairwise" if candidates.shape[-1] <= limit else "sort"


@functools.lru_cache(maxsize=64)
def _counter(method, implementation, max_order, block_sizes):
    """The function that counts on one flat batch, made once so that it is compiled once."""
    if implementation == "xla":
        return jax.jit(functools.partial(getattr(reference, method), max_order=max_order))
    if implementation == "mosaic_tpu":
        kernel = tpu.pairwise
    else:
        from pallas_kernels.ngram_counts.gpu import pairwise as kernel
    kernel = functools.partial(kernel, max_order=max_order, block_sizes=block_sizes)
    return jax.jit(doors.over_batch(kernel))
