"""Linear recurrences on TPU: diagonal and block-diagonal, one pass over HBM
by the kernel.

Channels lie along the 128 lanes. A tile of time is cut into chunks, one a sublane, so that each
instruction on a whole register advances eight chunks by one step (registers are filled by loads
with the chunk's length as stride), and several groups of eight hide each other's latency. A first
walk over the tile in fast memory finds every chunk's transition and offset, these are combined row
by row into the state in which each chunk starts, and a second walk writes the states. The tiles
follow one another in the grid, the state between them in scratch memory; backwards in time the grid
is walked from its end.

Both walks take fewer instructions than the tile's transfers take time, so that HBM is the limit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import doors

LANES, SUBLANES = 128, 8
UNROLL = 4  # steps in one pass of the inner loops, an even number
MOST_COPIED = 36  # registers copied in one pass
HIGH_HALF = 0xFFFF0000
ONE_IN_HIGH_HALF = 0x3F800000  # as bfloat16
DTYPES = (jnp.float32, jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tile of the kernel.

    Attributes:
      time: steps of a tile at most, up to rounding to whole chunks.
      groups: registers of eight chunks that are walked side by side.
    """

    time: int = 2048
    groups: int = 4

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    @classmethod
    def of(cls, blocks: int) -> "BlockSizes":
        """Defaults for m = `blocks`: what fits into fast memory and into registers."""
        return {1: cls(), 2: cls(1024, 2), 3: cls(512, 1), 4: cls(256, 1)}[blocks]

    def chunk_length(self, steps: int) -> int:
        """Steps of a chunk, in tiles as equal as can be: an odd multiple of `UNROLL`.

        Loads whose stride is a multiple of 16 rows, or on some chips 8, hit one bank of the fast
        memory eight times; with this stride they take one cycle.
        """
        per_tile = pl.cdiv(steps, pl.cdiv(steps, self.time))
        passes = pl.cdiv(per_tile, SUBLANES * self.groups * UNROLL)
        return UNROLL * (passes + 1 - passes % 2)


def refusal(dtypes) -> str | None:
    """Returns why the kernel cannot serve a call with operands of `dtypes`, if so."""
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"it takes float32 and bfloat16, not {dtype}"
    return doors.not_on_platform("tpu")


def recurrence(
    a: jax.Array,
    b: jax.Array,
    h0: jax.Array,
    *,
    reverse: bool = False,
    adjoint: bool = False,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`reference.scan` as a kernel.

    Args:
      a: (B, T, H), or (B, T, m, m, H), float32 or bfloat16.
      b: (B, T, H), or (B, T, m, H), float32 or bfloat16.
      h0: (B, H), or (B, m, H), float32.
      reverse: run from the last step to the first.
      adjoint: transpose the transitions, and multiply with each behind its own step and not before
        it: h_t = b_t + c_{t-1}, c_t = A_t' h_t, where c_0 is `h0`.
      block_sizes: None takes the defaults.
      interpret: run it without a TPU, for tests.

    Returns:
      like `b`.
    """
    if a.ndim == 3:
        a, b, h0 = a[:, :, None, None], b[:, :, None], h0[:, None]
        options = {"adjoint": adjoint, "block_sizes": block_sizes, "interpret": interpret}
        return recurrence(a, b, h0, reverse=reverse, **options)[:, :, 0]
    batch, steps, blocks, _, channels = a.shape
    sizes = block_sizes or BlockSizes.of(blocks)
    chunks, length = SUBLANES * sizes.groups, sizes.chunk_length(steps)
    tile = chunks * length
    tiles = pl.cdiv(steps, tile)
    # Time next to the channels. For blocks that is a copy in HBM, of the states too.
    a = jnp.moveaxis(a, 1, 3).reshape(batch, blocks**2, steps, channels)
    b = jnp.moveaxis(b, 1, 2)

    def of_time(components):
        def index(i, j, t):
            return i, 0, tiles - 1 - t if reverse else t, j

        return pl.BlockSpec((None, components, tile, LANES), index)

    def scratch(components, rows):
        return pltpu.VMEM((components, rows, LANES), jnp.float32)

    def words(components, dtype):
        rows = SUBLANES if dtype == jnp.float32 else tile // 2
        return pltpu.VMEM((components, rows, LANES), jnp.uint32)

    kernel = functools.partial(
        _kernel,
        walk=_Walk(blocks, length, sizes.groups, reverse, adjoint, interpret),
        missing=tiles * tile - steps if reverse else 0,
    )
    out = pl.pallas_call(
        kernel,
        grid=(batch, pl.cdiv(channels, LANES), tiles),
        in_specs=[
            of_time(blocks**2),
            of_time(blocks),
            pl.BlockSpec((None, blocks, LANES), lambda i, j, t: (i, 0, j)),
        ],
        out_specs=of_time(blocks),
        out_shape=jax.ShapeDtypeStruct(
            b.shape, b.dtype, manual_axis_type=jax.typeof(b).manual_axis_type
        ),
        scratch_shapes=[
            scratch(blocks, 1),
            scratch(blocks**2, chunks),
            scratch(blocks, chunks),
            words(blocks**2, a.dtype),
            words(blocks, b.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=0,  # nothing for the matrix unit
            bytes_accessed=a.nbytes + 2 * b.nbytes + h0.nbytes,
            transcendentals=0,
        ),
        interpret=interpret,
        name="linear_recurrence",
    )(a, b, h0)
    return jnp.moveaxis(out, 1, 2)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """How the chunks of a tile are walked.

    Attributes:
      blocks: m.
      length: steps of a chunk.
      groups: of eight chunks.
      reverse, adjoint, interpret: as for `recurrence`.
    """

    blocks: int
    length: int
    groups: int
    reverse: bool
    adjoint: bool
    interpret: bool

    def over_steps(self, body, initial):
        """Calls `body(pair, state)` for every two steps of the chunks, in the direction of time."""
        pairs, passes = UNROLL // 2, self.length // UNROLL

        def several(index, state):
            # Addresses as one base plus constants: only so can the compiler tell them apart.
            first = (passes - 1 - index if self.reverse else index) * pairs
            for k in reversed(range(pairs)) if self.reverse else range(pairs):
                state = body(first + k, state)
            return state

        return lax.fori_loop(0, passes, several, initial)

    @property
    def in_pair(self):
        """The places of a pair's two steps in the direction of time."""
        return (1, 0) if self.reverse else (0, 1)

    def rows(self, ref, step, group):
        """One step, or word of two steps, of the eight chunks of a group."""
        length = self.length if ref.dtype == jnp.float32 else self.length // 2
        return pl.ds(group * SUBLANES * length + step, SUBLANES, stride=length)

    def load(self, ref, pair, group):
        """Both steps of a pair, each with a list of components."""
        components = range(ref.shape[0])
        if ref.dtype == jnp.float32:
            return [
                [ref.at[k][self.rows(ref, 2 * pair + i, group), :] for k in components]
                for i in range(2)
            ]
        words = [ref.at[k][self.rows(ref, pair, group), :] for k in components]
        low = [lax.bitcast_convert_type(word << 16, jnp.float32) for word in words]
        high = [
            lax.bitcast_convert_type(word & jnp.uint32(HIGH_HALF), jnp.float32) for word in words
        ]
        return [low, high]

    def store(self, ref, pair, group, states):
        """Writes the components of both steps."""
        for k, (first, second) in enumerate(zip(*states, strict=True)):
            if ref.dtype == jnp.float32:
                ref.at[k][self.rows(ref, 2 * pair, group), :] = first
                ref.at[k][self.rows(ref, 2 * pair + 1, group), :] = second
            else:
                ref.at[k][self.rows(ref, pair, group), :] = self.word(first, second)

    def word(self, first, second):
        """Two steps rounded to bfloat16, the first in the lower half."""
        if not self.interpret:
            return pltpu.pack_elementwise([first, second], packed_dtype=jnp.bfloat16)
        halves = [
            lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
            for x in (first, second)
        ]
        return halves[0] | halves[1] << 16

    def transition(self, components):
        """The rows of a transition, or of its transpose for the adjoint."""
        m = self.blocks
        rows = [components[i * m : (i + 1) * m] for i in range(m)]
        return [list(column) for column in zip(*rows, strict=True)] if self.adjoint else rows

    def advance(self, a, b, state):
        """The states of a step, and what is carried into the next."""
        if self.adjoint:
            h = [x + c for x, c in zip(b, state, strict=True)]
            return h, _apply(a, h)
        h = [x + y for x, y in zip(b, _apply(a, state), strict=True)]
        return h, h


def _apply(a, h):
    return [functools.reduce(jnp.add, map(jnp.multiply, row, h)) for row in a]


def _kernel(
    a_ref,
    b_ref,
    h0_ref,
    out_ref,
    carry_ref,
    transition_ref,
    offset_ref,
    a_words_ref,
    b_words_ref,
    *,
    walk,
    missing,
):
    t = pl.program_id(2)

    @pl.when(t == 0)
    def _():
        for i in range(walk.blocks):
            carry_ref[i] = h0_ref[i : i + 1, :]

    # Single rows of 16-bit values cannot be loaded with a stride, words of two can.
    a_ref, b_ref = _as_words(a_ref, a_words_ref), _as_words(b_ref, b_words_ref)
    if missing:
        # Backwards in time they come first. What lies there is of no array, so that it may change.
        pl.when(t == 0)(functools.partial(_fill_missing, a_ref, b_ref, missing, walk))
    _totals(a_ref, b_ref, transition_ref, offset_ref, walk)
    _starts(transition_ref, offset_ref, carry_ref, walk)
    # The words of states take the place of those they were made from.
    states_ref = out_ref if out_ref.dtype == jnp.float32 else b_ref
    _states(a_ref, b_ref, offset_ref, states_ref, walk)
    if states_ref is not out_ref:
        _copy_bits(states_ref, out_ref)


def _as_words(ref, words_ref):
    if ref.dtype == jnp.float32:
        return ref
    _copy_bits(ref, words_ref)
    return words_ref


def _copy_bits(source_ref, target_ref):
    """Copies rows of bfloat16 to words of two rows, or back."""
    words = min(source_ref.shape[1], target_ref.shape[1])
    part = SUBLANES * max(n for n in range(1, MOST_COPIED + 1) if words % (SUBLANES * n) == 0)

    def copy(index, _):
        def rows(ref):
            count = part * ref.shape[1] // words
            return pl.ds(pl.multiple_of(index * count, count), count)

        for k in range(source_ref.shape[0]):
            bits = pltpu.bitcast(source_ref.at[k][rows(source_ref), :], target_ref.dtype)
            target_ref.at[k][rows(target_ref), :] = bits

    lax.fori_loop(0, words // part, copy, None)


def _fill_missing(a_ref, b_ref, missing, walk):
    """Makes the last steps of a tile such that they change nothing."""
    m = walk.blocks
    for k in range(m * m):
        _fill_end(a_ref.at[k], missing, 1.0 if k % (m + 1) == 0 else 0.0)
    for k in range(m):
        _fill_end(b_ref.at[k], missing, 0.0)


def _fill_end(ref, missing, value):
    if ref.dtype == jnp.float32:
        ref[ref.shape[0] - missing :, :] = jnp.full((missing, LANES), value)
        return
    words, half = ref.shape[0] - missing // 2, ONE_IN_HIGH_HALF if value else 0
    ref[words:, :] = jnp.full((missing // 2, LANES), half | half >> 16, jnp.uint32)
    if missing % 2:
        word = ref[words - 1 : words, :]
        ref[words - 1 : words, :] = word & jnp.uint32(0xFFFF) | jnp.uint32(half)


def _totals(a_ref, b_ref, transition_ref, offset_ref, walk):
    """Writes every chunk's own transition and offset."""
    m, groups = walk.blocks, walk.groups
    zero, one = (jnp.full((SUBLANES, LANES), value, jnp.float32) for value in (0, 1))
    identity = [[one if i == j else zero for j in range(m)] for i in range(m)]

    def two_steps(pair, totals):
        totals = list(totals)
        for group in range(groups):
            a_pair, b_pair = walk.load(a_ref, pair, group), walk.load(b_ref, pair, group)
            for i in walk.in_pair:
                a, (transition, offset) = walk.transition(a_pair[i]), totals[group]
                columns = [_apply(a, column) for column in zip(*transition, strict=True)]
                rows = [list(row) for row in zip(*columns, strict=True)]
                totals[group] = (rows, walk.advance(a, b_pair[i], offset)[1])
        return totals

    totals = walk.over_steps(two_steps, [(identity, [zero] * m)] * groups)
    for group, (transition, offset) in enumerate(totals):
        chunks = slice(group * SUBLANES, (group + 1) * SUBLANES)
        for i in range(m):
            offset_ref[i, chunks, :] = offset[i]
            for j in range(m):
                transition_ref[i * m + j, chunks, :] = transition[i][j]


def _starts(transition_ref, offset_ref, carry_ref, walk):
    """Puts in place of every chunk's offset the state in which it starts."""
    m = walk.blocks
    chunks = range(SUBLANES * walk.groups)
    state = [carry_ref[i] for i in range(m)]
    for chunk in reversed(chunks) if walk.reverse else chunks:
        row = slice(chunk, chunk + 1)
        transition = [[transition_ref[i * m + j, row, :] for j in range(m)] for i in range(m)]
        offset = [offset_ref[i, row, :] for i in range(m)]
        for i in range(m):
            offset_ref[i, row, :] = state[i]
        state = [x + y for x, y in zip(offset, _apply(transition, state), strict=True)]
    for i in range(m):
        carry_ref[i] = state[i]


def _states(a_ref, b_ref, starts_ref, out_ref, walk):
    """Writes the states of every step."""
    groups = range(walk.groups)

    def two_steps(pair, carried):
        carried = list(carried)
        for group in groups:
            a_pair, b_pair = walk.load(a_ref, pair, group), walk.load(b_ref, pair, group)
            states = [None, None]
            for i in walk.in_pair:
                a = walk.transition(a_pair[i])
                states[i], carried[group] = walk.advance(a, b_pair[i], carried[group])
            walk.store(out_ref, pair, group, states)
        return carried

    chunks = [slice(group * SUBLANES, (group + 1) * SUBLANES) for group in groups]
    starts = [[starts_ref[i, rows, :] for i in range(walk.blocks)] for rows in chunks]
    walk.over_steps(two_steps, starts)
