"""Fused recurrent cells on TPU: forward by either method, and the adjoint, each in one pass.

Eight batch rows lie along the sublanes and channels along the lanes, so that a step of time is
whole registers and nothing crosses lanes. Tiles come in with time along the sublanes and are turned
by strided stores. Newton's linear recurrence runs as a loop over the steps of its tile: its chain
is one multiply-add a step (four for 2 x 2 blocks), and the gates of all steps, which cost more,
do not wait for it. All else stays in fast memory: the projections are read once and the states
written once, whatever the number of iterations.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import doors
from pallas_kernels.recurrent_tiles import Config

LANES, ROWS = 128, 8
UNROLL = 8
MOST_CHANNELS = {"newton": 256, "sequential": 512}
VMEM_BYTES = 64 * 2**20
MOST_STEPS = 256  # of a tile, what fits into fast memory beside the pipeline's second copy


def refusal(u: jax.Array, method: str, tile: int, *, float64: bool) -> str | None:
    """Returns why the kernels cannot serve a call, if so."""
    if method == "newton" and (tile % ROWS or tile > MOST_STEPS):
        return f"tile={tile} is not a multiple of {ROWS} up to {MOST_STEPS}"
    if float64:
        return "its arithmetic is float32, and an operand is float64"
    if u.size == 0:
        return f"u of shape {u.shape} is empty"
    return doors.not_on_platform("tpu")


def forward(config: Config, u, weights, first, *, interpret=False):
    """`recurrent_tiles.newton` or `.sequential` as a kernel.

    Args:
      config: the call.
      u: (B, T, 3, H).
      weights: (B, num_weights, H).
      first: (B, m, H).
      interpret: run it in Pallas' interpreter.

    Returns:
      the states, m arrays (B, T, H) in u's dtype.
    """
    layout = _Layout(config, u)
    cell, m = config.cell, config.cell.num_states
    states = pl.pallas_call(
        functools.partial(_forward_kernel, config=config, layout=layout),
        grid=layout.grid,
        in_specs=[layout.parts(), layout.rows(cell.num_weights), layout.rows(m)],
        out_specs=[layout.states()] * m,
        out_shape=[layout.result(layout.shape, u.dtype)] * m,
        scratch_shapes=[layout.scratch(3), layout.scratch(m), layout.carry(m)],
        compiler_params=_params(),
        cost_estimate=layout.cost(3 + m, u.dtype, 4 if config.method == "newton" else 1),
        interpret=interpret,
        name=cell.name,
    )(layout.parts_first(u), layout.count_first(weights), layout.count_first(first))
    return tuple(layout.cut(x) for x in states)


def adjoint(config: Config, u, weights, first, *states_and_grads, interpret=False):
    """`recurrent_tiles.adjoint` as a kernel.

    Args:
      config, u, weights, first, interpret: as for `forward`.
      states_and_grads: m arrays (B, T, H) of states, then as many of their gradients.

    Returns:
      the gradients of `u`, of `weights` for each row of the batch, and of `first`, with the shapes
      of these; the first in u's dtype, the others float32.
    """
    layout = _Layout(config._replace(method="sequential"), u, backward=True)
    cell, m, n = config.cell, config.cell.num_states, config.cell.num_weights
    states_and_grads = [layout.pad(x) for x in states_and_grads]
    before = [layout.before(first[:, i], x) for i, x in enumerate(states_and_grads[:m])]
    batch, steps, width = layout.shape
    of_u, of_weights, of_first = pl.pallas_call(
        functools.partial(_adjoint_kernel, config=config, layout=layout),
        grid=layout.grid,
        in_specs=[
            layout.parts(),
            layout.rows(n),
            *[layout.states()] * (2 * m),
            *[layout.tile_rows()] * m,
        ],
        out_specs=[layout.parts(), layout.rows(n), layout.rows(m)],
        out_shape=[
            layout.result((batch, 3, steps, width), u.dtype),
            layout.result((n, batch, width), jnp.float32),
            layout.result((m, batch, width), jnp.float32),
        ],
        scratch_shapes=[layout.scratch(3), layout.scratch(m), layout.scratch(m), layout.carry(m)],
        compiler_params=_params(),
        cost_estimate=layout.cost(6 + 2 * m, u.dtype, 1),
        interpret=interpret,
        name=f"{cell.name}_adjoint",
    )(
        layout.parts_first(u),
        layout.count_first(weights),
        *states_and_grads,
        *before,
    )
    batch, steps, _, width = u.shape
    of_u = jnp.moveaxis(of_u[:batch, :, :steps, :width], 1, 2)
    return of_u, *(jnp.moveaxis(x, 0, 1)[:batch, :, :width] for x in (of_weights, of_first))


def _params():
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    )


def _up(x, to):
    return -(-x // to) * to


class _Layout:
    """Where batch rows, steps and channels lie: all padded to whole tiles, at their ends."""

    def __init__(self, config, u, backward=False):
        batch, steps, _, width = u.shape
        most = config.tile if config.method == "newton" else 64
        self.given = batch, steps, width
        self.tile = min(most, _up(steps, ROWS))
        padded = _up(width, LANES)
        chunks = padded // LANES
        largest = MOST_CHANNELS[config.method] // LANES
        self.chunks = max(n for n in range(1, largest + 1) if chunks % n == 0)
        self.channels = self.chunks * LANES
        self.shape = _up(batch, ROWS), _up(steps, self.tile), padded
        self.tiles = self.shape[1] // self.tile
        self.grid = self.shape[0] // ROWS, padded // self.channels, self.tiles
        self.spare = tuple((0, to - size) for size, to in zip(self.given, self.shape, strict=True))
        self.varying = jax.typeof(u).manual_axis_type
        self.backward = backward

    def result(self, shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=self.varying)

    def time(self, t):
        return self.tiles - 1 - t if self.backward else t

    def parts_first(self, u):
        """(B, 3, T, H): each projection of a row in whole registers of steps by channels.

        What makes `u` can write it so as well; only to an array that lies in memory as (B, T, 3, H)
        does it cost a copy.
        """
        batch, steps, width = self.spare
        return jnp.pad(jnp.moveaxis(u, 2, 1), (batch, (0, 0), steps, width))

    def parts(self):
        block = (ROWS, 3, self.tile, self.channels)
        return pl.BlockSpec(block, lambda b, c, t: (b, 0, self.time(t), c))

    def count_first(self, x):
        """(B, count, H) to (count, B, H), float32."""
        batch, _, width = self.spare
        return jnp.pad(jnp.moveaxis(x, 1, 0).astype(jnp.float32), ((0, 0), batch, width))

    def rows(self, count):
        return pl.BlockSpec((count, ROWS, self.channels), lambda b, c, t: (0, b, c))

    def pad(self, states):
        return jnp.pad(states, self.spare)

    def states(self):
        block = (ROWS, self.tile, self.channels)
        return pl.BlockSpec(block, lambda b, c, t: (b, self.time(t), c))

    def before(self, first, states):
        """(tiles, B, H) float32: the state before each tile.

        Gathered outside the kernel, to which a second window on the states would look like all of
        them once more.
        """
        batch, _, width = self.spare
        first = jnp.pad(first, (batch, width))[:, None]
        ends = states[:, self.tile - 1 : -1 : self.tile]
        both = [x.astype(jnp.float32) for x in (first, ends)]
        return jnp.moveaxis(jnp.concatenate(both, axis=1), 1, 0)

    def tile_rows(self):
        block = (None, ROWS, self.channels)
        return pl.BlockSpec(block, lambda b, c, t: (self.time(t), b, c))

    def cut(self, x):
        batch, steps, width = self.given
        return x[:batch, :steps, :width]

    def scratch(self, count):
        return pltpu.VMEM((count, self.chunks, self.tile * ROWS, LANES), jnp.float32)

    def carry(self, count):
        return pltpu.VMEM((count, self.chunks, ROWS, LANES), jnp.float32)

    def cost(self, arrays, dtype, passes):
        batch, steps, width = self.shape
        size = batch * steps * width
        return pl.CostEstimate(
            flops=40 * passes * size,
            transcendentals=3 * passes * size,
            bytes_accessed=arrays * size * jnp.dtype(dtype).itemsize,
        )

    def turn_in(self, block, scratch):
        """(rows, tile, channels) to the scratch (chunks, tile x rows, lanes)."""
        for row, chunk, lanes in self.windows():
            rows = scratch.at[chunk]
            rows[pl.ds(row, self.tile, stride=ROWS), :] = block[row, :, lanes].astype(jnp.float32)

    def turn_out(self, scratch, block):
        """The other way."""
        for row, chunk, lanes in self.windows():
            rows = scratch.at[chunk]
            values = rows[pl.ds(row, self.tile, stride=ROWS), :]
            block[row, :, lanes] = values.astype(block.dtype)

    def windows(self):
        for row in range(ROWS):
            for chunk in range(self.chunks):
                yield row, chunk, slice(chunk * LANES, (chunk + 1) * LANES)

    def by_chunk(self, x):
        """(count, rows, channels) to as many (chunks, rows, lanes)."""
        return tuple(
            jnp.stack([y[:, i * LANES : (i + 1) * LANES] for i in range(self.chunks)]) for y in x
        )

    def loop(self, body, carry, *, backward=False):
        """Runs `body(step, carry)` over the steps of the tile, UNROLL of them at a time."""
        groups = self.tile // UNROLL

        def group(i, carry):
            i = groups - 1 - i if backward else i
            order = range(UNROLL)[::-1] if backward else range(UNROLL)
            return body(i, order, carry)

        return lax.fori_loop(0, groups, group, carry)


def _at(i, k):
    return pl.ds(pl.multiple_of((i * UNROLL + k) * ROWS, ROWS), ROWS)


def _load(scratch, at):
    return tuple(scratch[part, :, at, :] for part in range(scratch.shape[0]))


def _store(scratch, at, values):
    for part, value in enumerate(values):
        scratch[part, :, at, :] = value


def _apply(jacobian, x):
    return tuple(sum(j * y for j, y in zip(row, x, strict=True)) for row in jacobian)


def _add(x, y):
    return tuple(p + q for p, q in zip(x, y, strict=True))


def _forward_kernel(u_in, rows, first, *refs, config, layout):
    cell = config.cell
    *out, us, states, carry = refs
    weights = layout.by_chunk(rows[...])

    @pl.when(pl.program_id(2) == 0)
    def _():
        for part, value in enumerate(layout.by_chunk(first[...])):
            carry[part] = value

    for part in range(3):
        layout.turn_in(u_in.at[:, part], us.at[part])
    incoming = tuple(carry[part] for part in range(cell.num_states))
    zeros = tuple(jnp.zeros_like(x) for x in incoming)

    def follow(i, order, prev):
        for k in order:
            prev = cell.step(_load(us, _at(i, k)), weights, prev)
            _store(states, _at(i, k), prev)
        return prev

    def guess(i, order, prev):
        for k in order:
            _store(states, _at(i, k), cell.step(_load(us, _at(i, k)), weights, prev))
            prev = zeros
        return prev

    def iterate(i, order, carried):
        prev, delta = carried
        found = []
        olds = [_load(states, _at(i, k)) for k in order]
        for k, old in zip(order, olds, strict=True):
            u = _load(us, _at(i, k))
            residual = tuple(x - y for x, y in zip(cell.step(u, weights, prev), old, strict=True))
            delta = _add(_apply(cell.jacobian(u, weights, prev, old), delta), residual)
            found.append(tuple(x + config.damping * d for x, d in zip(old, delta, strict=True)))
            prev = old
        for k, new in zip(order, found, strict=True):
            _store(states, _at(i, k), new)
        return prev, delta

    if config.method == "sequential":
        layout.loop(follow, incoming)
    else:
        layout.loop(guess, incoming)
        for _ in range(config.num_iterations):
            layout.loop(iterate, (incoming, zeros))
    for part, value in enumerate(_load(states, pl.ds((layout.tile - 1) * ROWS, ROWS))):
        carry[part] = value
    for part, block in enumerate(out):
        layout.turn_out(states.at[part], block)


def _adjoint_kernel(u_in, rows, *refs, config, layout):
    cell, step = config.cell, pl.program_id(2)
    m = cell.num_states
    states_in, grads_in, before = (refs[i * m : (i + 1) * m] for i in range(3))
    of_u_out, of_weights, of_first, us, states, grads, carry = refs[3 * m :]
    weights = layout.by_chunk(rows[...])

    @pl.when(step == 0)
    def _():
        carry[...] = jnp.zeros_like(carry)
        of_weights[...] = jnp.zeros_like(of_weights)

    for part in range(3):
        layout.turn_in(u_in.at[:, part], us.at[part])
    for part in range(m):
        layout.turn_in(states_in[part], states.at[part])
        layout.turn_in(grads_in[part], grads.at[part])
    incoming = layout.by_chunk([block[...] for block in before])

    def walk(i, order, carried):
        ahead, sums = carried
        for k in order:
            at = _at(i, k)
            u, new = _load(us, at), _load(states, at)
            index = i * UNROLL + k
            prev_at = pl.ds(pl.multiple_of(jnp.maximum(index - 1, 0) * ROWS, ROWS), ROWS)
            prev = tuple(
                jnp.where(index == 0, x, y)
                for x, y in zip(incoming, _load(states, prev_at), strict=True)
            )
            total = _add(_load(grads, at), ahead)
            jacobian = cell.jacobian(u, weights, prev, new)
            ahead = _apply(tuple(zip(*jacobian, strict=True)), total)
            of_u, parts = cell.gradients(u, weights, prev, new, total)
            _store(us, at, of_u)
            sums = _add(sums, parts)
        return ahead, sums

    zeros = tuple(jnp.zeros_like(x) for x in weights)
    start = tuple(carry[part] for part in range(cell.num_states))
    ahead, sums = layout.loop(walk, (start, zeros), backward=True)
    for part, value in enumerate(ahead):
        carry[part] = value
        for chunk in range(layout.chunks):
            of_first[part, :, chunk * LANES : (chunk + 1) * LANES] = value[chunk]
    for part, value in enumerate(sums):
        for chunk in range(layout.chunks):
            of_weights[part, :, chunk * LANES : (chunk + 1) * LANES] += value[chunk]
    for part in range(3):
        layout.turn_out(us.at[part], of_u_out.at[:, part])
