"""Train from a config file.

    python -m jaxeff.train --config configs/lm_stdlib.py
    python -m jaxeff.train --config configs/lm_stdlib.py --workdir runs/mine \\
        --config.training.num_steps=500 --config.optimizer.learning_rate=1e-3

Any setting of the config can be overridden by --config.<section>.<name>=<value>; a name that does
not exist is refused, with the nearest one that does. With --workdir a run that was interrupted goes
on from its newest checkpoint. SIGTERM or Ctrl-C saves and stops.

Many hosts: start the same command on every host with --distributed (TPU pods, SLURM, Open MPI), or
with --coordinator_address, --num_processes and --process_id (or JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID).
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxeff.data import DataStateError
from jaxeff.tasks.experiment import load_experiment, make_task, make_trainer, shipped_configs
from jaxeff.training import CheckpointError, ConfigError, NonFiniteError
from jaxeff.training.config import nearest
from jaxeff.training.distributed import initialize
from jaxeff.training.host import keep_freed_memory

OVERRIDE = "--config."


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of everything but the overrides."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxeff.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", help="config file, or the name of a shipped config; file.py:text passes text on"
    )
    parser.add_argument(
        "--workdir",
        help="directory of the run, resumed if it exists; default runs/<config>/<time>",
    )
    parser.add_argument("--list", action="store_true", help="list the shipped configs and exit")
    parser.add_argument(
        "--print_config", action="store_true", help="print the resolved config and exit"
    )
    group = parser.add_argument_group("many hosts")
    group.add_argument("--distributed", action="store_true", help="find the other hosts by itself")
    group.add_argument("--coordinator_address", help="host:port of process 0")
    group.add_argument("--num_processes", type=int)
    group.add_argument("--process_id", type=int)
    return parser


def split_overrides(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Splits ``--config.a.b=value`` (or ``--config.a.b value``) from the other arguments.

    Raises:
      ConfigError: for an override without a value.
    """
    overrides, rest = {}, []
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith(OVERRIDE):
            rest.append(argument)
            continue
        name, equals, value = argument[len(OVERRIDE) :].partition("=")
        if not equals:
            value = next(waiting, None)
            if value is None:
                raise ConfigError(f"{argument} needs a value: {argument}=...")
        overrides[name] = value
    return overrides, rest


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Parses the command line; returns the flags and the overrides."""
    overrides, rest = split_overrides(arguments)
    parser = make_parser()
    flags, unknown = parser.parse_known_args(rest)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        known = [a.lstrip("-") for action in parser._actions for a in action.option_strings]
        parser.error(f"unknown argument {unknown[0]!r}{nearest(name, known)}")
    if not flags.config and not flags.list:
        parser.error("--config is required (--list shows the shipped configs)")
    return flags, overrides


def print_configs() -> None:
    """Prints the shipped configs, one line each."""
    for path, summary in shipped_configs().items():
        print(f"{Path(path).stem:24s} {summary}")


def default_workdir(name: str) -> Path:
    """Returns ``runs/<config>/<time>``."""
    return Path("runs") / name / time.strftime("%Y%m%d-%H%M%S")


def run(flags: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Trains, and prints the task's report on the first process."""
    experiment = load_experiment(flags.config, overrides)
    if flags.print_config:
        import json

        print(json.dumps(experiment.to_dict(), indent=2))
        return
    initialize(flags.coordinator_address, flags.num_processes, flags.process_id, flags.distributed)
    if jax.process_count() > 1 and not flags.workdir:
        raise ConfigError("--workdir is required with several processes: they share one")
    workdir = flags.workdir or default_workdir(experiment.name)
    if jax.process_index() == 0:
        print(f"workdir: {workdir}", flush=True)
    task = make_task(experiment)
    result = make_trainer(experiment, task=task).fit(workdir, experiment.to_dict())
    if result.stopped:
        return
    if jax.process_index() == 0:
        print(
            f"{result.steps_per_second:.2f} steps/s; waited for data "
            f"{100 * result.data_wait_share:.2f} % of the time; "
            f"{result.num_compilations} compilation(s) of the step"
        )
        if hasattr(task, "report"):
            # Parameters spread over several processes cannot be sampled from by one of them.
            params = result.state.params if jax.process_count() == 1 else None
            print(task.report(params, result.evaluation))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("jaxeff").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        flags, overrides = parse(sys.argv[1:] if arguments is None else arguments)
        if flags.list:
            print_configs()
            return 0
        keep_freed_memory()
        run(flags, overrides)
    except (
        CheckpointError,
        ConfigError,
        DataStateError,
        FileNotFoundError,
        NonFiniteError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
