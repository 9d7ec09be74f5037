"""Runs the Triton kernel of n-gram counts in Triton's interpreter; a process of its own.

The interpreter is chosen by an environment variable that is read when triton is imported, and then
holds for every kernel of the process.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from ngram_oracle import clipped_matches, ragged_batch

from pallas_kernels.ngram_counts import gpu


def count(candidates, references, max_order, sizes):
    grid, constants = gpu.launch(candidates.shape, references.shape, max_order, sizes)
    parts = torch.zeros((*grid, constants["orders"]), dtype=torch.int32)
    gpu.count_kernel[grid](torch.tensor(candidates), torch.tensor(references), parts, **constants)
    return parts.numpy().sum(1)[:, :max_order]


def main():
    small = gpu.BlockSizes(candidates=16, keys=16)
    for max_order in (1, 3, 4, 8):
        for batch, length, num_references, reference_length in ((3, 40, 2, 30), (2, 5, 1, 70)):
            given = ragged_batch(max_order, batch, length, num_references, reference_length)
            expected = clipped_matches(*given, max_order)
            np.testing.assert_array_equal(count(*given, max_order, small), expected)
    # More agreeing keys than a packed counter of 4 bits in each of 16 columns holds.
    same = np.zeros((1, 300), np.int32), np.zeros((1, 1, 290), np.int32)
    np.testing.assert_array_equal(count(*same, 8, small), [range(290, 282, -1)])
    largest = ragged_batch(0, 2, 20, 2, vocabulary=3, first_id=2**31 - 3)
    np.testing.assert_array_equal(
        count(*largest, 4, gpu.BlockSizes()), clipped_matches(*largest, 4)
    )
    print("counts agree")


if __name__ == "__main__":
    main()
