"""Mixture of experts: router, sorted grouped matmuls, load statistics, expert parallelism.

No capacity and no dropped token: assignments (token, choice) are sorted by expert and each expert
multiplies its own rows. Mixtral arXiv 2401.04088, Switch Transformer arXiv 2101.03961 (load
balancing), ST-MoE arXiv 2202.08906 (z-loss).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.sharding import PartitionSpec

from jaxeff.language.config import DecoderConfig, MoEConfig
from jaxeff.language.layers import Linear, gated_silu, residual_std
from jaxeff.language.sharding import free_axes, mesh_axes, target_platform

METHODS = (None, "gmm", "ragged", "blocks")


class RouterStats(NamedTuple):
    """Sums over the real tokens of one layer (stacked: (layers, ...))."""

    loads: jax.Array  # (E,) int32, assignments to each expert
    probabilities: jax.Array  # (E,) float32
    z: jax.Array  # () float32, logsumexp(logits)^2
    tokens: jax.Array  # () float32


def route(
    logits: jax.Array, num_choices: int, normalize: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choose experts.

    Args:
      logits: (..., E), softmax is taken over all experts in float32, before the choice.
      num_choices: k.
      normalize: make the chosen weights sum to 1.

    Returns:
      weights (..., k) float32, experts (..., k) int32 in falling order of weight, and the
      probabilities (..., E) float32.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, num_choices)
    if normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, experts, probabilities


def router_stats(logits, experts, probabilities, real: jax.Array | None = None) -> RouterStats:
    """Statistics of one layer; `real` (...) bool leaves padding out."""
    num_experts = logits.shape[-1]
    weight = jnp.ones(logits.shape[:-1], jnp.float32) if real is None else real.astype(jnp.float32)
    over = tuple(range(weight.ndim))
    chosen = experts[..., None] == jnp.arange(num_experts)  # (..., k, E)
    chosen &= weight[..., None, None] > 0
    z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1) ** 2
    return RouterStats(
        loads=jnp.sum(chosen, axis=(*over, len(over)), dtype=jnp.int32),
        probabilities=jnp.sum(probabilities * weight[..., None], axis=over),
        z=jnp.sum(z * weight),
        tokens=jnp.sum(weight),
    )


def empty_stats(num_experts: int) -> RouterStats:
    """Statistics of a layer that routed nothing."""
    zero = jnp.zeros((), jnp.float32)
    return RouterStats(
        loads=jnp.zeros(num_experts, jnp.int32),
        probabilities=jnp.zeros(num_experts, jnp.float32),
        z=zero,
        tokens=zero,
    )


def load_balancing_loss(stats: RouterStats) -> jax.Array:
    """E sum_e (assignments to e per token) (mean probability of e), layers taken together.

    `stats` is stacked, (layers, ...). The value is num_choices for a perfectly even router. This
    is the switch loss as the published Mixtral and Qwen3-MoE checkpoints use it.
    """
    num_tokens = jnp.maximum(jnp.sum(stats.tokens), 1)
    loads = jnp.sum(stats.loads, axis=0) / num_tokens
    return loads.shape[-1] * jnp.sum(loads * jnp.sum(stats.probabilities, axis=0) / num_tokens)


def router_z_loss(stats: RouterStats) -> jax.Array:
    """Mean over tokens and layers of logsumexp(router logits)^2."""
    return jnp.sum(stats.z) / jnp.maximum(jnp.sum(stats.tokens), 1)


def router_loss(aux: dict, moe: MoEConfig | None) -> jax.Array | float:
    """What the router adds to the training loss, from a decoder's `aux`; 0 without experts."""
    if moe is None:
        return 0.0
    balance = moe.router_aux_loss_coef * aux["aux_loss"]
    return balance + moe.router_z_loss_coef * aux["router_z_loss"]


# --- experts --------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where each assignment sits among the rows that the experts multiply."""

    source: jax.Array  # (rows,) assignment of a row; num_assignments where the row is padding
    target: jax.Array  # (assignments,) row of an assignment; num_rows where no expert is here
    group_sizes: jax.Array  # (E,) assignments of each expert
    block_experts: jax.Array | None  # (blocks,) expert of each block of rows


def expert_mlp(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    method: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """sum_j weights_j down_e(silu(gate_e(x)) up_e(x)), e = experts_j.

    Args:
      x: (N, d) tokens.
      weights, experts: (N, k); experts outside 0..E-1 contribute nothing.
      gate, up: (E, d, f).
      down: (E, f, d).
      method: "gmm" (JAX's grouped matmul kernel for TPU), "ragged" (`jax.lax.ragged_dot`), "blocks"
        (each expert's rows padded to blocks, one batched matmul over the blocks), or None: "gmm" on
        TPU and "blocks" elsewhere. Except on TPU v5p, XLA turns `ragged_dot` into a product of
        every row with every expert.
      interpret: run "gmm" without a TPU, for tests.

    Returns:
      (N, d) in x's dtype; products are accumulated over the choices in float32.

    Raises:
      ValueError: for an unknown method.
      NotImplementedError: for "gmm" away from a TPU.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, METHODS))}")
    if method == "gmm" and target_platform() != "tpu" and not interpret:
        raise NotImplementedError(
            f"method='gmm' runs on TPU, and this program is traced for {target_platform()}"
        )
    if method is None:
        method = "gmm" if target_platform() == "tpu" else "blocks"
    flat = experts.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < gate.shape[0]), flat, gate.shape[0])
    layout, matmul = _METHODS[method](flat, gate.shape[0], interpret)
    rows = _dispatch(x, layout.source, layout.target)
    hidden = gated_silu(
        checkpoint_name(matmul(rows, gate), "mlp_gate"),
        checkpoint_name(matmul(rows, up), "mlp_up"),
    )
    return _combine(matmul(hidden, down), weights, layout.source, layout.target)


def _by_ragged_dot(experts: jax.Array, num_experts: int, interpret: bool):
    del interpret
    layout = _sorted(experts, num_experts, experts.size)

    def matmul(rows, kernel):
        sizes = layout.group_sizes
        out = jax.lax.ragged_dot(rows, kernel, sizes, preferred_element_type=jnp.float32)
        return out.astype(rows.dtype)

    return layout, matmul


def _by_gmm(experts: jax.Array, num_experts: int, interpret: bool):
    tile = min(max(_power_of_two(experts.size // (2 * num_experts)), 128), 512)
    layout = _sorted(experts, num_experts, -(-experts.size // tile) * tile)
    return layout, functools.partial(
        _gmm, group_sizes=layout.group_sizes, tile=tile, interpret=interpret
    )


def _by_blocks(experts: jax.Array, num_experts: int, interpret: bool):
    del interpret
    layout = _blocked(experts, num_experts)

    def matmul(rows, kernel):
        owners = layout.block_experts
        blocks = rows.reshape(owners.size, -1, rows.shape[-1])
        out = jnp.einsum("nbd,ndf->nbf", blocks, kernel[owners], preferred_element_type=jnp.float32)
        return out.astype(rows.dtype).reshape(rows.shape[0], -1)

    return layout, matmul


_METHODS = {"gmm": _by_gmm, "ragged": _by_ragged_dot, "blocks": _by_blocks}


def _sorted(experts: jax.Array, num_experts: int, num_rows: int) -> Layout:
    """Assignments in the order of their experts; absent ones and padding come last."""
    order, rank, sizes = _sort(experts, num_experts)
    count = experts.size
    source = jnp.pad(order, (0, num_rows - count), constant_values=count)
    target = jnp.where(experts < num_experts, rank, num_rows)
    return Layout(source=source, target=target, group_sizes=sizes, block_experts=None)


def _blocked(experts: jax.Array, num_experts: int) -> Layout:
    """Rows of each expert padded to whole blocks; at most half as many rows again."""
    count = experts.size
    block = _power_of_two(count // (2 * num_experts))  # up to half an even share
    num_blocks = (count + min(num_experts, count) * (block - 1)) // block
    order, rank, sizes = _sort(experts, num_experts)
    first = jnp.cumsum(sizes) - sizes  # place of each expert's first assignment in the order
    last_block = jnp.cumsum(-(-sizes // block))
    first_row = (last_block - -(-sizes // block)) * block

    owner = jnp.searchsorted(last_block, jnp.arange(num_blocks), side="right")
    owner = jnp.minimum(owner, num_experts - 1).astype(jnp.int32)
    row_owner = jnp.repeat(owner, block)
    place = jnp.arange(num_blocks * block) - first_row[row_owner]
    used = place < sizes[row_owner]
    source = order[jnp.where(used, first[row_owner] + place, 0)]
    own = jnp.minimum(experts, num_experts - 1)
    target = first_row[own] + rank - first[own]
    return Layout(
        source=jnp.where(used, source, count),
        target=jnp.where(experts < num_experts, target, num_blocks * block),
        group_sizes=sizes,
        block_experts=owner,
    )


def _power_of_two(limit: int) -> int:
    """The largest power of two up to `limit`, at least 1."""
    return 1 << (max(limit, 1).bit_length() - 1)


def _sort(experts: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Stable order by expert, each assignment's place in it, and assignments of each expert."""
    order = jnp.argsort(experts, stable=True)
    rank = jnp.argsort(order)
    sizes = jnp.sum(experts[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return order, rank, sizes


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _gmm(rows, kernel, group_sizes, tile, interpret=False):
    """Rows of group e times kernel[e]; rows beyond the groups are left undefined."""
    tiling = (tile, *_kernel_tile(kernel.shape[1:]))
    return gmm(rows, kernel, group_sizes, rows.dtype, tiling, interpret=interpret)


def _gmm_fwd(rows, kernel, group_sizes, tile, interpret):
    return _gmm(rows, kernel, group_sizes, tile, interpret), (rows, kernel, group_sizes)


def _gmm_bwd(tile, interpret, residuals, g):
    rows, kernel, group_sizes = residuals
    inner, outer = _kernel_tile(kernel.shape[1:])
    d_rows = gmm(
        g, kernel, group_sizes, rows.dtype, (tile, outer, inner),
        transpose_rhs=True, interpret=interpret,
    )  # fmt: skip
    d_kernel = tgmm(rows.T, g, group_sizes, kernel.dtype, (tile, inner, outer), interpret=interpret)
    return d_rows, d_kernel, None


_gmm.defvjp(_gmm_fwd, _gmm_bwd)


def _kernel_tile(shape: tuple[int, int]) -> tuple[int, int]:
    return min(shape[0], 1024), min(shape[1], 512)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)


# Dispatch and combine are gathers whose transposes are gathers by the inverse permutation; left to
# automatic differentiation they would become scatters, which are slow everywhere.


@jax.custom_vjp
def _dispatch(x, source, target):
    """Row r is the token of assignment source[r]; zeros in padding rows."""
    return _take(x, source // (target.size // x.shape[0]))


def _dispatch_fwd(x, source, target):
    return _dispatch(x, source, target), (target, x.shape[0])


def _dispatch_bwd(residuals, g):
    target, num_tokens = residuals
    per_choice = _take(g, target).reshape(num_tokens, -1, g.shape[-1])
    return jnp.sum(per_choice, axis=1, dtype=jnp.float32).astype(g.dtype), None, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _combine(rows, weights, source, target):
    """Weighted sum over each token's choices, in rows' dtype."""
    choices = _take(rows, target).reshape(*weights.shape, -1)
    return jnp.einsum("nk,nkd->nd", weights, choices.astype(jnp.float32)).astype(rows.dtype)


def _combine_fwd(rows, weights, source, target):
    return _combine(rows, weights, source, target), (rows, weights, source, target)


def _combine_bwd(residuals, g):
    rows, weights, source, target = residuals
    row_weights = _take(weights.reshape(-1), source)
    d_rows = _take(g, source // weights.shape[1]) * row_weights[:, None].astype(g.dtype)
    choices = _take(rows, target).reshape(*weights.shape, -1)
    d_weights = jnp.einsum("nd,nkd->nk", g, choices, preferred_element_type=jnp.float32)
    return d_rows, d_weights.astype(weights.dtype), None, None


_combine.defvjp(_combine_fwd, _combine_bwd)


def sharded_expert_mlp(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    **options,
) -> jax.Array:
    """`expert_mlp` and its options over (B, T, ...) arrays on the mesh of the traced program.

    Every device sorts its own tokens. Along the mesh axes of "expert" the tokens are gathered,
    each device computes the experts it owns, and the partial sums are scattered back; along those
    of "act_mlp" the width of the experts is split. The result equals that of one device.
    """
    batch, seq = mesh_axes("act_batch", x.shape[0]), mesh_axes("act_seq", x.shape[1])
    owners, width = mesh_axes("expert", gate.shape[0]), mesh_axes("act_mlp", gate.shape[2])
    if not (batch or seq or owners or width):
        return _flat_expert_mlp(x, weights, experts, gate, up, down, **options)
    gathered = tuple(axis for axis in owners if axis in batch)
    summed = tuple(axis for axis in owners if axis not in batch) + width
    tokens = PartitionSpec(batch or None, seq or None)
    wide = PartitionSpec(owners or None, None, width or None)
    narrow = PartitionSpec(owners or None, width or None, None)
    specs = (tokens, tokens, tokens, wide, wide, narrow)

    def local(*args):
        # The hand-written gradients take all operands to differ along the same axes.
        x, weights, experts, gate, up, down = (
            _varying(a, batch + seq + summed, spec) for a, spec in zip(args, specs, strict=True)
        )
        if gathered:
            x, weights, experts = (
                jax.lax.all_gather(a, gathered, axis=0, tiled=True) for a in (x, weights, experts)
            )
        if owners:
            experts = experts - jax.lax.axis_index(owners) * gate.shape[0]
        y = _flat_expert_mlp(x, weights, experts, gate, up, down, **options)
        if gathered:
            y = jax.lax.psum_scatter(y, gathered, scatter_dimension=0, tiled=True)
        return jax.lax.psum(y, summed) if summed else y

    return jax.shard_map(
        local,
        in_specs=specs,
        out_specs=tokens,
        axis_names=set(free_axes()),
        # The kernel of "gmm" does not say how its outputs vary.
        check_vma=options.get("method") != "gmm" and target_platform() != "tpu",
    )(x, weights, experts, gate, up, down)


def _varying(x, axes, spec):
    """x of an in_spec, marked as different along the axes that the spec does not name."""
    named = jax.tree.leaves(tuple(spec))
    missing = tuple(axis for axis in axes if axis not in named)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _flat_expert_mlp(x, weights, experts, *kernels, **options):
    num_tokens, num_choices = x.shape[0] * x.shape[1], weights.shape[-1]
    y = expert_mlp(
        x.reshape(num_tokens, -1),
        weights.reshape(num_tokens, num_choices),
        experts.reshape(num_tokens, num_choices),
        *kernels,
        **options,
    )
    return y.reshape(x.shape)


class MoE(nn.Module):
    """Router and experts in place of the MLP; returns the output and `RouterStats`."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, real: jax.Array | None = None
    ) -> tuple[jax.Array, RouterStats]:
        config, moe = self.config, self.config.moe
        width = moe.intermediate_size or config.intermediate_size
        logits = Linear(
            features=moe.num_experts,
            kernel_axes=("embed", None),
            init_std=config.initializer_range,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            output_dtype="float32",
            name="router",
        )(x)
        weights, experts, probabilities = route(
            logits, moe.num_experts_per_token, moe.norm_topk_prob
        )
        wide = (moe.num_experts, config.hidden_size, width)
        narrow = (moe.num_experts, width, config.hidden_size)
        gate = self.kernel("gate_proj", wide, ("expert", "embed", "mlp"))
        up = self.kernel("up_proj", wide, ("expert", "embed", "mlp"))
        down = self.kernel("down_proj", narrow, ("expert", "mlp", "embed"), residual_std(config))
        y = sharded_expert_mlp(x, weights, experts, gate, up, down)
        return y, router_stats(logits, experts, probabilities, real)

    def kernel(self, name, shape, axes, std=None):
        init = nn.initializers.normal(std or self.config.initializer_range)
        kernel = self.param(
            name, nn.with_logical_partitioning(init, axes), shape, self.config.param_dtype
        )
        return kernel.astype(self.config.dtype)
