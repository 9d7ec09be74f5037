"""Checkpoints in and out: bit-equal round trips, shards, meshes, and named errors."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType

from jaxeff.language import (
    Decoder,
    RopeConfig,
    TensorMismatchError,
    config_to_hf,
    load_hf,
    preset,
    save_hf,
    unstack_layers,
)
from jaxeff.language.huggingface import abstract_parameters

GOLDEN = Path(__file__).parents[1] / "golden" / "decoder_lm"
FAMILIES = {
    "llama": preset("tiny"),
    "llama_biased": preset("tiny", attention_bias=True, mlp_bias=True, head_dim=10),
    "mistral": preset("tiny", sliding_window=8),
    "qwen2": preset("tiny-qwen2"),
    "qwen3": preset("tiny-qwen3"),
    "mixtral": preset("tiny-mixtral"),
    "qwen3_moe": preset("tiny-qwen3-moe"),
}


@functools.cache
def random_params(config):
    shapes = nn.meta.unbox(abstract_parameters(config))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), shapes)


def assert_bit_equal(ours, theirs):
    ours, theirs = flatten_dict(ours), flatten_dict(theirs)
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert ours[key].dtype == expected.dtype, key
        assert np.asarray(ours[key]).tobytes() == np.asarray(expected).tobytes(), key


def tensors_in(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def rewrite(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def copy(tmp_path):
    """A private copy of a golden checkpoint."""

    def make(name="llama"):
        return Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_parameters_are_bit_equal(family, dtype, tmp_path):
    config = dataclasses.replace(FAMILIES[family], dtype=dtype, param_dtype=dtype)
    params = random_params(config)
    save_hf(tmp_path, config, params)
    loaded_config, loaded = load_hf(tmp_path)
    assert dataclasses.replace(loaded_config, head_dim=config.head_dim) == config
    assert_bit_equal(loaded, params)


@pytest.mark.parametrize("folder", ["llama_bias_tied_headdim", "mixtral", "qwen3_moe"])
def test_loaded_and_saved_tensors_are_those_of_the_file(folder, tmp_path):
    save_hf(tmp_path, *load_hf(GOLDEN / folder))
    ours, original = tensors_in(tmp_path), tensors_in(GOLDEN / folder)
    assert ours.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


def test_golden_logits_follow_from_loaded_parameters():
    config, params = load_hf(GOLDEN / "qwen3")
    golden = np.load(GOLDEN / "qwen3" / "golden.npz")
    with jax.default_matmul_precision("highest"):
        out = Decoder(config).apply({"params": params}, golden["input_ids"])
    np.testing.assert_allclose(out.logits, golden["logits"], atol=2e-4)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "yarn_full", "llama3"])
def test_both_config_layouts_load_the_same(kind, copy):
    folder = copy(f"llama_rope_{kind}")
    shutil.copy(GOLDEN / "llama" / "model.safetensors", folder)
    config, params = load_hf(folder)
    (folder / "config_legacy.json").replace(folder / "config.json")
    legacy_config, legacy_params = load_hf(folder)
    assert config == legacy_config
    assert config.rope.rope_type == kind.split("_")[0]
    assert_bit_equal(legacy_params, params)


class TestLayouts:
    def test_layers_load_stacked_or_one_by_one(self):
        config, stacked = load_hf(GOLDEN / "llama")
        unrolled_config, unrolled = load_hf(GOLDEN / "llama", scan_layers=False)
        assert (config.scan_layers, unrolled_config.scan_layers) == (True, False)
        assert_bit_equal(unrolled, unstack_layers(stacked))

    def test_both_layouts_save_the_same_file(self, tmp_path):
        config, params = load_hf(GOLDEN / "mixtral")
        save_hf(tmp_path / "stacked", config, params)
        save_hf(tmp_path / "unstacked", config, unstack_layers(params))
        files = [tmp_path / name / "model.safetensors" for name in ("stacked", "unstacked")]
        ours, theirs = (safetensors.numpy.load_file(file) for file in files)
        assert_bit_equal(ours, theirs)

    def test_boxed_parameters_are_saved(self, tmp_path):
        config = FAMILIES["llama"]
        boxed = Decoder(config).init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
        save_hf(tmp_path, config, boxed)
        assert_bit_equal(load_hf(tmp_path)[1], nn.meta.unbox(boxed))


class TestDtypes:
    def test_the_stored_dtype_is_kept(self, tmp_path):
        config = preset("tiny", param_dtype="bfloat16")
        save_hf(tmp_path, config, random_params(config))
        loaded, params = load_hf(tmp_path)
        assert (loaded.dtype, loaded.param_dtype) == ("bfloat16", "bfloat16")
        assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}

    @pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16])
    def test_a_wanted_dtype_is_cast_to(self, dtype):
        config, params = load_hf(GOLDEN / "llama", dtype)
        name = jnp.dtype(dtype).name
        assert (config.dtype, config.param_dtype) == (name, name)
        exact = load_hf(GOLDEN / "llama")[1]
        assert_bit_equal(params, jax.tree.map(lambda x: x.astype(dtype), exact))

    def test_the_written_config_names_the_dtype_of_the_tensors(self, tmp_path):
        config, params = load_hf(GOLDEN / "llama", "bfloat16")
        save_hf(tmp_path, dataclasses.replace(config, param_dtype="float32"), params)
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["dtype"] == written["torch_dtype"] == "bfloat16"

    def test_tensors_that_are_not_floats_are_refused(self, copy):
        folder = copy()
        rewrite(folder, tensors_in(folder) | {"model.norm.weight": np.ones(32, np.int8)})
        with pytest.raises(ValueError, match=r"model\.norm\.weight .* has dtype I8"):
            load_hf(folder)


class TestShards:
    def test_small_shards_load_bit_equal(self, tmp_path):
        config, params = load_hf(GOLDEN / "llama")
        save_hf(tmp_path, config, params, max_shard_size=30_000)
        files = sorted(tmp_path.glob("*.safetensors"))
        assert len(files) > 3
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
        assert all(file.stat().st_size < 34_000 for file in files)  # a header comes on top
        assert_bit_equal(load_hf(tmp_path)[1], params)

    def test_the_index_lists_every_tensor_and_the_total_size(self, tmp_path):
        config, params = load_hf(GOLDEN / "qwen2")
        save_hf(tmp_path, config, params, max_shard_size=30_000)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        original = tensors_in(GOLDEN / "qwen2")
        assert index["weight_map"].keys() == original.keys()
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in original.values())

    def test_a_later_save_leaves_nothing_of_the_earlier_one(self, tmp_path):
        config, params = load_hf(GOLDEN / "llama")
        doubled = jax.tree.map(lambda x: 2 * x, params)
        save_hf(tmp_path, config, params)
        save_hf(tmp_path, config, doubled, max_shard_size=50_000)
        assert_bit_equal(load_hf(tmp_path)[1], doubled)
        save_hf(tmp_path, config, params)
        assert_bit_equal(load_hf(tmp_path)[1], params)
        assert sorted(file.name for file in tmp_path.iterdir()) == [
            "config.json",
            "model.safetensors",
        ]

    def test_a_lost_shard_is_named(self, tmp_path):
        save_hf(tmp_path, *load_hf(GOLDEN / "llama"), max_shard_size=30_000)
        (tmp_path / sorted(tmp_path.glob("model-*"))[1].name).unlink()
        with pytest.raises(FileNotFoundError, match="lacks model-00002-of-"):
            load_hf(tmp_path)

    def test_a_shard_size_must_be_positive(self, tmp_path):
        with pytest.raises(ValueError, match="max_shard_size=0"):
            save_hf(tmp_path, *load_hf(GOLDEN / "llama"), max_shard_size=0)


class TestTiedEmbeddings:
    def test_they_are_written_once(self, tmp_path):
        save_hf(tmp_path, *load_hf(GOLDEN / "qwen2"))
        assert "lm_head.weight" not in tensors_in(tmp_path)

    def test_a_repeated_head_is_accepted(self, copy):
        folder = copy("qwen2")
        tensors = tensors_in(folder)
        rewrite(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()})
        assert "lm_head" not in load_hf(folder)[1]

    def test_a_different_head_is_refused(self, copy):
        folder = copy("qwen2")
        tensors = tensors_in(folder)
        rewrite(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
        with pytest.raises(TensorMismatchError, match=r"unexpected: lm_head\.weight"):
            load_hf(folder)


class TestMismatch:
    def test_missing_and_unexpected_tensors_are_listed(self, copy):
        folder = copy()
        tensors = tensors_in(folder)
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        rewrite(folder, tensors | {"model.layers.0.adapter": np.ones(2, np.float32)})
        with pytest.raises(KeyError) as caught:
            load_hf(folder)
        error = caught.value
        assert error.missing == ("model.layers.1.mlp.up_proj.weight", "model.norm.weight")
        assert error.unexpected == ("model.layers.0.adapter",)
        assert str(error).endswith(
            "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight; "
            "unexpected: model.layers.0.adapter"
        )

    def test_a_wrong_shape_is_named_with_both_shapes(self, copy):
        folder = copy()
        rewrite(folder, tensors_in(folder) | {"model.norm.weight": np.ones(31, np.float32)})
        with pytest.raises(TensorMismatchError, match=r"norm.weight is \(31,\), expected \(32,\)"):
            load_hf(folder)

    def test_a_missing_embedding_is_missing(self, copy):
        folder = copy()
        tensors = tensors_in(folder)
        del tensors["model.embed_tokens.weight"]
        rewrite(folder, tensors)
        with pytest.raises(TensorMismatchError, match=r"missing: model\.embed_tokens\.weight"):
            load_hf(folder)

    def test_rotary_constants_of_old_files_are_passed_over(self, copy):
        folder = copy()
        constant = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
        rewrite(folder, tensors_in(folder) | constant)
        assert_bit_equal(load_hf(folder)[1], load_hf(GOLDEN / "llama")[1])

    def test_an_absent_expert_is_named(self, copy):
        folder = copy("mixtral")
        tensors = tensors_in(folder)
        name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
        del tensors[name]
        rewrite(folder, tensors)
        with pytest.raises(TensorMismatchError) as caught:
            load_hf(folder)
        assert caught.value.missing == (name,)

    def test_parameters_that_are_not_those_of_the_config_are_not_saved(self, tmp_path):
        config, params = load_hf(GOLDEN / "llama")
        with pytest.raises(TensorMismatchError, match="missing: layers/attention/k_proj/bias"):
            save_hf(tmp_path, dataclasses.replace(config, qkv_bias=True), params)
        with pytest.raises(TensorMismatchError, match=r"embedding is \(97, 32\), expected \(98"):
            save_hf(tmp_path, dataclasses.replace(config, vocab_size=98), params)
        assert not list(tmp_path.iterdir())


class TestFolders:
    def test_what_is_missing_is_named(self, tmp_path, copy):
        with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
            load_hf(tmp_path / "none")
        with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
            load_hf(tmp_path)
        folder = copy()
        (folder / "model.safetensors").replace(folder / "pytorch_model.bin")
        with pytest.raises(FileNotFoundError, match="other formats are not read"):
            load_hf(folder)

    def test_extra_entries_end_up_in_the_config(self, tmp_path):
        save_hf(tmp_path, *load_hf(GOLDEN / "llama"), extra={"eos_token_id": 2})
        assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 2

    def test_a_config_that_no_family_expresses_is_refused(self, tmp_path):
        config = preset("tiny", qk_norm=True, mlp_bias=True)
        with pytest.raises(ValueError, match="combines mlp_bias, qk_norm"):
            save_hf(tmp_path, config, random_params(config))

    def test_rope_settings_survive(self, tmp_path):
        config = preset("tiny", rope=RopeConfig("yarn", theta=5e4, factor=4.0, beta_fast=24.0))
        save_hf(tmp_path, config, random_params(config))
        assert load_hf(tmp_path)[0] == config
        assert json.loads((tmp_path / "config.json").read_text()) == config_to_hf(config)


class TestMesh:
    AXES = ("data", "fsdp", "expert", "context", "tensor")

    def mesh(self, **sizes):
        shape = [sizes.get(axis, 1) for axis in self.AXES]
        return jax.make_mesh(
            shape,
            self.AXES,
            axis_types=(AxisType.Auto,) * 5,
            devices=jax.devices()[: int(np.prod(shape))],
        )

    @pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
    def test_every_parameter_lands_sharded_and_unchanged(self, family, tmp_path):
        config = dataclasses.replace(FAMILIES[family], vocab_size=256)
        save_hf(tmp_path, config, random_params(config))
        _, plain = load_hf(tmp_path)
        _, sharded = load_hf(tmp_path, mesh=self.mesh(fsdp=2, expert=2, tensor=2))
        assert_bit_equal(sharded, plain)
        bytes_here = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(sharded)
            for shard in leaf.addressable_shards
            if shard.device == jax.devices()[0]
        )
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(plain))
        assert bytes_here < total / 3.5  # fsdp x tensor, but for norms and biases

    def test_each_axis_goes_where_the_rules_say(self, tmp_path):
        config = dataclasses.replace(FAMILIES["llama"], vocab_size=256)
        save_hf(tmp_path, config, random_params(config))
        _, params = load_hf(tmp_path, mesh=self.mesh(fsdp=2, tensor=2))
        spec = params["layers"]["mlp"]["up_proj"]["kernel"].sharding.spec
        assert tuple(spec) == (None, "fsdp", "tensor")
        rules = [("embed", "data"), ("mlp", None)]
        _, params = load_hf(tmp_path, mesh=self.mesh(data=2), rules=rules)
        spec = params["layers"]["mlp"]["up_proj"]["kernel"].sharding.spec
        assert tuple(spec) == (None, "data", None)
        with nn.logical_axis_rules(rules):
            _, params = load_hf(tmp_path, mesh=self.mesh(data=2))
        assert tuple(params["embed"]["embedding"].sharding.spec) == (None, "data")

    def test_too_few_kv_heads_are_replicated(self, tmp_path):
        config = dataclasses.replace(FAMILIES["llama"], vocab_size=256)
        save_hf(tmp_path, config, random_params(config))
        _, params = load_hf(tmp_path, mesh=self.mesh(tensor=4))
        attention = params["layers"]["attention"]
        assert tuple(attention["k_proj"]["kernel"].sharding.spec) == (None, None, None)
        assert tuple(attention["q_proj"]["kernel"].sharding.spec) == (None, None, "tensor")

    def test_an_axis_that_does_not_divide_is_named(self):
        with pytest.raises(ValueError, match=r"'tensor'.*'vocab' \(size 97\) of embed/embedding"):
            load_hf(GOLDEN / "llama", mesh=self.mesh(tensor=2))

    def test_sharded_parameters_are_saved(self, tmp_path):
        config = dataclasses.replace(FAMILIES["mixtral"], vocab_size=256)
        save_hf(tmp_path / "a", config, random_params(config))
        _, sharded = load_hf(tmp_path / "a", mesh=self.mesh(fsdp=2, expert=2, tensor=2))
        save_hf(tmp_path / "b", config, sharded)
        assert_bit_equal(load_hf(tmp_path / "b")[1], random_params(config))
