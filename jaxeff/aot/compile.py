"""Compiles a function for a chip that is not there, and reports what the program will need.

Example (the environment must be prepared before jax is imported, see `jaxeff.aot.environment`;
under pytest the fixtures of ``tests/aot_fixtures.py`` do it)::

    report = compile_for_target(jnp.dot, (spec, spec), "v5e")
    report.memory.total, report.costs.flops, report.kernels[0].schedule.cycles
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxeff.aot.costs import Costs, KernelCall, module_costs
from jaxeff.aot.devices import target_mesh
from jaxeff.aot.environment import SCHEDULE_PREFIX, check_compiler, schedule_dump_directory
from jaxeff.aot.gpu_kernels import kernel_resources
from jaxeff.aot.hlo import Module, parse_module
from jaxeff.aot.results import CompiledReport, DoesNotFitError, KernelReport, Memory, Roofline
from jaxeff.aot.schedule import KernelSchedule, find_schedules
from jaxeff.aot.targets import GIB, Chip, Target, parse_target


def compile_for_target(
    fn: Callable[..., Any],
    args: Sequence[Any],
    target: str | Target,
    *,
    mesh: Mesh | None = None,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    model_flops: float | None = None,
    name: str | None = None,
) -> CompiledReport:
    """Compiles ``fn(*args)`` for a target.

    Args:
      fn: a function, jitted or not.
      args: its arguments; arrays may be given as ``jax.ShapeDtypeStruct``. Arrays whose sharding is
        a ``NamedSharding`` on the target's devices keep it, others are replicated over ``mesh``.
      target: e.g. "v5e", "v5p:4x4x4", "h100".
      mesh: devices to compile for; default: the mesh of the arguments' shardings, else one device.
      donate_argnums, static_argnums: as in ``jax.jit``; ignored when ``fn`` is jitted already.
      model_flops: for the bound on model flops utilisation.
      name: of the program in reports; default: the function's.

    Returns:
      the report; ``report.hlo`` is the optimised module.

    Raises:
      CompilerMissingError: when the compiler is not installed, with the line that installs it.
      TargetError: when the target is unknown.
      DoesNotFitError: when the compiler gives up for want of memory; ``error.report`` has what is
        known. (The GPU compiler does not give up: see ``report.memory.fits``.)
    """
    target = parse_target(target)
    check_compiler(target)
    static = {static_argnums} if isinstance(static_argnums, int) else set(static_argnums)
    mesh = mesh or _mesh_of(args) or target_mesh(target)
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any) -> Any:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            return leaf
        sharding = getattr(leaf, "sharding", None)
        if not (isinstance(sharding, NamedSharding) and sharding.mesh == mesh):
            sharding = replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    placed = [a if i in static else jax.tree.map(place, a) for i, a in enumerate(args)]
    if not hasattr(fn, "lower"):
        fn = jax.jit(fn, donate_argnums=donate_argnums, static_argnums=static_argnums)
    # Code that chooses a kernel by platform looks at the mesh, not at the host it is traced on.
    with jax.set_mesh(mesh):
        lowered = fn.lower(*placed)
    default_name = getattr(fn, "__name__", "program")
    return compile_lowered(
        lowered, target, mesh=mesh, model_flops=model_flops, name=name or default_name
    )


def _mesh_of(args: Any) -> Mesh | None:
    """The mesh of compile-only devices that an argument is sharded over, if any."""
    for leaf in jax.tree.leaves(args):
        mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
        if isinstance(mesh, Mesh) and mesh.devices.flat[0].platform != jax.default_backend():
            return mesh
    return None


def compile_lowered(
    lowered: Any,
    target: str | Target,
    *,
    mesh: Mesh,
    model_flops: float | None = None,
    name: str = "program",
) -> CompiledReport:
    """Compiles a lowered function (``jax.jit(f).lower(...)``) and reports on it.

    Args:
      lowered: lowered for devices of ``target``.
      target: what it was lowered for.
      mesh: the devices, in the order of the program's partitions.
      model_flops, name: as in `compile_for_target`.

    Raises:
      DoesNotFitError: when the program needs more memory than the chip has.
    """
    target = parse_target(target)
    started = time.perf_counter()
    with _dumps(target) as dumps:
        executable, needs = _compile(lowered, dumps)
        seconds = time.perf_counter() - started
        hlo = _hlo_text(executable, dumps)
        module = parse_module(hlo)
        costs = module_costs(module)
        kernels = _kernel_reports(costs.kernels, target, dumps)
        sorts = _kernel_reports(costs.sorts, target, dumps) if target.is_tpu else ()
        largest = _largest_buffers(dumps)
    if executable is None:
        memory = _required_memory(module, hlo, *needs)
    else:
        memory = _allocated_memory(executable, target.chip)
    coordinates = _coordinates(mesh) if target.is_tpu else None
    times = tuple(c.seconds(target, coordinates) for c in costs.collectives)
    report = CompiledReport(
        name=name,
        target=target,
        num_devices=mesh.size,
        memory=dataclasses.replace(memory, largest=largest),
        costs=costs,
        roofline=_roofline(costs, kernels + sorts, times, target.chip),
        collective_seconds=times,
        kernels=kernels,
        xla_flops=_xla_flops(executable),
        model_flops=model_flops,
        compile_seconds=seconds,
        hlo=hlo,
        executable=executable,
    )
    if executable is None:
        raise DoesNotFitError(report)
    return report


def _compile(lowered: Any, dumps: _Dumps) -> tuple[Any, tuple[float, float]]:
    """Returns the executable, or None and the memory it would need and that there is."""
    try:
        return lowered.compile(compiler_options=dumps.options), (0.0, 0.0)
    except jax.errors.JaxRuntimeError as error:
        match = re.search(
            r"\(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)", str(error)
        )
        if match is None:
            raise
        unit = {"K": 2**10, "M": 2**20, "G": GIB}
        required, in_unit, available, of_unit = match.groups()
        return None, (float(required) * unit[in_unit], float(available) * unit[of_unit])


@dataclasses.dataclass(frozen=True)
class _Dumps:
    """Where the compiler writes what it knows.

    Attributes:
      modules: directory of HLO texts, memory reports and PTX of this compilation.
      schedules: directory of kernels' schedules (TPU), shared by all compilations of the process.
      before: files that were in ``schedules`` already.
      options: compiler options.
    """

    modules: Path
    schedules: Path | None
    before: frozenset[str]
    options: dict[str, Any]


@contextmanager
def _dumps(target: Target) -> Iterator[_Dumps]:
    modules = Path(tempfile.mkdtemp(prefix="jaxeff_modules_"))
    options: dict[str, Any] = {"xla_dump_to": str(modules)}
    schedules, before = None, frozenset()
    if target.is_tpu:
        given = schedule_dump_directory()
        schedules = Path(given) if given and Path(given).is_dir() else None
        before = frozenset(os.listdir(schedules)) if schedules else frozenset()
    else:
        # Autotuning would run candidates on the device.
        options["xla_gpu_autotune_level"] = 0
    try:
        yield _Dumps(modules, schedules, before, options)
    finally:
        shutil.rmtree(modules, ignore_errors=True)
        # A directory of the user's own choice is left as it is.
        if schedules and schedules.name.startswith(SCHEDULE_PREFIX):
            for entry in schedules.iterdir():
                entry.unlink(missing_ok=True)


def _hlo_text(executable: Any, dumps: _Dumps) -> str:
    """The module as generated, which has the cycle estimates; else as optimised.

    Read from the dump: ``executable.as_text()`` fails where libtpu writes instructions that are
    newer than jaxlib.
    """
    for pattern in ("*after_codegen.txt", "*after_optimizations.txt"):
        for path in sorted(dumps.modules.glob(pattern)):
            return path.read_text()
    return executable.as_text()


def _largest_buffers(dumps: _Dumps, count: int = 8) -> tuple[tuple[float, str], ...]:
    """Reads XLA's report on the buffers in device memory."""
    unit = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB}
    buffers = []
    for path in sorted(dumps.modules.glob("*memory-usage-report.txt"))[:1]:
        device_memory = path.read_text().split("Memory Space:")[1:2] or [path.read_text()]
        rows = re.findall(
            r"^.*?\);\s*([\d.]+)(B|KiB|MiB|GiB);.*;\s*(\S.*)$", device_memory[0], re.M
        )
        buffers += [(float(size) * unit[u], shapes.strip()) for size, u, shapes in rows]
    return tuple(sorted(buffers, key=lambda row: -row[0])[:count])


def _kernel_reports(
    calls: Sequence[KernelCall], target: Target, dumps: _Dumps
) -> tuple[KernelReport, ...]:
    schedules: dict[str, KernelSchedule] = {}
    if dumps.schedules and calls:
        names = {call.instruction.name for call in calls}
        schedules = find_schedules(dumps.schedules, target.chip, names, dumps.before)
    groups: dict[Any, list[KernelCall]] = {}
    for call in calls:
        groups.setdefault(_identity(call), []).append(call)
    reports = []
    for group in groups.values():
        # The compiler compiles identical kernels once, under one of their names.
        names = [call.instruction.name for call in group]
        scheduled = next((n for n in names if n in schedules), names[0])
        first = next(call for call in group if call.instruction.name == scheduled)
        resources = None
        if not target.is_tpu:
            resources = kernel_resources(first.instruction, dumps.modules, target.chip)
        reports.append(
            KernelReport(
                name=scheduled,
                count=sum(call.count for call in group),
                flops=first.flops,
                nbytes=first.nbytes,
                schedule=schedules.get(scheduled),
                resources=resources,
            )
        )
    return tuple(reports)


def _identity(call: KernelCall) -> Any:
    """Two calls with the same program and shapes are the same kernel."""
    attributes = call.instruction.attributes
    match = re.search(r"backend_config=.*", attributes, re.S)
    return call.instruction.target, call.instruction.arrays, match.group(0) if match else attributes


def _coordinates(mesh: Mesh) -> list[tuple[int, ...]]:
    return [tuple(device.coords) for device in mesh.devices.flat]


def _allocated_memory(executable: Any, chip: Chip) -> Memory:
    stats = executable.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        capacity=chip.hbm_bytes,
    )


def _required_memory(module: Module, hlo: str, required: float, available: float) -> Memory:
    """Memory of a program that does not fit, from its signature and the compiler's total."""
    parameters = module.entry.parameters
    header = hlo.splitlines()[0]
    donated = re.findall(r"\((\d+), \{\}, (?:may|must)-alias\)", header)
    arguments = int(sum(p.nbytes for p in parameters.values()))
    outputs = int(module.entry.root.nbytes)
    aliased = int(sum(parameters[int(i)].nbytes for i in donated if int(i) in parameters))
    return Memory(
        arguments=arguments,
        outputs=outputs,
        aliased=aliased,
        temporaries=max(0, int(required) - arguments - outputs + aliased),
        code=0,
        capacity=available,
    )


def _roofline(
    costs: Costs, kernels: Sequence[KernelReport], times: Sequence[float], chip: Chip
) -> Roofline:
    estimate = None
    if chip.platform == "tpu":
        scheduled = [k for k in kernels if k.schedule is not None]
        cycles = costs.cycles + sum(k.count * k.schedule.cycles for k in scheduled)
        estimate = cycles / chip.clock
    return Roofline(
        compute=costs.flops / chip.peak_flops,
        hbm=costs.hbm_bytes / chip.hbm_bandwidth,
        collectives=sum(times, 0.0),
        estimate=estimate,
    )


def _xla_flops(executable: Any) -> float | None:
    if executable is None:
        return None
    analysis = executable.cost_analysis()
    if isinstance(analysis, list):
        analysis = analysis[0] if analysis else None
    return analysis.get("flops") if analysis else None
