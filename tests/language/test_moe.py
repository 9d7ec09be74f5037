"""Router and experts: exactness against a dense reference, cost, statistics, expert parallelism."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import RULES, make_mesh, params_of, relative_error, tiny, tokens_of
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from jaxeff.language import Decoder, MoEConfig, cross_entropy, router_loss
from jaxeff.language.moe import (
    expert_mlp,
    load_balancing_loss,
    route,
    router_stats,
    router_z_loss,
    sharded_expert_mlp,
)


def problem(num_tokens=24, width=8, hidden=12, num_experts=5, k=2, seed=0, normalize=True):
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (num_tokens, width))
    logits = jax.random.normal(keys[1], (num_tokens, num_experts))
    weights, experts, _ = route(logits, k, normalize)
    gate, up = (0.4 * jax.random.normal(key, (num_experts, width, hidden)) for key in keys[2:4])
    down = 0.4 * jax.random.normal(keys[4], (num_experts, hidden, width))
    return x, weights, experts, gate, up, down


def dense_reference(x, weights, experts, gate, up, down):
    """Every expert on every token, weighted by what the router gave it."""
    num_experts = gate.shape[0]
    hidden = jax.nn.silu(jnp.einsum("nd,edf->enf", x, gate)) * jnp.einsum("nd,edf->enf", x, up)
    outputs = jnp.einsum("enf,efd->end", hidden, down)
    share = jnp.sum(jax.nn.one_hot(experts, num_experts) * weights[..., None], axis=1)
    return jnp.einsum("ne,end->nd", share, outputs)


# --- router ---------------------------------------------------------------------------------------


def test_softmax_comes_before_the_choice():
    logits = jnp.asarray([[1.0, 3.0, 2.0, -1.0]], jnp.bfloat16)
    probabilities = np.exp([1, 3, 2, -1]) / np.sum(np.exp([1, 3, 2, -1]))
    weights, experts, all_probabilities = route(logits, 2, normalize=False)
    np.testing.assert_array_equal(experts, [[1, 2]])
    np.testing.assert_allclose(weights, [probabilities[[1, 2]]], rtol=1e-5)
    np.testing.assert_allclose(all_probabilities, [probabilities], rtol=1e-5)
    assert weights.dtype == jnp.float32
    normalized, _, _ = route(logits, 2, normalize=True)
    np.testing.assert_allclose(normalized, weights / weights.sum(), rtol=1e-5)


def test_statistics_leave_padding_out():
    logits = jax.random.normal(jax.random.key(0), (2, 6, 4))
    _, experts, probabilities = route(logits, 2, True)
    real = jnp.asarray([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    stats = router_stats(logits, experts, probabilities, real)
    loads = np.bincount(np.asarray(experts)[np.asarray(real)].reshape(-1), minlength=4)
    np.testing.assert_array_equal(stats.loads, loads)
    np.testing.assert_allclose(
        stats.probabilities, np.asarray(probabilities)[np.asarray(real)].sum(0), rtol=1e-5
    )
    assert stats.tokens == 10


def test_balance_loss_takes_all_layers_and_tokens_together():
    logits = jax.random.normal(jax.random.key(0), (3, 10, 4))  # (layers, tokens, experts)
    _, experts, probabilities = route(logits, 2, True)
    stats = jax.vmap(router_stats)(logits, experts, probabilities)
    flat, chosen = np.asarray(probabilities).reshape(30, 4), np.asarray(experts).reshape(30, 2)
    hit = np.stack([(chosen[:, j, None] == np.arange(4)).mean(0) for j in range(2)])
    expected = 4 * np.sum(hit * flat.mean(0))
    np.testing.assert_allclose(load_balancing_loss(stats), expected, rtol=1e-5)
    z = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))
    np.testing.assert_allclose(router_z_loss(stats), np.mean(z**2), rtol=1e-5)


def test_an_even_router_costs_its_number_of_choices():
    stats = router_stats(
        jnp.zeros((1, 8, 4)), jnp.arange(16).reshape(1, 8, 2) % 4, jnp.full((1, 8, 4), 0.25)
    )
    stacked = jax.tree.map(lambda a: a[None], stats)
    np.testing.assert_allclose(load_balancing_loss(stacked), 2.0, rtol=1e-6)


# --- experts --------------------------------------------------------------------------------------


SIZES = [(24, 5, 2), (1, 8, 2), (40, 3, 3), (7, 16, 1), (33, 1, 1)]  # tokens, experts, choices


@pytest.mark.parametrize(
    ("method", "num_tokens", "num_experts", "k"),
    [("gmm", *SIZES[0]), ("ragged", *SIZES[0]), *(("blocks", *sizes) for sizes in SIZES)],
)
def test_experts_equal_the_dense_reference_with_gradients(method, num_tokens, num_experts, k):
    x, weights, experts, *kernels = problem(num_tokens, num_experts=num_experts, k=k)

    def loss(fn, x, weights, kernels):
        return jnp.sum(jnp.sin(fn(x, weights, experts, *kernels)))

    sparse = functools.partial(expert_mlp, method=method, interpret=True)
    np.testing.assert_allclose(
        sparse(x, weights, experts, *kernels),
        dense_reference(x, weights, experts, *kernels),
        rtol=1e-4,
        atol=1e-4,
    )
    gradient = jax.grad(loss, argnums=(1, 2, 3))
    found = jax.jit(functools.partial(gradient, sparse))(x, weights, kernels)
    assert relative_error(found, gradient(dense_reference, x, weights, kernels)) < 1e-5


@pytest.mark.parametrize("method", ["gmm", "ragged", "blocks"])
def test_skewed_empty_and_absent_experts(method):
    x, weights, _, *kernels = problem(num_tokens=32, num_experts=6)
    # Expert 1 has nearly everything, 0, 3 and 4 have nothing, -1 and 6 are not here.
    experts = jnp.full((32, 2), 1).at[3, 0].set(2).at[5, 1].set(5)
    experts = experts.at[7].set(-1).at[9, 1].set(6)
    here = (experts >= 0) & (experts < 6)
    expected = dense_reference(x, jnp.where(here, weights, 0), experts, *kernels)
    found = expert_mlp(x, weights, experts, *kernels, method=method, interpret=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not np.any(found[7])


def test_methods_that_cannot_run_are_refused():
    with pytest.raises(ValueError, match="method='dense'"):
        expert_mlp(*problem(), method="dense")
    with pytest.raises(NotImplementedError, match="traced for cpu"):
        expert_mlp(*problem(), method="gmm")


def flops(num_experts, k, num_tokens=256):
    args = problem(num_tokens, width=32, hidden=64, num_experts=num_experts, k=k)
    loss = lambda *args: jnp.sum(expert_mlp(*args))  # noqa: E731
    compiled = jax.jit(jax.grad(loss, argnums=(0, 3, 4, 5))).lower(*args).compile()
    return compiled.cost_analysis()["flops"]


def test_cost_grows_with_the_choices_not_with_the_experts():
    base = flops(num_experts=4, k=2)
    assert flops(num_experts=32, k=2) < 1.3 * base
    assert 1.7 * base < flops(num_experts=4, k=4) < 2.3 * base
    products = 3 * 3 * 2 * 256 * 2 * 32 * 64  # three matmuls, forward and twice backward
    assert products < base < 1.6 * products


def test_experts_work_in_bfloat16():
    x, weights, experts, *kernels = problem()
    exact = expert_mlp(x, weights, experts, *kernels)
    low = expert_mlp(
        x.astype(jnp.bfloat16), weights, experts, *(a.astype(jnp.bfloat16) for a in kernels)
    )
    assert low.dtype == jnp.bfloat16
    assert relative_error(low.astype(jnp.float32), exact) < 2e-2


# --- in the decoder -------------------------------------------------------------------------------


def test_loads_and_losses_are_returned_for_the_moe_layers_only():
    moe = MoEConfig(5, mlp_only_layers=(1,), router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    config = tiny(moe=moe)
    out = jax.jit(Decoder(config).apply)({"params": params_of(config)}, tokens_of(2, 6))
    assert out.aux["router_loads"].shape == (2, 5)
    np.testing.assert_array_equal(out.aux["router_loads"].sum(axis=1), 2 * 6 * 2)
    expected = 0.5 * out.aux["aux_loss"] + 0.25 * out.aux["router_z_loss"]
    np.testing.assert_allclose(router_loss(out.aux, moe), expected, rtol=1e-6)
    assert out.aux["aux_loss"] > 0 and out.aux["router_z_loss"] > 0
    assert router_loss({}, None) == 0


def test_sparse_step_alternates_dense_and_expert_layers():
    config = tiny(num_layers=4, moe=MoEConfig(4, decoder_sparse_step=2))
    assert config.moe_layers == (1, 3)
    assert "mlp" in params_of(config)["layers_0"] and "moe" in params_of(config)["layers_1"]


def test_the_balance_loss_trains_the_router():
    config = tiny(moe=MoEConfig(4))
    tokens = tokens_of(4, 16)

    def aux_loss(params):
        return Decoder(config).apply({"params": params}, tokens).aux["aux_loss"]

    gradients = jax.jit(jax.grad(aux_loss))(params_of(config))
    assert np.any(gradients["layers"]["moe"]["router"]["kernel"])
    assert not np.any(gradients["lm_head"]["kernel"])


# --- expert parallelism ---------------------------------------------------------------------------

MESHES = {
    "experts": {"expert": 4},
    "experts and tensor": {"expert": 2, "tensor": 2, "data": 2},
    "experts and fsdp": {"expert": 4, "fsdp": 2},
    "no experts": {"data": 2, "fsdp": 2, "context": 2},
}


@pytest.mark.parametrize(
    ("name", "batch"),
    [*((name, 8) for name in MESHES), ("experts and tensor", 3)],  # 3 rows do not divide
)
def test_experts_on_a_mesh_equal_one_device(name, batch):
    x, weights, experts, *kernels = problem(num_tokens=batch * 4, num_experts=8)
    x, weights, experts = (a.reshape(batch, 4, -1) for a in (x, weights, experts))

    def loss(x, weights, kernels):
        return jnp.sum(jnp.sin(sharded_expert_mlp(x, weights, experts, *kernels)))

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
    expected = gradient(x, weights, kernels)
    with jax.set_mesh(make_mesh(**MESHES[name])), nn.logical_axis_rules(RULES):
        found = jax.jit(gradient)(x, weights, kernels)
    assert relative_error(found, expected) < 1e-5


def test_the_grouped_kernel_on_a_mesh_equals_one_device():
    x, weights, experts, *kernels = problem(num_tokens=32, num_experts=8)
    x, weights, experts = (a.reshape(8, 4, -1) for a in (x, weights, experts))

    def loss(x, weights, kernels):
        call = functools.partial(sharded_expert_mlp, method="gmm", interpret=True)
        return jnp.sum(jnp.sin(call(x, weights, experts, *kernels)))

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
    expected = gradient(x, weights, kernels)
    with jax.set_mesh(make_mesh(**MESHES["experts and tensor"])), nn.logical_axis_rules(RULES):
        found = jax.jit(gradient)(x, weights, kernels)
    assert relative_error(found, expected) < 1e-5


def test_sharded_moe_decoder_equals_one_device_and_really_is_sharded():
    config = tiny(vocab_size=64, num_layers=2, moe=MoEConfig(8, router_aux_loss_coef=0.1))
    tokens = tokens_of(8, 8)

    def loss(params, tokens):
        out = Decoder(config).apply({"params": params}, tokens)
        total, weight = cross_entropy(out.logits[:, :-1], tokens[:, 1:])
        return total / weight + router_loss(out.aux, config.moe)

    expected = jax.jit(jax.value_and_grad(loss))(params_of(config), tokens)
    mesh = make_mesh(expert=4, fsdp=2)
    boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    params = jax.device_put(params_of(config), shardings)
    placed = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(("fsdp", "expert"))))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        step = jax.jit(jax.value_and_grad(loss))
        found = step(params, placed)
        text = step.lower(params, placed).compile().as_text()
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert relative_error(found[1], expected[1]) < 1e-5
    kernel = params["layers"]["moe"]["gate_proj"]
    assert kernel.addressable_shards[0].data.nbytes == kernel.nbytes // 8
    assert "all-gather" in text and "reduce-scatter" in text


@pytest.mark.tpu_compile
@pytest.mark.parametrize("sizes", [{}, {"expert": 2, "fsdp": 2}], ids=["one chip", "four chips"])
def test_tpu_computes_only_the_chosen_experts(sizes):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = make_mesh(devices, **sizes)
    placed = NamedSharding(mesh, PartitionSpec())
    batch, length, width, hidden, num_experts = 4, 256, 256, 512, 16
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
        for shape, dtype in (
            ((batch, length, width), "bfloat16"),
            ((batch, length, 2), "float32"),
            ((batch, length, 2), "int32"),
            ((num_experts, width, hidden), "bfloat16"),
            ((num_experts, width, hidden), "bfloat16"),
            ((num_experts, hidden, width), "bfloat16"),
        )
    ]

    def loss(*args):
        return jnp.sum(sharded_expert_mlp(*args).astype(jnp.float32))

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 3, 4, 5))).lower(*shapes).compile()
    products = 3 * 3 * 2 * batch * length * 2 * width * hidden
    # With four chips, tokens of two meet on each: half the rows are there twice.
    assert compiled.cost_analysis()["flops"] < 1.2 * products / (2 if sizes else 1)
    assert compiled.as_text().count("tpu_custom_call") >= 9
