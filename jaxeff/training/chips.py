"""Peak matrix-multiply rates of chips, for model flops utilisation."""

from __future__ import annotations

from typing import Any

# Dense bfloat16 peak, flops per second per JAX device, from the vendors' data sheets. The kind is
# matched by prefix, longest first.
PEAK_BF16_FLOPS = {
    "TPU v3": 61.5e12,  # a device is one of the chip's two cores
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # a device is one of the chip's two dies
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,
}


def peak_flops(device: Any) -> float | None:
    """Returns the device's dense bfloat16 peak in flops per second, or None when unknown."""
    kind = device.device_kind
    matches = [name for name in PEAK_BF16_FLOPS if kind.startswith(name)]
    return PEAK_BF16_FLOPS[max(matches, key=len)] if matches else None
