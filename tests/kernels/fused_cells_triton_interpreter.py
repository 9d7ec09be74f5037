"""Runs the Triton kernels of the fused cells in Triton's interpreter; a process of its own.

The interpreter is chosen by an environment variable that is read when triton is imported, and then
holds for every kernel of the process.
"""

import functools
import os
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pallas_kernels import recurrent_tiles
from pallas_kernels.fused_gru import gpu as gru
from pallas_kernels.fused_gru.reference import CELL as GRU
from pallas_kernels.fused_lstm import gpu as lstm
from pallas_kernels.fused_lstm.reference import CELL as LSTM

KERNELS = {GRU: gru, LSTM: lstm}
GROUP = 2
GOLDEN = Path(__file__).parents[1] / "golden" / "pararnn"


def operands(cell, batch, steps, width, dtype):
    """u, weights, first and the gradient of the states, rounded to `dtype` where it is."""
    rng = np.random.default_rng(steps)

    def rounded(x):
        return torch.tensor(x, dtype=torch.float32).to(dtype).float().numpy()

    u = rounded(rng.normal(size=(batch, steps, 3, width)))
    weights = rng.uniform(-0.5, 0.5, (cell.num_weights, width)).astype(np.float32)
    first = rng.uniform(-0.9, 0.9, (cell.num_states, batch, width)).astype(np.float32)
    grad = rounded(rng.normal(size=(cell.num_states, batch, steps, width)))
    return u, weights, first, grad


def call(cell, kind, inputs, outputs, shape, **constants):
    batch, steps, width = shape
    block = 4 if width < 8 else 16
    grid = (batch, -(-width // block))
    sizes = {"steps": steps, "channels": width, "block_channels": block}
    kernel = getattr(KERNELS[cell], f"{cell.name}_{kind}")
    kernel[grid](*inputs, *outputs, **sizes, **constants)
    return [x.float().numpy() for x in outputs]


def by_row(weights, first, batch):
    rows = np.repeat(weights[None], batch, axis=0)
    return torch.tensor(rows), torch.tensor(np.ascontiguousarray(first.swapaxes(0, 1)))


def forward(config, u, weights, first, dtype):
    batch, steps, _, width = u.shape
    outputs = [torch.full((batch, steps, width), 7, dtype=dtype) for _ in first]
    inputs = torch.tensor(u).to(dtype), *by_row(weights, first, batch)
    constants = {"group": GROUP}
    if config.method == "newton":
        constants = {"num_iterations": config.num_iterations, "damping": config.damping}
        constants |= {"block_time": min(config.tile, 1 << (steps - 1).bit_length())}
    return np.stack(
        call(config.cell, config.method, inputs, outputs, (batch, steps, width), **constants)
    )


def adjoint(config, u, weights, first, states, grad, dtype):
    batch, steps, _, width = u.shape
    inputs = [torch.tensor(u).to(dtype), *by_row(weights, first, batch)]
    inputs += [torch.tensor(x).to(dtype) for x in (*states, *grad)]
    outputs = [torch.full(x.shape, 7, dtype=x.dtype) for x in inputs[:3]]
    shape = batch, steps, width
    of_u, of_weights, of_first = call(config.cell, "adjoint", inputs, outputs, shape, group=GROUP)
    return of_u, of_weights.sum(0), of_first.swapaxes(0, 1)


def check(cell, method, batch, steps, width, dtype, atol):
    config = recurrent_tiles.Config(cell, method, "triton", 2, 0.9, 4)
    u, weights, first, grad = operands(cell, batch, steps, width, dtype)
    expected = defined(config, method)(u, weights, first)
    found = forward(config, u, weights, first, dtype)
    np.testing.assert_allclose(found, expected, atol=atol)
    saved = u, weights, first, found, grad
    exact = defined(config._replace(method=None), "adjoint")(*saved)
    for x, y in zip(adjoint(config, *saved, dtype), exact, strict=True):
        np.testing.assert_allclose(x, y, atol=atol * max(1, float(jnp.abs(y).max())))


def check_golden(cell, name):
    arrays = np.load(GOLDEN / f"{name}.npz")
    x, b, a = arrays["x"], arrays["B"], arrays["A"]
    u = np.einsum("btki,kivj->btvkj", x.reshape(*x.shape[:2], b.shape[0], -1), b)
    u = (u.reshape(*x.shape[:2], *a.shape) + arrays["bias"]).astype(np.float32)
    weights = np.concatenate([a, arrays["C"]]) if cell is LSTM else a
    first = np.zeros((cell.num_states, len(u), a.shape[1]), np.float32)
    config = recurrent_tiles.Config(cell, "newton", "triton", 1, 1.0, 64)
    found = forward(config, u[:1], weights, first[:, :1], torch.float32)
    np.testing.assert_allclose(np.concatenate(found, -1), arrays["state_newton1"][:1], atol=2e-6)
    states = forward(config._replace(method="sequential"), u, weights, first, torch.float32)
    np.testing.assert_allclose(states[-1], arrays["y_seq"], atol=2e-5)
    grad = np.zeros_like(states)
    grad[-1] = arrays["w"]
    of_u, of_weights, _ = adjoint(config, u, weights, first, states, grad, torch.float32)
    names = {"gbias": of_u.sum((0, 1)), "gA": of_weights[:3], "gC": of_weights[3:]}
    for key in ["gbias", "gA"] + (["gC"] if cell is LSTM else []):
        expected = arrays[key]
        assert np.abs(names[key] - expected).max() <= 1e-4 * np.abs(expected).max(), key


@functools.cache
def defined(config, name):
    return jax.jit(functools.partial(getattr(recurrent_tiles, name), config))


def main():
    for cell in (GRU, LSTM):
        for method in ("newton", "sequential"):
            check(cell, method, 1, 1, 3, torch.float32, 1e-6)
            check(cell, method, 2, 9, 5, torch.float32, 2e-6)
            check(cell, method, 2, 9, 5, torch.bfloat16, 1e-2)
    check_golden(GRU, "gru_t64")
    check_golden(LSTM, "lstm_t64")
    print("states and gradients agree")


if __name__ == "__main__":
    main()
