"""One layer of a sequence mixer on the synthetic tasks of ``jaxeff.data.synthetic_sequences``.

"ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models" (arXiv
2510.21450), section 5.2 and appendix C.2: embedding, RMS norm, mixer, RMS norm, linear head. A
recurrence trained through Newton's method is also run step by step with the same weights, so that
what the solver leaves undone shows.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jaxeff.data.synthetic_sequences import (
    SyntheticSequenceConfig,
    SyntheticSequenceIterator,
    evaluation_batches,
)
from jaxeff.language.layers import RMSNorm
from jaxeff.language.losses import cross_entropy
from jaxeff.recurrent import NewtonConfig, ParaGRU, ParaLSTM, clip_recurrent
from jaxeff.recurrent.baselines import CausalAttention, DiagonalRecurrence
from jaxeff.recurrent.diagnostics import LayerDiagnosis, diagnose_layer
from jaxeff.recurrent.language_model import CausalConv
from jaxeff.tasks.experiment import Experiment
from jaxeff.training.config import ConfigError, require
from jaxeff.training.task import Aux, Placement
from jaxeff.trees import unbox

Batch = dict[str, jax.Array]

CELLS = {"gru": ParaGRU, "lstm": ParaLSTM}
BASELINES = {"linear": DiagonalRecurrence, "attention": CausalAttention}


@dataclasses.dataclass(frozen=True)
class SequenceModelConfig:
    """The model; its vocabulary is the task's.

    Attributes:
      mixer: "gru", "lstm", "linear" (a selective diagonal recurrence) or "attention".
      width: of the embedding and of the mixer's state.
      num_heads: of the mixer.
      block: what is around the mixer: "bare", nothing; or "gated", the recurrent block of the
        paper's figure 9: convolution before, gate behind, residual. Parity and keep-n-th are solved
        bare, recall and hops are not.
      conv_size: taps of the gated block's causal convolution.
      positional: add sinusoids of the position to the embeddings, without which a recurrence cannot
        tell the n-th token.
      max_recurrent_weight: what the recurrent weights of "gru" and "lstm" are clipped to after each
        step (0.9 in the paper); None leaves them alone, as parity needs.
      newton: how the states of "gru" and "lstm" are solved for.
      method: of "gru" and "lstm": "newton" or "sequential".
    """

    mixer: Literal["gru", "lstm", "linear", "attention"] = "gru"
    width: int = 32
    num_heads: int = 1
    block: Literal["bare", "gated"] = "bare"
    conv_size: int = 4
    positional: bool = False
    max_recurrent_weight: float | None = None
    newton: NewtonConfig = dataclasses.field(default=NewtonConfig())
    method: Literal["newton", "sequential"] = "newton"

    def __post_init__(self):
        require(self.width >= 1, "model.width", self.width, ">= 1")
        heads = self.num_heads
        fits = heads >= 1 and self.width % heads == 0
        require(fits, "model.num_heads", heads, f"a divisor of model.width={self.width}")
        require(self.conv_size >= 1, "model.conv_size", self.conv_size, ">= 1")
        limit = self.max_recurrent_weight
        require(limit is None or limit > 0, "model.max_recurrent_weight", limit, "None or > 0")


@dataclasses.dataclass(frozen=True)
class SyntheticSequenceOptions:
    """What is evaluated.

    Attributes:
      eval_lengths: of the sequences evaluated on, in addition to those of the training length.
      eval_sequences: of each length.
      tolerance: the largest difference from the sequential states at which Newton's iterates count
        as converged.
    """

    eval_lengths: tuple[int, ...] = ()
    eval_sequences: int = 512
    tolerance: float = 1e-5

    def __post_init__(self):
        shortest = min(self.eval_lengths, default=1)
        require(shortest >= 1, "options.eval_lengths", self.eval_lengths, "lengths >= 1")
        require(self.eval_sequences >= 1, "options.eval_sequences", self.eval_sequences, ">= 1")
        require(self.tolerance > 0, "options.tolerance", self.tolerance, "> 0")


MODEL, DATA, OPTIONS = SequenceModelConfig, SyntheticSequenceConfig, SyntheticSequenceOptions


def make_task(experiment: Experiment) -> SyntheticSequenceTask:
    """Returns the task of an experiment."""
    return SyntheticSequenceTask(
        experiment.model, experiment.data, experiment.options, seed=experiment.seed
    )


def sinusoids(length: int, width: int) -> jax.Array:
    """Sines and cosines of the position ("Attention is all you need", section 3.5), (T, width)."""
    frequencies = 10_000.0 ** -(jnp.arange(0, width, 2) / width)
    angles = jnp.arange(length)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[:, :width]


class SequenceModel(nn.Module):
    """Embedding, RMS norm, one mixer in its block, RMS norm, linear head."""

    config: SequenceModelConfig
    vocab_size: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The logits (B, T, V) and the mixer's outputs (B, T, width) of tokens (B, T)."""
        config = self.config
        normal = nn.initializers.normal(1.0)
        x = nn.Embed(self.vocab_size, config.width, embedding_init=normal, name="embed")(tokens)
        if config.positional:
            x = x + sinusoids(tokens.shape[1], config.width)
        h = RMSNorm(1e-5, name="norm")(x)
        if config.block == "bare":
            x = mixed = self.mix(h)
        else:
            x, mixed = self.gated(x, h)
        x = RMSNorm(1e-5, name="final_norm")(x)
        return nn.Dense(self.vocab_size, name="head")(x), mixed

    def gated(self, x, h):
        """The block of figure 9, and the outputs of the mixer in it."""
        config = self.config
        y, gate = jnp.split(nn.Dense(2 * config.width, use_bias=False, name="in_proj")(h), 2, -1)
        before = jnp.zeros((len(y), config.conv_size - 1, config.width))
        mixed = self.mix(nn.silu(CausalConv(config.conv_size, name="conv")(y, before)))
        y = RMSNorm(1e-5, name="mixer_norm")(mixed) * nn.silu(gate)
        scale = self.param("scale", nn.initializers.ones, ())
        return scale * x + nn.Dense(config.width, use_bias=False, name="out_proj")(y), mixed

    def mix(self, x):
        config = self.config
        self.sow("intermediates", "mixer_input", x)
        sizes = {"features": config.width, "num_heads": config.num_heads, "name": "mixer"}
        if config.mixer in BASELINES:
            return BASELINES[config.mixer](**sizes)(x)
        return CELLS[config.mixer](newton=config.newton, method=config.method, **sizes)(x)


class SyntheticSequenceTask:
    """A synthetic task learnt by one layer.

    Args:
      model: the layer.
      data: the task and its batches.
      options: what is evaluated.
      seed: of the sequences, unless ``data`` has its own.
    """

    unit = "targets"

    def __init__(
        self,
        model: SequenceModelConfig,
        data: SyntheticSequenceConfig,
        options: SyntheticSequenceOptions | None = None,
        *,
        seed: int = 0,
    ):
        self.config, self.data, self.options = model, data, options or SyntheticSequenceOptions()
        self.model = self._with_method(model.method)
        self._seed = seed

    def _with_method(self, method: str) -> SequenceModel:
        return SequenceModel(dataclasses.replace(self.config, method=method), self.data.vocab_size)

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the global batch: three (batch_size, seq_len) arrays."""
        shape = (self.data.batch_size, self.data.seq_len)
        spec = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "targets")}
        return spec | {"loss_mask": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def logical_sizes(self) -> dict[str, int]:
        """Returns what a mesh axis must divide."""
        return {"heads": self.config.num_heads}

    def final_transform(self) -> optax.GradientTransformationExtraArgs | None:
        """Returns the clipping of the recurrent weights, where the config asks for it."""
        limit = self.config.max_recurrent_weight
        return None if limit is None else clip_recurrent(limit)

    def init(self, key: jax.Array, batch: Batch) -> tuple[Any, dict]:
        """Returns the parameters; no other state."""
        return self.model.init(key, batch["tokens"][:1])["params"], {}

    def loss(
        self, params: Any, extra: Any, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Returns the mean cross-entropy in nats over the positions that have a target."""
        del extra, key, step  # nothing random, nothing that changes with the step
        (logits, _), sown = self.model.apply(
            {"params": params}, batch["tokens"], mutable="intermediates"
        )
        total, weight = cross_entropy(logits, batch["targets"], batch["loss_mask"])
        metrics = {"accuracy": jnp.sum(_right(logits, batch)) / jnp.maximum(weight, 1)}
        if self.config.mixer in CELLS:
            (info,) = sown["intermediates"]["mixer"]["solve_info"]
            metrics["newton_residual"] = jnp.max(info.residual)
        return total / jnp.maximum(weight, 1), Aux(weight, metrics)

    def train_iterator(self, shard_index: int, shard_count: int) -> SyntheticSequenceIterator:
        """Returns one host's rows of the training batches.

        Raises:
          ConfigError: the batch cannot be divided, or a length evaluated on is too short.
        """
        try:
            for length in self.options.eval_lengths:
                self.data.draw((0, 0), 1, length)
            return SyntheticSequenceIterator(
                self.data, seed=self._seed, process_index=shard_index, process_count=shard_count
            )
        except ValueError as error:
            raise ConfigError(f"config.data: {error}") from error

    @functools.cached_property
    def _eval_step(self):
        sequential = self._with_method("sequential")

        def eval_step(params, batch):
            logits, states = self.model.apply({"params": params}, batch["tokens"])
            sums = _counts(logits, batch)
            if self.config.mixer not in CELLS:
                return sums, None, None
            exact_logits, exact = sequential.apply({"params": params}, batch["tokens"])
            return sums, _counts(exact_logits, batch), jnp.max(jnp.abs(states - exact))

        return jax.jit(eval_step)

    def evaluate(self, params: Any, extra: Any, place: Placement) -> dict[str, float]:
        """Returns accuracies on sequences of each length, the training length first.

        ``accuracy_L`` is over all positions of sequences of length L that have a target,
        ``last_accuracy_L`` over the last of each sequence. For the nonlinear cells also the same
        with the weights run step by step (``sequential_...``), the largest difference of the
        outputs from those (``state_difference_L``), and on one batch of the training length
        ``newton_iterations``: after how many all states are within ``options.tolerance`` of the
        sequential ones (-1: never, which rounding can do where states are large), the mean
        ``lyapunov_exponent`` and the ``max_recurrent_weight``.
        """
        del extra
        metrics = {}
        for length in dict.fromkeys((self.data.seq_len, *self.options.eval_lengths)):
            metrics |= self._evaluate_length(params, place, length)
        if self.config.mixer in CELLS:
            tokens = next(self._evaluation_batches(place, self.data.seq_len))["tokens"]
            diagnosis = self._diagnose(params, tokens)
            metrics["max_recurrent_weight"] = float(diagnosis.max_recurrent_weight)
            metrics["lyapunov_exponent"] = float(jnp.mean(diagnosis.lyapunov_exponent))
            metrics["newton_iterations"] = float(diagnosis.convergence.iterations)
        return metrics

    def _evaluate_length(self, params, place, length) -> dict[str, float]:
        sums = exact = difference = 0.0
        for batch in self._evaluation_batches(place, length):
            more, more_exact, distance = self._eval_step(params, batch)
            sums = sums + more
            if more_exact is not None:
                exact, difference = exact + more_exact, max(difference, float(distance))
        metrics = _accuracies("", sums, length)
        if self.config.mixer in CELLS:
            metrics |= _accuracies("sequential_", exact, length)
            metrics[f"state_difference_{length}"] = difference
        return metrics

    def _evaluation_batches(self, place, length):
        for batch in evaluation_batches(
            self.data,
            self.options.eval_sequences,
            length,
            process_index=place.shard_index,
            process_count=place.shard_count,
        ):
            yield place(batch)

    def diagnose(self, params: Any, tokens: jax.Array) -> LayerDiagnosis:
        """Returns how Newton's method does on tokens (B, T), with up to T iterations."""
        _, sown = self.model.apply({"params": params}, tokens, mutable="intermediates")
        (x,) = sown["intermediates"]["mixer_input"]
        cell = CELLS[self.config.mixer](
            features=self.config.width, num_heads=self.config.num_heads, newton=self.config.newton
        )
        variables = {"params": params["mixer"]}
        return diagnose_layer(
            cell, variables, x, tolerance=self.options.tolerance, max_iterations=tokens.shape[1]
        )

    @functools.cached_property
    def _diagnose(self):
        return jax.jit(self.diagnose)

    def report(self, params: Any | None, evaluation: dict[str, float]) -> str:
        """Returns a closing text: accuracies by length and how far Newton's method came."""
        lines = []
        for length in dict.fromkeys((self.data.seq_len, *self.options.eval_lengths)):
            line = f"length {length}: {_percent(evaluation, '', length)}"
            if self.config.mixer in CELLS:
                distance = evaluation[f"state_difference_{length}"]
                line += (
                    f"; step by step {_percent(evaluation, 'sequential_', length)}, "
                    f"outputs at most {distance:.1e} away"
                )
            lines.append(line)
        if self.config.mixer not in CELLS:
            return "\n".join(lines)
        lines.append(
            f"largest recurrent weight {evaluation['max_recurrent_weight']:.2f}, "
            f"Lyapunov exponent {evaluation['lyapunov_exponent']:.2f}"
        )
        counts = f"{evaluation['newton_iterations']:.0f} at the end"
        if params is not None:
            size, length = self.data.batch_size, self.data.seq_len
            tokens = jnp.asarray(next(evaluation_batches(self.data, size, length))["tokens"])
            fresh, _ = jax.jit(self.init)(jax.random.key(self._seed), {"tokens": tokens})
            first = self._diagnose(unbox(fresh), tokens).convergence.iterations
            counts = f"{int(first)} at initialisation, {counts}"
        newton = self.config.newton
        limit = "at most " if newton.tolerance else ""
        lines.append(
            f"Newton iterations to {self.options.tolerance:.0e} at length {self.data.seq_len}: "
            f"{counts}; trained with {limit}{newton.num_iterations}"
        )
        return "\n".join(lines)


def _right(logits: jax.Array, batch: Batch) -> jax.Array:
    """(B, T) float32, 1 where there is a target and the largest logit is its."""
    return batch["loss_mask"] * (jnp.argmax(logits, axis=-1) == batch["targets"])


def _counts(logits: jax.Array, batch: Batch) -> jax.Array:
    """Right answers and targets, then the same of each sequence's last target alone: (4,)."""
    mask, right = batch["loss_mask"], _right(logits, batch)
    ahead = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]  # targets from here to the end
    last = mask * (ahead == 1)
    return jnp.stack([jnp.sum(x) for x in (right, mask, right * last, last)])


def _accuracies(prefix: str, sums: Any, length: int) -> dict[str, float]:
    right, there, last_right, last = (float(x) for x in sums)
    return {
        f"{prefix}accuracy_{length}": right / max(there, 1),
        f"{prefix}last_accuracy_{length}": last_right / max(last, 1),
    }


def _percent(evaluation: dict[str, float], prefix: str, length: int) -> str:
    accuracy, last = (
        100 * evaluation[f"{prefix}{name}_{length}"] for name in ("accuracy", "last_accuracy")
    )
    return f"{accuracy:.2f} % of all answers right, {last:.2f} % of the last"
