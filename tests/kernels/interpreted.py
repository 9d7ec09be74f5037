"""Runs a script with Triton kernels in Triton's interpreter.

The interpreter is chosen when triton is imported, for every kernel of the process: so each script
is a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run_in_tritons_interpreter(script: str, says: str) -> None:
    """Fails unless the script of that name beside this file ends well and says so."""
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(HERE / script)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert says in run.stdout
