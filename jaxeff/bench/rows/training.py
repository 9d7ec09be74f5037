"""The training step against its matrix products; data loading; saving."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax

from jaxeff.bench.measure import BenchError, Case, Figure, Sample, Variant
from jaxeff.bench.rows.matmuls import MatmulChain
from jaxeff.language import DecoderConfig, count_parameters
from jaxeff.tasks import Experiment, load_experiment, make_trainer
from jaxeff.training import CheckpointConfig, Checkpoints, Trainer, use_mesh
from jaxeff.training.chips import peak_flops
from jaxeff.training.mesh import MeshPlacement

# The 1B shape at sizes that one accelerator holds together with its optimiser state.
ONE_ACCELERATOR = {
    "mesh.fsdp": "1",
    "data.seq_len": "2048",
    "data.batch_size": "4",
    "model.remat": "names",
}
# Parameters, gradients and two moments in float32.
BYTES_PER_PARAMETER = 16


class StepRunner:
    """The real training step of an experiment on one device, and the state it works on.

    Args:
      experiment: what to train.
      device: the device.
    """

    def __init__(self, experiment: Experiment, device: jax.Device):
        self.trainer: Trainer = make_trainer(experiment, devices=[device])
        self.task = self.trainer.task
        self.place = MeshPlacement.for_batch(self.trainer.mesh, self.trainer.batch_size)
        self.plan = self.trainer.controller.propose(0)
        self.state = self.trainer.init_state()
        self.metrics: dict[str, jax.Array] = {}

    def mesh(self) -> contextlib.AbstractContextManager:
        """Makes the trainer's mesh and rules current."""
        return use_mesh(self.trainer.mesh, self.trainer.rules)

    def steps(self, batches: Callable[[], Any], count: int) -> Any:
        """Takes ``count`` steps; returns the metrics of the last one once all are done."""
        with self.mesh():
            for _ in range(count):
                self.state, self.metrics = self.trainer.steps(self.state, batches(), self.plan)
            jax.block_until_ready((self.state, self.metrics))
        return self.metrics

    def gradients(self, batch: Any, count: int) -> Callable[[], Any]:
        """Returns a function that computes loss and gradients ``count`` times, and nothing else."""

        def loss(params, extra, batch):
            key = self.state.step_key()
            return self.task.loss(params, extra, batch, key, jax.numpy.zeros((), "int32"))[0]

        gradient = jax.jit(jax.value_and_grad(loss))

        def run():
            with self.mesh():
                for _ in range(count):
                    result = gradient(self.state.params, self.state.extra, batch)
                    jax.block_until_ready(result)

        return run


def load(name: str, config: Mapping[str, str], device: jax.Device) -> Experiment:
    """Returns a shipped experiment with overrides, nothing held out.

    On an accelerator whose memory is known the model gets no more layers than fit, unless
    ``config`` says how many.

    Raises:
      ConfigError: for an unknown config or setting.
    """
    settings = {"data.heldout_fraction": "0", **config}
    experiment = load_experiment(name, settings)
    if device.platform == "cpu" or "model.num_layers" in config:
        return experiment
    memory = (device.memory_stats() or {}).get("bytes_limit")
    if not memory:
        return experiment
    layers = layers_that_fit(experiment.model, memory)
    return load_experiment(name, settings | {"model.num_layers": str(layers)})


def layers_that_fit(model: DecoderConfig, memory: float) -> int:
    """Returns how many layers leave half of ``memory`` bytes to everything else, at least one.

    Raises:
      BenchError: when not even embedding and head fit.
    """
    one, two = (count_parameters(dataclasses.replace(model, num_layers=n)) for n in (1, 2))
    layer = two - one
    room = 0.5 * memory / BYTES_PER_PARAMETER - (one - layer)
    if room < layer:
        raise BenchError(
            f"the device's {memory / 1e9:.1f} GB do not hold one layer of the model with its "
            "optimiser state; set config.model.* smaller"
        )
    return min(model.num_layers, int(room / layer))


@dataclasses.dataclass(frozen=True)
class DecoderTrain:
    """Tokens per second of the real step, against its matrix products; data loading.

    Attributes:
      experiment: config file, or name of a shipped config, of a language model.
      config: overrides of that config, such as ``model.num_layers``.
      steps: training steps in one timed run.
    """

    experiment: str = "lm_stdlib"
    config: dict = dataclasses.field(default_factory=dict)
    steps: int = 4

    ON_ACCELERATOR: ClassVar[dict] = {
        "experiment": "lm_1b",
        "config": ONE_ACCELERATOR,
        "steps": 10,
    }

    def cases(self, device: jax.Device) -> Iterator[Case]:
        """Yields ``step`` (against the matrix products) and ``data`` (against a constant batch)."""
        runner = StepRunner(load(self.experiment, self.config, device), device)
        with contextlib.closing(runner.task.train_iterator(0, 1)) as data:
            batch = runner.place(next(data))
            yield self._step(runner, batch, device)
            yield self._data(runner, batch, data)

    def _step(self, runner: StepRunner, batch: Any, device: jax.Device) -> Case:
        task, steps = runner.task, self.steps
        tokens = task.data.batch_size * task.data.seq_len
        # On a CPU attention is computed as these products. A fused kernel never writes the scores,
        # so there its share is counted at the rate that the other products reach.
        on_cpu = device.platform == "cpu"
        chain = MatmulChain(task.model, task.data.batch_size, task.data.seq_len, attention=on_cpu)
        more = 1.0 if on_cpu else task.flops_per_step() / chain.flops()

        def products_per_step(r):
            return more * r.seconds["matrix products"]

        def step(r):
            return r.seconds["training step"] / steps

        figures = [
            Figure("tokens per second", "tokens/s", lambda r: tokens / step(r)),
            Figure("model flops", "Tflop/s", lambda r: task.flops_per_step() / step(r) / 1e12),
            Figure(
                "rate of the products alone",
                "Tflop/s",
                lambda r: chain.flops() / r.seconds["matrix products"] / 1e12,
            ),
            Figure(
                "optimiser's share of the step",
                "%",
                lambda r: 100 * (1 - r.seconds["loss and gradients"] / r.seconds["training step"]),
            ),
        ]
        if peak := peak_flops(device):
            figures.insert(
                1, Figure("MFU", "%", lambda r: 100 * task.flops_per_step() / step(r) / peak)
            )
        return Case(
            name="step",
            technique=Variant("training step", lambda: lambda: runner.steps(lambda: batch, steps)),
            baselines=(
                Variant("matrix products", lambda: chain.prepare(device)),
                Variant("loss and gradients", lambda: runner.gradients(batch, steps)),
            ),
            ratio=lambda r: products_per_step(r) / step(r),
            ratio_name="matrix products / training step",
            limit=1.0,
            limit_note=(
                "a step cannot be shorter than its own matrix products (forward and both backward "
                "ones of every layer and the head, same shapes), measured alone on this device"
                + (
                    "; attention's are over the whole square of positions."
                    if on_cpu
                    else "; attention counts its causal half at the rate of the others."
                )
            ),
            figures=figures,
        )

    def _data(self, runner: StepRunner, batch: Any, data: Any) -> Case:
        # Many more steps than batches that are ready when a run begins.
        steps = max(self.steps, 4 * runner.task.data.prefetch)

        def with_data():
            waited, started = data.wait_seconds, time.perf_counter()
            runner.steps(lambda: runner.place(next(data)), steps)
            seconds = time.perf_counter() - started
            return Sample(seconds, {"waiting": data.wait_seconds - waited})

        return Case(
            name="data",
            technique=Variant("real data", lambda: with_data),
            baselines=(
                Variant("constant batch", lambda: lambda: runner.steps(lambda: batch, steps)),
            ),
            limit=1.0,
            limit_note="loading is hidden when steps on new data take no longer than steps on one "
            "batch that is already on the device.",
            figures=(
                Figure(
                    "time spent waiting for data",
                    "%",
                    lambda r: 100 * r.values["real data"]["waiting"] / r.seconds["real data"],
                ),
            ),
        )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What saving costs: in the background, in the foreground, and none.

    Attributes:
      experiment: config file, or name of a shipped config.
      config: overrides of that config.
      steps: training steps from one save to the next.
      directory: where checkpoints go, in a folder that is deleted; None takes the system's
        temporary directory, which may be faster than the disk of real runs.
    """

    experiment: str = "lm_stdlib"
    config: dict = dataclasses.field(default_factory=dict)
    steps: int = 10
    directory: str | None = None

    ON_ACCELERATOR: ClassVar[dict] = {
        "experiment": "lm_1b",
        "config": ONE_ACCELERATOR | {"model.num_layers": "2", "model.vocab_size": "32000"},
        "steps": 50,
    }

    def cases(self, device: jax.Device) -> Iterator[Case]:
        """Yields ``one save every N steps``."""
        runner = StepRunner(load(self.experiment, self.config, device), device)
        with contextlib.closing(runner.task.train_iterator(0, 1)) as data:
            batch = runner.place(next(data))
        with tempfile.TemporaryDirectory(dir=self.directory) as folder:
            savers = {
                name: Checkpoints(
                    f"{folder}/{name}", CheckpointConfig(keep=1, asynchronous=background), {}
                )
                for name, background in (("background", True), ("foreground", False))
            }
            try:
                yield self._case(runner, batch, savers)
            finally:
                for saver in savers.values():
                    saver.close()

    def _case(self, runner: StepRunner, batch: Any, savers: Mapping[str, Checkpoints]) -> Case:
        def run(saver: Checkpoints | None) -> Sample:
            started = time.perf_counter()
            if saver is not None:
                saver.save(runner.state, {}, {})
            blocked = time.perf_counter() - started
            runner.steps(lambda: batch, self.steps)
            seconds = time.perf_counter() - started
            if saver is not None:
                # What is still being written must not slow the next variant.
                saver.wait()
            return Sample(seconds, {"blocked": blocked})

        def rate(name):
            return Figure(f"steps per second, {name}", "", lambda r: self.steps / r.seconds[name])

        def blocked(name):
            return Figure(f"stall of one save, {name}", "s", lambda r: r.values[name]["blocked"])

        background, foreground, none = "background", "foreground", "no saving"
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.state))
        return Case(
            name=f"{size / 1e6:.0f} MB every {self.steps} steps",
            technique=Variant(background, lambda: lambda: run(savers[background])),
            baselines=(
                Variant(none, lambda: lambda: run(None)),
                Variant(foreground, lambda: lambda: run(savers[foreground])),
            ),
            limit=1.0,
            limit_note="training with saving cannot be faster than training without; the stall of "
            "a save is the time until the state may change again (fingerprints and copy).",
            figures=(
                *(blocked(name) for name in (background, foreground)),
                *(rate(name) for name in (background, foreground, none)),
                Figure("foreground ratio", "", lambda r: r.seconds[none] / r.seconds[foreground]),
            ),
        )
