"""The ParaRNN language model: ParaGRU or ParaLSTM blocks alternating with gated MLPs.

"ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models" (arXiv
2510.21450), figure 9 and appendix: the block around the cell is Mamba's.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxeff.language.config import check_at_least, check_choice, check_positive
from jaxeff.language.decoder import output_logits, remat_policy
from jaxeff.language.layers import MLP, Embedding, Linear, RMSNorm, make_linear
from jaxeff.language.sharding import constrain, mesh_axes
from jaxeff.recurrent.layers import ParaGRU, ParaLSTM
from jaxeff.recurrent.newton import NewtonConfig
from jaxeff.trees import unbox

CELLS = {"gru": ParaGRU, "lstm": ParaLSTM}
METHODS = ("newton", "sequential", "fused")
NORM_ORDERS = ("norm_then_gate", "gate_then_norm")
REMAT = ("none", "full", "dots_with_no_batch_dims", "names")
NAMED_ACTIVATIONS = ("cell_states", "mlp_gate", "mlp_up")
FLOAT_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ParaRNNConfig:
    """One recurrent language model.

    Attributes:
      vocab_size, hidden_size, num_layers: sizes; a layer is a recurrent block and an MLP.
      intermediate_size: of the MLP; None takes 8/3 hidden_size, rounded up to a multiple of 256.
      num_heads: blocks of the cell's input projection.
      cell: "gru" or "lstm".
      conv_size: taps of the causal depthwise convolution before the cell.
      norm_order: whether the cell's output is normalised before it is gated or after.
      max_recurrent_weight: what the entries of `a` and `peephole` are clipped to by the task after
        each step; None leaves them alone, and Newton's method may then diverge.
      newton: iterations, tolerance, damping, fallback.
      method: "newton"; "sequential", a loop over time; or "fused", the kernels' own choice.
      implementation: of the kernels: None, "xla", "mosaic_tpu" or "triton".
      reset_at_documents: the state and the convolution begin anew where a packed document does.
        The fused kernels cannot, and need False: text runs on, as in the paper.
      tie_embeddings: the head is the transposed embedding.
      rms_norm_eps: epsilon of every RMS norm.
      dtype, param_dtype: of the computation and of the stored parameters; the solver is float32.
      scan_layers: stack the layers and scan over them.
      remat: "none", "full", "dots_with_no_batch_dims" or "names" (keep the cell's states and the
        MLP's two products).

    Raises:
      ValueError: for a value out of range; the message names the field.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int | None = None
    cell: str = "gru"
    conv_size: int = 4
    norm_order: str = "norm_then_gate"
    max_recurrent_weight: float | None = 0.5
    newton: NewtonConfig = dataclasses.field(default=NewtonConfig())
    method: str = "newton"
    implementation: str | None = None
    reset_at_documents: bool = True
    tie_embeddings: bool = False
    rms_norm_eps: float = 1e-5
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"

    def __post_init__(self):
        if isinstance(self.newton, dict):
            object.__setattr__(self, "newton", NewtonConfig(**self.newton))
        if self.intermediate_size is None:
            width = -(-8 * self.hidden_size // (3 * 256)) * 256
            object.__setattr__(self, "intermediate_size", width)
        for name in ("dtype", "param_dtype"):
            value = getattr(self, name)
            if not isinstance(value, str):
                object.__setattr__(self, name, jnp.dtype(value).name)
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
        for name in (*sizes, "conv_size"):
            check_at_least(name, getattr(self, name), 1)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}"
            )
        choices = {"cell": CELLS, "norm_order": NORM_ORDERS, "method": METHODS, "remat": REMAT}
        choices |= {"dtype": FLOAT_DTYPES, "param_dtype": FLOAT_DTYPES}
        for name, known in choices.items():
            check_choice(name, getattr(self, name), known)
        limit = self.max_recurrent_weight
        if limit is not None and not limit > 0:
            raise ValueError(f"max_recurrent_weight={limit} must be above zero, or None")
        check_positive("rms_norm_eps", self.rms_norm_eps)
        if self.method == "fused" and self.reset_at_documents:
            raise ValueError(
                "method='fused' cannot start anew inside a row: it needs reset_at_documents=False"
            )

    # What the shared embedding and MLP ask of a decoder's config.
    mlp_bias = False
    scale_residual_init = False

    @property
    def initializer_range(self) -> float:
        """Standard deviation of the matrices outside the cell at initialisation."""
        return self.hidden_size**-0.5


@flax.struct.dataclass
class RecurrentCache:
    """What the model remembers of each row, the same size after any number of tokens.

    Attributes:
      state: of the cells, float32: (num_layers, batch, hidden_size), for "lstm" two of them.
      conv: (num_layers, batch, conv_size - 1, hidden_size), the convolutions' last inputs.
      lengths: (batch,) int32, tokens seen.
    """

    state: Any
    conv: jax.Array
    lengths: jax.Array


@flax.struct.dataclass
class ParaRNNOutput:
    """What the model returns.

    Attributes:
      logits: (B, T, V) float32, or None with `return_logits=False`.
      cache: the cache after the new tokens, or None.
      aux: "residual" (num_layers, B) float32, the largest Newton residual of each row.
      hidden: (B, T, d), the final norm's output.
    """

    logits: jax.Array | None
    cache: RecurrentCache | None
    aux: dict[str, Any]
    hidden: jax.Array


class CausalConv(nn.Module):
    """A causal depthwise convolution over time, `kernel` (taps, D): sums of shifted products."""

    taps: int
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: jax.Array, before: jax.Array, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """(B, T, D) from `x` (B, T, D) and the taps - 1 inputs `before` it.

        Inputs of another segment than the output's count as zero.
        """
        bound = self.taps**-0.5

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(uniform, (None, "heads")),
            (self.taps, x.shape[-1]),
            self.param_dtype,
        ).astype(self.dtype)
        length, past = x.shape[1], self.taps - 1
        whole = jnp.concatenate([before.astype(x.dtype), x], axis=1)
        total = kernel[past] * x
        for lag in range(1, self.taps):
            shifted = whole[:, past - lag : past - lag + length]
            if segment_ids is not None:
                same = jnp.pad(segment_ids, ((0, 0), (lag, 0)), constant_values=-1)[:, :length]
                shifted = jnp.where((same == segment_ids)[..., None], shifted, 0)
            total += kernel[past - lag] * shifted
        return total


class RecurrentBlock(nn.Module):
    """x * scale + out(norm(cell(silu(conv(in(norm x))))) * silu(gate(norm x)))."""

    config: ParaRNNConfig

    @nn.compact
    def __call__(self, x, cached, segment_ids, num_tokens):
        """Also the layer's new (state, conv), or None without `cached`, and the residual."""
        config = self.config
        width = {"features": config.hidden_size}
        h = RMSNorm(config.rms_norm_eps, config.param_dtype, name="norm")(x)
        inner = {"kernel_axes": ("embed", "heads"), **width}
        y = make_linear(Linear, config, name="in_proj", **inner)(h)
        gate = make_linear(Linear, config, name="gate_proj", **inner)(h)
        y, gate = (constrain(a, "act_batch", "act_seq", "act_heads") for a in (y, gate))
        past = config.conv_size - 1
        before = (
            jnp.zeros((x.shape[0], past, y.shape[-1]), y.dtype) if cached is None else cached[1]
        )
        conv = CausalConv(config.conv_size, config.dtype, config.param_dtype, name="conv")
        states, state, residual = self.run(
            nn.silu(conv(y, before, segment_ids)), cached, segment_ids, num_tokens
        )
        states = checkpoint_name(states, "cell_states")
        norm = RMSNorm(config.rms_norm_eps, config.param_dtype, name="state_norm")
        if config.norm_order == "norm_then_gate":
            gated = norm(states) * nn.silu(gate)
        else:
            gated = norm(states * nn.silu(gate))
        out = make_linear(Linear, config, name="out_proj", kernel_axes=("heads", "embed"), **width)
        scale = self.param("scale", nn.initializers.ones, (), config.param_dtype)
        x = constrain(scale.astype(x.dtype) * x + out(gated), "act_batch", "act_seq", "act_embed")
        if cached is None:
            return x, None, residual
        return x, (state, _last_inputs(before, y, num_tokens)), residual

    def run(self, y, cached, segment_ids, num_tokens):
        """The cell's outputs (B, T, d), its state after each row's tokens, Newton's residual."""
        config = self.config
        cell = CELLS[config.cell](
            features=config.hidden_size,
            num_heads=config.num_heads,
            newton=config.newton,
            method=config.method,
            implementation=config.implementation,
            dtype=jnp.dtype(config.dtype),
            partitioned=True,
            name="cell",
        )
        exact = jnp.zeros(y.shape[0])
        if cached is not None and y.shape[1] == 1:
            state, out = cell.step(cached[0], y[:, 0])
            real = (num_tokens > 0)[:, None]
            state = jax.tree.map(lambda new, old: jnp.where(real, new, old), state, cached[0])
            return out[:, None], state, exact
        reset = None
        if segment_ids is not None and config.reset_at_documents:
            reset = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        if cached is None:
            out, info = self.over_time(cell, y, reset)
            return out, None, info.residual
        out, state, info = cell(
            y, cached[0], return_carry=True, lengths=num_tokens, return_info=True
        )
        return out, state, info.residual

    def over_time(self, cell, y, reset):
        """The cell on whole rows, whose steps a mesh axis of the rules may split."""
        axes = mesh_axes("act_seq", y.shape[1])
        if not axes or self.is_initializing():
            return cell(y, reset=reset, return_info=True)
        if len(axes) > 1:
            raise ValueError(f"mesh axes {axes} split the sequence, expected at most one")
        split = cell.clone(parent=None, name=None, axis_name=axes[0], partitioned=False)
        in_time, reset = PartitionSpec(None, *axes), () if reset is None else (reset,)

        def run(params, y, *reset):
            reset = reset[0] if reset else None
            return split.apply({"params": params}, y, reset=reset, return_info=True)

        run = jax.shard_map(
            run,
            in_specs=(PartitionSpec(), in_time, *[in_time] * len(reset)),
            out_specs=(in_time, PartitionSpec()),
            axis_names=set(axes),
        )
        return run(unbox(self.variables["params"]["cell"]), y, *reset)


def _last_inputs(before, y, num_tokens):
    """The last of each row's convolution inputs, as many as `before` has."""
    whole = jnp.concatenate([before, y.astype(before.dtype)], axis=1)
    at = num_tokens[:, None] + jnp.arange(before.shape[1])
    return jnp.take_along_axis(whole, at[..., None], axis=1)


class ParaRNNLayer(nn.Module):
    """A recurrent block and an MLP."""

    config: ParaRNNConfig

    @nn.compact
    def __call__(self, x, cached, segment_ids, num_tokens):
        config = self.config
        x, cached, residual = RecurrentBlock(config, name="block")(
            x, cached, segment_ids, num_tokens
        )
        h = RMSNorm(config.rms_norm_eps, config.param_dtype, name="mlp_norm")(x)
        x = constrain(x + MLP(config, name="mlp")(h), "act_batch", "act_seq", "act_embed")
        return x, (cached, residual)


class ParaRNN(nn.Module):
    """The whole model; call and parameters' outer layout are those of `jaxeff.language.Decoder`."""

    config: ParaRNNConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: RecurrentCache | None = None,
        num_tokens: jax.Array | None = None,
        return_logits: bool = True,
    ) -> ParaRNNOutput:
        """Runs the model over T new tokens: in parallel over time, or one step where T is 1.

        Args:
          tokens: (B, T) int ids.
          positions: taken for the sake of one call for all models; a recurrence needs none.
          segment_ids: (B, T) int, packed documents. Not with a cache.
          cache: of earlier tokens.
          num_tokens: (B,) int, how many of the T tokens each row really has, padding behind them;
            what the cache keeps is the state after those. Only with a cache. Default: T.
          return_logits: compute `logits`; without them the head is not touched.

        Raises:
          ValueError: for tokens that are not (B, T) integers, no tokens, a cache of another batch,
            or arguments that exclude each other.
        """
        del positions
        config = self.config
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or 0 in tokens.shape:
            raise ValueError(f"tokens {tokens.shape} {tokens.dtype} must be integers (batch, T)")
        if cache is None and num_tokens is not None:
            raise ValueError("num_tokens is for a call with a cache")
        if cache is not None:
            if segment_ids is not None:
                raise ValueError("segment_ids cannot be given with a cache")
            if cache.lengths.shape != tokens.shape[:1]:
                rows = cache.lengths.shape[0]
                raise ValueError(f"cache of {rows} rows, expected {tokens.shape[0]} as tokens")
            if num_tokens is None:
                num_tokens = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
        embed = Embedding(config, name="embed")
        x = constrain(embed(tokens), "act_batch", "act_seq", "act_embed")
        cached = None if cache is None else (cache.state, cache.conv)
        x, (cached, residual) = self.run_layers(x, cached, segment_ids, num_tokens)
        x = RMSNorm(config.rms_norm_eps, config.param_dtype, name="final_norm")(x)
        if cache is not None:
            cache = RecurrentCache(*cached, cache.lengths + num_tokens)
        wanted = return_logits or self.is_initializing()
        logits = output_logits(config, embed, x) if wanted else None
        return ParaRNNOutput(logits, cache, {"residual": residual}, x)

    @nn.nowrap
    def init_cache(
        self, batch: int, capacity: int | None = None, dtype: Any = None
    ) -> RecurrentCache:
        """What is remembered before the first token; `dtype` is that of the convolutions' inputs.

        `capacity` is taken as by a decoder and not used: there is no limit.
        """
        del capacity
        config = self.config
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        one = CELLS[config.cell](features=config.hidden_size).initial_state(batch)
        state = jax.tree.map(
            lambda x: constrain(
                jnp.broadcast_to(x, (config.num_layers, *x.shape)), None, "act_batch", "act_heads"
            ),
            one,
        )
        shape = (config.num_layers, batch, config.conv_size - 1, config.hidden_size)
        conv = constrain(
            jnp.zeros(shape, dtype or config.dtype), None, "act_batch", None, "act_heads"
        )
        return RecurrentCache(state, conv, jnp.zeros(batch, jnp.int32))

    def run_layers(self, x, cached, segment_ids, num_tokens):
        """All layers; what they leave behind has a leading layer axis."""
        config = self.config
        layer_cls = ParaRNNLayer
        if config.remat != "none" and not self.is_initializing():
            policy = remat_policy(config.remat, NAMED_ACTIVATIONS)
            layer_cls = nn.remat(layer_cls, policy=policy, prevent_cse=not config.scan_layers)
        if config.scan_layers:
            scanned = nn.scan(
                layer_cls,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=config.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return scanned(config, name="layers")(x, cached, segment_ids, num_tokens)
        left = []
        for index in range(config.num_layers):
            own = jax.tree.map(lambda a, i=index: a[i], cached)
            x, output = layer_cls(config, name=f"layers_{index}")(x, own, segment_ids, num_tokens)
            left.append(output)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *left)


def count_parameters(config: ParaRNNConfig) -> int:
    """Number of parameters of the model (tied weights counted once), without allocating them."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(ParaRNN(config).init, jax.random.key(0), tokens)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def flops_per_token(config: ParaRNNConfig) -> float:
    """Forward flops per token: matrix products only, a multiply-add counted as two.

    The recurrence itself is elementwise: some 40 operations per channel and Newton iteration,
    which is below 1 % of the layer's products at the published sizes.
    """
    d = config.hidden_size
    block = 3 * d * d + 3 * d * d // config.num_heads + config.conv_size * d
    return 2 * (
        config.num_layers * (block + 3 * d * config.intermediate_size) + d * config.vocab_size
    )


_SIZES = {
    "pararnn-400m": {"hidden_size": 1024, "num_layers": 24, "num_heads": 4},
    "pararnn-1b": {"hidden_size": 2048, "num_layers": 24, "num_heads": 4},
    "pararnn-2.9b": {"hidden_size": 2560, "num_layers": 32, "num_heads": 2},
    "pararnn-7b": {"hidden_size": 4096, "num_layers": 32, "num_heads": 4},
}


def preset(name: str, **overrides) -> ParaRNNConfig:
    """The published sizes (arXiv 2510.21450, table 3): 406M, 1.42B, 2.90B and 6.76B parameters.

    Args:
      name: one of `list_presets()`, or its last part in any case: "7B".
      **overrides: fields of `ParaRNNConfig` to set instead, such as `cell="lstm"`.

    Raises:
      ValueError: an unknown name.
    """
    key = name.lower()
    key = key if key.startswith("pararnn-") else f"pararnn-{key}"
    if key not in _SIZES:
        raise ValueError(f"no preset {name!r}. There are {', '.join(_SIZES)}")
    return ParaRNNConfig(**{"vocab_size": 50_432, **_SIZES[key], **overrides})


def list_presets() -> tuple[str, ...]:
    """Returns the names of all presets."""
    return tuple(_SIZES)
