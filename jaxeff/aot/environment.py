"""Settings that the compilers read from the environment, and what to install when they are missing.

They must be in place before jax is imported (``JAX_PLATFORMS``) or before the compiler's library is
loaded (everything else), so this module imports neither.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile

from jaxeff.aot.targets import Target

TPU_INSTALL = 'pip install "jaxeff[aot]"'
CUDA_INSTALL = 'pip install "jaxeff[aot-cuda]"'

TPU_SETTINGS = {
    # Do not ask a cloud's metadata server what machine this is.
    "TPU_SKIP_MDS_QUERY": "1",
    # With no machine to ask, libtpu warns at length about the type and the names of the hosts
    # unless they are given. Any valid values silence it; the topology decides what is compiled.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Several processes may compile at once: no TPU is touched, so the lock guards nothing.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

CUDA_SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}

SCHEDULES = "JAXEFF_AOT_SCHEDULES"
SCHEDULE_PREFIX = "jaxeff_schedules_"  # of the directory for dumps that we make ourselves
_DUMP_FLAG = "--xla_jf_dump_to="
# Only the last stage of every kernel: the bundles as the chip runs them.
_DUMP_OPTIONS = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final"


class CompilerMissingError(RuntimeError):
    """The compiler of the target's platform is not installed."""


def prepare(target: Target) -> None:
    """Sets the environment for compiling for ``target``; call it before jax is imported.

    Values that are set already stay. The TPU compiler is asked to write kernels' schedules into a
    directory that goes away with the process; it takes about twice as long for that, so
    ``JAXEFF_AOT_SCHEDULES=0`` does without.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # The compilers' own messages; what matters of them comes back as an exception or in the report.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    prepare_compiler(target)


def prepare_compiler(target: Target) -> None:
    """Sets what the compiler's library reads; may be called after jax is imported.

    The process must run on the CPU (``JAX_PLATFORMS=cpu``), else it may want the accelerators that
    these settings hide, and only the dump of schedules is asked for.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        for name, value in (TPU_SETTINGS if target.is_tpu else CUDA_SETTINGS).items():
            os.environ.setdefault(name, value)
    if target.is_tpu and os.environ.get(SCHEDULES) != "0":
        _request_schedule_dump()


def _request_schedule_dump() -> None:
    arguments = os.environ.get("LIBTPU_INIT_ARGS", "")
    given = schedule_dump_directory()
    own = f"{SCHEDULE_PREFIX}{os.getpid()}_"
    if given and (not _is_ours(given) or os.path.basename(given).startswith(own)):
        return
    if given:
        # Our parent's: it and its other children empty it while they compile.
        arguments = arguments.replace(f"{_DUMP_FLAG}{given} {_DUMP_OPTIONS}", "")
    directory = tempfile.mkdtemp(prefix=own)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    flags = f"{_DUMP_FLAG}{directory} {_DUMP_OPTIONS}"
    os.environ["LIBTPU_INIT_ARGS"] = f"{arguments.strip()} {flags}".strip()


def _is_ours(directory: str) -> bool:
    return os.path.basename(directory).startswith(SCHEDULE_PREFIX)


def schedule_dump_directory() -> str | None:
    """Returns where libtpu writes the schedules of what it compiles, or None if it does not."""
    for argument in os.environ.get("LIBTPU_INIT_ARGS", "").split():
        if argument.startswith(_DUMP_FLAG):
            return argument.removeprefix(_DUMP_FLAG)
    return None


def has_tpu_compiler() -> bool:
    """True if libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def has_cuda_compiler() -> bool:
    """True if jax's CUDA plugin is installed."""
    names = ("xla_cuda13", "xla_cuda12")
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.{name}") is not None for name in names)


def check_compiler(target: Target) -> None:
    """Raises `CompilerMissingError`, with the line that installs it, if there is no compiler."""
    if target.is_tpu and not has_tpu_compiler():
        raise CompilerMissingError(
            f"compiling for {target} needs the TPU compiler (libtpu): {TPU_INSTALL}"
        )
    if not target.is_tpu and not has_cuda_compiler():
        raise CompilerMissingError(
            f"compiling for {target} needs jax's CUDA wheels: {CUDA_INSTALL}"
        )
