"""Clipped n-gram matches on TPU: pairwise comparison on the vector unit.

Sentences lie along the 128 lanes and positions along the sublanes, so that a comparison of eight
candidate positions with one key position is one instruction on whole registers: the key's row is
spread over the sublanes by its load, n-grams are compared by rows read one further down, nothing is
moved across lanes, and sums over positions stay in registers. Each register of comparisons takes
2 max_order + 1 vector instructions (compare, select, add; see `fields`), of which four issue at a
time.

A batch of 64 or fewer would leave lanes empty: then the candidates are cut into chunks of
positions, each in a lane of its own, against all keys.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import doors
from pallas_kernels.ngram_counts.fields import Fields
from pallas_kernels.ngram_counts.reference import CANDIDATE_PADDING, REFERENCE_PADDING

LANES, SUBLANES = 128, 8
# Rows of all sentences of a lane block that fit into fast memory, twice for the pipeline.
MOST_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tile of the kernel.

    Attributes:
      candidate_rows: candidate positions held in registers, a multiple of 8.
      key_rows: key positions in one pass of the inner loop, a multiple of 8.
    """

    candidate_rows: int = 32
    key_rows: int = 16

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < SUBLANES or value % SUBLANES:
                raise ValueError(f"{name}={value} must be a positive multiple of {SUBLANES}")
        if self.candidate_rows % self.key_rows:
            raise ValueError(
                f"candidate_rows={self.candidate_rows} must be a multiple of "
                f"key_rows={self.key_rows}"
            )


def refusal(rows: int) -> str | None:
    """Returns why the kernel cannot serve a call with `rows` = Lc + R Lr, if so."""
    if rows > MOST_ROWS:
        return f"Lc + R * Lr = {rows} is more than {MOST_ROWS}, what fits into fast memory"
    return doors.not_on_platform("tpu")


def pairwise(
    candidates: jax.Array,
    references: jax.Array,
    *,
    max_order: int,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`reference.pairwise` as a kernel.

    Args:
      candidates: (B, Lc) int32, negative where there is no token.
      references: (B, R, Lr) int32, the same.
      max_order: 1 to 8.
      block_sizes: None takes the defaults.
      interpret: run it without a TPU, for tests.

    Returns:
      (B, max_order) int32.
    """
    fields = Fields(max_order)
    sizes = _fitting(block_sizes or BlockSizes(), fields)
    layout = _Layout.of(candidates.shape, sizes)
    keys = layout.rows(candidates, CANDIDATE_PADDING)
    refs = layout.rows(references, REFERENCE_PADDING)
    tokens = layout.chunked(keys, CANDIDATE_PADDING)
    bounds = layout.bounds(keys, refs)

    def block(rows, *leading):
        return pl.BlockSpec((*leading, rows, LANES), lambda b, _: (*(0 for _ in leading), 0, b))

    num_references = refs.shape[0]
    out = pl.pallas_call(
        functools.partial(_kernel, fields=fields, sizes=sizes, layout=layout),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(layout.blocks,),
            in_specs=[
                block(tokens.shape[0]),
                block(keys.shape[0]),
                block(refs.shape[1], num_references),
            ],
            out_specs=block(SUBLANES),
        ),
        out_shape=jax.ShapeDtypeStruct(
            (SUBLANES, layout.blocks * LANES),
            jnp.int32,
            manual_axis_type=jax.typeof(candidates).manual_axis_type,
        ),
        cost_estimate=pl.CostEstimate(
            flops=0,  # it compares integers: nothing for the matrix unit
            bytes_accessed=4 * (tokens.size + keys.size + refs.size),
            transcendentals=0,
        ),
        interpret=interpret,
        name="ngram_counts",
    )(bounds, tokens, keys, refs)
    return layout.sentences(out[:max_order])


def loop_trips(
    batch: int,
    length: int,
    num_references: int,
    reference_length: int,
    max_order: int = 4,
    block_sizes: BlockSizes | None = None,
    grid_trips: int | None = None,
) -> list[float]:
    """Returns how often each loop of the compiled kernel runs when all sentences are full.

    The bounds of the loops are data, so that a static schedule has bundles for them but no trips.

    Args:
      batch, length: of the candidates.
      num_references, reference_length: of the references.
      max_order: 1 to 8.
      block_sizes: as in `pairwise`.
      grid_trips: of the grid's loop as compiled, which runs a few times more than there are blocks
        to fill and drain its pipeline, the body left out; None takes the blocks.

    Returns:
      the trips of the loops in the order of the program, from each entry into the loop; the mean
      where they differ (the rank of a late tile looks at more keys). A grid of one block has no
      loop, nor has the only other reference of two.
    """
    fields = Fields(max_order)
    sizes = _fitting(block_sizes or BlockSizes(), fields)
    layout = _Layout.of((batch, length), sizes)
    firsts = range(0, min(layout.chunk_rows, length), sizes.candidate_rows)
    grid_trips = layout.blocks if layout.blocks == 1 else grid_trips or layout.blocks

    def trips(rows):
        passes = [pl.cdiv(count, sizes.key_rows) for count in rows]
        rounds = sum(pl.cdiv(count, fields.capacity // sizes.key_rows) for count in passes)
        return [rounds / len(passes), sum(passes) / max(rounds, 1)]

    if layout.chunks == 1:
        ranks = trips(firsts)
        ranks += trips([min(sizes.candidate_rows, length - first) for first in firsts])
    else:
        ranks = trips([length])
    reference = trips([reference_length])
    others = [] if num_references == 1 else reference
    if num_references > 2:
        others = [num_references - 1, *reference]
    grid = [] if layout.blocks == 1 else [grid_trips]
    return [*grid, len(firsts) * layout.blocks / grid_trips, *ranks, *reference, *others]


def _fitting(sizes, fields):
    """Block sizes whose pass over the keys does not fill a counter."""
    if sizes.key_rows <= fields.capacity:
        return sizes
    return dataclasses.replace(sizes, key_rows=SUBLANES)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where sentences and positions lie.

    Attributes:
      batch: sentences.
      chunks: lanes over which the positions of one candidate are cut.
      chunk_rows: candidate positions in each of them, whole tiles.
      key_rows: rows in one pass over the keys.
    """

    batch: int
    chunks: int
    chunk_rows: int
    key_rows: int

    @classmethod
    def of(cls, shape, sizes):
        batch, length = shape
        chunks = LANES // pl.next_power_of_2(batch) if batch < LANES else 1
        chunks = min(chunks, pl.next_power_of_2(pl.cdiv(length, sizes.candidate_rows)))
        tiles = pl.cdiv(length, chunks * sizes.candidate_rows)
        return cls(batch, chunks, tiles * sizes.candidate_rows, sizes.key_rows)

    @property
    def lanes(self):
        """Sentences side by side."""
        return LANES // self.chunks

    @property
    def blocks(self):
        return pl.cdiv(self.batch, self.lanes)

    def rows(self, tokens, padding):
        """(B, ..., L) to (..., rows, lanes): positions down, sentences across, once a chunk.

        Behind the last pass come rows for the windows that begin in it.
        """
        length = tokens.shape[-1]
        if tokens.ndim == 2:
            whole = max(
                pl.cdiv(length, self.key_rows) * self.key_rows, self.chunks * self.chunk_rows
            )
        else:
            whole = pl.cdiv(length, self.key_rows) * self.key_rows
        lanes_missing = self.blocks * self.lanes - self.batch
        widths = [(0, lanes_missing), *[(0, 0)] * (tokens.ndim - 2), (0, whole + SUBLANES - length)]
        tokens = jnp.pad(jnp.where(tokens < 0, padding, tokens), widths, constant_values=padding)
        return jnp.tile(jnp.moveaxis(tokens, 0, -1), self.chunks)

    def chunked(self, rows, padding):
        """The candidates' rows with each chunk of positions in its own lanes."""
        if self.chunks == 1:
            return rows
        height = self.chunk_rows + SUBLANES
        parts = [
            rows[chunk * self.chunk_rows :][:height, chunk * self.lanes : (chunk + 1) * self.lanes]
            for chunk in range(self.chunks)
        ]
        return jnp.concatenate(parts, axis=1)

    def bounds(self, keys, refs):
        """Positions up to the last token in a block: of candidates, then of every reference."""
        both = [keys[None], refs]
        longest = [
            jnp.max(jnp.where(rows >= 0, jnp.arange(1, rows.shape[1] + 1)[:, None], 0), axis=1)
            for rows in both
        ]
        longest = jnp.concatenate(longest).reshape(-1, self.blocks, LANES).max(-1)
        return longest.T.astype(jnp.int32).reshape(-1)

    def sentences(self, counts):
        """(N, lanes) to (B, N), the chunks of a sentence added up."""
        counts = counts.reshape(-1, self.blocks, self.chunks, self.lanes).sum(2)
        return counts.reshape(counts.shape[0], -1)[:, : self.batch].T


def _kernel(bounds_ref, tokens_ref, keys_ref, refs_ref, out_ref, *, fields, sizes, layout):
    max_order, num_references = fields.max_order, refs_ref.shape[0]
    bounds_at = pl.program_id(0) * (1 + num_references)
    tile_rows, groups = sizes.candidate_rows, sizes.candidate_rows // SUBLANES
    longest = bounds_ref[bounds_at]
    zeros = jnp.zeros((SUBLANES, LANES), jnp.int32)

    def tile(index, matched):
        first = pl.multiple_of(index * tile_rows, SUBLANES)
        windows = [
            [tokens_ref[pl.ds(first + SUBLANES * group + shift, SUBLANES), :]
             for shift in range(max_order)]
            for group in range(groups)
        ]  # fmt: skip
        count = functools.partial(_count_agreeing, windows, fields=fields, key_rows=sizes.key_rows)
        positions = _positions(layout, first, groups)
        # Rows before the tile are earlier than all of it; in chunks, no row is that for all lanes.
        whole_rows = first if layout.chunks == 1 else 0
        end = jnp.minimum(first + tile_rows, longest) if layout.chunks == 1 else longest
        ranks = count(keys_ref, 0, whole_rows) if layout.chunks == 1 else None
        masked = count(keys_ref, whole_rows, end, positions=positions)
        ranks = masked if ranks is None else _add(ranks, masked)
        best = count(refs_ref.at[0], 0, bounds_ref[bounds_at + 1])
        if num_references > 1:

            def another(k, best):
                counts = count(refs_ref.at[k], 0, bounds_ref[bounds_at + 1 + k])
                return jax.tree.map(jnp.maximum, best, counts)

            best = lax.fori_loop(1, num_references, another, best)
        return _matches(matched, windows, ranks, best)

    tiles = pl.cdiv(jnp.minimum(layout.chunk_rows, longest), tile_rows)
    matched = lax.fori_loop(0, tiles, tile, [zeros] * max_order)
    totals = [jnp.sum(order, axis=0, keepdims=True) for order in matched]
    unused = [jnp.zeros((1, LANES), jnp.int32)] * (SUBLANES - max_order)
    out_ref[...] = jnp.concatenate(totals + unused, axis=0)


def _positions(layout, first, groups):
    """The candidate positions in a tile's registers."""
    shape = (SUBLANES, LANES)
    lane, row = lax.broadcasted_iota(jnp.int32, shape, 1), lax.broadcasted_iota(jnp.int32, shape, 0)
    start = first + lane // layout.lanes * layout.chunk_rows
    return [start + row + SUBLANES * group for group in range(groups)]


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


def _count_agreeing(windows, keys_ref, first, end, *, fields, key_rows, positions=None):
    """For each group and order, how many keys in rows first <= row < end agree.

    `end` is rounded up to whole passes: rows beyond hold padding, or keys that `positions` masks.

    Args:
      windows: for each group of 8 candidate positions, registers with the tokens at every shift.
      keys_ref: (rows, 128).
      first, end: rows; `first` is a multiple of `key_rows`.
      positions: of each group's candidates; given, only earlier keys count.
    """
    groups, max_order = len(windows), fields.max_order
    increments = [jnp.full((SUBLANES, LANES), value, jnp.int32) for value in fields.increments]
    zeros = jnp.zeros((SUBLANES, LANES), jnp.int32)

    def compare(index, packed):
        row = pl.multiple_of(index * key_rows, SUBLANES)
        keys = [
            jnp.broadcast_to(keys_ref[pl.ds(row + i, 1), :], (SUBLANES, LANES))
            for i in range(key_rows + max_order - 1)
        ]
        packed = list(packed)
        for key in range(key_rows):
            for group in range(groups):
                increment = increments[max_order]
                for shift in reversed(range(max_order)):
                    agree = windows[group][shift] == keys[key + shift]
                    if shift == 0 and positions is not None:
                        agree &= positions[group] > row + key
                    increment = jnp.where(agree, increment, increments[shift])
                packed[group] += increment
        return packed

    passes_until_full = fields.capacity // key_rows
    first_pass, last_pass = first // key_rows, pl.cdiv(end, key_rows)

    def until_full(index, counts):
        start = first_pass + index * passes_until_full
        stop = jnp.minimum(start + passes_until_full, last_pass)
        packed = lax.fori_loop(start, stop, compare, [zeros] * groups)
        return _add(counts, [fields.unpack(group) for group in packed])

    rounds = pl.cdiv(jnp.maximum(last_pass - first_pass, 0), passes_until_full)
    return lax.fori_loop(0, rounds, until_full, [[zeros] * max_order] * groups)


def _matches(matched, windows, ranks, best):
    """Adds the n-grams of a tile that no padding touches and that the references still have."""
    matched = list(matched)
    for window, rank, most in zip(windows, ranks, best, strict=True):
        real = None
        for order, tokens in enumerate(window):
            real = tokens >= 0 if real is None else real & (tokens >= 0)
            matched[order] += jnp.where(real & (rank[order] < most[order]), 1, 0)
    return matched
