"""The ParaLSTM cell on arrays of any shape, and its Jacobian and gradients by hand.

A long short-term memory with coupled input and forget gates, peepholes and diagonal recurrent
weights: "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models" (arXiv
2510.21450), section 4. Operands are tuples: the input projections (f, o, c), the weights (a_f, a_o,
a_c, p_f, p_o), the state (c, h).
"""

import jax.numpy as jnp

from pallas_kernels.recurrent_tiles import Cell, sigmoid


def _forget_and_candidate(u, weights, prev):
    (u_f, _, u_c), (a_f, _, a_c, p_f, _), (c, h) = u, weights, prev
    return sigmoid(a_f * h + u_f + p_f * c), jnp.tanh(a_c * h + u_c)


def _output_gate(u, weights, prev, c_new):
    # The output gate looks at the new memory.
    return sigmoid(weights[1] * prev[1] + u[1] + weights[4] * c_new)


def step(u, weights, prev):
    """The state that follows `prev`."""
    f, candidate = _forget_and_candidate(u, weights, prev)
    c = candidate + f * (prev[0] - candidate)
    return c, _output_gate(u, weights, prev, c) * jnp.tanh(c)


def jacobian(u, weights, prev, new):
    """The derivative of `step` with respect to `prev`, as 2 x 2 blocks of diagonals.

    The memory of `new` stands for the one that `step` would give: they agree at the solution.
    """
    a_f, a_o, a_c, p_f, p_o = weights
    f, candidate = _forget_and_candidate(u, weights, prev)
    by_forget = (prev[0] - candidate) * f * (1 - f)
    c_c = f + by_forget * p_f
    c_h = by_forget * a_f + (1 - f) * (1 - candidate * candidate) * a_c
    o, tanh_c = _output_gate(u, weights, prev, new[0]), jnp.tanh(new[0])
    by_output = tanh_c * o * (1 - o)
    by_memory = by_output * p_o + o * (1 - tanh_c * tanh_c)
    return (c_c, c_h), (by_memory * c_c, by_output * a_o + by_memory * c_h)


def gradients(u, weights, prev, new, grad):
    """Gradients of grad . step with respect to `u`, and each step's part of that of `weights`."""
    (c, h), (g_memory, g_hidden), p_o = prev, grad, weights[4]
    f, candidate = _forget_and_candidate(u, weights, prev)
    o, tanh_c = _output_gate(u, weights, prev, new[0]), jnp.tanh(new[0])
    g_o = g_hidden * tanh_c * o * (1 - o)
    g_memory = g_memory + g_hidden * o * (1 - tanh_c * tanh_c) + g_o * p_o
    g_f = g_memory * (c - candidate) * f * (1 - f)
    g_c = g_memory * (1 - f) * (1 - candidate * candidate)
    return (g_f, g_o, g_c), (g_f * h, g_o * h, g_c * h, g_f * c, g_o * new[0])


CELL = Cell("fused_lstm", 2, 5, step, jacobian, gradients)
