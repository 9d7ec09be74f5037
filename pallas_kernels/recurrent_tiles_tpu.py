"""Fused recurrent cells on TPU: forward by either method, and the adjoint, each in one pass.

Eight batch rows lie along the sublanes and channels along the lanes, so that a step of time is
whole registers and nothing crosses lanes. Tiles come in with time along the sublanes and are turned
by strided stores. Newton's linear recurrence runs as a loop over the steps of its tile: its chain
is one multiply-add a step (four for 2 x 2 blocks), and the gates of all steps, which cost more,
do not wait for it. All else stays in fast memory: the projections are read once and the states
written once, whatever the number of iterations.
"""

import functools
import math

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
    if math.prod(doors.free_axes().values()) > 1:
        return "the compiler cannot partition it over a mesh; call it inside a shard_map"
    return doors.not_on_platform("tpu")


def forward(config: Config, u, weights, first, *, interpret=False):
    """`recurrent_tiles.newton` or `.sequential` as a kernel; the states in u's dtype."""
    layout = _Layout(config, u)
    cell, m = config.cell, config.cell.num_states
    body = functools.partial(_forward_kernel, config=config, layout=layout)
    states = pl.pallas_call(
        body,
        grid=layout.grid,
        in_specs=[*layout.parts(3), layout.rows(cell.num_weights), layout.state(m)],
        out_specs=layout.states(m),
        out_shape=jax.ShapeDtypeStruct((m, *layout.shape), u.dtype),
        scratch_shapes=[layout.scratch(3), layout.scratch(m), layout.carry(m)],
        compiler_params=_params(),
        cost_estimate=layout.cost(3 + m, u.dtype, 4 if config.method == "newton" else 1),
        interpret=interpret,
        name=cell.name,
    )(*layout.projections(u), layout.wide(weights), layout.first(first))
    return layout.cut(states)


def adjoint(config: Config, u, weights, first, states, grad, *, interpret=False):
    """`recurrent_tiles.adjoint` as a kernel."""
    layout = _Layout(config._replace(method="sequential"), u, backward=True)
    cell, m, n = config.cell, config.cell.num_states, config.cell.num_weights
    states, grad = layout.pad_states(states), layout.pad_states(grad)
    before = pl.BlockSpec(
        (m, ROWS, ROWS, layout.channels),
        lambda b, c, t: (0, b, jnp.maximum(layout.time(t) * (layout.tile // ROWS) - 1, 0), c),
    )
    batch, _, width = layout.shape
    *of_u, of_weights, of_first = pl.pallas_call(
        functools.partial(_adjoint_kernel, config=config, layout=layout),
        grid=layout.grid,
        in_specs=[
            *layout.parts(3),
            layout.rows(n),
            layout.state(m),
            layout.states(m),
            before,
            layout.states(m),
        ],
        out_specs=[*[layout.states()] * 3, layout.state(n), layout.state(m)],
        out_shape=[
            *[jax.ShapeDtypeStruct(layout.shape, u.dtype)] * 3,
            jax.ShapeDtypeStruct((n, batch, width), jnp.float32),
            jax.ShapeDtypeStruct((m, batch, width), jnp.float32),
        ],
        scratch_shapes=[layout.scratch(3), layout.scratch(m), layout.scratch(m), layout.carry(m)],
        compiler_params=_params(),
        cost_estimate=layout.cost(6 + 2 * m, u.dtype, 1),
        interpret=interpret,
        name=f"{cell.name}_adjoint",
    )(*layout.projections(u), layout.wide(weights), layout.first(first), states, states, grad)
    of_u = jnp.stack([layout.cut(x) for x in of_u], axis=2)
    b, h = u.shape[0], u.shape[-1]
    return of_u, of_weights.sum(1)[:, :h], of_first[:, :b, :h]


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
        self.backward = backward

    def time(self, t):
        return self.tiles - 1 - t if self.backward else t

    def projections(self, u):
        """Three times (B, T, 3 H): each projection is a window of its own on one array."""
        whole = self.shape
        widths = [(0, w - g) for w, g in zip(whole, self.given, strict=True)]
        u = jnp.pad(u, (widths[0], widths[1], (0, 0), widths[2]))
        return [u.reshape(*whole[:2], 3 * whole[2])] * 3

    def parts(self, count):
        blocks = self.grid[1]
        return [
            pl.BlockSpec(
                (ROWS, self.tile, self.channels),
                lambda b, c, t, part=part: (b, self.time(t), part * blocks + c),
            )
            for part in range(count)
        ]

    def rows(self, count):
        return pl.BlockSpec((count, ROWS, self.channels), lambda b, c, t: (0, 0, c))

    def wide(self, weights):
        weights = jnp.pad(
            weights.astype(jnp.float32), ((0, 0), (0, self.shape[2] - weights.shape[1]))
        )
        return jnp.broadcast_to(weights[:, None], (len(weights), ROWS, self.shape[2]))

    def state(self, count):
        return pl.BlockSpec((count, ROWS, self.channels), lambda b, c, t: (0, b, c))

    def first(self, first):
        widths = [(0, self.shape[i] - self.given[i]) for i in (0, 2)]
        return jnp.pad(first.astype(jnp.float32), ((0, 0), *widths))

    def states(self, count=None):
        block = (ROWS, self.tile, self.channels)
        if count is None:
            return pl.BlockSpec(block, lambda b, c, t: (b, self.time(t), c))
        return pl.BlockSpec((count, *block), lambda b, c, t: (0, b, self.time(t), c))

    def pad_states(self, states):
        widths = [(0, w - g) for w, g in zip(self.shape, self.given, strict=True)]
        return jnp.pad(states, ((0, 0), *widths))

    def cut(self, x):
        batch, steps, width = self.given
        return x[..., :batch, :steps, :width]

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


def _forward_kernel(u_0, u_1, u_2, rows, first, out, us, states, carry, *, config, layout):
    cell = config.cell
    weights = layout.by_chunk(rows[...])

    @pl.when(pl.program_id(2) == 0)
    def _():
        for part, value in enumerate(layout.by_chunk(first[...])):
            carry[part] = value

    for part, block in enumerate((u_0, u_1, u_2)):
        layout.turn_in(block, us.at[part])
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
    for part in range(cell.num_states):
        layout.turn_out(states.at[part], out.at[part])


def _adjoint_kernel(
    u_0,
    u_1,
    u_2,
    rows,
    first,
    states_in,
    before,
    grad_in,
    of_u_0,
    of_u_1,
    of_u_2,
    of_weights,
    of_first,
    us,
    states,
    grads,
    carry,
    *,
    config,
    layout,
):
    cell, step = config.cell, pl.program_id(2)
    weights = layout.by_chunk(rows[...])

    @pl.when(step == 0)
    def _():
        carry[...] = jnp.zeros_like(carry)
        of_weights[...] = jnp.zeros_like(of_weights)

    for part, block in enumerate((u_0, u_1, u_2)):
        layout.turn_in(block, us.at[part])
    for part in range(cell.num_states):
        layout.turn_in(states_in.at[part], states.at[part])
        layout.turn_in(grad_in.at[part], grads.at[part])
    # The state before this tile: the initial one, or the last row of the tile before.
    earlier = layout.by_chunk(before[...][:, :, ROWS - 1, :].astype(jnp.float32))
    is_first = step == layout.tiles - 1
    incoming = tuple(
        jnp.where(is_first, x, y) for x, y in zip(layout.by_chunk(first[...]), earlier, strict=True)
    )

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
    for part, block in enumerate((of_u_0, of_u_1, of_u_2)):
        layout.turn_out(us.at[part], block)
