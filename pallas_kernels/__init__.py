"""Kernels: arrays in, arrays out.

One folder an operation, one public function each, with `implementation=None | "xla" | "mosaic_tpu"
| "triton"`: None takes the kernel of the platform the program is traced for where it serves the
call, and XLA otherwise; a named one that cannot serve the call raises `NotImplementedError` with
the reason.
"""

from pallas_kernels.fused_gru import fused_gru
from pallas_kernels.fused_lstm import fused_lstm
from pallas_kernels.linear_recurrence import linear_recurrence
from pallas_kernels.ngram_counts import ngram_counts

__all__ = ["fused_gru", "fused_lstm", "linear_recurrence", "ngram_counts"]
