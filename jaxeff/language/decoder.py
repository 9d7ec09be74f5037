"""The decoder: Llama, Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE by configuration.

Thin linen modules over the pure functions of the other files. Pieces are replaceable: `linear_cls`
(fields and call of `layers.Linear`), `attention_fn` (signature of `attention.attention`), `mlp_cls`
(of `layers.MLP`) and `moe_cls` (of `moe.MoE`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from jaxeff.language.attention import attention
from jaxeff.language.cache import CachedKeys, KVCache, check_room, init_cache, write
from jaxeff.language.config import DecoderConfig
from jaxeff.language.layers import MLP, Embedding, Linear, RMSNorm, make_linear, residual_std
from jaxeff.language.moe import (
    MoE,
    RouterStats,
    empty_stats,
    load_balancing_loss,
    router_z_loss,
)
from jaxeff.language.rope import rope_frequencies, rope_table, rotate
from jaxeff.language.sharding import constrain

NAMED_ACTIVATIONS = ("attn_qkv", "attn_out", "mlp_gate", "mlp_up")


@flax.struct.dataclass
class DecoderOutput:
    """What a decoder returns.

    Attributes:
      logits: (B, T, V) float32, or None with `return_logits=False`.
      cache: the cache with the new tokens, or None.
      aux: "router_loads" (MoE layers, E) int32, "aux_loss" () and "router_z_loss" () float32
        (0 without experts), and "hidden_states" (L + 1, B, T, d) when asked for.
      hidden: (B, T, d), the final norm's output.
    """

    logits: jax.Array | None
    cache: KVCache | None
    aux: dict[str, Any]
    hidden: jax.Array


class Shared(NamedTuple):
    """What all layers of one call have in common."""

    cos: jax.Array  # (B or 1, T, D/2) float32
    sin: jax.Array
    positions: jax.Array | None
    segment_ids: jax.Array | None
    mask: jax.Array | None
    lengths: jax.Array | None  # of the cache


class LayerInput(NamedTuple):
    """What one layer has of its own."""

    cached_k: jax.Array | None = None  # (B, S, K, D)
    cached_v: jax.Array | None = None
    gates: jax.Array | None = None  # (2,) bool


class LayerOutput(NamedTuple):
    """What one layer leaves behind besides the residual stream."""

    k: jax.Array | None  # (B, T, K, D), only with a cache
    v: jax.Array | None
    stats: RouterStats | None
    hidden: jax.Array | None


class Attention(nn.Module):
    """Projections, optional query/key norm, RoPE, attention, output projection."""

    config: DecoderConfig
    linear_cls: Callable[..., nn.Module] = Linear
    attention_fn: Callable[..., jax.Array] = attention

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: Shared, cached: CachedKeys | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        config = self.config
        q = self.project(x, "q_proj", config.num_heads, "heads")
        k = self.project(x, "k_proj", config.num_kv_heads, "kv_heads")
        v = self.project(x, "v_proj", config.num_kv_heads, "kv_heads")
        if config.qk_norm:
            q = RMSNorm(config.rms_norm_eps, config.param_dtype, name="q_norm")(q)
            k = RMSNorm(config.rms_norm_eps, config.param_dtype, name="k_norm")(k)
        q, k = rotate(q, shared.cos, shared.sin), rotate(k, shared.cos, shared.sin)
        q, k, v = (checkpoint_name(a, "attn_qkv") for a in (q, k, v))
        out = self.attention_fn(
            q,
            k,
            v,
            positions=shared.positions,
            segment_ids=shared.segment_ids,
            mask=shared.mask,
            cache=cached,
            sliding_window=config.sliding_window,
            implementation=config.attention_implementation,
        )
        out = out.reshape(*x.shape[:2], config.num_heads * config.resolved_head_dim)
        out = make_linear(
            self.linear_cls,
            config,
            name="o_proj",
            features=config.hidden_size,
            kernel_axes=("heads", "embed"),
            use_bias=config.attention_bias,
            init_std=residual_std(config),
        )(out)
        return out, k, v

    def project(self, x: jax.Array, name: str, heads: int, axis: str) -> jax.Array:
        config = self.config
        y = make_linear(
            self.linear_cls,
            config,
            name=name,
            features=heads * config.resolved_head_dim,
            kernel_axes=("embed", axis),
            use_bias=config.attention_bias or config.qkv_bias,
        )(x)
        y = y.reshape(*x.shape[:2], heads, config.resolved_head_dim)
        return constrain(y, "act_batch", "act_seq", f"act_{axis}", None)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP (or experts), each of which a gate may skip."""

    config: DecoderConfig
    is_moe: bool
    keep_hidden: bool = False
    linear_cls: Callable[..., nn.Module] = Linear
    attention_fn: Callable[..., jax.Array] = attention
    mlp_cls: Callable[..., nn.Module] = MLP
    moe_cls: Callable[..., nn.Module] = MoE

    def setup(self):
        config = self.config
        self.input_norm = RMSNorm(config.rms_norm_eps, config.param_dtype)
        self.attention = Attention(config, self.linear_cls, self.attention_fn)
        self.post_attention_norm = RMSNorm(config.rms_norm_eps, config.param_dtype)
        if self.is_moe:
            self.moe = self.moe_cls(config)
        else:
            self.mlp = self.mlp_cls(config, self.linear_cls)

    def __call__(
        self, x: jax.Array, own: LayerInput, shared: Shared
    ) -> tuple[jax.Array, LayerOutput]:
        run_attention, run_mlp = (True, True) if own.gates is None else own.gates

        def attend(layer, x):
            return layer.attend(x, own, shared)

        def no_attention(layer, x):
            new = (*x.shape[:2], self.config.num_kv_heads, self.config.resolved_head_dim)
            zeros = jnp.zeros(new, self.config.dtype)
            return (x, zeros, zeros)

        x, k, v = self.gated(run_attention, attend, no_attention, x)
        x, stats = self.gated(
            run_mlp,
            lambda layer, x: layer.feed_forward(x, shared),
            lambda layer, x: (x, empty_stats(self.config.moe.num_experts) if self.is_moe else None),
            x,
        )
        if own.cached_k is None:
            k = v = None
        return x, LayerOutput(k, v, stats, x if self.keep_hidden else None)

    def gated(self, gate, run, skip, x):
        """Only the chosen branch is computed: in Python for a known gate, else by `lax.cond`."""
        if isinstance(gate, bool | np.bool_):
            return run(self, x) if gate else skip(self, x)
        return nn.cond(gate, run, skip, self, x)

    def attend(self, x, own, shared):
        """The attention sub-layer; also its new keys and values."""
        cached = None
        if own.cached_k is not None:
            cached = CachedKeys(own.cached_k, own.cached_v, shared.lengths)
        out, k, v = self.attention(self.input_norm(x), shared, cached)
        return constrain(x + out, "act_batch", "act_seq", "act_embed"), k, v

    def feed_forward(self, x, shared):
        """The MLP or expert sub-layer; also the router's statistics."""
        h, stats = self.post_attention_norm(x), None
        if self.is_moe:
            real = None if shared.segment_ids is None else shared.segment_ids != 0
            out, stats = self.moe(h, real)
        else:
            out = self.mlp(h)
        return constrain(x + out, "act_batch", "act_seq", "act_embed"), stats


class Decoder(nn.Module):
    """The whole model.

    Attributes:
      config: sizes and options.
      linear_cls, attention_fn, mlp_cls, moe_cls: replaceable pieces (see the module's docstring).
    """

    config: DecoderConfig
    linear_cls: Callable[..., nn.Module] = Linear
    attention_fn: Callable[..., jax.Array] = attention
    mlp_cls: Callable[..., nn.Module] = MLP
    moe_cls: Callable[..., nn.Module] = MoE

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        mask: jax.Array | None = None,
        layer_gates: Any = None,
        inputs_embeds: jax.Array | None = None,
        num_tokens: jax.Array | None = None,
        return_logits: bool = True,
        return_hidden_states: bool = False,
    ) -> DecoderOutput:
        """Run the model over T new tokens.

        Args:
          tokens: (B, T) int ids, or None when `inputs_embeds` (B, T, d) replaces the embedding.
          positions: (B, T) int, for RoPE and masks. Default: the order of the tokens, behind the
            cache's lengths. "dynamic" and "longrope" RoPE take the call's static maximum length
            (T, or the capacity of the cache), so that all keys of a cache share one base.
          segment_ids: (B, T) int, packed documents; 0 is padding, which the router's statistics
            leave out. Not with a cache.
          cache: keys and values of earlier tokens; the new ones are appended at `cache.lengths`.
          mask: (B, T, T) bool, which new token sees which, in place of causality (tree).
          layer_gates: (L, 2) bool, run attention / run MLP of each layer. Skipped sub-layers are
            not computed; a skipped attention leaves zero keys and values in the cache. Gates that
            are not traced are resolved while tracing where the layers are not scanned.
          num_tokens: (B,) int, how many of the T tokens each row really has, the rest being padding
            behind them: the cache's lengths grow by that. Default: T.
          return_logits: compute `logits`; without them the head is not touched.
          return_hidden_states: put (L + 1, B, T, d) in `aux`: the embeddings, each layer's output,
            the last one after the final norm.

        Raises:
          ValueError: for shapes that do not fit, both or neither of tokens and inputs_embeds, or
            more new tokens than the cache has room for.
        """
        config = self.config
        embed = Embedding(config, name="embed")
        x = self.embedded(embed, tokens, inputs_embeds)
        x = constrain(x.astype(config.dtype), "act_batch", "act_seq", "act_embed")
        shared = self.shared(x, positions, segment_ids, cache, mask)
        embedded = x
        x, outputs = self.run_layers(x, shared, cache, layer_gates, return_hidden_states)
        x = RMSNorm(config.rms_norm_eps, config.param_dtype, name="final_norm")(x)

        aux = _router_aux(outputs.stats)
        if return_hidden_states:
            states = (embedded[None], outputs.hidden[:-1], x[None])
            aux["hidden_states"] = jnp.concatenate(states)
        if cache is not None:
            written = write(cache, outputs.k, outputs.v)
            new = x.shape[1] if num_tokens is None else num_tokens
            cache = written.replace(lengths=cache.lengths + new)
        wanted = return_logits or self.is_initializing()
        logits = output_logits(config, embed, x) if wanted else None
        return DecoderOutput(logits=logits, cache=cache, aux=aux, hidden=x)

    @nn.nowrap
    def init_cache(self, batch: int, capacity: int, dtype=None) -> KVCache:
        """An empty cache for `batch` texts of up to `capacity` tokens, sharded as it is used."""
        cache = init_cache(self.config, batch, capacity, dtype)
        axes = (None, "act_batch", None, "act_kv_heads", None)
        return cache.replace(k=constrain(cache.k, *axes), v=constrain(cache.v, *axes))

    def embedded(self, embed, tokens, inputs_embeds):
        if (tokens is None) == (inputs_embeds is None):
            raise ValueError("give either tokens or inputs_embeds")
        if inputs_embeds is None:
            if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
                raise ValueError(
                    f"tokens {tokens.shape} {tokens.dtype} must be integers of shape (batch, T)"
                )
            return embed(tokens)
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds {inputs_embeds.shape} must be "
                f"(batch, T, hidden_size={self.config.hidden_size})"
            )
        return inputs_embeds

    def shared(self, x, positions, segment_ids, cache, mask) -> Shared:
        config, (batch, length) = self.config, x.shape[:2]
        if cache is not None:
            expected = (config.num_layers, batch, config.num_kv_heads, config.resolved_head_dim)
            found = (*cache.k.shape[:2], *cache.k.shape[3:])
            if found != expected:
                raise ValueError(
                    f"cache of (layers, batch, kv_heads, head_dim)={found}, expected {expected}"
                )
            check_room(cache, length)
        if positions is not None and positions.shape not in ((batch, length), (1, length)):
            raise ValueError(f"positions {positions.shape} must be {(batch, length)}")
        longest = length if cache is None else cache.capacity
        inv_freq, scaling = rope_frequencies(config.rope, config.resolved_head_dim, longest)
        order = jnp.arange(length)[None]
        default = order if cache is None else cache.lengths[:, None] + order
        cos, sin = rope_table(default if positions is None else positions, inv_freq, scaling)
        lengths = None if cache is None else cache.lengths
        return Shared(cos, sin, positions, segment_ids, mask, lengths)

    def run_layers(self, x, shared, cache, layer_gates, keep_hidden):
        """All layers; every leaf of the outputs has a leading layer axis."""
        gates = _checked_gates(layer_gates, self.config.num_layers)
        own = LayerInput(gates=gates)
        if cache is not None:
            own = LayerInput(cache.k, cache.v, gates)
        if self.config.scanned:
            return self.scan_layers(x, own, shared, keep_hidden)
        outputs = []
        for index in range(self.config.num_layers):
            layer = self.layer_cls()(
                is_moe=index in self.config.moe_layers,
                keep_hidden=keep_hidden,
                name=f"layers_{index}",
                **self.pieces(),
            )
            x, output = layer(x, jax.tree.map(lambda a, i=index: a[i], own), shared)
            outputs.append(output)
        return x, _stack_outputs(outputs)

    def scan_layers(self, x, own, shared, keep_hidden):
        if own.gates is not None:
            own = own._replace(gates=jnp.asarray(own.gates))
        scanned = nn.scan(
            self.layer_cls(),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        layers = scanned(
            is_moe=bool(self.config.moe_layers),
            keep_hidden=keep_hidden,
            name="layers",
            **self.pieces(),
        )
        return layers(x, own, shared)

    def pieces(self) -> dict[str, Any]:
        names = ("config", "linear_cls", "attention_fn", "mlp_cls", "moe_cls")
        return {name: getattr(self, name) for name in names}

    def layer_cls(self):
        """`DecoderLayer` under the config's rematerialisation policy."""
        if self.config.remat == "none" or self.is_initializing():
            return DecoderLayer
        return nn.remat(
            DecoderLayer,
            policy=remat_policy(self.config.remat, NAMED_ACTIVATIONS),
            prevent_cse=not self.config.scanned,
        )


def output_logits(config: Any, embed: Embedding, x: jax.Array) -> jax.Array:
    """(B, T, V) float32, from the final norm's output; inside a module's compact method.

    `config` says whether the head is the embedding, or the module's own `lm_head`.
    """
    if config.tie_embeddings:
        logits = embed.attend(x)
    else:
        head = make_linear(
            Linear,
            config,
            name="lm_head",
            features=config.vocab_size,
            kernel_axes=("embed", "vocab"),
            output_dtype="float32",
        )
        logits = head(x)
    return constrain(logits, "act_batch", "act_seq", "act_vocab")


def remat_policy(name: str, kept: tuple[str, ...]):
    """The `jax.checkpoint` policy of a config's `remat`; `kept` are the activations it names."""
    policies = jax.checkpoint_policies
    return {
        "full": policies.nothing_saveable,
        "dots_with_no_batch_dims": policies.dots_with_no_batch_dims_saveable,
        "names": policies.save_only_these_names(*kept),
        "names_offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(kept),
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[name]


def _checked_gates(layer_gates, num_layers):
    """None when nothing is skipped; numpy when the gates are known while tracing."""
    if layer_gates is None:
        return None
    if not isinstance(layer_gates, jax.Array):
        layer_gates = np.asarray(layer_gates)
    if layer_gates.shape != (num_layers, 2) or layer_gates.dtype != bool:
        raise ValueError(
            f"layer_gates {layer_gates.shape} {layer_gates.dtype} must be bool of "
            f"shape (num_layers={num_layers}, 2)"
        )
    if isinstance(layer_gates, np.ndarray) and layer_gates.all():
        return None
    return layer_gates


def _stack_outputs(outputs: list[LayerOutput]) -> LayerOutput:
    """Stack each field over the layers that have it."""

    def stack(name):
        found = [getattr(o, name) for o in outputs if getattr(o, name) is not None]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found) if found else None

    return LayerOutput(*(stack(name) for name in LayerOutput._fields))


def _router_aux(stats: RouterStats | None) -> dict[str, jax.Array]:
    if stats is None:
        zero = jnp.zeros((), jnp.float32)
        loads = jnp.zeros((0, 0), jnp.int32)
        return {"router_loads": loads, "aux_loss": zero, "router_z_loss": zero}
    return {
        "router_loads": stats.loads,
        "aux_loss": load_balancing_loss(stats),
        "router_z_loss": router_z_loss(stats),
    }


def head_kernel(params: dict, config: DecoderConfig) -> jax.Array:
    """The (hidden_size, vocab_size) matrix of the logits, tied or not."""
    if config.tie_embeddings:
        return params["embed"]["embedding"].T
    return params["lm_head"]["kernel"]


def stack_layers(params: dict) -> dict:
    """`layers_0`, `layers_1`, ... -> `layers` with a leading layer axis; nothing is rounded.

    Raises:
      ValueError: if there are no such sub-trees, or the layers are not alike.
    """
    names = [name for name in params if name.startswith("layers_")]
    if not names:
        raise ValueError(f"no layers_0, layers_1, ... among {sorted(params)}")
    layers = [params[f"layers_{index}"] for index in range(len(names))]
    if len({jax.tree.structure(layer) for layer in layers}) > 1:
        raise ValueError("layers of different kinds cannot be stacked")
    rest = {name: value for name, value in params.items() if name not in names}
    return rest | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: dict) -> dict:
    """The inverse of `stack_layers`.

    Raises:
      ValueError: if there is no `layers` sub-tree.
    """
    if "layers" not in params:
        raise ValueError(f"no layers among {sorted(params)}")
    rest = {name: value for name, value in params.items() if name != "layers"}
    num_layers = jax.tree.leaves(params["layers"])[0].shape[0]
    for index in range(num_layers):
        rest[f"layers_{index}"] = jax.tree.map(lambda leaf, i=index: leaf[i], params["layers"])
    return rest


def count_parameters(config: DecoderConfig) -> int:
    """Number of parameters of the model (tied weights counted once), without allocating them."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
