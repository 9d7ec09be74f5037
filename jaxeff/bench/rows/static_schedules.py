"""Static schedules for a row, compiled in processes of their own: one for each chip.

The compiler reads its settings when it is loaded, and should not take memory from what is timed.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax

from jaxeff.aot import environment
from jaxeff.aot.targets import parse_target
from jaxeff.bench.measure import BenchError

_log = logging.getLogger(__name__)


def can_compile(chips: Sequence[str]) -> bool:
    """Whether there are chips to compile for and a compiler; says so where it is missing."""
    if not chips:
        return False
    if not environment.has_tpu_compiler():
        _log.warning(
            "static TPU schedules are left out: they need libtpu, %s", environment.TPU_INSTALL
        )
        return False
    return True


def from_processes(module: str, chips: Sequence[str], arguments: Sequence[str]) -> list[Any]:
    """Runs ``python -m MODULE CHIP ARGUMENTS...`` for all chips at once.

    Returns:
      of each chip, what its process printed as JSON.

    Raises:
      BenchError: when one fails, with the last line of what it said.
    """
    processes = [_start(module, chip, arguments) for chip in chips]
    outputs = [process.communicate() for process in processes]
    found = []
    for chip, process, (output, errors) in zip(chips, processes, outputs, strict=True):
        if process.returncode:
            reason = (errors.strip().splitlines() or ["no message"])[-1]
            raise BenchError(f"the schedules for {chip} failed: {reason}")
        found.append(json.loads(output))
    return found


def _start(module, chip, arguments):
    return subprocess.Popen(
        [sys.executable, "-m", module, chip, *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def compiler_for(chip: str) -> Any:
    """In such a process, before it compiles: returns `jaxeff.aot.compile_for_target`."""
    jax.config.update("jax_platforms", "cpu")
    environment.prepare(parse_target(chip))
    from jaxeff.aot import compile_for_target

    return compile_for_target
