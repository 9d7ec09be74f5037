"""Linear recurrences on NVIDIA GPUs: diagonal and block-diagonal, in Triton kernels.

One program takes one sequence and a block of channels, which lie side by side in memory, and walks
over tiles of time with the state in registers; within a tile, an associative scan over (transition,
offset) pairs. Backwards in time, it is the addresses that run backwards.
"""

import dataclasses

import jax
import triton
import triton.language as tl

from pallas_kernels import doors


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tile of the kernel.

    Attributes:
      time: steps of a tile, a power of two.
      channels: of a program, a power of two.
      num_warps: warps of a program.
    """

    time: int = 64
    channels: int = 32
    num_warps: int = 4

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two")

    @classmethod
    def of(cls, blocks: int) -> "BlockSizes":
        """Defaults for m = `blocks`: what fits into registers."""
        return {1: cls(), 2: cls(32, 32), 3: cls(16, 32)}[blocks]


@triton.jit
def compose1(p, u, q, v):
    return q * p, q * u + v


@triton.jit
def compose2(p00, p01, p10, p11, u0, u1, q00, q01, q10, q11, v0, v1):
    return (
        q00 * p00 + q01 * p10,
        q00 * p01 + q01 * p11,
        q10 * p00 + q11 * p10,
        q10 * p01 + q11 * p11,
        q00 * u0 + q01 * u1 + v0,
        q10 * u0 + q11 * u1 + v1,
    )


@triton.jit
def compose3(
    p00, p01, p02, p10, p11, p12, p20, p21, p22, u0, u1, u2,
    q00, q01, q02, q10, q11, q12, q20, q21, q22, v0, v1, v2,
):  # fmt: skip
    return (
        q00 * p00 + q01 * p10 + q02 * p20,
        q00 * p01 + q01 * p11 + q02 * p21,
        q00 * p02 + q01 * p12 + q02 * p22,
        q10 * p00 + q11 * p10 + q12 * p20,
        q10 * p01 + q11 * p11 + q12 * p21,
        q10 * p02 + q11 * p12 + q12 * p22,
        q20 * p00 + q21 * p10 + q22 * p20,
        q20 * p01 + q21 * p11 + q22 * p21,
        q20 * p02 + q21 * p12 + q22 * p22,
        q00 * u0 + q01 * u1 + q02 * u2 + v0,
        q10 * u0 + q11 * u1 + q12 * u2 + v1,
        q20 * u0 + q21 * u1 + q22 * u2 + v2,
    )


@triton.jit
def _entry(
    ptr,
    order,
    channel,
    i: tl.constexpr,
    j: tl.constexpr,
    steps: tl.constexpr,
    channels: tl.constexpr,
    m: tl.constexpr,
    reverse: tl.constexpr,
    adjoint: tl.constexpr,
):
    """Entry (i, j) of the transitions of a tile's steps, in the order in which they run.

    In the adjoint it is that of the step before, transposed; before the first step is nothing, and
    what carries the initial state on is the identity.
    """
    if adjoint:
        order = order - 1
        entry = j * m + i
    else:
        entry = i * m + j
    exists = (order >= 0) & (order < steps)
    row = steps - 1 - order if reverse else order
    at = (row[:, None].to(tl.int64) * (m * m) + entry) * channels + channel[None, :]
    inside = exists[:, None] & (channel < channels)[None, :]
    value = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    if adjoint and i == j:
        value = tl.where((order < 0)[:, None], 1.0, value)
    return value


@triton.jit
def _place(
    order,
    channel,
    i: tl.constexpr,
    steps: tl.constexpr,
    channels: tl.constexpr,
    m: tl.constexpr,
    reverse: tl.constexpr,
):
    """Where component i of a tile's states lies, and whether it exists."""
    row = steps - 1 - order if reverse else order
    at = (row[:, None].to(tl.int64) * m + i) * channels + channel[None, :]
    return at, (order < steps)[:, None] & (channel < channels)[None, :]


@triton.jit
def _offset(
    ptr,
    order,
    channel,
    i: tl.constexpr,
    steps: tl.constexpr,
    channels: tl.constexpr,
    m: tl.constexpr,
    reverse: tl.constexpr,
):
    at, exists = _place(order, channel, i, steps, channels, m, reverse)
    return tl.load(ptr + at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _save(
    ptr,
    h,
    order,
    channel,
    i: tl.constexpr,
    steps: tl.constexpr,
    channels: tl.constexpr,
    m: tl.constexpr,
    reverse: tl.constexpr,
):
    at, exists = _place(order, channel, i, steps, channels, m, reverse)
    tl.store(ptr + at, h.to(ptr.dtype.element_ty), mask=exists)


@triton.jit
def last_step(h, block: tl.constexpr):
    """The row of the tile's last step."""
    return tl.sum(tl.where((tl.arange(0, block) == block - 1)[:, None], h, 0.0), axis=0)


@triton.jit
def diagonal_kernel(
    a_ptr, b_ptr, h0_ptr, out_ptr,
    steps: tl.constexpr, channels: tl.constexpr,
    reverse: tl.constexpr, adjoint: tl.constexpr,
    block_time: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """States of one sequence and one block of channels.

    Args:
      a_ptr: (B, steps, channels).
      b_ptr, out_ptr: the same.
      h0_ptr: (B, channels) float32.
    """
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    a_ptr += sequence * steps * channels
    b_ptr += sequence * steps * channels
    out_ptr += sequence * steps * channels
    h0_ptr += sequence * channels
    c = tl.load(h0_ptr + channel, mask=channel < channels, other=0.0)
    for start in range(0, steps, block_time):
        order = start + tl.arange(0, block_time)
        p = _entry(a_ptr, order, channel, 0, 0, steps, channels, 1, reverse, adjoint)
        u = _offset(b_ptr, order, channel, 0, steps, channels, 1, reverse)
        p, u = tl.associative_scan((p, u), 0, compose1)
        h = p * c[None, :] + u
        _save(out_ptr, h, order, channel, 0, steps, channels, 1, reverse)
        c = last_step(h, block_time)


@triton.jit
def block2_kernel(
    a_ptr, b_ptr, h0_ptr, out_ptr,
    steps: tl.constexpr, channels: tl.constexpr,
    reverse: tl.constexpr, adjoint: tl.constexpr,
    block_time: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """The same for blocks of 2 x 2: a is (B, steps, 2, 2, channels), b (B, steps, 2, channels)."""
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    a_ptr += sequence * steps * 4 * channels
    b_ptr += sequence * steps * 2 * channels
    out_ptr += sequence * steps * 2 * channels
    h0_ptr += sequence * 2 * channels
    c0 = tl.load(h0_ptr + channel, mask=channel < channels, other=0.0)
    c1 = tl.load(h0_ptr + channels + channel, mask=channel < channels, other=0.0)
    for start in range(0, steps, block_time):
        order = start + tl.arange(0, block_time)
        p00 = _entry(a_ptr, order, channel, 0, 0, steps, channels, 2, reverse, adjoint)
        p01 = _entry(a_ptr, order, channel, 0, 1, steps, channels, 2, reverse, adjoint)
        p10 = _entry(a_ptr, order, channel, 1, 0, steps, channels, 2, reverse, adjoint)
        p11 = _entry(a_ptr, order, channel, 1, 1, steps, channels, 2, reverse, adjoint)
        u0 = _offset(b_ptr, order, channel, 0, steps, channels, 2, reverse)
        u1 = _offset(b_ptr, order, channel, 1, steps, channels, 2, reverse)
        p00, p01, p10, p11, u0, u1 = tl.associative_scan((p00, p01, p10, p11, u0, u1), 0, compose2)
        h0 = p00 * c0[None, :] + p01 * c1[None, :] + u0
        h1 = p10 * c0[None, :] + p11 * c1[None, :] + u1
        _save(out_ptr, h0, order, channel, 0, steps, channels, 2, reverse)
        _save(out_ptr, h1, order, channel, 1, steps, channels, 2, reverse)
        c0, c1 = last_step(h0, block_time), last_step(h1, block_time)


@triton.jit
def block3_kernel(
    a_ptr, b_ptr, h0_ptr, out_ptr,
    steps: tl.constexpr, channels: tl.constexpr,
    reverse: tl.constexpr, adjoint: tl.constexpr,
    block_time: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """The same for blocks of 3 x 3: a is (B, steps, 3, 3, channels), b (B, steps, 3, channels)."""
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    a_ptr += sequence * steps * 9 * channels
    b_ptr += sequence * steps * 3 * channels
    out_ptr += sequence * steps * 3 * channels
    h0_ptr += sequence * 3 * channels
    c0 = tl.load(h0_ptr + channel, mask=channel < channels, other=0.0)
    c1 = tl.load(h0_ptr + channels + channel, mask=channel < channels, other=0.0)
    c2 = tl.load(h0_ptr + 2 * channels + channel, mask=channel < channels, other=0.0)
    for start in range(0, steps, block_time):
        order = start + tl.arange(0, block_time)
        p00 = _entry(a_ptr, order, channel, 0, 0, steps, channels, 3, reverse, adjoint)
        p01 = _entry(a_ptr, order, channel, 0, 1, steps, channels, 3, reverse, adjoint)
        p02 = _entry(a_ptr, order, channel, 0, 2, steps, channels, 3, reverse, adjoint)
        p10 = _entry(a_ptr, order, channel, 1, 0, steps, channels, 3, reverse, adjoint)
        p11 = _entry(a_ptr, order, channel, 1, 1, steps, channels, 3, reverse, adjoint)
        p12 = _entry(a_ptr, order, channel, 1, 2, steps, channels, 3, reverse, adjoint)
        p20 = _entry(a_ptr, order, channel, 2, 0, steps, channels, 3, reverse, adjoint)
        p21 = _entry(a_ptr, order, channel, 2, 1, steps, channels, 3, reverse, adjoint)
        p22 = _entry(a_ptr, order, channel, 2, 2, steps, channels, 3, reverse, adjoint)
        u0 = _offset(b_ptr, order, channel, 0, steps, channels, 3, reverse)
        u1 = _offset(b_ptr, order, channel, 1, steps, channels, 3, reverse)
        u2 = _offset(b_ptr, order, channel, 2, steps, channels, 3, reverse)
        p00, p01, p02, p10, p11, p12, p20, p21, p22, u0, u1, u2 = tl.associative_scan(
            (p00, p01, p02, p10, p11, p12, p20, p21, p22, u0, u1, u2), 0, compose3
        )
        h0 = p00 * c0[None, :] + p01 * c1[None, :] + p02 * c2[None, :] + u0
        h1 = p10 * c0[None, :] + p11 * c1[None, :] + p12 * c2[None, :] + u1
        h2 = p20 * c0[None, :] + p21 * c1[None, :] + p22 * c2[None, :] + u2
        _save(out_ptr, h0, order, channel, 0, steps, channels, 3, reverse)
        _save(out_ptr, h1, order, channel, 1, steps, channels, 3, reverse)
        _save(out_ptr, h2, order, channel, 2, steps, channels, 3, reverse)
        c0, c1, c2 = last_step(h0, block_time), last_step(h1, block_time), last_step(h2, block_time)


KERNELS = {1: diagonal_kernel, 2: block2_kernel, 3: block3_kernel}


def launch(shape, *, reverse: bool, adjoint: bool, sizes: BlockSizes):
    """Returns the grid and the compile-time arguments of a kernel.

    Args:
      shape: (B, T, H).
      reverse, adjoint: as for `recurrence`.
      sizes: the tile.
    """
    batch, steps, channels = shape
    constants = {
        "steps": steps,
        "channels": channels,
        "reverse": reverse,
        "adjoint": adjoint,
        "block_time": min(sizes.time, max(triton.next_power_of_2(steps), 2)),
        "block_channels": sizes.channels,
    }
    return (batch, triton.cdiv(channels, sizes.channels)), constants


def recurrence(
    a: jax.Array,
    b: jax.Array,
    h0: jax.Array,
    *,
    reverse: bool = False,
    adjoint: bool = False,
    block_sizes: BlockSizes | None = None,
) -> jax.Array:
    """`reference.scan` as a kernel.

    Args:
      a: (B, T, H), or (B, T, m, m, H) with m up to 3.
      b: (B, T, H), or (B, T, m, H).
      h0: (B, H), or (B, m, H), float32.
      reverse: run from the last step to the first.
      adjoint: transpose the transitions, and multiply with each behind its own step and not before
        it: h_t = b_t + c_{t-1}, c_t = A_t' h_t, where c_0 is `h0`.
      block_sizes: None takes the defaults.

    Returns:
      like `b`.
    """
    import jax_triton

    blocks = 1 if a.ndim == 3 else a.shape[2]
    sizes = block_sizes or BlockSizes.of(blocks)
    shape = (*b.shape[:2], b.shape[-1])
    grid, constants = launch(shape, reverse=reverse, adjoint=adjoint, sizes=sizes)
    return jax_triton.triton_call(
        a,
        b,
        h0,
        kernel=KERNELS[blocks],
        out_shape=jax.ShapeDtypeStruct(b.shape, b.dtype),
        grid=grid,
        num_warps=sizes.num_warps,
        compute_capability=doors.compute_capability(),
        **constants,
    )
