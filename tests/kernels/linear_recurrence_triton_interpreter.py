"""Runs the Triton kernels of linear recurrences in Triton's interpreter; a process of its own.

The interpreter is chosen by an environment variable that is read when triton is imported, and then
holds for every kernel of the process.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from recurrence_cases import looped, operands

from pallas_kernels.linear_recurrence import gpu

SMALL = gpu.BlockSizes(time=8, channels=4)


def solve(a, b, h0, *, dtype=torch.float32, **directions):
    blocks = 1 if a.ndim == 3 else a.shape[2]
    shape = (*b.shape[:2], b.shape[-1])
    grid, constants = gpu.launch(shape, sizes=SMALL, **directions)
    a, b = (torch.tensor(x, dtype=dtype) for x in (a, b))
    out = torch.zeros_like(b)
    gpu.KERNELS[blocks][grid](a, b, torch.tensor(h0), out, **constants)
    return out.float().numpy()


def adjoint(a, b, h0, reverse):
    """Each step with the transposed transition of the one before, the first with `h0` itself."""
    moved = np.zeros_like(a)
    moved[:, :-1] = a[:, 1:]
    if not reverse:
        moved[:, 0], moved[:, 1:] = 0, a[:, :-1]
    b = b.copy()
    b[:, -1 if reverse else 0] += h0
    return looped(moved if a.ndim == 3 else moved.swapaxes(2, 3), b, None, reverse)


def main():
    for structure in ("diagonal", 2, 3):
        for steps, channels in ((1, 1), (21, 6)):
            a, b, h0 = operands(0, 2, steps, channels, structure)
            for reverse in (False, True):
                expected = looped(a, b, h0, reverse)
                h = solve(a, b, h0, reverse=reverse, adjoint=False)
                np.testing.assert_allclose(h, expected, rtol=1e-5, atol=1e-5)
                h = solve(a, b, h0, reverse=reverse, adjoint=True)
                expected = adjoint(a, b, h0, reverse)
                np.testing.assert_allclose(h, expected, rtol=1e-5, atol=1e-5)
    a, b, h0 = operands(1, 1, 40, 3)
    h = solve(a, b, h0, dtype=torch.bfloat16, reverse=False, adjoint=False)
    np.testing.assert_allclose(h, looped(a, b, h0), rtol=3e-2, atol=3e-2)
    print("states agree")


if __name__ == "__main__":
    main()
