"""The ParaLSTM cell in Triton: what `reference` does to arrays, on blocks of steps and channels."""

import triton
import triton.language as tl

from pallas_kernels.recurrent_tiles_gpu import (
    adjoint_body,
    newton_body,
    sequential_body,
    sigmoid,
    tanh,
)


@triton.jit
def _forget_and_candidate(u, weights, prev):
    f = sigmoid(weights[0] * prev[1] + u[0] + weights[3] * prev[0])
    return f, tanh(weights[2] * prev[1] + u[2])


@triton.jit
def _output_gate(u, weights, prev, c_new):
    return sigmoid(weights[1] * prev[1] + u[1] + weights[4] * c_new)


@triton.jit
def step(u, weights, prev):
    f, candidate = _forget_and_candidate(u, weights, prev)
    c = candidate + f * (prev[0] - candidate)
    return c, _output_gate(u, weights, prev, c) * tanh(c)


@triton.jit
def jacobian(u, weights, prev, new):
    f, candidate = _forget_and_candidate(u, weights, prev)
    by_forget = (prev[0] - candidate) * f * (1 - f)
    c_c = f + by_forget * weights[3]
    c_h = by_forget * weights[0] + (1 - f) * (1 - candidate * candidate) * weights[2]
    o, tanh_c = _output_gate(u, weights, prev, new[0]), tanh(new[0])
    by_output = tanh_c * o * (1 - o)
    by_memory = by_output * weights[4] + o * (1 - tanh_c * tanh_c)
    return c_c, c_h, by_memory * c_c, by_output * weights[1] + by_memory * c_h


@triton.jit
def gradients(u, weights, prev, new, grad):
    c, h = prev
    f, candidate = _forget_and_candidate(u, weights, prev)
    o, tanh_c = _output_gate(u, weights, prev, new[0]), tanh(new[0])
    g_o = grad[1] * tanh_c * o * (1 - o)
    g_memory = grad[0] + grad[1] * o * (1 - tanh_c * tanh_c) + g_o * weights[4]
    g_f = g_memory * (c - candidate) * f * (1 - f)
    g_c = g_memory * (1 - f) * (1 - candidate * candidate)
    return (g_f, g_o, g_c), (g_f * h, g_o * h, g_c * h, g_f * c, g_o * new[0])


@triton.jit
def fused_lstm_newton(
    u_ptr, weights_ptr, first_ptr, c_ptr, h_ptr,
    steps: tl.constexpr, channels: tl.constexpr,
    num_iterations: tl.constexpr, damping: tl.constexpr,
    block_time: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    newton_body(
        step, jacobian, u_ptr, weights_ptr, first_ptr, (c_ptr, h_ptr),
        steps, channels, 5, num_iterations, damping, block_time, block_channels,
    )  # fmt: skip


@triton.jit
def fused_lstm_sequential(
    u_ptr, weights_ptr, first_ptr, c_ptr, h_ptr,
    steps: tl.constexpr, channels: tl.constexpr,
    group: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    sequential_body(
        step, u_ptr, weights_ptr, first_ptr, (c_ptr, h_ptr),
        steps, channels, 5, group, block_channels,
    )  # fmt: skip


@triton.jit
def fused_lstm_adjoint(
    u_ptr, weights_ptr, first_ptr, c_ptr, h_ptr, grad_c_ptr, grad_h_ptr,
    of_u_ptr, of_weights_ptr, of_first_ptr,
    steps: tl.constexpr, channels: tl.constexpr,
    group: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    adjoint_body(
        jacobian, gradients, u_ptr, weights_ptr, first_ptr, (c_ptr, h_ptr),
        (grad_c_ptr, grad_h_ptr), of_u_ptr, of_weights_ptr, of_first_ptr,
        steps, channels, 5, group, block_channels,
    )  # fmt: skip
