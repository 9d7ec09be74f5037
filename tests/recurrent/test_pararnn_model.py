"""The ParaRNN language model: sizes, decoding, packed documents, meshes, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxeff.language import SamplingConfig, generate, sequence_logprobs, stack_layers
from jaxeff.recurrent import NewtonConfig, ParaRNN, ParaRNNConfig, count_parameters, preset
from jaxeff.training import MeshConfig
from jaxeff.training.mesh import fit_rules, make_mesh
from jaxeff.trees import unbox

EXACT = NewtonConfig(num_iterations=6)


def tiny(**fields):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    fields = {"intermediate_size": 32, "dtype": "float32", "newton": EXACT} | fields
    return ParaRNNConfig(**sizes | fields)


def model_of(config, seed=0):
    model = ParaRNN(config)
    params = unbox(model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"])
    return model, params


def tokens_of(batch, length, seed=1):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 50)


@functools.partial(jax.jit, static_argnums=0)
def whole(model, params, tokens, segment_ids=None):
    return model.apply({"params": params}, tokens, segment_ids=segment_ids).logits


@pytest.mark.parametrize(
    "name, millions, width",
    [("400M", 405.6, 2816), ("1B", 1415, 5632), ("2.9B", 2902, 6912), ("7B", 6757, 11008)],
)
def test_presets_have_the_published_sizes(name, millions, width):
    config = preset(name)
    assert config.intermediate_size == width
    assert count_parameters(config) / 1e6 == pytest.approx(millions, rel=5e-4)
    # An LSTM has two peepholes a channel more.
    more = count_parameters(preset(name, cell="lstm")) - count_parameters(config)
    assert more == config.num_layers * 2 * config.hidden_size


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_prefill_and_single_steps_give_what_the_whole_sequence_gives(cell):
    model, params = model_of(tiny(cell=cell))
    apply = jax.jit(lambda t, c: model.apply({"params": params}, t, cache=c))
    tokens = tokens_of(3, 12)
    expected = whole(model, params, tokens)
    output = apply(tokens[:, :7], model.init_cache(3))
    logits = [output.logits]
    for t in range(7, 12):
        output = apply(tokens[:, t : t + 1], output.cache)
        logits.append(output.logits)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), expected, atol=2e-5)
    np.testing.assert_array_equal(output.cache.lengths, [12] * 3)
    in_one = apply(tokens, model.init_cache(3)).cache
    for step_by_step, at_once in zip(
        jax.tree.leaves(output.cache), jax.tree.leaves(in_one), strict=True
    ):
        np.testing.assert_allclose(step_by_step, at_once, atol=2e-5)


def test_the_cache_holds_the_state_after_the_real_tokens_of_each_row():
    model, params = model_of(tiny())
    tokens, lengths = tokens_of(4, 6), jnp.asarray([6, 1, 0, 3])
    apply = jax.jit(lambda t, c, n: model.apply({"params": params}, t, cache=c, num_tokens=n))
    ragged = apply(tokens, model.init_cache(4), lengths).cache
    for row, length in enumerate(lengths.tolist()):
        alone = model.init_cache(1)
        for t in range(length):
            alone = apply(tokens[row : row + 1, t : t + 1], alone, jnp.ones(1, jnp.int32)).cache
        np.testing.assert_allclose(ragged.state[:, row], alone.state[:, 0], atol=1e-5)
        np.testing.assert_allclose(ragged.conv[:, row], alone.conv[:, 0], atol=1e-5)


@pytest.mark.parametrize("prefill_chunk", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_greedy_generation_takes_the_best_token_of_the_whole_forward(prefill_chunk):
    config = tiny(cell="lstm")
    model, params = model_of(config)
    prompts, lengths = tokens_of(3, 7), jnp.asarray([7, 2, 4])
    output = generate(
        params, config, prompts, lengths, max_new_tokens=5, decoder=model,
        sampling=SamplingConfig(temperature=0.0), prefill_chunk=prefill_chunk,
    )  # fmt: skip
    texts = jnp.zeros((3, 12), jnp.int32)
    for row, length in enumerate(lengths.tolist()):
        text = jnp.concatenate([prompts[row, :length], output.tokens[row]])
        texts = texts.at[row, : length + 5].set(text)
    best = jnp.argmax(whole(model, params, texts), axis=-1)
    for row, length in enumerate(lengths.tolist()):
        np.testing.assert_array_equal(best[row, length - 1 : length + 4], output.tokens[row])


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_packed_documents_are_as_documents_alone(cell):
    model, params = model_of(tiny(cell=cell))
    tokens = tokens_of(1, 11)
    segments = jnp.asarray([[1] * 5 + [2] * 2 + [3] * 4])
    packed = whole(model, params, tokens, segments)
    for start, stop in ((0, 5), (5, 7), (7, 11)):
        alone = whole(model, params, tokens[:, start:stop])
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=1e-5)
    running_on = ParaRNN(tiny(cell=cell, reset_at_documents=False))
    other = whole(running_on, params, tokens, segments)
    assert float(jnp.abs(other - packed)[:, 5:].max()) > 1e-3


def test_stacked_layers_are_the_same_model():
    model, params = model_of(tiny(scan_layers=False))
    stacked = ParaRNN(tiny())
    tokens = tokens_of(2, 6)
    np.testing.assert_allclose(
        whole(stacked, stack_layers(params), tokens),
        whole(model, params, tokens),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "remat",
    [
        "names",
        pytest.param("full", marks=pytest.mark.slow),
        pytest.param("dots_with_no_batch_dims", marks=pytest.mark.slow),
    ],
)
def test_rematerialisation_changes_no_gradient(remat):
    model, params = model_of(tiny())
    tokens = tokens_of(2, 6)

    def gradient(model):
        def loss(params):
            return jnp.sum(model.apply({"params": params}, tokens).logits ** 2)

        return jax.jit(jax.grad(loss))(params)

    expected, found = gradient(model), gradient(ParaRNN(tiny(remat=remat)))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("method", ["sequential", "fused"])
def test_every_method_computes_the_same_model(method):
    model, params = model_of(tiny(reset_at_documents=False))
    other = ParaRNN(tiny(reset_at_documents=False, method=method))
    tokens = tokens_of(2, 9)
    output = jax.jit(lambda t: other.apply({"params": params}, t))(tokens)
    np.testing.assert_allclose(output.logits, whole(model, params, tokens), atol=2e-5)
    assert float(output.aux["residual"].max()) < 1e-5


def test_bfloat16_keeps_the_solver_in_float32():
    model, params = model_of(tiny())
    tokens = tokens_of(2, 9)
    model_16 = ParaRNN(tiny(dtype="bfloat16"))
    half = jax.jit(lambda t: model_16.apply({"params": params}, t))(tokens)
    assert float(half.aux["residual"].max()) < 1e-5  # bfloat16 states would leave 1e-2
    expected = whole(model, params, tokens)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(half.logits, expected, atol=0.05 * scale)


SPLIT = {"data": 2, "fsdp": 2, "tensor": 2}
SPLIT_TIME = {"fsdp": 2, "context": 2, "tensor": 2}


@pytest.mark.parametrize(
    "cell, method, mesh",
    [
        ("gru", "newton", SPLIT_TIME),
        pytest.param("gru", "newton", SPLIT, marks=pytest.mark.slow),
        pytest.param("lstm", "newton", SPLIT_TIME, marks=pytest.mark.slow),
        pytest.param("lstm", "fused", SPLIT, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_no_loss_and_no_gradient(cell, method, mesh):
    config = tiny(cell=cell, method=method, reset_at_documents=method != "fused")
    model, params = model_of(config)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    tokens = tokens_of(4, 8)
    segments = jnp.asarray([[1] * 3 + [2] * 5, [1] * 8, [1] * 4 + [2] * 4, [1] * 7 + [2]])

    def loss(params):
        output = model.apply({"params": params}, tokens, segment_ids=segments)
        return jnp.mean(output.logits**2)

    expected = jax.jit(jax.value_and_grad(loss))(params)
    mesh = make_mesh(MeshConfig(**{"data": 1} | mesh))
    rules = fit_rules(mesh, {"heads": 2})
    specs = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)["params"]
    split = {str(s.spec) for s in jax.tree.leaves(specs)}
    assert any("tensor" in s for s in split) and any("fsdp" in s for s in split)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        found = jax.jit(jax.value_and_grad(loss))(jax.device_put(params, unbox(specs)))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_log_probabilities_are_those_of_the_logits():
    config = tiny()
    model, params = model_of(config)
    tokens = tokens_of(2, 7)
    found = sequence_logprobs(params, config, tokens, jnp.ones_like(tokens), decoder=model)
    logits = jax.nn.log_softmax(whole(model, params, tokens)[:, :-1])
    expected = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_order_of_gate_and_norm_matters():
    model, params = model_of(tiny())
    other = ParaRNN(tiny(norm_order="gate_then_norm"))
    tokens = tokens_of(1, 4)
    a, b = (whole(m, params, tokens) for m in (model, other))
    assert float(jnp.abs(a - b).max()) > 1e-3


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": 15}, "hidden_size=15 must be a multiple of num_heads=2"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"conv_size": 0}, "conv_size=0"),
        ({"cell": "rnn"}, "cell='rnn' is not one of 'gru', 'lstm'"),
        ({"norm_order": "none"}, "norm_order='none'"),
        ({"method": "scan"}, "method='scan'"),
        ({"remat": "some"}, "remat='some'"),
        ({"max_recurrent_weight": 0.0}, "max_recurrent_weight=0.0"),
        ({"method": "fused"}, "needs reset_at_documents=False"),
        ({"newton": {"num_iterations": 0}}, "num_iterations=0"),
    ],
)
def test_a_config_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny(), **fields)


def test_calls_that_do_not_fit_are_refused():
    model, params = model_of(tiny())
    apply, tokens = model.apply, tokens_of(2, 4)
    with pytest.raises(ValueError, match="must be integers"):
        apply({"params": params}, tokens[0])
    with pytest.raises(ValueError, match="cache of 3 rows, expected 2"):
        apply({"params": params}, tokens, cache=model.init_cache(3))
    with pytest.raises(ValueError, match="segment_ids cannot be given with a cache"):
        apply({"params": params}, tokens, segment_ids=tokens, cache=model.init_cache(2))
    with pytest.raises(ValueError, match="num_tokens is for a call with a cache"):
        apply({"params": params}, tokens, num_tokens=jnp.ones(2, jnp.int32))
    with pytest.raises(ValueError, match="no preset '3B'"):
        preset("3B")
