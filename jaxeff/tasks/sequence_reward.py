"""Training a decoder on a reward for whole sequences: translations sampled and scored by BLEU.

Every step draws several translations of each source with the decoder's own cached generation,
scores them with sentence BLEU, and raises the probability of those that scored better than the
other samples of their source. Sampling, scoring, loss and gradient are one compiled program; no
reference translation is ever a target of the loss.

Training on the very metric: Ranzato et al., "Sequence level training with recurrent neural
networks" (arXiv 1511.06732). The estimator: REINFORCE (Williams 1992) with the mean of a source's
other samples as baseline (RLOO: Ahmadian et al., "Back to basics", arXiv 2402.14740, section 3).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxeff.data.synthetic_translation import (
    EOS_ID,
    FIRST_WORD_ID,
    PAD_ID,
    TranslationConfig,
    TranslationIterator,
    heldout_batches,
)
from jaxeff.language import (
    DecoderConfig,
    SamplingConfig,
    flops_per_token,
    generate,
)
from jaxeff.metrics.bleu import BleuAccumulator, bleu_reward, bleu_statistics, sentence_bleu
from jaxeff.tasks.experiment import Experiment
from jaxeff.tasks.language_model import make_model, matrix_labels
from jaxeff.training.config import ConfigError, require
from jaxeff.training.task import Aux, Placement

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class SequenceRewardOptions:
    """Settings of the objective and of the closing report.

    Attributes:
      objective: "reinforce" weighs every sample by its advantage; "best_of_n" raises the
        probability of each source's best sample, where one is better than the rest.
      samples_per_prompt: translations drawn of each source in a step.
      temperature: of the policy, both where it is sampled and where it is trained.
      entropy_bonus: weight of the mean entropy of the next word, added to what is maximised.
      smoothing: of the reward, as in ``jaxeff.metrics.bleu``.
      num_examples: held-out translations shown at the end.
    """

    objective: Literal["reinforce", "best_of_n"] = "reinforce"
    samples_per_prompt: int = 16
    temperature: float = 1.0
    entropy_bonus: float = 0.0
    smoothing: Literal["none", "floor", "add-k", "exp"] = "floor"
    num_examples: int = 4

    def __post_init__(self):
        n = self.samples_per_prompt
        require(n >= 2, "options.samples_per_prompt", n, ">= 2: the others are the baseline")
        require(self.temperature > 0, "options.temperature", self.temperature, "> 0")
        require(self.entropy_bonus >= 0, "options.entropy_bonus", self.entropy_bonus, ">= 0")
        require(self.num_examples >= 0, "options.num_examples", self.num_examples, ">= 0")


MODEL, DATA, OPTIONS = DecoderConfig, TranslationConfig, SequenceRewardOptions


def make_task(experiment: Experiment) -> SequenceRewardTask:
    """Returns the task of an experiment."""
    return SequenceRewardTask(
        experiment.model, experiment.data, experiment.options, seed=experiment.seed
    )


class Samples(NamedTuple):
    """Translations drawn from the policy.

    Attributes:
      tokens: (batch, max_length + 1) int32, the end token included, padding after it.
      lengths: (batch,) int32, the end token included.
    """

    tokens: jax.Array
    lengths: jax.Array

    @property
    def mask(self) -> jax.Array:
        """(batch, max_length + 1) bool, what was drawn."""
        return jnp.arange(self.tokens.shape[1]) < self.lengths[:, None]

    @property
    def num_words(self) -> jax.Array:
        """(batch,) int32, tokens before the end token."""
        return jnp.sum(self.mask & (self.tokens != EOS_ID), axis=-1)


def leave_one_out_advantages(rewards: jax.Array) -> jax.Array:
    """Returns each reward less the mean of the other samples' (arXiv 2402.14740, section 3).

    The baseline does not depend on the sample itself, so the estimator stays unbiased.

    Args:
      rewards: (..., samples), at least two.
    """
    others = jnp.sum(rewards, axis=-1, keepdims=True) - rewards
    return rewards - others / (rewards.shape[-1] - 1)


def best_of_n_weights(rewards: jax.Array) -> jax.Array:
    """Returns the number of samples for the first best of each row, 0 for the others.

    All are 0 where no sample is better than the rest. Shape (..., samples).
    """
    count = rewards.shape[-1]
    best = jax.nn.one_hot(jnp.argmax(rewards, axis=-1), count, dtype=rewards.dtype)
    differ = jnp.max(rewards, axis=-1) > jnp.min(rewards, axis=-1)
    return count * best * differ[..., None]


_NLTK_METHODS = {"none": "method0", "floor": "method1", "add-k": "method2", "exp": "method3"}

_WEIGHTS = {"reinforce": leave_one_out_advantages, "best_of_n": best_of_n_weights}


def policy_gradient_loss(logprobs: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns -mean(weight log pi(sample)); no gradient flows through the weights.

    Args:
      logprobs: (samples,) log-probability of each whole sample.
      weights: (samples,).
    """
    return -jnp.mean(jax.lax.stop_gradient(weights) * logprobs)


class SequenceRewardTask:
    """Translation of a synthetic language, learnt from sentence BLEU alone.

    Args:
      model: the decoder, the policy.
      data: the language.
      options: objective and report.
      seed: of the sources, unless ``data`` has its own.
    """

    unit = "prompts"

    def __init__(
        self,
        model: DecoderConfig,
        data: TranslationConfig,
        options: SequenceRewardOptions | None = None,
        *,
        seed: int = 0,
    ):
        if model.vocab_size < data.vocab_size:
            raise ConfigError(
                f"config.model.vocab_size is {model.vocab_size}; expected at least "
                f"{data.vocab_size}, the language's words and {FIRST_WORD_ID} marks"
            )
        self.model, self.data, self.options = model, data, options or SequenceRewardOptions()
        self.decoder = make_model(model)
        self.max_new_tokens = data.max_length + 1
        self._seed = seed

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the global batch: sources as prompts, their translations and lengths."""
        size, longest = self.data.batch_size, self.data.max_length
        shapes = {
            "prompts": (size, longest + 1), "references": (size, longest), "lengths": (size,)
        }  # fmt: skip
        return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}

    def logical_sizes(self) -> dict[str, int]:
        """Returns what a mesh axis must divide."""
        return {"heads": self.model.num_heads, "kv_heads": self.model.num_kv_heads}

    def flops_per_step(self) -> float:
        """Returns the model flops of a step: one forward pass to sample, three to learn."""
        length = 2 * self.data.max_length + 2
        tokens = self.data.batch_size * self.options.samples_per_prompt * length
        return 4 * flops_per_token(self.model, length) * tokens

    def param_labels(self, params: Any) -> Any:
        """Returns what is updated alike; see `matrix_labels`."""
        return matrix_labels(params)

    def init(self, key: jax.Array, batch: Batch) -> tuple[Any, dict]:
        """Returns the decoder's parameters, boxed with logical axis names; no other state."""
        return self.decoder.init(key, batch["prompts"][:1, :1])["params"], {}

    def sample(
        self, params: Any, prompts: jax.Array, temperature: float, key: jax.Array | None = None
    ) -> Samples:
        """Draws a translation for each prompt (batch, max_length + 1); greedy at temperature 0."""
        batch, length = prompts.shape
        output = generate(
            params,
            self.model,
            prompts,
            jnp.full(batch, length, jnp.int32),
            max_new_tokens=self.max_new_tokens,
            sampling=SamplingConfig(temperature=temperature),
            key=key,
            eos_ids=(EOS_ID,),
            pad_id=PAD_ID,
        )
        return Samples(output.tokens, output.lengths)

    def rewards(self, samples: Samples, batch: Batch) -> jax.Array:
        """Returns the sentence BLEU of each sample, (batch,) float32 between 0 and 1."""
        return bleu_reward(
            samples.tokens,
            batch["references"],
            samples.mask,
            eos_id=EOS_ID,
            reference_lengths=batch["lengths"],
            smoothing=self.options.smoothing,
        )

    def logprobs(
        self, params: Any, prompts: jax.Array, samples: Samples
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the policy's log-probability of each sample and its entropy at each token.

        Shapes (batch,) and (batch, max_length + 1), nats.
        """
        tokens = jnp.concatenate([prompts, samples.tokens[:, :-1]], axis=1)
        logits = self.decoder.apply({"params": params}, tokens).logits
        logits = logits[:, prompts.shape[1] - 1 :].astype(jnp.float32) / self.options.temperature
        logs = jax.nn.log_softmax(logits)
        drawn = jnp.take_along_axis(logs, samples.tokens[..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logs) * logs, axis=-1)
        return jnp.sum(drawn * samples.mask, axis=-1), entropy

    def loss(
        self, params: Any, extra: Any, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Returns a loss whose gradient is that of the negative expected reward, estimated."""
        del extra, step
        options = self.options
        repeated = self._repeat(batch)
        samples = self.sample(
            jax.lax.stop_gradient(params), repeated["prompts"], options.temperature, key
        )
        rewards = self.rewards(samples, repeated).reshape(-1, options.samples_per_prompt)
        weights = _WEIGHTS[options.objective](rewards).reshape(-1)
        logprobs, entropies = self.logprobs(params, repeated["prompts"], samples)
        entropy = jnp.sum(entropies * samples.mask) / jnp.sum(samples.mask)
        loss = policy_gradient_loss(logprobs, weights) - options.entropy_bonus * entropy
        metrics = {
            "reward": jnp.mean(rewards),
            "reward_std": jnp.mean(jnp.std(rewards, axis=-1)),
            "best_reward": jnp.mean(jnp.max(rewards, axis=-1)),
            "exact_match": jnp.mean(_exact_match(samples, repeated)),
            "entropy": entropy,
            "words": jnp.mean(samples.num_words.astype(jnp.float32)),
        }
        return loss, Aux(jnp.float32(rewards.shape[0]), metrics)

    def _repeat(self, batch: Batch) -> Batch:
        count = self.options.samples_per_prompt
        return {name: jnp.repeat(x, count, axis=0) for name, x in batch.items()}

    def train_iterator(self, shard_index: int, shard_count: int) -> TranslationIterator:
        """Returns one host's rows of the training batches.

        Raises:
          ConfigError: the batch cannot be divided, or either side of the language is too small.
        """
        next(self.heldout(shard_index, shard_count))  # refused now, not at the first evaluation
        try:
            iterator = TranslationIterator(
                self.data, seed=self._seed, process_index=shard_index, process_count=shard_count
            )
            iterator.batch(0)
            return iterator
        except ValueError as error:
            raise ConfigError(f"config.data: {error}") from error

    @functools.cached_property
    def _eval_step(self):
        def eval_step(params, batch):
            samples = self.sample(params, batch["prompts"], 0.0)
            real = batch["lengths"] > 0  # rows that fill up the last batch have no source
            lengths = {
                "candidate_lengths": jnp.where(real, samples.num_words, 0),
                "reference_lengths": batch["lengths"],
            }
            given = samples.tokens, batch["references"]
            scores = sentence_bleu(*given, smoothing=self.options.smoothing, **lengths)
            corpus = BleuAccumulator.empty().update(bleu_statistics(*given, **lengths))
            exact = _exact_match(samples, batch)
            sums = [jnp.sum(jnp.where(real, x, 0)) for x in (scores, exact, 1.0)]
            return corpus, jnp.stack(sums)

        return jax.jit(eval_step)

    def evaluate(self, params: Any, extra: Any, place: Placement) -> dict[str, float]:
        """Returns ``sentence_bleu`` (mean), ``corpus_bleu`` and ``exact_match`` of greedy outputs.

        Over the held-out sources, each between 0 and 1.
        """
        del extra
        corpus, sums = BleuAccumulator.empty(), 0.0
        for batch in self.heldout(place.shard_index, place.shard_count):
            more, counted = self._eval_step(params, place(batch))
            corpus, sums = corpus.merge(more), sums + counted
        scores, exact, count = (float(x) for x in sums)
        return {
            "sentence_bleu": scores / count,
            "corpus_bleu": float(corpus.compute()),
            "exact_match": exact / count,
        }

    def heldout(self, shard_index: int = 0, shard_count: int = 1) -> Iterator[Batch]:
        """Yields one host's rows of the held-out sources; rows of length 0 fill up the last."""
        try:
            yield from heldout_batches(
                self.data, process_index=shard_index, process_count=shard_count
            )
        except ValueError as error:
            raise ConfigError(f"config.data: {error}") from error

    def report(self, params: Any | None, evaluation: dict[str, float]) -> str:
        """Returns a closing text: scores, translations, and what the reward costs of a step.

        Without parameters only the scores.
        """
        lines = [f"held-out {name.replace('_', ' ')}: {x:.4f}" for name, x in evaluation.items()]
        if params is None:
            return "\n".join(lines)
        if self.options.num_examples:
            lines.append(self.examples(params))
        lines.append(str(self.reward_cost(params)))
        return "\n".join(lines)

    def examples(self, params: Any) -> str:
        """Returns some held-out sources, their translations, and the decoder's."""
        batch = next(self.heldout())
        samples = jax.device_get(self.sample(params, jnp.asarray(batch["prompts"]), 0.0))
        rows = []
        for row in range(min(self.options.num_examples, self.data.batch_size)):
            length = batch["lengths"][row]
            source = _words(batch["prompts"][row, :length])
            wanted = _words(batch["references"][row, :length])
            drawn = samples.tokens[row, : samples.lengths[row]]
            rows.append(f"{source} -> {_words(drawn[drawn != EOS_ID])} (reference: {wanted})")
        return "\n".join(rows)

    def reward_cost(self, params: Any) -> RewardCost:
        """Measures the reward alone, and a whole step's loss and gradient, on a training batch."""
        batch = {name: jnp.asarray(x) for name, x in self.train_iterator(0, 1).batch(0).items()}
        key = jax.random.key(self._seed)
        repeated = self._repeat(batch)
        samples = self.sample(params, repeated["prompts"], self.options.temperature, key)

        rewards = jax.jit(self.rewards)
        gradient = jax.jit(jax.value_and_grad(self.loss, has_aux=True))
        host = None
        if importlib.util.find_spec("nltk"):
            host = _seconds(lambda: nltk_rewards(samples, repeated, self.options.smoothing))
        return RewardCost(
            count=len(samples.lengths),
            reward=_seconds(lambda: rewards(samples, repeated)),
            step=_seconds(lambda: gradient(params, {}, batch, key, jnp.int32(0))),
            host=host,
        )


class RewardCost(NamedTuple):
    """What the reward takes, in seconds.

    Attributes:
      count: samples scored.
      reward: of the compiled reward alone.
      step: of a step's sampling, reward, loss and gradient, without the optimiser.
      host: of copying the samples to the host and scoring them with NLTK, or None without NLTK.
    """

    count: int
    reward: float
    step: float
    host: float | None

    @property
    def share(self) -> float:
        """Share of the step that the reward is."""
        return self.reward / self.step

    def __str__(self) -> str:
        text = (
            f"reward of {self.count} samples: {1e3 * self.reward:.2f} ms of a step of "
            f"{1e3 * self.step:.1f} ms ({100 * self.share:.2f} %)"
        )
        if self.host is None:
            return text
        share = 100 * self.host / (self.host + self.step - self.reward)
        return f"{text}; NLTK on the host: {1e3 * self.host:.1f} ms ({share:.0f} % of its step)"


def _exact_match(samples: Samples, batch: Batch) -> jax.Array:
    """(batch,) float32, 1 where the sample is the reference followed by the end token."""
    lengths = batch["lengths"][:, None]
    places = jnp.arange(samples.tokens.shape[1])
    wanted = jnp.pad(batch["references"], ((0, 0), (0, 1)), constant_values=PAD_ID)
    wanted = jnp.where(places == lengths, EOS_ID, wanted)
    return jnp.all((samples.tokens == wanted) | (places > lengths), axis=-1).astype(jnp.float32)


def _words(ids) -> str:
    return " ".join(f"w{i - FIRST_WORD_ID}" if i >= FIRST_WORD_ID else f"<{i}>" for i in ids)


def _seconds(run: Callable[[], Any], rounds: int = 5) -> float:
    """Median time of a call, the first one (which compiles) left out."""
    jax.block_until_ready(run())
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def nltk_rewards(samples: Samples, batch: Batch, smoothing: str) -> list[float]:
    """Returns the rewards as a loop on the host gets them: copied from the device, one by one.

    Args:
      samples: with the end token where they have one.
      batch: their references and lengths.
      smoothing: as in the options.
    """
    from nltk.translate import bleu_score

    smooth = getattr(bleu_score.SmoothingFunction(), _NLTK_METHODS[smoothing])
    copied = jax.device_get((*samples, batch["references"], batch["lengths"]))
    scores = []
    for tokens, num_tokens, reference, length in zip(*copied, strict=True):
        words = [token for token in tokens[:num_tokens].tolist() if token != EOS_ID]
        wanted = reference[:length].tolist()
        scores.append(bleu_score.sentence_bleu([wanted], words, smoothing_function=smooth))
    return scores
