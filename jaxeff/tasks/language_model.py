"""Training a decoder on text: next-token cross-entropy, bits per byte, a sample at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.data import (
    DataConfig,
    TokenStream,
    TrainIterator,
    eval_batches,
    load_corpus,
    make_train_iterator,
    tokenize,
)
from jaxeff.language import (
    Decoder,
    DecoderConfig,
    SamplingConfig,
    chunked_cross_entropy,
    cross_entropy,
    flops_per_token,
    generate,
    head_kernel,
    load_hf,
    load_tokenizer,
    router_loss,
)
from jaxeff.metrics.ngram import fit_ngram
from jaxeff.tasks.experiment import Experiment
from jaxeff.training.checkpoints import CHECKPOINTS, restore_params
from jaxeff.training.config import ConfigError, require
from jaxeff.training.task import Aux, Placement

log = logging.getLogger(__name__)

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LanguageModelOptions:
    """Settings of the objective and of the closing report.

    Attributes:
      init_from: start from the parameters of a Hugging Face folder or of another run's workdir
        (fine-tuning); None starts from random ones.
      z_loss: weight of the squared log-partition function (PaLM, arXiv 2204.02311, section 5).
      loss_chunk_size: tokens whose logits exist at once on each device; None computes whole logits
        for vocabularies below 32,768 and chunks of half a gigabyte above.
      ngram_order: context length of the byte n-gram model the report compares with; 0 leaves it
        out. It is fitted only where the tokenizer is ``bytes``.
      sample_prompt: what the sample at the end continues.
      sample_tokens: length of the sample; 0 takes none.
      sample_temperature: its temperature.
    """

    init_from: str | None = None
    z_loss: float = 0.0
    loss_chunk_size: int | None = None
    ngram_order: int = 2
    sample_prompt: str = "def "
    sample_tokens: int = 200
    sample_temperature: float = 0.8

    def __post_init__(self):
        require(self.z_loss >= 0, "options.z_loss", self.z_loss, ">= 0")
        chunk = self.loss_chunk_size
        require(chunk is None or chunk >= 1, "options.loss_chunk_size", chunk, "None or >= 1")
        require(0 <= self.ngram_order <= 3, "options.ngram_order", self.ngram_order, "0 to 3")
        require(self.sample_tokens >= 0, "options.sample_tokens", self.sample_tokens, ">= 0")


MODEL, DATA, OPTIONS = DecoderConfig, DataConfig, LanguageModelOptions

WHOLE_LOGITS_BELOW = 32_768


def make_task(experiment: Experiment) -> LanguageModelTask:
    """Returns the task of an experiment."""
    return LanguageModelTask(
        experiment.model, experiment.data, experiment.options, seed=experiment.seed
    )


def make_model(config: DecoderConfig) -> Decoder:
    """Returns the module of a model section."""
    return Decoder(config)


@contextlib.contextmanager
def _data_settings():
    """Reports what the data room refuses as a mistake in the config."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"config.data: {error}") from error


def matrix_labels(params: Any) -> Any:
    """Returns ``"matrix"`` for the matrices inside a decoder's layers, ``"other"`` for the rest."""

    def label(path, leaf):
        names = [getattr(key, "key", "") for key in path]
        inside = names[0].startswith("layers") and names[-1] not in ("scale", "bias")
        return "matrix" if inside else "other"

    return jax.tree_util.tree_map_with_path(label, params)


class LanguageModelTask:
    """Next-token prediction with the decoder of ``jaxeff.language``.

    The corpus is read when it is first needed, so that compiling for another machine needs none.

    Args:
      model: the decoder.
      data: corpus, row length and batch size.
      options: objective and report.
      seed: of the data order, unless ``data`` has its own.
    """

    unit = "tokens"
    make_model = staticmethod(make_model)

    def __init__(
        self,
        model: DecoderConfig,
        data: DataConfig,
        options: LanguageModelOptions | None = None,
        *,
        seed: int = 0,
    ):
        self.model, self.data, self.options = model, data, options or LanguageModelOptions()
        self.decoder = self.make_model(model)
        self._seed = seed

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the global batch: five (batch_size, seq_len) arrays."""
        shape = (self.data.batch_size, self.data.seq_len)
        names = ("tokens", "targets", "positions", "segment_ids")
        spec = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
        return spec | {"loss_mask": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def logical_sizes(self) -> dict[str, int]:
        """Returns what a mesh axis must divide."""
        sizes = {"heads": self.model.num_heads, "kv_heads": self.model.num_kv_heads}
        if self.model.moe:
            sizes["expert"] = self.model.moe.num_experts
        return sizes

    def flops_per_step(self) -> float:
        """Returns the model flops of a training step (rematerialisation not counted)."""
        tokens = self.data.batch_size * self.data.seq_len
        return 3 * flops_per_token(self.model, self.data.seq_len) * tokens

    def param_labels(self, params: Any) -> Any:
        """Returns what is updated alike; see `matrix_labels`."""
        return matrix_labels(params)

    def init(self, key: jax.Array, batch: Batch) -> tuple[Any, dict]:
        """Returns the decoder's parameters, boxed with logical axis names; no other state."""
        # One token is enough to shape the parameters.
        return self.decoder.init(key, batch["tokens"][:1, :1])["params"], {}

    def initial_params(self, shardings: Any) -> Any | None:
        """Returns the parameters of ``options.init_from``, or None.

        Raises:
          ConfigError: when there is nothing to load there.
        """
        source = self.options.init_from
        if source is None:
            return None
        if (Path(source) / CHECKPOINTS).is_dir():
            return restore_params(source, shardings=shardings)
        try:
            _, params = load_hf(
                source,
                self.model.param_dtype,
                mesh=jax.tree.leaves(shardings)[0].mesh,
                scan_layers=self.model.scan_layers,
            )
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise ConfigError(f"config.options.init_from: {error}") from error
        return jax.device_put(params, shardings)

    def loss(
        self, params: Any, extra: Any, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Returns the mean cross-entropy in nats per target token, plus the experts' losses."""
        del extra, key, step  # nothing random, nothing that changes with the step
        total, weight, aux = self._cross_entropy(params, batch, self.options.z_loss)
        loss = total / jnp.maximum(weight, 1)
        if not self.model.moe:
            return loss, Aux(weight)
        loads = aux["router_loads"]
        metrics = {
            "cross_entropy": loss,
            "load_imbalance": jnp.mean(jnp.max(loads, -1) / jnp.maximum(jnp.mean(loads, -1), 1)),
        }
        return loss + router_loss(aux, self.model.moe), Aux(weight, metrics)

    def _cross_entropy(self, params: Any, batch: Batch, z_loss: float):
        """Returns the summed loss, the number of target tokens, and the decoder's ``aux``."""
        chunk = self.options.loss_chunk_size
        whole = chunk is None and self.model.vocab_size < WHOLE_LOGITS_BELOW
        output = self.decoder.apply(
            {"params": params},
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            return_logits=whole,
        )
        targets, mask = batch["targets"], batch["loss_mask"]
        if whole:
            total, weight = cross_entropy(output.logits, targets, mask, z_loss)
        else:
            kernel = head_kernel(params, self.model)
            total, weight = chunked_cross_entropy(
                output.hidden, kernel, targets, mask, chunk, z_loss
            )
        return total, weight, output.aux

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of ``data.tokenizer``.

        Raises:
          ConfigError: when its vocabulary is larger than the model's.
        """
        tokenizer = load_tokenizer(self.data.tokenizer)
        if tokenizer.vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"config.model.vocab_size is {self.model.vocab_size}; expected at least "
                f"{tokenizer.vocab_size}, the vocabulary of tokenizer {self.data.tokenizer!r}"
            )
        return tokenizer

    @functools.cached_property
    def streams(self) -> tuple[TokenStream, TokenStream]:
        """The tokenised training and held-out texts."""
        with _data_settings():
            corpus = load_corpus(self.data)
            train = tokenize(corpus.train, self.tokenizer, self.data.cache_dir)
            heldout = tokenize(corpus.heldout, self.tokenizer, self.data.cache_dir)
        log.info(
            "corpus %s: %d training tokens in %d documents, %d held-out tokens in %d",
            self.data.corpus, train.num_tokens, train.num_documents, heldout.num_tokens,
            heldout.num_documents,
        )  # fmt: skip
        return train, heldout

    def train_iterator(self, shard_index: int, shard_count: int) -> TrainIterator:
        """Returns one host's rows of the training batches."""
        train, _ = self.streams
        with _data_settings():
            return make_train_iterator(
                train,
                self.data,
                seed=self._seed,
                process_index=shard_index,
                process_count=shard_count,
            )

    def _eval_batches(self, shard_index: int = 0, shard_count: int = 1):
        return eval_batches(
            self.streams[1], self.data, process_index=shard_index, process_count=shard_count
        )

    @functools.cached_property
    def _eval_step(self):
        def eval_step(params, batch):
            total, weight, _ = self._cross_entropy(params, batch, z_loss=0.0)
            return total, weight

        return jax.jit(eval_step)

    def evaluate(self, params: Any, extra: Any, place: Placement) -> dict[str, float]:
        """Returns ``loss`` (nats per token) and ``bits_per_byte`` over the held-out text.

        Empty where nothing is held out.
        """
        del extra
        if not self.streams[1].num_documents:
            return {}
        batches = self._eval_batches(place.shard_index, place.shard_count)
        sums = [self._eval_step(params, place(batch)) for batch in batches]
        total = math.fsum(float(loss) for loss, _ in sums)
        weight = math.fsum(float(count) for _, count in sums)
        loss = total / weight
        return {
            "loss": loss,
            "bits_per_byte": loss / math.log(2) / batches.bytes_per_target,
        }

    def ngram_bits_per_byte(self) -> float:
        """Returns the held-out bits per byte of an n-gram model fitted on the training text.

        It is scored on the very rows, targets and contexts that ``evaluate`` scores the decoder on.
        """
        train, _ = self.streams
        model = fit_ngram(
            train.tokens,
            self.options.ngram_order,
            vocab_size=train.vocab_size,
            offsets=train.offsets,
        )
        batches = self._eval_batches()
        return model.bits_per_byte(batches, batches.bytes_per_target)

    def report(self, params: Any | None, evaluation: dict[str, float]) -> str:
        """Returns a closing text: the held-out cost, the n-gram model's, and a sample.

        Without parameters there is no sample.
        """
        lines = []
        if "bits_per_byte" in evaluation:
            lines.append(f"held-out bits per byte: {evaluation['bits_per_byte']:.4f}")
            if self.options.ngram_order and self.data.tokenizer == "bytes":
                order, cost = self.options.ngram_order, self.ngram_bits_per_byte()
                lines.append(f"order-{order} byte n-gram on the same text: {cost:.4f}")
        if self.options.sample_tokens and params is not None:
            lines.append(f"sample:\n{self.sample(params)}")
        return "\n".join(lines)

    def sample(self, params: Any) -> str:
        """Returns the sample prompt and its continuation."""
        tokenizer, options = self.tokenizer, self.options
        prompt = tokenizer.encode(options.sample_prompt, add_bos=True)
        output = generate(
            params,
            self.model,
            jnp.asarray(prompt)[None],
            jnp.asarray([len(prompt)]),
            max_new_tokens=options.sample_tokens,
            sampling=SamplingConfig(temperature=options.sample_temperature),
            key=jax.random.key(self._seed),
            eos_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
            decoder=self.decoder,
        )
        length = int(output.lengths[0])
        return options.sample_prompt + tokenizer.decode(output.tokens[0, :length].tolist())
