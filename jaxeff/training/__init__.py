"""The training loop and what it stands on; knows no technique and no model."""

from jaxeff.training.checkpoints import CheckpointError, Checkpoints, restore_params
from jaxeff.training.config import (
    CheckpointConfig,
    ConfigError,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
)
from jaxeff.training.controllers import Controller, Plan, ScheduleController
from jaxeff.training.gradients import per_replica_gradients
from jaxeff.training.loop import FitResult, Trainer
from jaxeff.training.mesh import DEFAULT_RULES, make_mesh, use_mesh
from jaxeff.training.metrics import NonFiniteError
from jaxeff.training.optimizers import make_optimizer, make_schedule
from jaxeff.training.state import TrainState
from jaxeff.training.step import CompiledSteps, build_train_step
from jaxeff.training.task import Aux, Task

__all__ = [
    "DEFAULT_RULES",
    "Aux",
    "CheckpointConfig",
    "CheckpointError",
    "Checkpoints",
    "CompiledSteps",
    "ConfigError",
    "Controller",
    "FitResult",
    "MeshConfig",
    "NonFiniteError",
    "OptimizerConfig",
    "Plan",
    "ScheduleController",
    "Task",
    "TrainState",
    "Trainer",
    "TrainingConfig",
    "build_train_step",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "per_replica_gradients",
    "restore_params",
    "use_mesh",
]
