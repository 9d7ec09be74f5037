"""The ParaGRU cell in Triton: what `reference` does to arrays, on blocks of steps and channels."""

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
def _gates(u, weights, prev):
    z = sigmoid(weights[0] * prev[0] + u[0])
    r = sigmoid(weights[1] * prev[0] + u[1])
    return z, r, tanh(weights[2] * prev[0] * r + u[2])


@triton.jit
def step(u, weights, prev):
    z, _, candidate = _gates(u, weights, prev)
    return (prev[0] + z * (candidate - prev[0]),)


@triton.jit
def jacobian(u, weights, prev, new):
    z, r, candidate = _gates(u, weights, prev)
    by_update = (candidate - prev[0]) * z * (1 - z) * weights[0]
    through_reset = r + prev[0] * r * (1 - r) * weights[1]
    by_candidate = z * (1 - candidate * candidate) * weights[2] * through_reset
    return (1 - z + by_update + by_candidate,)


@triton.jit
def gradients(u, weights, prev, new, grad):
    h = prev[0]
    z, r, candidate = _gates(u, weights, prev)
    g_z = grad[0] * (candidate - h) * z * (1 - z)
    g_h = grad[0] * z * (1 - candidate * candidate)
    g_r = g_h * weights[2] * h * r * (1 - r)
    return (g_z, g_r, g_h), (g_z * h, g_r * h, g_h * h * r)


@triton.jit
def fused_gru_newton(
    u_ptr, weights_ptr, first_ptr, h_ptr,
    steps: tl.constexpr, channels: tl.constexpr,
    num_iterations: tl.constexpr, damping: tl.constexpr,
    block_time: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    newton_body(
        step, jacobian, u_ptr, weights_ptr, first_ptr, (h_ptr,),
        steps, channels, 3, num_iterations, damping, block_time, block_channels,
    )  # fmt: skip


@triton.jit
def fused_gru_sequential(
    u_ptr, weights_ptr, first_ptr, h_ptr,
    steps: tl.constexpr, channels: tl.constexpr,
    group: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    sequential_body(
        step, u_ptr, weights_ptr, first_ptr, (h_ptr,), steps, channels, 3, group, block_channels
    )


@triton.jit
def fused_gru_adjoint(
    u_ptr, weights_ptr, first_ptr, h_ptr, grad_ptr, of_u_ptr, of_weights_ptr, of_first_ptr,
    steps: tl.constexpr, channels: tl.constexpr,
    group: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    adjoint_body(
        jacobian, gradients, u_ptr, weights_ptr, first_ptr, (h_ptr,),
        (grad_ptr,), of_u_ptr, of_weights_ptr, of_first_ptr,
        steps, channels, 3, group, block_channels,
    )  # fmt: skip
