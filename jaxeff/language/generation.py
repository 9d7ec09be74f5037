"""Text generation with an explicit cache, and log-probabilities of given tokens.

`generate` is one compiled program: prefill, then a `while_loop` of decoding steps that ends when
every sequence has stopped. `generate_stream` runs the same two functions one call at a time and
hands out tokens as they come. A compiled program serves every prompt of the same padded shape,
every key, every set of stop tokens of the same size and every temperature, top-p and min-p.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.language.config import DecoderConfig
from jaxeff.language.decoder import Decoder, head_kernel
from jaxeff.language.sampling import SamplingConfig, apply_warpers, draw, warper_values
from jaxeff.language.sharding import constrain
from jaxeff.trees import unbox

Params = Any


class GenerateOutput(NamedTuple):
    """What was generated.

    Attributes:
      tokens: (batch, max_new_tokens) int32, new tokens only, the stop token included, pad after it.
      lengths: (batch,) int32, new tokens of each row, the stop token included.
      logprobs: (batch, max_new_tokens) float32 in nats, of the warped distribution that each token
        was drawn from (so 0 for greedy, which is a point mass); 0 after the end.
    """

    tokens: jax.Array
    lengths: jax.Array
    logprobs: jax.Array


class StreamedTokens(NamedTuple):
    """The tokens of one step, on the host.

    Attributes:
      tokens: (batch,) int32, pad for rows that ended before.
      logprobs: (batch,) float32, as in `GenerateOutput`.
      real: (batch,) bool, rows that had not ended before this step.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    real: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a compiled program is made for."""

    decoder: nn.Module
    max_new_tokens: int
    top_k: int
    prefill_chunk: int
    cache_dtype: str
    rules: tuple  # logical axis rules are traced into the program, so they key it


class _Request(NamedTuple):
    """What a compiled program is given besides the parameters."""

    prompts: jax.Array  # (batch, padded length)
    prompt_lengths: jax.Array  # (batch,)
    key: jax.Array
    sequence_ids: jax.Array  # (batch,)
    eos_ids: jax.Array  # (number of stop tokens,)
    pad_id: jax.Array  # ()
    warpers: dict[str, jax.Array]


@flax.struct.dataclass
class _State:
    """The sequences after `step` drawn tokens; the last one is not in the cache yet."""

    cache: Any  # the decoder's
    last: jax.Array  # (batch,)
    done: jax.Array  # (batch,)
    output: GenerateOutput
    step: jax.Array  # ()


def generate(
    params: Params,
    config: DecoderConfig,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    key: jax.Array | None = None,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    prefill_chunk: int | None = None,
    sequence_ids: jax.Array | None = None,
    cache_dtype: Any = None,
    decoder: nn.Module | None = None,
) -> GenerateOutput:
    """Continues every prompt by up to `max_new_tokens` tokens.

    The token at position p of sequence i is drawn with the key
    `fold_in(fold_in(key, sequence_ids[i]), p)`, so that neither the other rows of a batch nor their
    number changes a sample. Runs sharded where `params` are, under `jax.set_mesh` and
    `nn.logical_axis_rules` with sharded activations and cache.

    "dynamic" and "longrope" RoPE take the cache's capacity, padded prompt length plus
    `max_new_tokens`, as the length of the sequence from the first token on.

    Args:
      params: plain nested dictionary (or boxed), layers stacked or not.
      config: of the decoder.
      prompts: (batch, T) integer ids, padded on the right with any valid id.
      prompt_lengths: (batch,) in 1..T.
      max_new_tokens: at least 1; static.
      sampling: None draws from the unchanged distribution. Temperature below 1e-5 is greedy.
      key: a `jax.random` key; may be left out when greedy.
      eos_ids: a sequence ends with the first of these that it draws.
      pad_id: fills `tokens` after the end.
      prefill_chunk: prompt tokens per forward pass while filling the cache; None takes all at once.
        Smaller chunks need less memory: scores are (batch, heads, chunk, capacity).
      sequence_ids: (batch,) integers that name the rows for the random keys; None counts from 0.
      cache_dtype: None takes `config.dtype`.
      decoder: a `Decoder` with replaced pieces, or another model with its call and `init_cache`;
        None builds `Decoder(config)`.

    Raises:
      ValueError: arguments of the wrong shape, prompt lengths outside 1..T, ids outside the
        vocabulary, no key for a random draw, fewer than 1 new tokens.
    """
    params, request, plan = _prepare(
        params,
        config,
        prompts,
        prompt_lengths,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        key=key,
        eos_ids=eos_ids,
        pad_id=pad_id,
        prefill_chunk=prefill_chunk,
        sequence_ids=sequence_ids,
        cache_dtype=cache_dtype,
        decoder=decoder,
    )
    return _generate(params, request, plan)


def generate_stream(
    params: Params, config: DecoderConfig, prompts: jax.Array, prompt_lengths: jax.Array, **kwargs
) -> Iterator[StreamedTokens]:
    """Yields the tokens of `generate`, step by step; takes the same arguments.

    The next step runs on the device while the caller handles the present one.

    Raises:
      ValueError: as `generate`, at the first step.
    """
    params, request, plan = _prepare(params, config, prompts, prompt_lengths, **kwargs)
    state, drawn = _start_alone(params, request, plan)
    for step in range(1, plan.max_new_tokens + 1):
        upcoming = None
        if step < plan.max_new_tokens:
            upcoming = _advance_alone(params, request, plan, state)
        streamed, all_done = jax.device_get(drawn)
        yield streamed
        if all_done or upcoming is None:
            return
        state, drawn = upcoming


def sequence_logprobs(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 4096,
    decoder: nn.Module | None = None,
) -> jax.Array:
    """Log-probability of every token but the first, given those before it. Differentiable.

    Logits are computed for one chunk of the sequence at a time, and again in the backward pass, so
    that the whole (batch, T, vocabulary) array never exists.

    Args:
      params: plain nested dictionary (or boxed), layers stacked or not.
      config: of the decoder.
      tokens: (batch, T) integer ids, padded on the right.
      mask: (batch, T), nonzero for the tokens whose log-probability is wanted. It does not hide
        tokens from attention.
      positions, segment_ids: (batch, T), for packed sequences.
      chunk_size: tokens of the whole batch whose logits are held at once.
      decoder: a `Decoder` with replaced pieces; None builds `Decoder(config)`.

    Returns:
      (batch, T - 1) float32 in nats: entry t is for token t + 1, 0 where that one is masked out.

    Raises:
      ValueError: arguments of the wrong shape, a chunk size below 1.
    """
    if tokens.ndim != 2 or mask.shape != tokens.shape:
        raise ValueError(f"tokens {tokens.shape} and mask {mask.shape} must both be (batch, T)")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    params = unbox(params)
    decoder = decoder or _decoder_for(params, config)
    return _sequence_logprobs(
        params, tokens, mask, positions, segment_ids, decoder, chunk_size, _active_rules()
    )


def pad_prompts(
    prompts: Sequence[Sequence[int]], *, pad_id: int = 0, multiple: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts padded on the right to one length, and their lengths, for `generate`.

    Args:
      prompts: token ids of each prompt, at least one each.
      pad_id: the filler.
      multiple: round the length up to a multiple of this, so that prompts of similar lengths share
        one compiled program.

    Raises:
      ValueError: no prompts, an empty prompt, a multiple below 1.
    """
    if not prompts or multiple < 1:
        raise ValueError(f"{len(prompts)} prompts, multiple={multiple}: expected at least 1 each")
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    if lengths.min() < 1:
        raise ValueError(f"prompt {int(lengths.argmin())} is empty, expected at least one token")
    padded = np.full((len(prompts), -(-lengths.max() // multiple) * multiple), pad_id, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, lengths


def _prepare(
    params: Params,
    config: DecoderConfig,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    key: jax.Array | None = None,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    prefill_chunk: int | None = None,
    sequence_ids: jax.Array | None = None,
    cache_dtype: Any = None,
    decoder: nn.Module | None = None,
) -> tuple[Params, _Request, _Plan]:
    """Checks the arguments of `generate` and sorts them into data and plan."""
    sampling = sampling or SamplingConfig()
    prompts = prompts if hasattr(prompts, "ndim") else np.asarray(prompts)
    _check_prompts(prompts, prompt_lengths, config)
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if key is None and not sampling.greedy:
        raise ValueError(f"key is needed to draw with temperature={sampling.temperature}")
    batch, length = prompts.shape
    if sequence_ids is None:
        sequence_ids = np.arange(batch, dtype=np.uint32)
    if sequence_ids.shape != (batch,):
        raise ValueError(f"sequence_ids {sequence_ids.shape} must be ({batch},)")
    params = unbox(params)
    request = _Request(
        prompts=jnp.asarray(prompts, jnp.int32),
        prompt_lengths=jnp.asarray(prompt_lengths, jnp.int32),
        key=jax.random.key(0) if key is None else key,
        sequence_ids=jnp.asarray(sequence_ids, jnp.uint32),
        eos_ids=jnp.asarray(tuple(eos_ids), jnp.int32),
        pad_id=jnp.asarray(pad_id, jnp.int32),
        warpers=warper_values(sampling),
    )
    plan = _Plan(
        decoder=decoder or _decoder_for(params, config),
        max_new_tokens=max_new_tokens,
        top_k=sampling.top_k,
        prefill_chunk=min(prefill_chunk or length, length),
        cache_dtype=jnp.dtype(cache_dtype or config.dtype).name,
        rules=_active_rules(),
    )
    return params, request, plan


def _check_prompts(prompts, prompt_lengths, config: DecoderConfig) -> None:
    if prompts.ndim != 2 or not jnp.issubdtype(prompts.dtype, jnp.integer) or 0 in prompts.shape:
        raise ValueError(f"prompts {prompts.shape} {prompts.dtype} must be integers (batch, T)")
    batch, length = prompts.shape
    if np.shape(prompt_lengths) != (batch,):
        raise ValueError(f"prompt_lengths {np.shape(prompt_lengths)} must be ({batch},)")
    if not (_is_known(prompts) and _is_known(prompt_lengths)):
        return
    lengths, prompts = np.asarray(prompt_lengths), np.asarray(prompts)
    if lengths.min() < 1 or lengths.max() > length:
        raise ValueError(f"prompt_lengths {lengths.tolist()} must be in 1..{length}")
    real = prompts[np.arange(length) < lengths[:, None]]
    if real.min() < 0 or real.max() >= config.vocab_size:
        raise ValueError(
            f"prompts hold ids {real.min()}..{real.max()}, outside 0..{config.vocab_size - 1}"
        )


def _is_known(x) -> bool:
    """Whether the values can be looked at: not while tracing, not if other processes hold some."""
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def _decoder_for(params: Params, config: DecoderConfig) -> Decoder:
    """Returns the decoder whose layer layout is that of the parameters."""
    if "embed" not in params:
        raise ValueError(f"params hold {sorted(params)}, expected 'embed' and the layers")
    return Decoder(dataclasses.replace(config, scan_layers="layers" in params))


def _active_rules() -> tuple:
    return tuple(
        (name, tuple(axes) if isinstance(axes, list) else axes)
        for name, axes in nn.get_logical_axis_rules()
    )


def _start(params: Params, request: _Request, plan: _Plan) -> _State:
    """Fills the cache with the prompts and draws the first token."""
    cache, hidden = _prefill(params, request, plan)
    batch, length = request.prompts.shape[0], plan.max_new_tokens
    output = GenerateOutput(
        tokens=jnp.full((batch, length), request.pad_id, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        logprobs=jnp.zeros((batch, length), jnp.float32),
    )
    nothing_drawn = _State(
        cache=cache,
        last=jnp.full(batch, request.pad_id, jnp.int32),
        done=jnp.zeros(batch, bool),
        output=output,
        step=jnp.zeros((), jnp.int32),
    )
    return _draw_next(params, request, plan, nothing_drawn, hidden)


def _advance(params: Params, request: _Request, plan: _Plan, state: _State) -> _State:
    """Runs the model on the last tokens and draws the next ones."""
    out = plan.decoder.apply(
        {"params": params},
        state.last[:, None],
        cache=state.cache,
        # Rows that have ended stay where they are: their writes never go past the capacity.
        num_tokens=(~state.done).astype(jnp.int32),
        return_logits=False,
    )
    return _draw_next(params, request, plan, state.replace(cache=out.cache), out.hidden[:, 0])


def _prefill(params: Params, request: _Request, plan: _Plan) -> tuple[Any, jax.Array]:
    """Returns the filled cache and the hidden state (batch, d) of each prompt's last token."""
    config, (batch, length) = plan.decoder.config, request.prompts.shape
    chunk = plan.prefill_chunk
    num_chunks = -(-length // chunk)
    padded = jnp.pad(request.prompts, ((0, 0), (0, num_chunks * chunk - length)))
    chunks = padded.reshape(batch, num_chunks, chunk).swapaxes(0, 1)
    ends = request.prompt_lengths - 1

    def fill(carry, inputs):
        cache, last = carry
        start, tokens = inputs
        out = plan.decoder.apply(
            {"params": params},
            tokens,
            cache=cache,
            num_tokens=jnp.clip(request.prompt_lengths - start, 0, chunk),
            return_logits=False,
        )
        offset = (ends - start)[:, None, None]
        here = jnp.take_along_axis(out.hidden, jnp.clip(offset, 0, chunk - 1), axis=1)
        last = jnp.where((offset >= 0) & (offset < chunk), here, last)
        return (out.cache, last), None

    cache = plan.decoder.init_cache(batch, length + plan.max_new_tokens, plan.cache_dtype)
    last = jnp.zeros((batch, 1, config.hidden_size), config.dtype)
    (cache, last), _ = jax.lax.scan(fill, (cache, last), (jnp.arange(num_chunks) * chunk, chunks))
    return cache, last[:, 0]


def _draw_next(
    params: Params, request: _Request, plan: _Plan, state: _State, hidden: jax.Array
) -> _State:
    """Draws one token per row from the hidden states (batch, d) and records it."""
    logits = jnp.matmul(
        hidden,
        head_kernel(params, plan.decoder.config).astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    warped = apply_warpers(constrain(logits, "act_batch", "act_vocab"), request.warpers, plan.top_k)
    positions = (request.prompt_lengths + state.step).astype(jnp.uint32)

    def draw_row(sequence_id, position, row):
        key = jax.random.fold_in(jax.random.fold_in(request.key, sequence_id), position)
        return draw(key, row, greedy="temperature" not in request.warpers)

    drawn = jax.vmap(draw_row)(request.sequence_ids, positions, warped)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(warped), drawn[:, None], axis=-1)[:, 0]
    real = ~state.done
    tokens = jnp.where(real, drawn, request.pad_id)
    old = state.output
    output = GenerateOutput(
        tokens=old.tokens.at[:, state.step].set(tokens),
        lengths=old.lengths + real,
        logprobs=old.logprobs.at[:, state.step].set(jnp.where(real, logprobs, 0.0)),
    )
    stopped = jnp.any(drawn[:, None] == request.eos_ids, axis=-1)
    return state.replace(last=tokens, done=state.done | stopped, output=output, step=state.step + 1)


@functools.partial(jax.jit, static_argnames="plan")
def _generate(params: Params, request: _Request, plan: _Plan) -> GenerateOutput:
    def unfinished(state):
        return ~jnp.all(state.done) & (state.step < plan.max_new_tokens)

    def advance(state):
        return _advance(params, request, plan, state)

    return jax.lax.while_loop(unfinished, advance, _start(params, request, plan)).output


@functools.partial(jax.jit, static_argnames="plan")
def _start_alone(params: Params, request: _Request, plan: _Plan):
    state = _start(params, request, plan)
    return state, _drawn(state, real=jnp.ones_like(state.done))


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def _advance_alone(params: Params, request: _Request, plan: _Plan, state: _State):
    real = ~state.done
    state = _advance(params, request, plan, state)
    return state, _drawn(state, real)


def _drawn(state: _State, real: jax.Array) -> tuple[StreamedTokens, jax.Array]:
    """Returns the tokens of the last step, and whether all rows have ended."""
    logprobs = state.output.logprobs[:, state.step - 1]
    return StreamedTokens(state.last, logprobs, real), jnp.all(state.done)


@functools.partial(jax.jit, static_argnames=("decoder", "chunk_size", "rules"))
def _sequence_logprobs(
    params, tokens, mask, positions, segment_ids, decoder, chunk_size, rules
) -> jax.Array:
    del rules  # traced into the program through its context
    batch, length = tokens.shape[0], tokens.shape[1] - 1
    if length == 0:
        return jnp.zeros((batch, 0), jnp.float32)
    out = decoder.apply(
        {"params": params},
        tokens,
        positions=positions,
        segment_ids=segment_ids,
        return_logits=False,
    )
    kernel = head_kernel(params, decoder.config).astype(out.hidden.dtype)
    steps = min(max(chunk_size // batch, 1), length)
    num_chunks = -(-length // steps)

    def chunks(x):
        # The sequence is cut, not the batch: a sharded batch keeps every device busy.
        padding = [(0, 0), (0, num_chunks * steps - length)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding).reshape(batch, num_chunks, steps, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def of_chunk(_, chunk):
        hidden, targets = chunk
        logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        # A masked sum instead of a gather stays local when the vocabulary is sharded.
        hit = jnp.arange(logits.shape[-1]) == targets[..., None]
        chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        return None, chosen - jax.nn.logsumexp(logits, axis=-1)

    _, logprobs = jax.lax.scan(of_chunk, None, (chunks(out.hidden[:, :-1]), chunks(tokens[:, 1:])))
    logprobs = logprobs.swapaxes(0, 1).reshape(batch, -1)[:, :length]
    return jnp.where(mask[:, 1:] != 0, logprobs, 0.0)
