"""Generation: golden continuations, independence of the batch, one compilation, sharding."""

import dataclasses
import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxeff.language import (
    Decoder,
    SamplingConfig,
    generate,
    generate_stream,
    load_hf,
    pad_prompts,
    preset,
    sequence_logprobs,
    stack_layers,
    unstack_layers,
    warp_logits,
)
from jaxeff.language.attention import attention

GOLDEN = Path(__file__).parents[1] / "golden" / "decoder_lm"
FAMILIES = ["llama", "llama_bias_tied_headdim", "qwen2", "qwen3", "mixtral", "qwen3_moe"]
GREEDY = SamplingConfig(temperature=0.0)
CONFIG = preset("tiny", vocab_size=97, hidden_size=32, intermediate_size=48)
PROMPTS, LENGTHS = pad_prompts([[5, 6, 7], [8], [9, 10, 11, 12, 13]])


@pytest.fixture(autouse=True)
def exact_matmul():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def random_params(config=CONFIG):
    """Weights far larger than the usual initialisation, so that distributions are not flat."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = jax.jit(Decoder(config).init)(jax.random.key(0), tokens)
    params = nn.meta.unbox(variables["params"])
    return jax.tree.map(lambda x: x if x.ndim == 1 else x * 8, params)


@functools.partial(jax.jit, static_argnames="config")
def forward(params, tokens, config=CONFIG):
    """Logits without a cache."""
    return Decoder(config).apply({"params": params}, tokens).logits


def continued(out):
    """Each prompt and its continuation, padded on the right, and the index of each new token."""
    rows = [[*PROMPTS[i, :n], *out.tokens[i].tolist()] for i, n in enumerate(LENGTHS)]
    tokens, _ = pad_prompts(rows)
    return tokens, LENGTHS[:, None] + np.arange(out.tokens.shape[1])


def run(prompts=PROMPTS, lengths=LENGTHS, *, config=CONFIG, params=None, **settings):
    settings = {"max_new_tokens": 6, "sampling": SamplingConfig(), "key": jax.random.key(3)} | (
        settings
    )
    return generate(params or random_params(config), config, prompts, lengths, **settings)


def assert_same(ours, theirs):
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.lengths, theirs.lengths)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuations_are_the_golden_ones(family):
    config, params = load_hf(GOLDEN / family)
    golden = np.load(GOLDEN / family / "golden.npz")
    prompts = [golden["prompt_0"][0], golden["prompt_1"][0]]
    padded, lengths = pad_prompts(prompts)
    out = generate(params, config, padded, lengths, max_new_tokens=24, sampling=GREEDY)
    np.testing.assert_array_equal(out.tokens[0], golden["greedy_0"][0])
    np.testing.assert_array_equal(out.tokens[1], golden["greedy_1"][0])


def test_cached_generation_equals_full_forward_passes():
    out = run(sampling=GREEDY)
    tokens, new = continued(out)
    best = np.asarray(forward(random_params(), tokens)).argmax(-1)
    np.testing.assert_array_equal(np.take_along_axis(best, new - 1, axis=1), out.tokens)


def test_samples_do_not_depend_on_the_rest_of_the_batch():
    together = run()
    for row, length in enumerate(LENGTHS):
        alone = run(
            PROMPTS[row : row + 1, :length],
            LENGTHS[row : row + 1],
            sequence_ids=np.asarray([row]),
        )
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


def test_rows_draw_with_different_keys():
    prompts = np.tile(PROMPTS[:1], (4, 1))
    tokens = np.asarray(run(prompts, np.full(4, 3)).tokens)
    assert len({tuple(row) for row in tokens}) == 4
    same = np.asarray(run(prompts, np.full(4, 3), sequence_ids=np.zeros(4, int)).tokens)
    assert len({tuple(row) for row in same}) == 1


def test_the_key_decides_the_sample():
    first, again = run(key=jax.random.key(1)), run(key=jax.random.key(1))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (np.asarray(run(key=jax.random.key(2)).tokens) != np.asarray(first.tokens)).any()
    old_style = run(key=jax.random.PRNGKey(1))
    np.testing.assert_array_equal(old_style.tokens, first.tokens)


@pytest.mark.parametrize("prefill_chunk", [1, 2, 3, 64])
def test_prefill_in_chunks_changes_nothing(prefill_chunk):
    assert_same(run(prefill_chunk=prefill_chunk), run())


def test_it_runs_inside_jit():
    inside = jax.jit(lambda params, prompts, lengths: run(prompts, lengths, params=params))
    assert_same(inside(random_params(), PROMPTS, LENGTHS), run())


def test_prompts_may_be_lists():
    assert_same(run([[5, 6, 7], [8, 0, 0]], [3, 1]), run(PROMPTS[:2, :3], LENGTHS[:2]))


def test_a_bfloat16_cache_touches_later_tokens_only():
    exact, rounded = run(), run(cache_dtype="bfloat16")
    np.testing.assert_array_equal(rounded.tokens[:, 0], exact.tokens[:, 0])
    np.testing.assert_allclose(rounded.logprobs[:, 0], exact.logprobs[:, 0], atol=2e-4)
    assert (np.asarray(rounded.logprobs) != np.asarray(exact.logprobs)).any()


class TestStopping:
    def test_the_stop_token_is_the_last_one_and_pad_follows(self):
        free = run()
        stop = int(free.tokens[0, 2])
        first = int(np.argmax(np.asarray(free.tokens[0]) == stop))
        out = run(eos_ids=(stop,), pad_id=77)
        assert int(out.lengths[0]) == first + 1
        np.testing.assert_array_equal(out.tokens[0, : first + 1], free.tokens[0, : first + 1])
        assert (np.asarray(out.tokens[0, first + 1 :]) == 77).all()
        assert (np.asarray(out.logprobs[0, first + 1 :]) == 0).all()
        assert (np.asarray(out.logprobs[0, : first + 1]) < 0).all()

    def test_a_stopped_row_leaves_the_others_alone(self):
        free = run()
        stop = int(free.tokens[0, 0])
        out = run(eos_ids=(stop,))
        for row in (1, 2):
            length = int(out.lengths[row])
            np.testing.assert_array_equal(out.tokens[row, :length], free.tokens[row, :length])

    def test_without_stop_tokens_every_row_is_full(self):
        assert run().lengths.tolist() == [6, 6, 6]

    def test_a_first_token_may_be_the_last(self):
        stops = tuple(np.asarray(run().tokens[:, 0]).tolist())
        assert run(eos_ids=stops).lengths.tolist() == [1, 1, 1]

    def test_one_token_can_be_asked_for(self):
        np.testing.assert_array_equal(run(max_new_tokens=1).tokens, run().tokens[:, :1])


class TestLogprobs:
    def test_they_are_those_of_the_warped_distribution(self):
        sampling = SamplingConfig(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01)
        out = run(sampling=sampling)
        tokens, new = continued(out)
        warped = jax.nn.log_softmax(warp_logits(forward(random_params(), tokens), sampling))
        rows = np.arange(len(tokens))[:, None]
        expected = np.asarray(warped)[rows, new - 1, out.tokens]
        np.testing.assert_allclose(out.logprobs, expected, atol=2e-4)

    def test_plain_sampling_agrees_with_sequence_logprobs(self):
        out = run(PROMPTS[:1, :3], LENGTHS[:1])
        tokens = jnp.concatenate([jnp.asarray(PROMPTS[:1, :3]), out.tokens], axis=1)
        given = sequence_logprobs(random_params(), CONFIG, tokens, jnp.ones_like(tokens))
        np.testing.assert_allclose(out.logprobs[0], given[0, 2:], atol=2e-4)

    def test_greedy_is_certain(self):
        assert (np.asarray(run(sampling=GREEDY).logprobs) == 0).all()


def test_every_warper_setting_is_used():
    tokens = np.asarray(run(sampling=SamplingConfig(top_k=1)).tokens)
    np.testing.assert_array_equal(tokens, run(sampling=GREEDY).tokens)
    for sampling in (SamplingConfig(top_p=1e-6), SamplingConfig(min_p=1.0)):
        np.testing.assert_array_equal(run(sampling=sampling).tokens, tokens)


def test_both_layer_layouts_generate_the_same():
    unstacked = unstack_layers(random_params())
    assert_same(run(params=unstacked), run())
    unrolled = dataclasses.replace(CONFIG, scan_layers=False)
    assert_same(run(config=unrolled, params=stack_layers(unstacked)), run())


def test_boxed_parameters_are_accepted():
    boxed = Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert_same(run(params=boxed), run(params=nn.meta.unbox(boxed)))


class TestCompilation:
    @pytest.fixture
    def counted(self):
        """Runs generation with a decoder that counts how often it is traced."""
        traces = []

        def counting(*args, **kwargs):
            traces.append(1)
            return attention(*args, **kwargs)

        decoder = Decoder(CONFIG, attention_fn=counting)

        def call(*args, **kwargs):
            before = len(traces)
            run(*args, decoder=decoder, **kwargs)
            return len(traces) > before

        return call

    def test_one_program_serves_a_bucket_of_prompts(self, counted):
        assert counted()
        prompts, lengths = pad_prompts([[1], [2, 3, 4, 5], [6, 7]], multiple=5)
        assert not counted(prompts, lengths)
        assert not counted(PROMPTS, LENGTHS, key=jax.random.key(9), pad_id=3)

    def test_settings_share_one_program(self, counted):
        assert counted(sampling=SamplingConfig(0.9, top_p=0.9, min_p=0.1), eos_ids=(3,))
        assert not counted(sampling=SamplingConfig(1.4, top_p=0.5, min_p=0.2), eos_ids=(4,))

    def test_another_shape_is_another_program(self, counted):
        assert counted()
        assert counted(max_new_tokens=7)


class TestStream:
    def test_it_yields_the_tokens_of_generate(self):
        stop = int(run().tokens[1, 3])
        expected = run(eos_ids=(stop,), pad_id=50)
        settings = {"max_new_tokens": 6, "eos_ids": (stop,), "pad_id": 50}
        steps = list(
            generate_stream(
                random_params(), CONFIG, PROMPTS, LENGTHS, key=jax.random.key(3), **settings
            )
        )
        count = len(steps)
        np.testing.assert_array_equal(
            np.stack([s.tokens for s in steps], 1), expected.tokens[:, :count]
        )
        np.testing.assert_array_equal(sum(s.real for s in steps), expected.lengths)
        logprobs = np.stack([s.logprobs for s in steps], 1)
        np.testing.assert_allclose(logprobs, expected.logprobs[:, :count], atol=2e-4)

    def test_it_ends_when_every_row_has_stopped(self):
        stops = tuple(np.asarray(run().tokens[:, 1]).tolist())
        steps = generate_stream(
            random_params(),
            CONFIG,
            PROMPTS,
            LENGTHS,
            max_new_tokens=6,
            key=jax.random.key(3),
            eos_ids=stops,
        )
        assert len(list(steps)) <= 2


class TestSharded:
    RULES = (
        ("embed", "fsdp"),
        ("heads", "tensor"),
        ("kv_heads", "tensor"),
        ("mlp", "tensor"),
        ("vocab", "tensor"),
        ("expert", "expert"),
        ("act_batch", ("data", "fsdp", "expert")),
        ("act_heads", "tensor"),
        ("act_kv_heads", "tensor"),
        ("act_mlp", "tensor"),
        ("act_vocab", "tensor"),
    )

    @pytest.mark.parametrize(
        ("family", "axes"),
        [("tiny", {"data": 2, "fsdp": 2, "tensor": 2}), ("tiny-mixtral", {"expert": 2})],
    )
    def test_many_devices_generate_what_one_does(self, family, axes):
        shape = [axes.get(a, 1) for a in ("data", "fsdp", "expert", "context", "tensor")]
        mesh = jax.make_mesh(
            shape,
            ("data", "fsdp", "expert", "context", "tensor"),
            axis_types=(AxisType.Auto,) * 5,
            devices=jax.devices()[: int(np.prod(shape))],
        )
        config = preset(family, vocab_size=98, hidden_size=32, intermediate_size=48)
        params = random_params(config)
        prompts, lengths = np.tile(PROMPTS[:2], (2, 1)), np.tile(LENGTHS[:2], 2)
        expected = run(prompts, lengths, config=config, params=params)

        tokens = jnp.zeros((1, 1), jnp.int32)
        boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
        logical = nn.get_partition_spec(boxed["params"])
        shardings = nn.logical_to_mesh_sharding(logical, mesh, self.RULES)
        sharded = jax.device_put(params, shardings)
        with jax.set_mesh(mesh), nn.logical_axis_rules(self.RULES):
            out = run(prompts, lengths, config=config, params=sharded)
        assert_same(out, expected)


class TestSequenceLogprobs:
    TOKENS = jax.random.randint(jax.random.key(5), (3, 9), 0, 97)

    def reference(self, params, mask):
        logprobs = jax.nn.log_softmax(forward(params, self.TOKENS)[:, :-1])
        chosen = jnp.take_along_axis(logprobs, self.TOKENS[:, 1:, None], axis=-1)[..., 0]
        return chosen * mask[:, 1:]

    @pytest.mark.parametrize("chunk_size", [1, 12, 4096])
    def test_they_are_those_of_the_full_logits(self, chunk_size):
        mask = jnp.asarray(np.random.default_rng(0).integers(0, 2, self.TOKENS.shape))
        ours = sequence_logprobs(random_params(), CONFIG, self.TOKENS, mask, chunk_size=chunk_size)
        assert ours.shape == (3, 8)
        np.testing.assert_allclose(ours, self.reference(random_params(), mask), atol=2e-5)
        assert (np.asarray(ours)[np.asarray(mask[:, 1:]) == 0] == 0).all()

    def test_gradients_are_those_of_the_full_logits(self):
        mask = jnp.ones(self.TOKENS.shape, bool).at[:, :3].set(False)

        def ours(params):
            return sequence_logprobs(params, CONFIG, self.TOKENS, mask, chunk_size=6).sum()

        found = jax.grad(ours)(random_params())
        expected = jax.grad(lambda p: self.reference(p, mask).sum())(random_params())
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(abs(b).max())),
            found,
            expected,
        )

    def test_padding_on_the_right_changes_nothing(self):
        padded = jnp.pad(self.TOKENS, ((0, 0), (0, 4)))
        mask = jnp.arange(13) < 9
        ours = sequence_logprobs(
            random_params(), CONFIG, padded, jnp.broadcast_to(mask, padded.shape)
        )
        alone = sequence_logprobs(random_params(), CONFIG, self.TOKENS, jnp.ones_like(self.TOKENS))
        np.testing.assert_allclose(ours[:, :8], alone, atol=2e-5)
        assert (np.asarray(ours[:, 8:]) == 0).all()

    def test_all_logits_never_exist_at_once(self):
        config = preset("tiny", vocab_size=32768)
        tokens = jax.ShapeDtypeStruct((2, 129), jnp.int32)
        shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
        params = nn.meta.unbox(shapes["params"])

        def temporary_bytes(chunk_size):
            def call(params, tokens):
                return sequence_logprobs(params, config, tokens, tokens, chunk_size=chunk_size)

            compiled = jax.jit(call).lower(params, tokens).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        whole = 2 * 128 * 32768 * 4
        assert temporary_bytes(4096) > whole
        assert temporary_bytes(16) < whole / 2

    def test_one_token_has_no_predictions(self):
        tokens = jnp.zeros((2, 1), jnp.int32)
        assert sequence_logprobs(random_params(), CONFIG, tokens, tokens).shape == (2, 0)

    def test_bad_arguments_are_refused(self):
        with pytest.raises(ValueError, match=r"tokens \(3, 9\) and mask \(3, 8\)"):
            sequence_logprobs(random_params(), CONFIG, self.TOKENS, self.TOKENS[:, 1:])
        with pytest.raises(ValueError, match="chunk_size=0"):
            sequence_logprobs(random_params(), CONFIG, self.TOKENS, self.TOKENS, chunk_size=0)


def test_prompts_are_padded_to_a_multiple():
    padded, lengths = pad_prompts([[1, 2, 3], [4]], pad_id=9, multiple=4)
    assert padded.tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    assert lengths.tolist() == [3, 1]
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        pad_prompts([[1], []])
    with pytest.raises(ValueError, match="0 prompts"):
        pad_prompts([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": np.asarray([3, 0, 5])}, r"prompt_lengths \[3, 0, 5\] must be in 1\.\.5"),
        ({"lengths": np.asarray([3, 1, 6])}, r"must be in 1\.\.5"),
        ({"lengths": np.asarray([3, 1])}, r"prompt_lengths \(2,\) must be \(3,\)"),
        ({"prompts": PROMPTS.astype(np.float32)}, "must be integers"),
        ({"prompts": PROMPTS[0]}, r"must be integers \(batch, T\)"),
        ({"prompts": PROMPTS + 90}, r"prompts hold ids 95\.\.103, outside 0\.\.96"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"key": None}, "key is needed to draw with temperature=1.0"),
        ({"sequence_ids": np.arange(2)}, r"sequence_ids \(2,\) must be \(3,\)"),
        ({"params": {"params": {}}}, r"params hold \['params'\]"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        run(**change)
