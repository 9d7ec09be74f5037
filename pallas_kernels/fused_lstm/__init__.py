"""A ParaLSTM layer's recurrence, solved in parallel over time or step by step.

"ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models" (arXiv
2510.21450), sections 3 and 4. What the two fused cells share is beside them: `recurrent_tiles` (the
methods in plain jnp, the adjoint), `recurrent_tiles_tpu` (the TPU kernels, which take a cell's
`reference` functions as they are) and `recurrent_tiles_gpu`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import doors, recurrent_tiles
from pallas_kernels.fused_lstm.reference import CELL

__all__ = ["fused_lstm"]


def fused_lstm(
    u: jax.Array,
    a: jax.Array,
    peephole: jax.Array,
    *,
    state0: tuple[jax.Array, jax.Array] | None = None,
    num_iterations: int = 3,
    damping: float = 1.0,
    method: str = "auto",
    tile: int = 128,
    implementation: str | None = None,
    channel_axes: tuple[str, ...] = doors.CHANNEL_AXES,
) -> tuple[jax.Array, jax.Array]:
    """Returns memories and states of an LSTM with coupled gates and diagonal recurrent weights.

    f = sigmoid(a_f h' + u_f + p_f c'), c = f c' + (1 - f) tanh(a_c h' + u_c),
    o = sigmoid(a_o h' + u_o + p_o c), h = o tanh(c), where c' and h' are those of the step before.
    The arithmetic is float32 (float64 if an operand is). Differentiable in reverse mode: the exact
    adjoint at the states returned, for which the operands and the states are saved and nothing
    else.

    Args:
      u: (B, T, 3, H) input projections in the order f, o, c.
      a: (3, H) recurrent weights in the same order.
      peephole: (2, H) weights p_f and p_o of the memory in the gates.
      state0: initial (c, h), each (B, H); None is zeros.
      num_iterations: Newton iterations. After k of them the first k + 1 steps of each tile are
        exact; with max |a| above 1 they may diverge.
      damping: factor of each Newton correction, between 0 and 2.
      method: "newton", "sequential" (one pass over time, exact), or "auto": sequential where a
        kernel serves, Newton otherwise.
      tile: steps that Newton's method solves at once, from the exact end of the tile before. The
        kernels take up to 256: multiples of 8 on TPU, powers of two on GPU.
      implementation: None | "xla" | "mosaic_tpu" | "triton".
      channel_axes: mesh axes that split H, if they divide it, where a kernel runs under
        `jax.set_mesh`; all others that divide B split the batch.

    Returns:
      (c, h), each (B, T, H) in u's dtype.

    Raises:
      ValueError: for shapes that do not fit one another, no step at all, a dtype that is not
        floating, or an option out of range.
      NotImplementedError: if a named implementation cannot serve the call, with the reason.
    """
    u, a, peephole = jnp.asarray(u), jnp.asarray(a), jnp.asarray(peephole)
    c0, h0 = (None, None) if state0 is None else map(jnp.asarray, state0)
    weights = {"a": (a, 3), "peephole": (peephole, 2)}
    options = {"num_iterations": num_iterations, "damping": damping, "tile": tile}
    states = {"state0[0]": c0, "state0[1]": h0}
    recurrent_tiles.checked(u, weights, states, method=method, **options)
    float64 = jnp.result_type(u, a, peephole) == jnp.float64
    config = recurrent_tiles.configure(
        CELL,
        u,
        method=method,
        implementation=implementation,
        channel_axes=channel_axes,
        float64=float64,
        **options,
    )
    zeros = jnp.zeros((2, u.shape[0], u.shape[-1]), a.dtype)
    first = zeros if state0 is None else jnp.stack([c0, h0])
    c, h = recurrent_tiles.solve(config, u, jnp.concatenate([a, peephole]), first)
    return c, h
