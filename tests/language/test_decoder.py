"""Invariants of the decoder: caching, batching, packing, layouts, remat, gates, sharding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import (
    FAMILIES,
    RULES,
    make_mesh,
    params_of,
    relative_error,
    tiny,
    tokens_of,
)
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from jaxeff.language import (
    MLP,
    Decoder,
    Linear,
    RopeConfig,
    count_parameters,
    cross_entropy,
    head_kernel,
    init_cache,
    stack_layers,
    unstack_layers,
)
from jaxeff.language.attention import attention
from jaxeff.language.cache import roll_back
from jaxeff.language.layers import rms_norm

LENGTH = 13


@functools.cache
def applied(config, **static):
    """The jitted forward of a config on its own parameters."""
    apply = functools.partial(Decoder(config).apply, **static)
    return functools.partial(jax.jit(apply), {"params": params_of(config)})


def loss_of(config, params, tokens, **call):
    out = Decoder(config).apply({"params": params}, tokens, **call)
    total, weight = cross_entropy(out.logits[:, :-1], tokens[:, 1:])
    return total / weight


def loss_and_gradients(config, params, tokens, **call):
    return jax.jit(jax.value_and_grad(functools.partial(loss_of, config)))(params, tokens, **call)


# --- caching --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen3_moe"])
def test_cached_chunks_of_any_size_equal_the_full_forward(family):
    config = tiny(**FAMILIES[family])
    forward, tokens = applied(config), tokens_of(2, LENGTH)
    expected = forward(tokens)
    for chunks in ((LENGTH,), (1,) * LENGTH, (5, 1, 7)):
        cache, logits = init_cache(config, 2, capacity=16), []
        for chunk in jnp.split(tokens, np.cumsum(chunks)[:-1], axis=1):
            out = forward(chunk, cache=cache)
            cache = out.cache
            logits.append(out.logits)
        found = jnp.concatenate(logits, axis=1)
        np.testing.assert_allclose(found, expected.logits, atol=1e-4)
        np.testing.assert_array_equal(cache.lengths, LENGTH)


def test_dynamic_rope_takes_the_capacity_so_that_all_chunks_agree():
    rope = RopeConfig("dynamic", factor=2.0)
    config = tiny(rope=rope, max_position_embeddings=8)
    forward, tokens = applied(config), tokens_of(1, LENGTH)
    whole = forward(tokens, cache=init_cache(config, 1, LENGTH)).logits
    np.testing.assert_allclose(whole, forward(tokens).logits, atol=1e-4)
    first = forward(tokens[:, :4], cache=init_cache(config, 1, LENGTH))
    second = forward(tokens[:, 4:], cache=first.cache)
    np.testing.assert_allclose(second.logits, whole[:, 4:], atol=1e-4)


def test_rows_of_a_ragged_batch_equal_each_row_alone():
    config = tiny(sliding_window=6)
    forward, tokens = applied(config), tokens_of(3, 9)
    lengths = [9, 4, 1]
    prefill = forward(tokens, cache=init_cache(config, 3, 16))
    cache = roll_back(prefill.cache, jnp.asarray(lengths))
    new = tokens_of(3, 2, seed=5)
    step = forward(new[:, :1], cache=cache)
    second = forward(new[:, 1:], cache=step.cache)
    for row, length in enumerate(lengths):
        alone = jnp.concatenate([tokens[row, :length], new[row]])[None]
        expected = forward(alone).logits[0]
        np.testing.assert_allclose(prefill.logits[row, :length], expected[:length], atol=1e-4)
        np.testing.assert_allclose(step.logits[row, 0], expected[length], atol=1e-4)
        np.testing.assert_allclose(second.logits[row, 0], expected[length + 1], atol=1e-4)


def test_decoding_compiles_once_for_all_lengths():
    config = tiny()
    traces = []

    @jax.jit
    def step(token, cache):
        traces.append(token.shape)
        return Decoder(config).apply({"params": params_of(config)}, token, cache=cache)

    cache = init_cache(config, 2, 8)
    for token in range(5):
        cache = step(jnp.full((2, 1), token), cache).cache
        cache = cache.replace(lengths=cache.lengths.at[1].set(1))
    assert len(traces) == 1


def test_a_full_cache_is_refused_outside_jit_and_flagged_inside():
    config = tiny()
    model, params = Decoder(config), {"params": params_of(config)}
    cache = init_cache(config, 1, 4).replace(lengths=jnp.asarray([3]))
    with pytest.raises(ValueError, match="capacity=4"):
        model.apply(params, tokens_of(1, 2), cache=cache)
    out = jax.jit(model.apply)(params, tokens_of(1, 2), cache=cache)
    assert bool(out.cache.overflow[0]) and np.all(np.isfinite(out.logits))


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral"])
def test_packed_documents_equal_separate_ones(family):
    config = tiny(**FAMILIES[family])
    forward, tokens = applied(config), tokens_of(1, LENGTH)
    bounds = [(0, 6), (6, 7), (7, 11)]  # then two tokens of padding
    segments, positions = np.zeros((1, LENGTH), np.int32), np.zeros((1, LENGTH), np.int32)
    for document, (start, stop) in enumerate(bounds):
        segments[0, start:stop] = document + 1
        positions[0, start:stop] = np.arange(stop - start)
    packed = forward(tokens, positions=jnp.asarray(positions), segment_ids=jnp.asarray(segments))
    for start, stop in bounds:
        alone = forward(tokens[:, start:stop]).logits
        np.testing.assert_allclose(packed.logits[:, start:stop], alone, atol=1e-4)


def test_a_causal_mask_changes_nothing_and_a_tree_mask_hides_siblings():
    config = tiny()
    forward, tokens = applied(config), tokens_of(1, 4)
    causal = jnp.tril(jnp.ones((1, 4, 4), bool))
    plain = forward(tokens).logits
    np.testing.assert_allclose(forward(tokens, mask=causal).logits, plain, atol=1e-5)

    siblings = causal.at[0, 3, 2].set(False)  # token 3 follows token 1, not token 2
    positions = jnp.asarray([[0, 1, 2, 2]])
    tree = forward(tokens, mask=siblings, positions=positions).logits
    expected = forward(tokens[:, jnp.asarray([0, 1, 3])]).logits
    np.testing.assert_allclose(tree[:, 3], expected[:, 2], atol=1e-4)
    np.testing.assert_allclose(tree[:, 2], plain[:, 2], atol=1e-4)


def test_positions_may_be_shifted_but_order_is_what_counts():
    config = tiny()
    forward, tokens = applied(config), tokens_of(2, 6)
    plain = forward(tokens).logits
    shifted = forward(tokens, positions=100 + jnp.arange(6)[None]).logits
    np.testing.assert_allclose(shifted, plain, atol=1e-3)
    turned = forward(tokens[:, ::-1], positions=jnp.arange(6)[None, ::-1]).logits
    np.testing.assert_allclose(turned[:, ::-1], plain, atol=1e-4)


# --- layouts and remat ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_scanned_and_unrolled_layers_are_the_same_model(family):
    config = tiny(**FAMILIES[family])
    unrolled = dataclasses.replace(config, scan_layers=False)
    params, tokens = params_of(config), tokens_of(2, 8)
    loss, gradients = loss_and_gradients(config, params, tokens)
    found = loss_and_gradients(unrolled, unstack_layers(params), tokens)
    np.testing.assert_allclose(found[0], loss, rtol=1e-6)
    assert relative_error(stack_layers(found[1]), gradients) < 1e-6

    states = applied(config, return_hidden_states=True)(tokens).aux["hidden_states"]
    assert states.shape == (4, 2, 8, 32)


def test_stacking_is_lossless_and_refuses_what_it_cannot_stack():
    params = params_of(tiny())
    back = stack_layers(unstack_layers(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    with pytest.raises(ValueError, match="layers_0"):
        stack_layers(params)
    with pytest.raises(ValueError, match="no layers"):
        unstack_layers(unstack_layers(params))
    mixed = tiny(**FAMILIES["qwen3_moe"])
    assert set(params_of(mixed)) >= {"layers_0", "layers_1", "layers_2"}
    with pytest.raises(ValueError, match="different kinds"):
        stack_layers(params_of(mixed))


@pytest.mark.parametrize(
    ("remat", "scan_layers"),
    [
        ("full", True),
        ("full", False),
        ("dots_with_no_batch_dims", True),
        ("names", False),
        ("names_offload", True),
    ],
)
def test_remat_changes_memory_not_numbers(remat, scan_layers):
    config = tiny(scan_layers=scan_layers, num_layers=2)
    params, tokens = params_of(config), tokens_of(2, 8)
    loss, gradients = loss_and_gradients(config, params, tokens)
    found = loss_and_gradients(dataclasses.replace(config, remat=remat), params, tokens)
    np.testing.assert_allclose(found[0], loss, rtol=1e-6)
    assert relative_error(found[1], gradients) < 1e-6


def saved_bytes(config, tokens):
    """Temporaries of the compiled gradient."""
    fn = jax.jit(jax.grad(functools.partial(loss_of, config)))
    return fn.lower(params_of(config), tokens).compile().memory_analysis().temp_size_in_bytes


def test_remat_policies_keep_less():
    config = tiny(num_layers=4)
    tokens = tokens_of(4, 32)
    policies = ("none", "names", "full")
    sizes = [saved_bytes(dataclasses.replace(config, remat=name), tokens) for name in policies]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.tpu_compile
def test_named_activations_can_be_offloaded_to_the_host():
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    config = tiny(remat="names_offload", dtype="bfloat16")
    placed = NamedSharding(make_mesh(devices), PartitionSpec())
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed),
        (params_of(config), tokens_of(2, 128)),
    )
    with jax.set_mesh(placed.mesh):
        compiled = jax.jit(jax.grad(functools.partial(loss_of, config))).lower(*shapes).compile()
    assert compiled.memory_analysis().host_temp_size_in_bytes > 0


# --- gates, embeddings, outputs -------------------------------------------------------------------


def without_sublayers(config, gates):
    """Unrolled parameters in which gated-off sub-layers write zeros into the residual stream."""
    params = jax.tree.map(lambda a: a, params_of(config))
    params = params if "layers_0" in params else unstack_layers(params)
    for index, (run_attention, run_mlp) in enumerate(gates):
        layer = params[f"layers_{index}"]
        if not run_attention:
            layer["attention"]["o_proj"]["kernel"] *= 0
        if not run_mlp and "moe" in layer:
            layer["moe"]["down_proj"] *= 0
        elif not run_mlp:
            layer["mlp"]["down_proj"]["kernel"] *= 0
    return params


@pytest.mark.parametrize("known", [True, False], ids=["known", "traced"])
@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_gates_skip_sublayers(family, scan_layers, known):
    config = tiny(**FAMILIES[family], scan_layers=scan_layers)
    gates = np.asarray([[True, True], [False, True], [True, False]])
    tokens = tokens_of(2, 5)
    unrolled = dataclasses.replace(config, scan_layers=False)
    zeroed = {"params": without_sublayers(config, gates)}
    expected = jax.jit(Decoder(unrolled).apply)(zeroed, tokens).logits
    cache = init_cache(config, 2, 8)
    if known:
        static = functools.partial(Decoder(config).apply, layer_gates=gates)
        found = jax.jit(static)({"params": params_of(config)}, tokens, cache=cache)
    else:
        found = applied(config)(tokens, cache=cache, layer_gates=jnp.asarray(gates))
    np.testing.assert_allclose(found.logits, expected, atol=1e-5)
    assert not np.any(found.cache.k[1]) and np.any(found.cache.k[2])


def test_known_gates_leave_no_work_behind_and_traced_gates_never_recompile():
    config = tiny(scan_layers=False)
    params, tokens = {"params": params_of(config)}, tokens_of(2, 32)

    def flops(gates):
        static = functools.partial(Decoder(config).apply, layer_gates=gates)
        return jax.jit(static).lower(params, tokens).compile().cost_analysis()["flops"]

    none, half, every = (np.full((3, 2), False), np.asarray([[True, False]] * 3), None)
    assert flops(none) < 0.2 * flops(every) and flops(none) < flops(half) < 0.6 * flops(every)

    scanned = tiny()
    forward = jax.jit(Decoder(scanned).apply)
    for gates in (none, half):
        forward({"params": params_of(scanned)}, tokens, layer_gates=jnp.asarray(gates))
    assert forward._cache_size() == 1
    text = forward.lower(
        {"params": params_of(scanned)}, tokens, layer_gates=jnp.asarray(half)
    ).as_text()
    assert text.count("stablehlo.case") == 2  # conditionals, not selects: skipping is real


def test_inputs_embeds_replace_the_embedding():
    config = tiny()
    forward, tokens = applied(config), tokens_of(2, 6)
    embeds = params_of(config)["embed"]["embedding"][tokens]
    np.testing.assert_allclose(
        forward(None, inputs_embeds=embeds).logits, forward(tokens).logits, atol=1e-5
    )


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_times_head_is_logits(tied):
    config = tiny(tie_embeddings=tied)
    params, tokens = params_of(config), tokens_of(2, 6)
    out = applied(config)(tokens)
    bare = applied(config, return_logits=False)(tokens)
    assert bare.logits is None and ("lm_head" in params) != tied
    np.testing.assert_array_equal(bare.hidden, out.hidden)
    np.testing.assert_allclose(bare.hidden @ head_kernel(params, config), out.logits, atol=1e-5)


def test_head_dim_wins_over_hidden_size():
    params = params_of(tiny(head_dim=10))
    assert params["layers"]["attention"]["q_proj"]["kernel"].shape == (3, 32, 40)
    assert params["layers"]["attention"]["o_proj"]["kernel"].shape == (3, 40, 32)


# --- numbers --------------------------------------------------------------------------------------


def test_norm_casts_before_the_gain():
    x = jnp.asarray([[3.0, 4.1, -1.7]], jnp.bfloat16)
    gain = jnp.asarray([1.1, 0.3, 2.7])
    x32 = x.astype(jnp.float32)
    normed = (x32 / jnp.sqrt(jnp.mean(x32**2) + 1e-5)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(rms_norm(x, gain, 1e-5), normed * gain.astype(jnp.bfloat16))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_bfloat16_stays_close_to_float32(family):
    config = tiny(**FAMILIES[family], initializer_range=0.1)
    tokens = tokens_of(2, 16)
    exact = applied(config)(tokens).logits
    low = Decoder(dataclasses.replace(config, dtype="bfloat16"))
    found = jax.jit(low.apply)({"params": params_of(config)}, tokens)
    assert found.logits.dtype == jnp.float32 and found.hidden.dtype == jnp.bfloat16
    assert relative_error(found.logits, exact) < 3e-2


def test_initial_parameters_have_the_stated_spread():
    config = tiny(
        hidden_size=256, intermediate_size=512, vocab_size=512, initializer_range=0.02,
        attention_bias=True, scale_residual_init=True,
    )  # fmt: skip
    params = params_of(config)
    layers = params["layers"]
    for kernel in (
        params["embed"]["embedding"],
        params["lm_head"]["kernel"],
        layers["attention"]["q_proj"]["kernel"],
        layers["mlp"]["up_proj"]["kernel"],
    ):
        assert abs(float(jnp.std(kernel)) / 0.02 - 1) < 0.02
        assert abs(float(jnp.mean(kernel))) < 1e-3
    for kernel in (layers["attention"]["o_proj"]["kernel"], layers["mlp"]["down_proj"]["kernel"]):
        assert abs(float(jnp.std(kernel)) * np.sqrt(6) / 0.02 - 1) < 0.02
    assert not np.any(layers["attention"]["q_proj"]["bias"])
    np.testing.assert_array_equal(layers["input_norm"]["scale"], 1)
    first, second = layers["attention"]["q_proj"]["kernel"][:2]
    assert np.any(first != second)  # every layer has its own key


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_without_being_made(family):
    config = tiny(**FAMILIES[family])
    assert count_parameters(config) == sum(a.size for a in jax.tree.leaves(params_of(config)))


# --- replaceable pieces ---------------------------------------------------------------------------


class DoubledLinear(Linear):
    """Stands for a quantised or adapted linear map."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class ZeroMLP(MLP):
    """Stands for another feed-forward block."""

    def __call__(self, x):
        return jnp.zeros_like(x)


def test_pieces_can_be_replaced_without_forking_the_model():
    config = tiny()
    params, tokens = {"params": params_of(config)}, tokens_of(1, 5)
    doubled = jax.tree_util.tree_map_with_path(
        lambda path, a: 2 * a if "_proj" in jax.tree_util.keystr(path) else a, params
    )
    expected = jax.jit(Decoder(config).apply)(doubled, tokens).logits
    found = jax.jit(Decoder(config, linear_cls=DoubledLinear).apply)(params, tokens).logits
    np.testing.assert_allclose(found, expected, atol=1e-4)

    gates = jnp.asarray([[True, False]] * 3)
    expected = applied(config)(tokens, layer_gates=gates).logits
    found = jax.jit(Decoder(config, mlp_cls=ZeroMLP).apply)(params, tokens).logits
    np.testing.assert_allclose(found, expected, atol=1e-5)

    def windowed(q, k, v, **call):
        return attention(q, k, v, **(call | {"sliding_window": 2}))

    expected = jax.jit(Decoder(tiny(sliding_window=2)).apply)(params, tokens).logits
    found = jax.jit(Decoder(config, attention_fn=windowed).apply)(params, tokens).logits
    np.testing.assert_allclose(found, expected, atol=1e-5)


# --- sharding -------------------------------------------------------------------------------------


def sharded_params(config, mesh):
    """The parameters placed by their logical axes, and their shardings."""
    boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens_of(1, 2))["params"]
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.device_put(params_of(config), shardings), shardings


def bytes_on_one_device(params):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))


SHARDED = {"vocab_size": 64, "num_kv_heads": 2, "qk_norm": True}


def test_sharded_step_equals_one_device():
    config = tiny(**SHARDED)
    tokens = tokens_of(8, 8)
    expected = loss_and_gradients(config, params_of(config), tokens)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    params, shardings = sharded_params(config, mesh)
    placed = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        step = jax.jit(
            jax.value_and_grad(functools.partial(loss_of, config)),
            out_shardings=(NamedSharding(mesh, PartitionSpec()), shardings),
        )
        found = step(params, placed)
        text = step.lower(params, placed).compile().as_text()
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert relative_error(found[1], expected[1]) < 1e-5

    # Really sharded: a quarter of the parameters on each device, and traffic between them.
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for tree in (params, found[1]):
        assert bytes_on_one_device(tree) < 1.1 * total / 4
    assert "all-gather" in text and ("reduce-scatter" in text or "all-reduce" in text)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [({"fsdp": 2, "tensor": 4}, (3, 7)), ({"data": 2, "context": 2, "tensor": 2}, (4, 8))],
    ids=["nothing divides", "sequence"],
)
def test_any_mesh_gives_the_same_logits(sizes, shape):
    """Three rows on two devices, two kv heads on four; and a sequence over two."""
    config = tiny(vocab_size=64)
    tokens = tokens_of(*shape)
    expected = applied(config)(tokens).logits
    params = {"params": params_of(config)}
    with jax.set_mesh(make_mesh(**sizes)), nn.logical_axis_rules(RULES):
        forward = jax.jit(Decoder(config).apply)
        found = forward(params, tokens).logits
        cached = forward(params, tokens, cache=init_cache(config, shape[0], 16)).logits
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(cached, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_gradients_inside_shard_map_are_those_of_the_own_rows(family):
    config = tiny(**FAMILIES[family], num_layers=2)
    params, tokens = params_of(config), tokens_of(4, 6)

    def local(params, tokens):
        params = jax.tree.map(lambda a: jax.lax.pcast(a, ("data",), to="varying"), params)
        gradients = jax.grad(functools.partial(loss_of, config))(params, tokens)
        return jax.tree.map(lambda a: a[None], gradients)

    mapped = jax.shard_map(
        local,
        mesh=make_mesh(data=4),
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
    )
    found = jax.jit(mapped)(params, tokens)
    expected = loss_and_gradients(config, params, tokens[2:3])[1]
    assert relative_error(jax.tree.map(lambda a: a[2], found), expected) < 1e-5
