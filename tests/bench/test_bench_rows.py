"""Every row at a tiny size: it runs, its figures are finite, and what it counts is right."""

import math
import re
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxeff.bench.measure import BenchError, measure_case
from jaxeff.bench.rows.language import DecoderDecode
from jaxeff.bench.rows.matmuls import MatmulChain
from jaxeff.bench.rows.torch_step import TorchStep
from jaxeff.bench.rows.training import Checkpoint, DecoderTrain, layers_that_fit
from jaxeff.language import count_parameters, flops_per_token, preset

DEVICE = jax.devices()[0]


def measured(settings):
    """Results of all cases, after a check that all figures are finite and positive."""
    results = [measure_case(case, rounds=1) for case in settings.cases(DEVICE)]
    for result in results:
        spreads = [result.ratio, *result.seconds.values()]
        # A share may be nothing; when a step is short its optimiser's may even seem negative.
        spreads += [figure.spread for figure in result.figures if figure.unit != "%"]
        for spread in spreads:
            assert all(math.isfinite(v) and v > 0 for v in (spread.median, spread.low, spread.high))
        assert all(math.isfinite(figure.spread.median) for figure in result.figures)
    return {result.name: result for result in results}


def test_decoder_train_compares_the_step_with_its_products_and_with_a_constant_batch(tiny):
    results = measured(DecoderTrain(config=tiny, steps=2))
    assert set(results) == {"step", "data"}
    assert set(results["step"].seconds) == {
        "training step",
        "matrix products",
        "loss and gradients",
    }
    waiting = {figure.name: figure for figure in results["data"].figures}
    assert 0 <= waiting["time spent waiting for data"].spread.median <= 100


def test_decoder_decode_has_a_case_for_each_batch_size():
    model = {"num_layers": "1"}
    settings = DecoderDecode(
        model=model, batch_sizes=(1, 3), prompt_length=4, new_tokens=3, read_bytes=2**16
    )
    assert set(measured(settings)) == {"batch 1", "batch 3"}


def test_checkpoint_compares_saving_in_background_and_foreground_with_none(tiny, tmp_path):
    (result,) = measured(Checkpoint(config=tiny, steps=2, directory=str(tmp_path))).values()
    assert set(result.seconds) == {"background", "foreground", "no saving"}
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]  # nothing is left behind


@pytest.mark.optional_dependency
@pytest.mark.parametrize("heads", ["2", "1"])
def test_torch_step_times_the_same_model(tiny, heads):
    pytest.importorskip("torch")
    (result,) = measured(TorchStep(config=tiny | {"model.num_kv_heads": heads}, steps=1)).values()
    assert set(result.seconds) == {"jaxeff", "PyTorch eager"}


@pytest.mark.optional_dependency
def test_torch_step_refuses_to_compare_different_models(tiny, monkeypatch):
    torch = pytest.importorskip("torch")
    from jaxeff.bench.rows import torch_decoder

    right = torch_decoder.from_params

    def wrong(*arguments):
        model = right(*arguments)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        return model

    monkeypatch.setattr(torch_decoder, "from_params", wrong)
    with pytest.raises(BenchError, match="with equal weights the losses are"):
        next(TorchStep(config=tiny).cases(DEVICE))


@pytest.mark.optional_dependency
def test_torch_step_says_which_models_it_lacks(tiny):
    pytest.importorskip("torch")
    with pytest.raises(BenchError, match="there is no PyTorch model with qk_norm"):
        next(TorchStep(config=tiny | {"model.qk_norm": "True"}).cases(DEVICE))


def test_torch_step_without_torch_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BenchError, match="torch is not installed"):
        next(TorchStep().cases(DEVICE))


def test_the_chain_has_every_product_of_a_step():
    model = preset("tiny", num_layers=1)
    chain = MatmulChain(model, batch_size=2, seq_len=8, attention=True)
    weights, tokens = jax.eval_shape(chain._create, jax.random.key(0))
    hlo = jax.jit(chain._run).lower(weights, tokens).compile().as_text()
    # Seven linear maps, the head and the two products of attention; each forward, and backward for
    # both operands.
    assert len(re.findall(r" dot\(", hlo)) == 3 * (7 + 1 + 2)


def test_the_chain_does_the_model_flops_of_a_step():
    model, batch_size, seq_len = preset("tiny"), 2, 8
    chain = MatmulChain(model, batch_size, seq_len, attention=False)
    width = model.num_heads * model.resolved_head_dim
    # The model's count has the causal half of attention, the chain without attention none of it.
    attention = 4 * model.num_layers * width * (seq_len + 1) / 2
    linear = flops_per_token(model, seq_len) - attention
    assert chain.flops() == pytest.approx(3 * batch_size * seq_len * linear)
    whole = MatmulChain(model, batch_size, seq_len, attention=True)
    square = 4 * model.num_layers * width * seq_len
    assert whole.flops() == pytest.approx(3 * batch_size * seq_len * (linear + square))


def test_the_chain_stays_finite_through_many_layers():
    chain = MatmulChain(preset("tiny", num_layers=16), batch_size=1, seq_len=8, attention=True)
    for leaf in jax.tree.leaves(chain.prepare(DEVICE)()):
        assert bool(jnp.isfinite(leaf).all())


def test_experts_count_as_the_width_a_token_passes_through():
    model = preset("tiny-mixtral")
    shapes = MatmulChain(model, 1, 8, attention=True).linear_shapes()
    assert shapes["gate"] == (64, 2 * 96)
    with pytest.raises(BenchError, match="layers are alike"):
        MatmulChain(preset("tiny-qwen3-moe"), 1, 8, attention=True)


def test_decoding_reads_all_weights_but_the_embedding_and_half_of_the_cache():
    settings = DecoderDecode(prompt_length=4, new_tokens=3)
    model = preset("tiny")
    params = {"embed": {"embedding": jnp.zeros((10, 4))}, "rest": jnp.zeros(100)}
    cached = 4 + 1  # on average over three steps
    cache = 2 * model.num_layers * model.num_kv_heads * model.resolved_head_dim * 4
    assert settings.bytes_per_step(model, params, 3) == 400 + 3 * cached * cache
    tied = preset("tiny", tie_embeddings=True)
    assert settings.bytes_per_step(tied, params, 3) == 400 + 160 + 3 * cached * cache


def test_a_model_gets_the_layers_that_fit():
    model = preset("llama3.2-1b")
    assert layers_that_fit(model, 80e9) == model.num_layers
    assert 1 <= layers_that_fit(model, 16e9) < model.num_layers
    half = 16e9 / 2 / 16
    fitting = layers_that_fit(model, 16e9)
    assert count_parameters(preset("llama3.2-1b", num_layers=fitting)) <= half
    assert count_parameters(preset("llama3.2-1b", num_layers=fitting + 1)) > half
    with pytest.raises(BenchError, match=r"1\.0 GB do not hold one layer"):
        layers_that_fit(model, 1e9)
