"""The training step against the same model in PyTorch eager."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax

from jaxeff.bench.measure import BenchError, Case, Figure, Variant
from jaxeff.bench.rows.training import StepRunner, load
from jaxeff.language import unstack_layers

LOSS_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class TorchStep:
    """Forward, backward, gradient clipping and AdamW on the same batch, in float32.

    Before anything is timed, loss and gradient norm of both are compared at equal weights.

    Attributes:
      experiment: config file, or name of a shipped config, of a language model.
      config: overrides of that config; the optimiser is AdamW whatever it says.
      steps: training steps in one timed run.
      fused: PyTorch's fused AdamW rather than its default one.
    """

    experiment: str = "lm_stdlib"
    config: dict = dataclasses.field(default_factory=dict)
    steps: int = 1
    fused: bool = True

    # Single steps and many of them, so that some are undisturbed on a machine with other work.
    ROUNDS: ClassVar[int] = 20

    def cases(self, device: jax.Device) -> Iterator[Case]:
        """Yields one case."""
        if importlib.util.find_spec("torch") is None:
            raise BenchError("torch is not installed (pip install torch)")
        # No weight decay: jaxeff leaves the norms' gains out of it, torch.optim.AdamW does not.
        fixed = {
            "optimizer.name": "adamw",
            "optimizer.schedule": "constant",
            "optimizer.warmup_steps": "0",
            "optimizer.learning_rate": "1e-3",
            "optimizer.weight_decay": "0",
            "model.dtype": "float32",
        }
        runner = StepRunner(load(self.experiment, {**self.config, **fixed}, device), device)
        with contextlib.closing(runner.task.train_iterator(0, 1)) as data:
            host_batch = next(data)
        batch = runner.place(host_batch)
        steps = self._torch_steps(runner, host_batch, device)
        _check_same_model(runner, batch, steps)
        tokens = runner.task.data.batch_size * runner.task.data.seq_len
        ours, theirs = "jaxeff", "PyTorch eager"
        yield Case(
            name=f"{tokens} tokens",
            technique=Variant(ours, lambda: lambda: runner.steps(lambda: batch, self.steps)),
            baselines=(Variant(theirs, lambda: lambda: steps(self.steps)),),
            limit_note="there is none; 1 or more means not slower than PyTorch. On a busy machine "
            "run both on one core (taskset -c 0): PyTorch's threads wait for one another.",
            figures=[
                Figure(
                    f"time per step, {name}",
                    "ms",
                    lambda r, n=name: 1e3 * r.seconds[n] / self.steps,
                )
                for name in (ours, theirs)
            ],
        )

    def _torch_steps(
        self, runner: StepRunner, host_batch: Any, device: jax.Device
    ) -> Callable[[int], tuple[float, float]]:
        """Returns a function that takes steps and returns the last one's loss and gradient norm."""
        import torch

        from jaxeff.bench.rows.torch_decoder import from_params, to_tensors

        place = _torch_device(device, torch)
        # As many as XLA takes: the cores that this process may use.
        if hasattr(os, "sched_getaffinity"):
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        params = jax.device_get(runner.state.params)
        if "layers" in params:
            params = unstack_layers(params)
        try:
            model = from_params(runner.task.model, params, place)
        except ValueError as error:
            raise BenchError(str(error)) from error
        batch = to_tensors(host_batch, place)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=self.fused
        )

        def steps(count: int) -> tuple[float, float]:
            for _ in range(count):
                loss = model(batch)
                optimizer.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            return loss.item(), norm.item()

        return steps


def _torch_device(device: jax.Device, torch: Any) -> str:
    if device.platform == "cpu":
        return "cpu"
    if device.platform == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise BenchError(f"the installed torch cannot run on this {device.platform}")


def _check_same_model(runner: StepRunner, batch: Any, torch_steps: Callable) -> None:
    """Takes the first step of both.

    Raises:
      BenchError: when their losses or gradients differ.
    """
    metrics = jax.device_get(runner.steps(lambda: batch, 1))
    loss, norm = torch_steps(1)
    if abs(metrics["loss"] - loss) > LOSS_TOLERANCE:
        raise BenchError(
            f"with equal weights the losses are {metrics['loss']:.6f} and {loss:.6f} (PyTorch); "
            f"expected a difference below {LOSS_TOLERANCE}"
        )
    if abs(metrics["grad_norm"] - norm) > 1e-3 * norm:
        raise BenchError(
            f"with equal weights the gradient norms are {metrics['grad_norm']:.6f} and {norm:.6f} "
            "(PyTorch); expected a relative difference below 1e-3"
        )
