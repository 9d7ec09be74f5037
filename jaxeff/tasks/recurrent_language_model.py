"""Training a ParaRNN on text: the language model's task with a recurrent network in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxeff.data import DataConfig
from jaxeff.recurrent import clip_recurrent
from jaxeff.recurrent.language_model import ParaRNN, ParaRNNConfig, flops_per_token
from jaxeff.tasks.experiment import Experiment
from jaxeff.tasks.language_model import Batch, LanguageModelOptions, LanguageModelTask
from jaxeff.training.checkpoints import CHECKPOINTS, restore_params
from jaxeff.training.config import ConfigError
from jaxeff.training.task import Aux

MODEL, DATA, OPTIONS = ParaRNNConfig, DataConfig, LanguageModelOptions


def make_task(experiment: Experiment) -> RecurrentLanguageModelTask:
    """Returns the task of an experiment."""
    return RecurrentLanguageModelTask(
        experiment.model, experiment.data, experiment.options, seed=experiment.seed
    )


def make_model(config: ParaRNNConfig) -> ParaRNN:
    """Returns the module of a model section."""
    return ParaRNN(config)


class RecurrentLanguageModelTask(LanguageModelTask):
    """Next-token prediction with `jaxeff.recurrent.ParaRNN`; see `LanguageModelTask`.

    Newton's largest residual in the batch is logged at each step: where it is not small, the states
    are not those of the recurrence.
    """

    model: ParaRNNConfig
    make_model = staticmethod(make_model)

    def logical_sizes(self) -> dict[str, int]:
        """Returns what a mesh axis must divide."""
        return {"heads": self.model.num_heads}

    def flops_per_step(self) -> float:
        """Returns the model flops of a training step (rematerialisation not counted)."""
        return 3 * flops_per_token(self.model) * self.data.batch_size * self.data.seq_len

    def param_labels(self, params: Any) -> Any:
        """Returns ``"matrix"`` for the layers' dense matrices, ``"other"`` for the rest."""

        def label(path, leaf):
            names = [getattr(key, "key", "") for key in path]
            dense = names[-1] == "kernel" and names[-2] != "conv"
            return "matrix" if dense and names[0].startswith("layers") else "other"

        return jax.tree_util.tree_map_with_path(label, params)

    def final_transform(self) -> optax.GradientTransformationExtraArgs | None:
        """Returns the clipping of the recurrent weights, unless the config leaves it out."""
        limit = self.model.max_recurrent_weight
        return None if limit is None else clip_recurrent(limit)

    def initial_params(self, shardings: Any) -> Any | None:
        """Returns the parameters of ``options.init_from``, or None.

        Raises:
          ConfigError: when it is not the workdir of a run.
        """
        source = self.options.init_from
        if source is None:
            return None
        if not (Path(source) / CHECKPOINTS).is_dir():
            raise ConfigError(
                f"config.options.init_from: {source} is not the workdir of a run with checkpoints"
            )
        return restore_params(source, shardings=shardings)

    def loss(
        self, params: Any, extra: Any, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Returns the mean cross-entropy in nats per target token."""
        del extra, key, step  # nothing random, nothing that changes with the step
        total, weight, aux = self._cross_entropy(params, batch, self.options.z_loss)
        metrics = {"newton_residual": jnp.max(aux["residual"])}
        return total / jnp.maximum(weight, 1), Aux(weight, metrics)
