"""Fused recurrent cells on NVIDIA GPUs: forward by either method, and the adjoint, in Triton.

One program takes one row of the batch and a block of channels, which lie side by side in memory,
and walks over time with the state in registers: the projections are read once and the states
written once, whatever the number of iterations. Newton's method solves a tile of steps at once, the
sequential pass and the adjoint go step by step and have the operands of the next steps on their way
meanwhile.

A cell's own functions take tuples of blocks (steps, channels), as those of its `reference` take
tuples of arrays; its Jacobian is one tuple, row after row.
"""

import importlib

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import doors
from pallas_kernels.linear_recurrence.gpu import compose1, compose2, last_step
from pallas_kernels.recurrent_tiles import Config

GROUP = 8  # steps whose operands a thread asks for while it computes the steps before


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 2 / (1 + tl.exp(-2 * x)) - 1


@triton.jit
def _steps(start, count: tl.constexpr):
    return (start + tl.arange(0, count))[:, None].to(tl.int64)


@triton.jit
def _channels(block: tl.constexpr):
    return (tl.program_id(1) * block + tl.arange(0, block))[None, :]


@triton.jit
def _load(ptr, row, channel, rows: tl.constexpr, channels: tl.constexpr, count: tl.constexpr):
    """A tuple of all `count` parts of rows of an array (rows, count, channels); zero outside."""
    inside = (row >= 0) & (row < rows) & (channel < channels)
    parts = ()
    for part in tl.static_range(count):
        at = (row * count + part) * channels + channel
        value = tl.load(ptr + at, mask=inside, other=0.0)
        parts = parts + (value.to(tl.float32),)  # noqa: RUF005
    return parts


@triton.jit
def _load_each(ptrs, row, channel, rows: tl.constexpr, channels: tl.constexpr):
    """A tuple of the rows of several arrays (rows, channels)."""
    parts = ()
    for part in tl.static_range(len(ptrs)):
        parts = parts + _load(ptrs[part], row, channel, rows, channels, 1)
    return parts


@triton.jit
def _save(ptr, values, row, channel, rows: tl.constexpr, channels: tl.constexpr):
    """The contrary of `_load`."""
    count: tl.constexpr = len(values)
    inside = (row >= 0) & (row < rows) & (channel < channels)
    for part in tl.static_range(count):
        at = (row * count + part) * channels + channel
        tl.store(ptr + at, values[part].to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _save_each(ptrs, values, row, channel, rows: tl.constexpr, channels: tl.constexpr):
    for part in tl.static_range(len(ptrs)):
        _save(ptrs[part], (values[part],), row, channel, rows, channels)


@triton.jit
def _moved(ptrs, offset):
    moved = ()
    for part in tl.static_range(len(ptrs)):
        moved = moved + (ptrs[part] + offset,)  # noqa: RUF005
    return moved


@triton.jit
def _combined(x, y, factor: tl.constexpr):
    """x + factor y."""
    total = ()
    for part in tl.static_range(len(x)):
        total = total + (x[part] + factor * y[part],)  # noqa: RUF005
    return total


@triton.jit
def _chosen(condition, x, y):
    chosen = ()
    for part in tl.static_range(len(x)):
        chosen = chosen + (tl.where(condition, x[part], y[part]),)  # noqa: RUF005
    return chosen


@triton.jit
def _shifted(x, block: tl.constexpr):
    """Each step's value of the step before; the first one keeps its own."""
    before = tl.maximum(tl.arange(0, block) - 1, 0)[:, None].broadcast_to(x[0].shape)
    shifted = ()
    for part in tl.static_range(len(x)):
        shifted = shifted + (tl.gather(x[part], before, 0),)  # noqa: RUF005
    return shifted


@triton.jit
def _last(x, block: tl.constexpr):
    """The last step's values."""
    last = ()
    for part in tl.static_range(len(x)):
        last = last + (last_step(x[part], block)[None, :],)  # noqa: RUF005
    return last


@triton.jit
def _linear(jacobian, b):
    """All d_t = J_t d_(t-1) + b_t of a tile, with d_0 = 0."""
    if len(b) == 1:
        _, d = tl.associative_scan((jacobian[0], b[0]), 0, compose1)
        return (d,)
    else:
        scanned = tl.associative_scan(
            (jacobian[0], jacobian[1], jacobian[2], jacobian[3], b[0], b[1]), 0, compose2
        )
        return scanned[4], scanned[5]


@triton.jit
def _transposed(jacobian, x):
    if len(x) == 1:
        return (jacobian[0] * x[0],)
    else:
        return (
            jacobian[0] * x[0] + jacobian[2] * x[1],
            jacobian[1] * x[0] + jacobian[3] * x[1],
        )


@triton.jit
def _once(ptr, channel, channels: tl.constexpr, count: tl.constexpr):
    """Parts of this program's row of an array (B, count, channels), for all its steps."""
    ptr += tl.program_id(0).to(tl.int64) * count * channels
    return _load(ptr, _steps(0, 1), channel, 1, channels, count)


@triton.jit
def _save_once(ptr, values, channel, channels: tl.constexpr):
    ptr += tl.program_id(0).to(tl.int64) * len(values) * channels
    _save(ptr, values, _steps(0, 1), channel, 1, channels)


@triton.jit
def newton_body(
    step: tl.constexpr, jacobian: tl.constexpr,
    u_ptr, weights_ptr, first_ptr, out_ptrs,
    steps: tl.constexpr, channels: tl.constexpr, num_weights: tl.constexpr,
    num_iterations: tl.constexpr, damping: tl.constexpr,
    block_time: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """The body of a cell's kernel: `recurrent_tiles.newton`.

    Args:
      step, jacobian: of the cell.
      u_ptr: (B, steps, 3, channels).
      weights_ptr: (B, num_weights, channels).
      first_ptr: (B, m, channels).
      out_ptrs: m times (B, steps, channels).
    """
    channel = _channels(block_channels)
    size = tl.program_id(0).to(tl.int64) * steps * channels
    u_ptr += 3 * size
    out_ptrs = _moved(out_ptrs, size)
    weights = _once(weights_ptr, channel, channels, num_weights)
    incoming = _once(first_ptr, channel, channels, len(out_ptrs))
    is_first = (tl.arange(0, block_time) == 0)[:, None]
    for start in range(0, steps, block_time):
        t = _steps(start, block_time)
        u = _load(u_ptr, t, channel, steps, channels, 3)
        zeros = (tl.zeros((block_time, block_channels), tl.float32),) * len(out_ptrs)
        new = step(u, weights, _chosen(is_first, incoming, zeros))
        for _ in range(num_iterations):
            prev = _chosen(is_first, incoming, _shifted(new, block_time))
            residual = _combined(step(u, weights, prev), new, -1.0)
            delta = _linear(jacobian(u, weights, prev, new), residual)
            new = _combined(new, delta, damping)
        _save_each(out_ptrs, new, t, channel, steps, channels)
        incoming = _last(new, block_time)


@triton.jit
def sequential_body(
    step: tl.constexpr,
    u_ptr, weights_ptr, first_ptr, out_ptrs,
    steps: tl.constexpr, channels: tl.constexpr, num_weights: tl.constexpr,
    group: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """The body of a cell's kernel: `recurrent_tiles.sequential`; arguments as for `newton`."""
    channel = _channels(block_channels)
    size = tl.program_id(0).to(tl.int64) * steps * channels
    u_ptr += 3 * size
    out_ptrs = _moved(out_ptrs, size)
    weights = _once(weights_ptr, channel, channels, num_weights)
    state = _once(first_ptr, channel, channels, len(out_ptrs))
    following = _forward_group(u_ptr, 0, channel, steps, channels, group)
    for start in range(0, steps, group):
        us = following
        following = _forward_group(u_ptr, start + group, channel, steps, channels, group)
        for k in tl.static_range(group):
            state = step(us[k], weights, state)
            _save_each(out_ptrs, state, _steps(start + k, 1), channel, steps, channels)


@triton.jit
def _forward_group(
    u_ptr, start, channel, steps: tl.constexpr, channels: tl.constexpr, count: tl.constexpr
):
    group = ()
    for k in tl.static_range(count):
        u = _load(u_ptr, _steps(start + k, 1), channel, steps, channels, 3)
        group = group + (u,)  # noqa: RUF005
    return group


@triton.jit
def adjoint_body(
    jacobian: tl.constexpr, gradients: tl.constexpr,
    u_ptr, weights_ptr, first_ptr, state_ptrs, grad_ptrs, of_u_ptr, of_weights_ptr, of_first_ptr,
    steps: tl.constexpr, channels: tl.constexpr, num_weights: tl.constexpr,
    group: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """The body of a cell's kernel: `recurrent_tiles.adjoint`, from the last step to the first.

    Args:
      jacobian, gradients: of the cell.
      u_ptr, of_u_ptr: (B, steps, 3, channels).
      weights_ptr, of_weights_ptr: (B, num_weights, channels), each row's own.
      first_ptr, of_first_ptr: (B, m, channels).
      state_ptrs, grad_ptrs: m times (B, steps, channels).
    """
    channel = _channels(block_channels)
    size = tl.program_id(0).to(tl.int64) * steps * channels
    u_ptr += 3 * size
    of_u_ptr += 3 * size
    state_ptrs, grad_ptrs = _moved(state_ptrs, size), _moved(grad_ptrs, size)
    weights = _once(weights_ptr, channel, channels, num_weights)
    first = _once(first_ptr, channel, channels, len(state_ptrs))
    zeros = tl.zeros((1, block_channels), tl.float32)
    ahead, sums = (zeros,) * len(state_ptrs), (zeros,) * num_weights
    # Steps behind the last one have no gradient, so that nothing comes of them.
    end: tl.constexpr = (steps + group - 1) // group * group
    new = _load_each(state_ptrs, _steps(end - 1, 1), channel, steps, channels)
    following = _adjoint_group(
        u_ptr, state_ptrs, grad_ptrs, end - group, channel, steps, channels, group
    )
    for done in range(0, end, group):
        start = end - group - done
        operands = following
        following = _adjoint_group(
            u_ptr, state_ptrs, grad_ptrs, start - group, channel, steps, channels, group
        )
        for k in tl.static_range(group - 1, -1, -1):
            t = _steps(start + k, 1)
            u, before, grad = operands[k]
            prev = _chosen(t == 0, first, before)
            total = _combined(grad, ahead, 1.0)
            ahead = _transposed(jacobian(u, weights, prev, new), total)
            of_u, of_weights = gradients(u, weights, prev, new, total)
            _save(of_u_ptr, of_u, t, channel, steps, channels)
            sums = _combined(sums, of_weights, 1.0)
            new = prev
    _save_once(of_weights_ptr, sums, channel, channels)
    _save_once(of_first_ptr, ahead, channel, channels)


@triton.jit
def _adjoint_group(
    u_ptr, state_ptrs, grad_ptrs, start, channel,
    steps: tl.constexpr, channels: tl.constexpr, count: tl.constexpr,
):  # fmt: skip
    """The projections, the state before, and the gradient of the state of each step."""
    group = ()
    for k in tl.static_range(count):
        t = _steps(start + k, 1)
        u = _load(u_ptr, t, channel, steps, channels, 3)
        before = _load_each(state_ptrs, t - 1, channel, steps, channels)
        grad = _load_each(grad_ptrs, t, channel, steps, channels)
        group = group + ((u, before, grad),)  # noqa: RUF005
    return group


def launch(config: Config, kind: str, steps: int):
    """Returns the compile-time arguments of a kernel beside the sizes, and its number of warps.

    Args:
      config: the call.
      kind: "newton", "sequential" or "adjoint".
      steps: T.
    """
    if kind != "newton":
        return {"group": GROUP, "block_channels": 32}, 1
    block_time = triton.next_power_of_2(min(config.tile, steps))
    constants = {
        "num_iterations": config.num_iterations,
        "damping": config.damping,
        "block_time": block_time,
        "block_channels": 16,
    }
    return constants, min(max(block_time // 16, 1), 8)


def forward(config: Config, u, weights, first):
    """`recurrent_tiles.newton` or `.sequential` as a kernel.

    Args:
      config: the call.
      u: (B, T, 3, H).
      weights: (B, num_weights, H).
      first: (B, m, H).

    Returns:
      the states, m arrays (B, T, H) in u's dtype.
    """
    batch, steps, _, channels = u.shape
    states = [jax.ShapeDtypeStruct((batch, steps, channels), u.dtype)] * config.cell.num_states
    return tuple(_call(config, config.method, states, u, weights, first))


def adjoint(config: Config, u, weights, first, *states_and_grads):
    """`recurrent_tiles.adjoint` as a kernel.

    Args:
      config, u, weights, first: as for `forward`.
      states_and_grads: m arrays (B, T, H) of states, then as many of their gradients.

    Returns:
      the gradients of `u`, of `weights` for each row of the batch, and of `first`, with the shapes
      of these; the first in u's dtype, the others float32.
    """
    found = [
        jax.ShapeDtypeStruct(u.shape, u.dtype),
        jax.ShapeDtypeStruct(weights.shape, jnp.float32),
        jax.ShapeDtypeStruct(first.shape, jnp.float32),
    ]
    return tuple(_call(config, "adjoint", found, u, weights, first, *states_and_grads))


def _call(config, kind, out_shape, u, *operands):
    import jax_triton

    batch, steps, _, channels = u.shape
    constants, num_warps = launch(config, kind, steps)
    kernels = importlib.import_module(f"pallas_kernels.{config.cell.name}.gpu")
    name = f"{config.cell.name}_{kind}"
    return jax_triton.triton_call(
        u,
        *operands,
        kernel=getattr(kernels, name),
        out_shape=out_shape,
        grid=(batch, triton.cdiv(channels, constants["block_channels"])),
        name=name,
        num_warps=num_warps,
        compute_capability=doors.compute_capability(),
        steps=steps,
        channels=channels,
        **constants,
    )
