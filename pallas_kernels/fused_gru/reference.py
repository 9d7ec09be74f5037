"""The ParaGRU cell on arrays of any shape, and its Jacobian and gradients by hand.

A gated recurrent unit with diagonal recurrent weights: "ParaRNN: Unlocking Parallel Training of
Nonlinear RNNs for Large Language Models" (arXiv 2510.21450), section 4. Operands are tuples: the
input projections (z, r, h), the weights (a_z, a_r, a_h), the state (h,).
"""

import jax.numpy as jnp

from pallas_kernels.recurrent_tiles import Cell, sigmoid


def _gates(u, weights, prev):
    (u_z, u_r, u_h), (a_z, a_r, a_h), (h,) = u, weights, prev
    z = sigmoid(a_z * h + u_z)
    r = sigmoid(a_r * h + u_r)
    return z, r, jnp.tanh(a_h * h * r + u_h)


def step(u, weights, prev):
    """The state that follows `prev`."""
    z, _, candidate = _gates(u, weights, prev)
    (h,) = prev
    return (h + z * (candidate - h),)


def jacobian(u, weights, prev, new):
    """The diagonal of the derivative of `step` with respect to `prev`, as a 1 x 1 block."""
    del new
    (a_z, a_r, a_h), (h,) = weights, prev
    z, r, candidate = _gates(u, weights, prev)
    by_update = (candidate - h) * z * (1 - z) * a_z
    by_candidate = z * (1 - candidate * candidate) * a_h * (r + h * r * (1 - r) * a_r)
    return ((1 - z + by_update + by_candidate,),)


def gradients(u, weights, prev, new, grad):
    """Gradients of grad . step with respect to `u`, and each step's part of that of `weights`."""
    del new
    (_, _, a_h), (h,), (g,) = weights, prev, grad
    z, r, candidate = _gates(u, weights, prev)
    g_z = g * (candidate - h) * z * (1 - z)
    g_h = g * z * (1 - candidate * candidate)
    g_r = g_h * a_h * h * r * (1 - r)
    return (g_z, g_r, g_h), (g_z * h, g_r * h, g_h * h * r)


CELL = Cell("fused_gru", 1, 3, step, jacobian, gradients)
