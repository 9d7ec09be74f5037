"""From a config file and command-line overrides to a task and its trainer."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxeff.training.config import (
    CheckpointConfig,
    ConfigError,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
    as_dict,
    build,
    nearest,
    override,
    to_dict,
)
from jaxeff.training.loop import Trainer

# Task name to module. A module defines MODEL, DATA and OPTIONS (dataclasses, the types of the
# sections `model`, `data` and `options`) and `make_task(experiment)`; that of a language model also
# `make_model(config)`, the module of its section `model`, with which text can be generated.
TASKS = {
    "language_model": "jaxeff.tasks.language_model",
    "recurrent_language_model": "jaxeff.tasks.recurrent_language_model",
    "sequence_reward": "jaxeff.tasks.sequence_reward",
    "synthetic_sequences": "jaxeff.tasks.synthetic_sequences",
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run, resolved: every setting has its value.

    Attributes:
      name: of the config file, without ``.py``; names the run's directory.
      task: key of ``TASKS``.
      seed: of initialisation, of every step's key, and of data order (unless data has its own).
      model, data, options: sections whose types belong to the task.
      optimizer, training, checkpoint, mesh: sections common to all tasks.
    """

    name: str
    task: str
    seed: int
    model: Any
    data: Any
    options: Any
    optimizer: OptimizerConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    mesh: MeshConfig

    def to_dict(self) -> dict[str, Any]:
        """Returns the experiment as nested plain dicts, ready for JSON."""
        return to_dict(self)


def task_module(name: str) -> Any:
    """Returns the module of a task.

    Raises:
      ConfigError: when there is no such task, with the nearest name.
    """
    if name not in TASKS:
        raise ConfigError(f"config.task is {name!r}{nearest(name, TASKS)}")
    return importlib.import_module(TASKS[name])


def build_experiment(name: str, values: Mapping[str, Any]) -> Experiment:
    """Converts a config (``ConfigDict`` or nested dicts) into an ``Experiment``.

    Raises:
      ConfigError: for unknown keys, with the nearest valid name, and values that cannot work.
    """
    values = {"name": name, "task": "language_model", "seed": 0, **as_dict(values)}
    module = task_module(values["task"])
    sections = {
        "model": module.MODEL,
        "data": module.DATA,
        "options": module.OPTIONS,
        "optimizer": OptimizerConfig,
        "training": TrainingConfig,
        "checkpoint": CheckpointConfig,
        "mesh": MeshConfig,
    }
    values = {section: {} for section in sections} | values
    # The sections' types depend on the task, so they are built first and checked with the rest.
    for section, cls in reversed(sections.items()):
        values[section] = build(cls, values[section] or {}, f"config.{section}")
    return build(Experiment, values)


def load_experiment(path: str | Path, overrides: Mapping[str, str] | None = None) -> Experiment:
    """Loads a config file and applies command-line overrides.

    Args:
      path: a Python file with ``get_config() -> ConfigDict``; ``file.py:text`` calls
        ``get_config("text")``; a bare name is looked up among the shipped configs.
      overrides: dotted setting to text, e.g. ``{"training.num_steps": "500"}``.

    Raises:
      ConfigError: when the file is missing or has no ``get_config``, for unknown settings (with the
        nearest valid name), and for values that cannot work.
    """
    file, _, argument = str(path).partition(":")
    file = find_config(file)
    config = _call_get_config(file, argument)
    experiment = build_experiment(file.stem, config)
    if overrides:
        resolved = override(experiment.to_dict(), overrides)
        experiment = build_experiment(file.stem, resolved)
    return experiment


def _call_get_config(file: Path, argument: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"jaxeff_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"config file {file} defines no get_config()")
    return module.get_config(argument) if argument else module.get_config()


def config_directories() -> list[Path]:
    """Returns where shipped configs are looked for."""
    beside_package = Path(__file__).resolve().parents[2] / "configs"
    return [d for d in dict.fromkeys([Path("configs").resolve(), beside_package]) if d.is_dir()]


def shipped_configs() -> dict[str, str]:
    """Returns the shipped configs: path to the first line of its docstring."""
    import ast

    configs = {}
    for directory in config_directories():
        for file in sorted(directory.glob("*.py")):
            if file.stem not in [Path(known).stem for known in configs]:
                doc = ast.get_docstring(ast.parse(file.read_text())) or ""
                configs[str(file)] = doc.partition("\n")[0]
    return configs


def find_config(name: str) -> Path:
    """Returns the config file of a path or of a shipped config's name.

    Raises:
      ConfigError: when there is none, with the nearest name.
    """
    path = Path(name)
    if path.is_file():
        return path.resolve()
    shipped = {Path(p).stem: Path(p) for p in shipped_configs()}
    if path.stem in shipped:
        return shipped[path.stem]
    raise ConfigError(f"config file {name!r} does not exist{nearest(path.stem, shipped)}")


def make_task(experiment: Experiment) -> Any:
    """Returns the task of an experiment."""
    return task_module(experiment.task).make_task(experiment)


def make_trainer(
    experiment: Experiment, *, task: Any = None, devices: Sequence[Any] | None = None
) -> Trainer:
    """Returns the trainer of an experiment, on all devices or on the given ones."""
    return Trainer(
        task or make_task(experiment),
        optimizer=experiment.optimizer,
        training=experiment.training,
        checkpoint=experiment.checkpoint,
        mesh=experiment.mesh,
        seed=experiment.seed,
        devices=devices,
    )
