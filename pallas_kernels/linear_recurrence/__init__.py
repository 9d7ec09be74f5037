"""Linear recurrences h_t = A_t h_{t-1} + b_t: the primitive of everything that scans over time.

The parallel reduction of "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language
Models" (arXiv 2510.21450), section 3, for its three structures of Jacobians: diagonal, blocks of
diagonals, dense; and the linear state-space layer it is measured against. Its gradient is one
recurrence more, in the other direction.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import doors
from pallas_kernels.linear_recurrence import reference, sharded, tpu

__all__ = ["linear_recurrence", "sharded_linear_recurrence"]

METHODS = ("auto", "scan", "sequential")
MOST_BLOCKS, MOST_TRITON_BLOCKS = 4, 3


def linear_recurrence(
    a: jax.Array,
    b: jax.Array,
    *,
    h0: jax.Array | None = None,
    reverse: bool = False,
    method: str = "auto",
    implementation: str | None = None,
    block_sizes: Any = None,
    channel_axes: tuple[str, ...] = doors.CHANNEL_AXES,
) -> jax.Array:
    """Returns all states h_t = A_t h_{t-1} + b_t of a linear recurrence.

    The arithmetic is float32, or float64 if an operand is. Differentiable in `a`, `b` and `h0` in
    reverse mode; what is saved for it are `a`, `h0` and the result.

    Args:
      a: the transitions: (B, T, H) diagonal; (B, T, m, m, H) with m from 1 to 4, where
        a[..., i, j, :] is the diagonal of block (i, j); or (B, T, H, H) dense.
      b: (B, T, H), or (B, T, m, H) for blocks.
      h0: (B, H), or (B, m, H): the state that the first A multiplies; None is zeros.
      reverse: h_t = A_t h_{t+1} + b_t, from the last step to the first; `h0` is then the state
        behind the last step.
      method: XLA's algorithm: "scan" is an associative scan of depth log T, "sequential" a loop
        over time; "auto" chooses. The kernels have an algorithm of their own: to name a method and
        no implementation is to ask for XLA's.
      implementation: None | "xla" | "mosaic_tpu" | "triton".
      block_sizes: a `tpu.BlockSizes` or `gpu.BlockSizes` for the kernels; None takes the chip's.
      channel_axes: mesh axes that split H, if they divide it, where a kernel runs under
        `jax.set_mesh`; all others that divide B split the batch.

    Returns:
      the states, with shape and dtype of `b`.

    Raises:
      ValueError: for shapes that do not fit one another, no step at all, a dtype that is not
        floating, or an unknown method or implementation.
      NotImplementedError: if a named implementation cannot serve the call, with the reason.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, METHODS))}")
    a, b, h0 = _checked(a, b, h0)
    named = implementation is not None
    implementation = doors.choose_implementation(implementation, _refusals(a, b, method, named))
    if b.size == 0:
        return b
    if implementation == "xla" and method == "auto":
        method = _faster_method(a)
    run = _runner(implementation, method, block_sizes, tuple(channel_axes))
    return _recurrence(run, bool(reverse), *sharded.varying_alike(a, b, h0))


def sharded_linear_recurrence(
    a: jax.Array,
    b: jax.Array,
    axis_name: str,
    *,
    h0: jax.Array | None = None,
    reverse: bool = False,
    method: str = "auto",
    implementation: str | None = None,
    block_sizes: Any = None,
    channel_axes: tuple[str, ...] = doors.CHANNEL_AXES,
) -> jax.Array:
    """`linear_recurrence` inside a `shard_map` that splits the steps over a mesh axis.

    Every device reduces its own steps to one transition and one offset, gathers those of all
    devices, and runs its steps from the state that the devices before it lead to. Differentiable
    like `linear_recurrence`.

    Args:
      a, b: the device's own steps, as for `linear_recurrence`; all devices have as many.
      axis_name: of the mesh axis; its order is that of time.
      h0: the state before the first step of the first device, or behind the last step of the last
        one with `reverse`; the same on all devices of the axis.
      reverse, method, implementation, block_sizes, channel_axes: as for `linear_recurrence`.

    Returns:
      the device's own states, with shape and dtype of `b`.

    Raises:
      ValueError, NotImplementedError: as `linear_recurrence`.
      NameError: outside of a `shard_map` over `axis_name`.
    """
    a, b, h0 = sharded.varying_alike(*_checked(a, b, h0))
    start = sharded.carried_in(a, b, h0, axis_name, reverse=reverse)
    return linear_recurrence(
        a,
        b,
        h0=start,
        reverse=reverse,
        method=method,
        implementation=implementation,
        block_sizes=block_sizes,
        channel_axes=channel_axes,
    )


def _checked(a, b, h0):
    a, b = jnp.asarray(a), jnp.asarray(b)
    for name, x in (("a", a), ("b", b)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {x.dtype}, expected a floating one")
    if a.ndim not in (reference.DIAGONAL, reference.DENSE, reference.BLOCK):
        raise ValueError(
            f"a has shape {a.shape}, expected (B, T, H), (B, T, m, m, H) or (B, T, H, H)"
        )
    expected = {
        reference.DIAGONAL: a.shape,
        reference.DENSE: a.shape[:3],
        reference.BLOCK: (*a.shape[:2], *a.shape[3:]),
    }[a.ndim]
    if b.shape != expected:
        raise ValueError(f"b has shape {b.shape}, expected {expected} for a of shape {a.shape}")
    if a.ndim != reference.DIAGONAL and a.shape[2] != a.shape[3]:
        raise ValueError(f"a has shape {a.shape}, expected square blocks in its axes 2 and 3")
    if a.ndim == reference.BLOCK and not 1 <= a.shape[2] <= MOST_BLOCKS:
        raise ValueError(f"a has {a.shape[2]} x {a.shape[2]} blocks, expected 1 to {MOST_BLOCKS}")
    if a.shape[1] == 0:
        raise ValueError(f"a of shape {a.shape} has T = 0 steps, expected at least one")
    state_shape = (b.shape[0], *b.shape[2:])
    dtype = reference.compute_dtype(a, b)
    if h0 is None:
        return a, b, jnp.zeros(state_shape, dtype)
    h0 = jnp.asarray(h0)
    if not jnp.issubdtype(h0.dtype, jnp.floating):
        raise ValueError(f"h0 has dtype {h0.dtype}, expected a floating one")
    if h0.shape != state_shape:
        raise ValueError(f"h0 has shape {h0.shape}, expected {state_shape}")
    return a, b, h0.astype(dtype)


def _refusals(a, b, method, named):
    def kernel(reason):
        def refuse():
            if a.ndim == reference.DENSE:
                return "a is dense, and kernels take diagonal and block-diagonal transitions"
            if method != "auto" and not named:
                return f"method={method!r} is an algorithm of XLA's"
            return reason()

        return refuse

    return {
        "xla": lambda: None,
        "mosaic_tpu": kernel(functools.partial(tpu.refusal, (a.dtype, b.dtype))),
        "triton": kernel(functools.partial(_triton_refusal, a, b)),
    }


def _triton_refusal(a, b):
    if a.ndim == reference.BLOCK and a.shape[2] > MOST_TRITON_BLOCKS:
        return f"a has {a.shape[2]} x {a.shape[2]} blocks, more than {MOST_TRITON_BLOCKS}"
    if reference.compute_dtype(a, b) != jnp.float32:
        return "its arithmetic is float32"
    return doors.triton_refusal()


def _faster_method(a):
    return "sequential" if a.ndim == reference.DENSE else "scan"


@functools.lru_cache(maxsize=64)
def _runner(implementation, method, block_sizes, channel_axes):
    """The function of (a, b, h0, reverse, adjoint), made once so that it is compiled once."""
    if implementation == "xla":
        return functools.partial(_run_xla, getattr(reference, method))
    return functools.partial(_run_kernel, implementation, block_sizes, channel_axes)


def _run_xla(algorithm, a, b, h0, *, reverse, adjoint=False):
    if adjoint:
        a = reference.adjoint_operands(a, reverse=reverse)
    return algorithm(a, b, h0, reverse=reverse)


def _run_kernel(implementation, block_sizes, channel_axes, a, b, h0, *, reverse, adjoint=False):
    return _kernel(implementation, block_sizes, channel_axes, reverse, adjoint)(a, b, h0)


@functools.lru_cache(maxsize=64)
def _kernel(implementation, block_sizes, channel_axes, reverse, adjoint):
    if implementation == "mosaic_tpu":
        kernel = tpu.recurrence
    else:
        from pallas_kernels.linear_recurrence.gpu import recurrence as kernel
    options = {"reverse": reverse, "adjoint": adjoint, "block_sizes": block_sizes}
    return doors.over_batch(functools.partial(kernel, **options), channel_axes=channel_axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recurrence(run, reverse, a, b, h0):
    return run(a, b, h0, reverse=reverse)


def _forward(run, reverse, a, b, h0):
    h = run(a, b, h0, reverse=reverse)
    return h, (a, h, h0)


def _backward(run, reverse, saved, g):
    a, h, h0 = saved
    rank, dtype = a.ndim, h0.dtype
    first = -1 if reverse else 0
    # The gradient of each state goes on through the step that runs next: the other direction.
    a, g, zeros = sharded.varying_alike(a, g, jnp.zeros(h0.shape, dtype))
    grad_b = run(a, g, zeros, reverse=not reverse, adjoint=True)
    before = reference.shifted(h, h0, reverse=reverse)
    grad_a = reference.outer(grad_b.astype(dtype), before.astype(dtype), rank).astype(a.dtype)
    grad_h0 = reference.apply(
        reference.transposed(a[:, first], rank).astype(dtype), grad_b[:, first].astype(dtype), rank
    )
    return grad_a, grad_b, grad_h0


_recurrence.defvjp(_forward, _backward)
