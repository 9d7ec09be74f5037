"""Compiling for chips that are not there: memory, flops, collectives, roofline, kernel schedules.

``python -m jaxeff.aot --config FILE --target v5p:4x4x4`` is the command; `compile_for_target` does
the same for any function.

The names below are imported when first used, since the environment must be prepared before jax is.
"""

import importlib
from typing import Any

_HOME = {
    "Chip": "targets",
    "CompiledReport": "results",
    "CompilerMissingError": "environment",
    "DoesNotFitError": "results",
    "KernelSchedule": "schedule",
    "Target": "targets",
    "TargetError": "targets",
    "compile_for_target": "compile",
    "compile_lowered": "compile",
    "has_cuda_compiler": "environment",
    "has_tpu_compiler": "environment",
    "parse_target": "targets",
    "prepare": "environment",
    "target_devices": "devices",
    "target_mesh": "devices",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
