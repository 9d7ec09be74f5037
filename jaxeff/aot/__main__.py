"""Size a training run before renting the machine.

    python -m jaxeff.aot --config configs/lm_8b.py --target v5p:4x4x4
    python -m jaxeff.aot --config configs/lm_1b.py --target h100 --json report.json \\
        --config.data.batch_size=8

Compiles the run's real train step with the target's real compiler, on a machine that has neither
the chips nor the data, and prints: parameters, memory per device against the chip's, flops, the
least time of a step (matrix products, HBM, collectives) and the model flops utilisation it allows,
collectives by kind, and the static schedules of Pallas and Triton kernels.

Exit status: 0 when the step fits, 3 when it does not, 1 for an error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxeff.aot.environment import SCHEDULES, CompilerMissingError, check_compiler, prepare
from jaxeff.aot.targets import CHIPS, Target, TargetError, parse_target

# jax must not be imported before the environment is prepared for the target.
if TYPE_CHECKING:
    from jaxeff.aot.report import Run
    from jaxeff.aot.results import CompiledReport

DOES_NOT_FIT = 3


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of everything but the overrides (``--config.a.b=value``)."""
    chips = "\n".join(
        f"  {chip.name:8s} {chip.description}, {chip.peak_flops / 1e12:.0f} Tflop/s bf16, "
        f"{chip.hbm_bytes / 2**30:.0f} GiB at {chip.hbm_bandwidth / 1e9:.0f} GB/s"
        for chip in CHIPS.values()
    )
    parser = argparse.ArgumentParser(
        prog="python -m jaxeff.aot",
        description=__doc__,
        epilog=f"chips (figures per device; a tpu7x chip is two devices):\n{chips}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, help="config file, or the name of a shipped config"
    )
    parser.add_argument(
        "--target",
        required=True,
        help="chip and topology: v5e:4x4, v6e:16x16, v5p:4x4x4, v4:2x2x1, tpu7x:2x2x1, h100, h200; "
        "h100:8 for eight GPUs of one machine",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the report there; - prints it")
    parser.add_argument(
        "--no-schedules",
        action="store_true",
        help="leave out the kernels' static schedules (TPU); halves the compile time",
    )
    return parser


def compile_step(config: str, overrides: dict[str, str], target: Target) -> tuple[Any, Run]:
    """Compiles the train step of a config; returns the report and what is known of the run.

    Raises:
      ConfigError: for settings that cannot work, a mesh that does not fit the target among them.
    """
    from jaxeff.aot.compile import compile_lowered
    from jaxeff.aot.devices import target_devices
    from jaxeff.aot.results import DoesNotFitError
    from jaxeff.tasks.experiment import load_experiment, make_task, make_trainer

    experiment = load_experiment(config, overrides)
    task = make_task(experiment)
    trainer = make_trainer(experiment, task=task, devices=target_devices(target))
    check_batch(trainer)
    # The plan's numbers come from the host, so they are made before the target's mesh is current.
    lowered = trainer.lower_step(trainer.controller.propose(0))
    run = describe(experiment.name, task, trainer)
    flops = task.flops_per_step() if hasattr(task, "flops_per_step") else None
    name = f"train step of {experiment.name}"
    print(f"compiling the {name} for {trainer.mesh.size} x {target.chip.name} ...", file=sys.stderr)
    try:
        report = compile_lowered(lowered, target, mesh=trainer.mesh, model_flops=flops, name=name)
    except DoesNotFitError as error:
        report = error.report
    return report, run


def check_batch(trainer: Any) -> None:
    """Raises ``ConfigError`` when the mesh does not divide the batch."""
    import jax

    from jaxeff.training.config import ConfigError
    from jaxeff.training.mesh import BATCH_AXES, axis_size

    rows, columns = axis_size(trainer.mesh, BATCH_AXES), axis_size(trainer.mesh, "context")
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainer.task.batch_spec()):
        length = leaf.shape[1] if len(leaf.shape) > 1 else columns
        if leaf.shape and (leaf.shape[0] % rows or length % columns):
            name = jax.tree_util.keystr(path, simple=True)
            raise ConfigError(
                f"batch array {name!r} of shape {leaf.shape} does not divide over the mesh: rows "
                f"over {BATCH_AXES} (product {rows}), positions over 'context' ({columns})"
            )


def describe(name: str, task: Any, trainer: Any) -> Run:
    """Returns the sizes of a run that follow from shapes and shardings."""
    import jax

    from jaxeff.aot.report import Run

    def bytes_per_device(tree: Any) -> float:
        return float(
            sum(
                math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(tree)
            )
        )

    batch = trainer.abstract_batch()
    unit = getattr(task, "unit", "examples")
    first = jax.tree.leaves(batch)[0].shape
    state = trainer.abstract_state
    return Run(
        config=name,
        mesh=dict(trainer.mesh.shape),
        num_params=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        tokens=math.prod(first) if unit == "tokens" else first[0],
        unit=unit,
        params_bytes=bytes_per_device(state.params),
        optimizer_bytes=bytes_per_device(state.opt_state),
        batch_bytes=bytes_per_device(batch),
    )


def write_json(report: CompiledReport, run: Run, path: str) -> None:
    """Writes the report to a file, or prints it for ``-``."""
    from jaxeff.aot.report import to_json

    text = json.dumps(to_json(report, run), indent=2)
    if path == "-":
        print(text)
    else:
        Path(path).write_text(text + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = make_parser()
    flags, rest = parser.parse_known_args(arguments)
    try:
        target = parse_target(flags.target)
        check_compiler(target)
    except (TargetError, CompilerMissingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if flags.no_schedules:
        os.environ[SCHEDULES] = "0"
    prepare(target)
    from jaxeff.aot.report import print_report
    from jaxeff.train import split_overrides
    from jaxeff.training.config import ConfigError

    try:
        overrides, unknown = split_overrides(rest)
        if unknown:
            parser.error(f"unknown argument {unknown[0]!r}")
        report, run = compile_step(flags.config, overrides, target)
        if flags.json:
            write_json(report, run, flags.json)
    except (ConfigError, NotImplementedError, TargetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if flags.json != "-":
        print_report(report, run)
    return 0 if report.memory.fits else DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main())
