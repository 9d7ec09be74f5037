"""A ParaGRU layer's recurrence, solved in parallel over time or step by step.

"ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models" (arXiv
2510.21450), sections 3 and 4. What the two fused cells share is beside them: `recurrent_tiles` (the
methods in plain jnp, the adjoint), `recurrent_tiles_tpu` (the TPU kernels, which take a cell's
`reference` functions as they are) and `recurrent_tiles_gpu`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import doors, recurrent_tiles
from pallas_kernels.fused_gru.reference import CELL

__all__ = ["fused_gru"]


def fused_gru(
    u: jax.Array,
    a: jax.Array,
    *,
    h0: jax.Array | None = None,
    num_iterations: int = 3,
    damping: float = 1.0,
    method: str = "auto",
    tile: int = 128,
    implementation: str | None = None,
    channel_axes: tuple[str, ...] = doors.CHANNEL_AXES,
) -> jax.Array:
    """Returns the states of a gated recurrent unit with diagonal recurrent weights.

    z = sigmoid(a_z h' + u_z), r = sigmoid(a_r h' + u_r), c = tanh(a_h h' r + u_h),
    h = (1 - z) h' + z c, where h' is the state before. The arithmetic is float32 (float64 if an
    operand is). Differentiable in reverse mode: the exact adjoint at the states returned, for which
    the operands and the states are saved and nothing else.

    Args:
      u: (B, T, 3, H) input projections in the order z, r, h.
      a: (3, H) recurrent weights.
      h0: (B, H) initial state; None is zeros.
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
      (B, T, H) in u's dtype.

    Raises:
      ValueError: for shapes that do not fit one another, no step at all, a dtype that is not
        floating, or an option out of range.
      NotImplementedError: if a named implementation cannot serve the call, with the reason.
    """
    u, a = jnp.asarray(u), jnp.asarray(a)
    h0 = h0 if h0 is None else jnp.asarray(h0)
    options = {"num_iterations": num_iterations, "damping": damping, "tile": tile}
    recurrent_tiles.checked(u, {"a": (a, 3)}, {"h0": h0}, method=method, **options)
    float64 = jnp.result_type(u, a) == jnp.float64
    config = recurrent_tiles.configure(
        CELL,
        u,
        method=method,
        implementation=implementation,
        channel_axes=channel_axes,
        float64=float64,
        **options,
    )
    first = jnp.zeros((u.shape[0], u.shape[-1]), a.dtype) if h0 is None else h0
    return recurrent_tiles.solve(config, u, a, first[None])[0]
