"""The training loop: runs a task, saves it, resumes it exactly, and says what happens.

It knows no technique and no model; see ``Task`` for what it calls and ``Controller`` for what
steers it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.training.checkpoints import (
    CONFIG_FILE,
    Checkpoints,
    check_layout,
    check_workdir,
    local_workdir,
    manifest,
    state_nbytes,
)
from jaxeff.training.chips import peak_flops
from jaxeff.training.config import CheckpointConfig, MeshConfig, OptimizerConfig, TrainingConfig
from jaxeff.training.controllers import Controller, Plan, ScheduleController
from jaxeff.training.distributed import StopRequest, check_same_everywhere
from jaxeff.training.mesh import (
    MeshPlacement,
    batch_sharding,
    fit_rules,
    make_mesh,
    param_shardings,
    state_shardings,
    use_mesh,
)
from jaxeff.training.metrics import MetricsBuffer
from jaxeff.training.optimizers import make_optimizer, make_schedule
from jaxeff.training.state import TrainState
from jaxeff.training.step import CompiledSteps, build_train_step
from jaxeff.training.task import Task
from jaxeff.training.trackers import MetricsFile, NoProgress, ProgressBar, TensorBoard, plot_curves
from jaxeff.trees import unbox

log = logging.getLogger(__name__)

# Steps that may be in flight on the device before the host waits for the oldest of them. Two keep
# the device busy; more would only delay the answer to a signal.
STEPS_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a call of ``Trainer.fit`` ended.

    Attributes:
      state: the final state.
      evaluation: metrics of the last evaluation; empty if there was none.
      stopped: True when a signal ended the run early (a checkpoint was saved).
      num_compilations: train steps compiled.
      data_wait_share: time spent waiting for data over time spent training.
      checkpoint_seconds: time training stood still for saving.
      steps_per_second: steps over the time spent in them, compilation left out.
    """

    state: TrainState
    evaluation: dict[str, float]
    stopped: bool
    num_compilations: int
    data_wait_share: float
    checkpoint_seconds: float
    steps_per_second: float


class Trainer:
    """Trains one task on one mesh.

    Args:
      task: what to train.
      optimizer, training, checkpoint, mesh: the settings.
      seed: of initialisation and of every step's key.
      controller: steers the run; default: the learning-rate schedule of ``optimizer``.
      devices: devices of the mesh; default all. May be those of a chip that is not there, for
        ahead-of-time compilation.
    """

    def __init__(
        self,
        task: Task,
        *,
        optimizer: OptimizerConfig | None = None,
        training: TrainingConfig | None = None,
        checkpoint: CheckpointConfig | None = None,
        mesh: MeshConfig | None = None,
        seed: int = 0,
        controller: Controller | None = None,
        devices: Sequence[Any] | None = None,
    ):
        self.task = task
        self.training = training or TrainingConfig()
        self.checkpoint = checkpoint or CheckpointConfig()
        optimizer = optimizer or OptimizerConfig()
        self.seed = seed
        self.mesh = make_mesh(mesh or MeshConfig(), devices)
        sizes = task.logical_sizes() if hasattr(task, "logical_sizes") else {}
        self.rules = fit_rules(self.mesh, sizes)
        final = task.final_transform() if hasattr(task, "final_transform") else None
        self.optimizer = make_optimizer(optimizer, getattr(task, "param_labels", None), final)
        self.controller = controller or ScheduleController(
            make_schedule(optimizer, self.training.num_steps)
        )
        self.batch_size = jax.tree.leaves(task.batch_spec())[0].shape[0]
        with use_mesh(self.mesh, self.rules):
            boxed = jax.eval_shape(lambda: self._create_boxed()[0])
            abstract = jax.eval_shape(self._create_state)
            shardings = param_shardings(boxed, self.mesh, self.rules)
        self.shardings = state_shardings(abstract, shardings, self.mesh)
        self.abstract_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract,
            self.shardings,
        )
        self.steps = CompiledSteps(self._build_step, self.shardings)

    def _create_boxed(self) -> tuple[Any, Any]:
        batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.task.batch_spec())
        # The steps' keys come from the same seed by fold_in(step), step >= 0; initialisation takes
        # its own branch so that no key is used twice.
        key = jax.random.split(jax.random.key(self.seed))[0]
        return self.task.init(key, batch)

    def _create_state(self) -> TrainState:
        params, extra = self._create_boxed()
        return TrainState.create(
            unbox(params), extra, self.optimizer, self.seed, self.training.ema_rates
        )

    def _build_step(self, static):
        return build_train_step(
            self.task,
            self.optimizer,
            accumulation_steps=self.training.accumulation_steps,
            ema_rates=self.training.ema_rates,
            static=static,
        )

    def init_state(self) -> TrainState:
        """Returns the state before the first step, created already sharded."""
        with use_mesh(self.mesh, self.rules):
            state = jax.jit(self._create_state, out_shardings=self.shardings)()
        if not hasattr(self.task, "initial_params"):
            return state
        loaded = self.task.initial_params(self.shardings.params)
        return state if loaded is None else self._start_from(loaded, state)

    def _start_from(self, params: Any, state: TrainState) -> TrainState:
        check_layout(manifest(params), self.abstract_state.params, "model to start from")
        ema = {rate: jax.tree.map(jnp.copy, params) for rate in state.ema}
        # The optimiser's state may depend on the parameters (a reference copy, a preconditioner).
        opt_state = jax.jit(self.optimizer.init, out_shardings=self.shardings.opt_state)(params)
        return state.replace(params=params, opt_state=opt_state, ema=ema)

    def abstract_batch(self) -> Any:
        """Returns the global training batch as ``jax.ShapeDtypeStruct`` with its shardings."""
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(
                s.shape, s.dtype, sharding=batch_sharding(self.mesh, len(s.shape))
            ),
            self.task.batch_spec(),
        )

    def lower_step(self, plan: Plan | None = None) -> Any:
        """Returns the lowered train step, from shapes alone: nothing is allocated."""
        # Outside the mesh, whose devices may not be there.
        plan = plan or self.controller.propose(0)
        with use_mesh(self.mesh, self.rules):
            return self.steps.lower(self.abstract_state, self.abstract_batch(), plan)

    def fit(
        self, workdir: str | os.PathLike, run_config: Mapping[str, Any] | None = None
    ) -> FitResult:
        """Trains to ``training.num_steps``, going on from the newest checkpoint in ``workdir``.

        Args:
          workdir: directory of the run, made if absent.
          run_config: the resolved config, written to ``config.json`` and into every checkpoint.

        Raises:
          ConfigError: when the batch does not divide over the mesh.
          CheckpointError: when the workdir cannot be written or a checkpoint cannot be read.
          NonFiniteError: when a metric is NaN or infinite.
        """
        run = _Run(self, local_workdir(workdir), dict(run_config or {}))
        with use_mesh(self.mesh, self.rules):
            return run.execute()


class _Run:
    """One call of ``fit``: the objects that live as long as it does, and the loop over them."""

    def __init__(self, trainer: Trainer, workdir: Path, run_config: dict[str, Any]):
        self.trainer = trainer
        self.workdir = workdir
        self.training = trainer.training
        self.controller = trainer.controller
        self.is_main = jax.process_index() == 0
        check_workdir(workdir, state_nbytes(trainer.abstract_state), trainer.checkpoint.keep)
        self.place = MeshPlacement.for_batch(trainer.mesh, trainer.batch_size)
        self.checkpoints = Checkpoints(workdir, trainer.checkpoint, run_config)
        restored = self.checkpoints.restore_latest(trainer.abstract_state)
        self.data = trainer.task.train_iterator(self.place.shard_index, self.place.shard_count)
        check_same_everywhere("the training data", self.data.get_state())
        if restored is None:
            self.state = trainer.init_state()
        else:
            self.state = restored.state
            self.data.set_state(restored.data)
            self.controller.load_state_dict(restored.controller)
        self.step = 0 if restored is None else restored.step
        self.first_step = self.step
        resumed = None if restored is None else restored.step
        self.writers = self._make_writers(run_config, resumed)
        self.progress = NoProgress()
        if self.is_main and self.training.progress:
            self.progress = ProgressBar(self.training.num_steps, self.step)
        self.buffer = MetricsBuffer(self.controller, self.training.stop_on_nonfinite)
        self.evaluation: dict[str, float] = {}
        self.evaluated_at = None
        self.profiling = False
        self.checkpoint_seconds = 0.0
        # Time and steps of training proper: evaluation, saving and compilation left out.
        self.train_seconds = 0.0
        self.rate = _Rate(self.step)

    def _make_writers(self, run_config: dict[str, Any], resumed: int | None) -> list[Any]:
        if not self.is_main:
            return []
        path = self.workdir / CONFIG_FILE
        if run_config:
            _report_changes(path, run_config)
            path.write_text(json.dumps(run_config, indent=2) + "\n")
        writers = [MetricsFile(self.workdir, resumed if resumed is not None else 0)]
        if self.training.tensorboard:
            writers.append(TensorBoard(self.workdir, resumed))
        return writers

    def execute(self) -> FitResult:
        finished = False
        try:
            with StopRequest() as stop, self.progress:
                if self.first_step:
                    self.progress.message(f"resumed from step {self.first_step} in {self.workdir}")
                stopped = self._loop(stop)
                self._end(stopped)
            self.checkpoints.wait()
            finished = True
        finally:
            self.data.close()
            for writer in self.writers:
                writer.close()
            if finished:
                self.checkpoints.close()
            else:
                self._close_after_error()
        done = self.step - self.first_step
        seconds = max(self.train_seconds, 1e-9)
        return FitResult(
            state=self.state,
            evaluation=self.evaluation,
            stopped=stopped,
            num_compilations=self.trainer.steps.num_compilations,
            data_wait_share=self.data.wait_seconds / seconds if done else 0.0,
            checkpoint_seconds=self.checkpoint_seconds,
            steps_per_second=done / seconds,
        )

    def _close_after_error(self) -> None:
        # The error that ended the run matters more than a second one from closing.
        try:
            self.checkpoints.close()
        except Exception as error:
            log.error("%s", error)

    def _loop(self, stop: StopRequest) -> bool:
        """Runs steps until the last one or a signal; returns whether a signal ended it."""
        in_flight: deque[jax.Array] = deque()
        while self.step < self.training.num_steps:
            self._profile()
            started, compiled = time.perf_counter(), self.trainer.steps.compile_seconds
            plan = self.controller.propose(self.step)
            batch = self.place(next(self.data))
            self.state, metrics = self.trainer.steps(self.state, batch, plan)
            in_flight.append(metrics["loss"])
            if len(in_flight) > STEPS_IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
            self.buffer.add(self.step, metrics, plan)
            self.step += 1
            if self._must_read_back():
                self.buffer.read_back()
            compiling = self.trainer.steps.compile_seconds - compiled
            self.train_seconds += time.perf_counter() - started - compiling
            self.progress.advance(self.step)
            self._log()
            if self._due(self.training.eval_every):
                self._evaluate()
            if self._due(self.trainer.checkpoint.every):
                self._save()
            if self._due(self.trainer.checkpoint.snapshot_every):
                self.buffer.read_back()
                self.checkpoints.save_snapshot(self.step, self.state.params)
            if stop.check(self.step, self.training.log_every):
                return self.step < self.training.num_steps
        return False

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _must_read_back(self) -> bool:
        observe = self.controller.observe_every
        return (
            (observe is not None and self.buffer.num_waiting >= observe)
            or self._due(self.training.log_every)
            or self._due(self.training.eval_every)
            or self._due(self.trainer.checkpoint.every)
            or self.step == self.training.num_steps
        )

    def _log(self) -> None:
        last = self.step == self.training.num_steps
        if not (self._due(self.training.log_every) or last):
            return
        metrics, weight = self.buffer.summary()
        metrics |= self._rates(weight)
        self._write("train", metrics)

    def _rates(self, weight: float) -> dict[str, float]:
        task = self.trainer.task
        steps, seconds, waited = self.rate.lap(
            self.step, self.train_seconds, self.data.wait_seconds
        )
        rates = {
            f"{getattr(task, 'unit', 'examples')}_per_second": weight / seconds,
            "seconds_per_step": seconds / steps,
            "data_wait_share": waited / seconds,
        }
        peak = peak_flops(self.trainer.mesh.devices.flat[0])
        if peak and hasattr(task, "flops_per_step"):
            available = seconds * peak * self.trainer.mesh.size
            rates["mfu"] = task.flops_per_step() * steps / available
        return rates

    def _write(self, kind: str, metrics: Mapping[str, float]) -> None:
        with self.checkpoints.reporting("metrics"):
            for writer in self.writers:
                writer.write(kind, self.step, metrics)
        self.progress.show(kind, self.step, metrics)

    def _evaluate(self) -> None:
        task, state = self.trainer.task, self.state
        self.evaluation = dict(task.evaluate(state.params, state.extra, self.place))
        for rate, params in state.ema.items():
            averaged = task.evaluate(params, state.extra, self.place)
            self.evaluation |= {f"{name}_ema_{rate}": v for name, v in averaged.items()}
        self.evaluated_at = self.step
        self._write("eval", self.evaluation)
        self._plot()

    def _save(self) -> None:
        # Metrics first: a state that is not finite must not become a checkpoint, and a controller
        # is saved after it has seen every step of the state.
        self.buffer.read_back()
        started = time.perf_counter()
        self.checkpoints.save(self.state, self.data.get_state(), self.controller.state_dict())
        self.checkpoint_seconds += time.perf_counter() - started

    def _end(self, stopped: bool) -> None:
        self.buffer.read_back()
        self._stop_profile()
        if stopped:
            self._save()
            self.checkpoints.wait()
            self.progress.message(
                f"stopped at step {self.step}; a checkpoint is saved in {self.workdir}. "
                "The same command with this --workdir goes on from here"
            )
            return
        if self.evaluated_at != self.step:
            self._evaluate()
        self._save()
        self._plot()

    def _plot(self) -> None:
        if self.is_main:
            with self.checkpoints.reporting("curves"):
                plot_curves(self.workdir)

    def _profile(self) -> None:
        first = self.training.profile_from
        if first is None:
            return
        if self.step == first:
            jax.block_until_ready(self.state)
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self.profiling = True
        elif self.step == first + self.training.profile_steps:
            self._stop_profile()

    def _stop_profile(self) -> None:
        if not self.profiling:
            return
        jax.block_until_ready(self.state)
        jax.profiler.stop_trace()
        self.profiling = False


class _Rate:
    """Steps, training time and waiting time since the last record."""

    def __init__(self, step: int):
        self._last = (step, 0.0, 0.0)

    def lap(self, step: int, seconds: float, waited: float) -> tuple[int, float, float]:
        last, self._last = self._last, (step, seconds, waited)
        return step - last[0], max(seconds - last[1], 1e-9), waited - last[2]


def _report_changes(path: Path, run_config: Mapping[str, Any]) -> None:
    """Logs which settings differ from those the run in this directory was started with."""
    if not path.exists():
        return
    try:
        before = _flatten(json.loads(path.read_text()))
    except json.JSONDecodeError:
        return
    now = _flatten(json.loads(json.dumps(run_config)))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            log.warning("setting %s changed: %s -> %s", name, before.get(name), now.get(name))


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
