"""Clipped n-gram matches on NVIDIA GPUs: pairwise comparison in a Triton kernel.

One program takes one sentence and a block of its positions, compares them with every key in tiles
held in registers (see `fields`), and writes how many of its n-grams of each order match. Shifted
tokens are loaded again and not moved between threads: they are in the first-level cache.
"""

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import doors
from pallas_kernels.ngram_counts.fields import Fields


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tile of the kernel.

    Attributes:
      candidates: candidate positions of a program, a power of two from 16 up.
      keys: key positions compared at once, a power of two from 16 up.
      num_warps: warps of a program.
    """

    candidates: int = 64
    keys: int = 32
    num_warps: int = 4

    def __post_init__(self):
        for name in ("candidates", "keys"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two, at least 16")


@triton.jit
def _agreeing(
    tokens_ptr,
    length,
    keys_ptr,
    keys_length,
    first,
    end,
    earlier_only: tl.constexpr,
    max_order: tl.constexpr,
    orders: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    block_keys: tl.constexpr,
):
    """(block, orders): for each candidate position, how many keys before `end` agree."""
    capacity: tl.constexpr = 2**width - 1
    positions = first + tl.arange(0, block)
    order = tl.arange(0, orders)
    counts = tl.zeros((block, orders), tl.int32)
    for start in range(0, end, capacity * block_keys):
        packed = tl.zeros((block, block_keys), tl.int32)
        for key in range(start, min(start + capacity * block_keys, end), block_keys):
            keys = key + tl.arange(0, block_keys)
            increment = tl.full(
                (block, block_keys), (2 ** (width * max_order) - 1) // capacity, tl.int32
            )
            for shift in tl.static_range(max_order - 1, -1, -1):
                mine = tl.load(
                    tokens_ptr + positions + shift, mask=positions + shift < length, other=-1
                )
                # Padding of keys agrees with nothing, nor do positions beyond them.
                theirs = tl.load(keys_ptr + keys + shift, mask=keys + shift < keys_length, other=-1)
                agree = (mine[:, None] == theirs[None, :]) & (theirs >= 0)[None, :]
                if earlier_only and shift == 0:
                    agree = agree & (keys[None, :] < positions[:, None])
                increment = tl.where(agree, increment, (2 ** (width * shift) - 1) // capacity)
            packed += increment
        for n in tl.static_range(max_order):
            total = tl.sum((packed >> (width * n)) & capacity, axis=1)
            counts += tl.where(order[None, :] == n, total[:, None], 0)
    return counts


@triton.jit
def count_kernel(
    tokens_ptr,
    refs_ptr,
    out_ptr,
    length: tl.constexpr,
    refs_length: tl.constexpr,
    num_references: tl.constexpr,
    max_order: tl.constexpr,
    orders: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    block_keys: tl.constexpr,
):
    """Matches of one block of positions of one sentence.

    Args:
      tokens_ptr: (B, length) int32.
      refs_ptr: (B, num_references, refs_length) int32.
      out_ptr: (B, blocks, orders) int32; orders is max_order rounded up to a power of two.
    """
    sentence = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    first = part * block
    tokens_ptr += sentence * length
    refs_ptr += sentence * num_references * refs_length
    end = min(first + block, length)
    ranks = _agreeing(
        tokens_ptr, length, tokens_ptr, length, first, end, True,
        max_order, orders, width, block, block_keys,
    )  # fmt: skip
    best = tl.zeros((block, orders), tl.int32)
    for k in range(num_references):
        counts = _agreeing(
            tokens_ptr, length, refs_ptr + k * refs_length, refs_length, first, refs_length, False,
            max_order, orders, width, block, block_keys,
        )  # fmt: skip
        best = tl.maximum(best, counts)
    # An n-gram with padding in it agrees with no key: its best count is 0, not above any rank.
    matched = tl.sum((ranks < best).to(tl.int32), axis=0)
    order = tl.arange(0, orders)
    out = out_ptr + (sentence * tl.num_programs(1) + part) * orders + order
    tl.store(out, matched)


def launch(shape_candidates, shape_references, max_order: int, sizes: BlockSizes):
    """Returns the grid and the compile-time arguments of `count_kernel`.

    Args:
      shape_candidates: (B, Lc).
      shape_references: (B, R, Lr).
      max_order: 1 to 8.
      sizes: the tile.
    """
    batch, length = shape_candidates
    grid = (batch, -(-length // sizes.candidates))
    constants = {
        "length": length,
        "refs_length": shape_references[2],
        "num_references": shape_references[1],
        "max_order": max_order,
        "orders": triton.next_power_of_2(max_order),
        "width": Fields(max_order).width,
        "block": sizes.candidates,
        "block_keys": sizes.keys,
    }
    return grid, constants


def pairwise(
    candidates: jax.Array,
    references: jax.Array,
    *,
    max_order: int,
    block_sizes: BlockSizes | None = None,
) -> jax.Array:
    """`reference.pairwise` as a kernel.

    Args:
      candidates: (B, Lc) int32, negative where there is no token.
      references: (B, R, Lr) int32, the same.
      max_order: 1 to 8.
      block_sizes: None takes the defaults.

    Returns:
      (B, max_order) int32.
    """
    import jax_triton

    sizes = block_sizes or BlockSizes()
    grid, constants = launch(candidates.shape, references.shape, max_order, sizes)
    parts = jax_triton.triton_call(
        candidates,
        references,
        kernel=count_kernel,
        out_shape=jax.ShapeDtypeStruct((*grid, constants["orders"]), jnp.int32),
        grid=grid,
        num_warps=sizes.num_warps,
        compute_capability=doors.compute_capability(),
        **constants,
    )
    return parts.sum(1)[:, :max_order]
