"""Mesh and sharding rules: sizes that do not fit are errors that name both sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from toy import RegressionTask, make_batch

from jaxeff.training import ConfigError, MeshConfig, make_mesh, per_replica_gradients, use_mesh
from jaxeff.training.mesh import MeshPlacement, fit_rules, mesh_shape
from jaxeff.trees import unbox


@pytest.mark.parametrize(
    "config, devices, expected",
    [
        (MeshConfig(), 8, (8, 1, 1, 1, 1)),
        (MeshConfig(fsdp=2, tensor=2), 8, (2, 2, 1, 1, 2)),
        (MeshConfig(data=1, fsdp=-1, tensor=4), 64, (1, 16, 1, 1, 4)),
    ],
)
def test_the_free_axis_takes_the_devices_that_are_left(config, devices, expected):
    assert mesh_shape(config, devices) == expected


def test_meshes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="8 devices cannot be divided"):
        mesh_shape(MeshConfig(tensor=3), 8)
    with pytest.raises(ConfigError, match="needs 4 devices; there are 8"):
        mesh_shape(MeshConfig(data=4), 8)


def test_heads_must_divide_and_kv_heads_are_replicated(caplog):
    mesh = make_mesh(MeshConfig(data=2, tensor=4), jax.devices()[:8])
    with pytest.raises(ConfigError, match=r"'tensor' has size 4.*6 units of model axis 'heads'"):
        fit_rules(mesh, {"heads": 6})
    rules = dict(fit_rules(mesh, {"heads": 8, "kv_heads": 2}))
    assert rules["kv_heads"] is None and rules["act_kv_heads"] is None
    assert rules["heads"] == "tensor"
    assert "2 kv_heads do not divide" in caplog.text


def test_a_dimension_that_does_not_divide_is_named():
    from jaxeff.training import Trainer

    with pytest.raises(ConfigError, match=r"'tensor' has size 8.*dimension 12 of parameter"):
        Trainer(RegressionTask(hidden=12), mesh=MeshConfig(data=1, tensor=8))


def test_a_batch_that_does_not_divide_is_refused():
    mesh = make_mesh(MeshConfig(data=8), jax.devices()[:8])
    with pytest.raises(ConfigError, match="batch size 12 is not divisible"):
        MeshPlacement.for_batch(mesh, 12)


def test_placement_puts_rows_where_they_belong():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=2), jax.devices()[:8])
    place = MeshPlacement.for_batch(mesh, 8)
    tokens = np.arange(8 * 4).reshape(8, 4)
    placed = place({"tokens": tokens, "step": np.int32(3)})
    np.testing.assert_array_equal(placed["tokens"], tokens)
    assert placed["tokens"].sharding.spec == PartitionSpec(("data", "fsdp", "expert"), "context")
    assert {s.data.shape for s in placed["tokens"].addressable_shards} == {(2, 2)}
    assert (place.shard_index, place.shard_count) == (0, 1)


@pytest.mark.parametrize("axes, mesh", [("data", {"data": 8}), (("data", "fsdp"), {"fsdp": 2})])
def test_per_replica_gradients_are_each_replicas_own(axes, mesh):
    mesh = make_mesh(MeshConfig(**mesh), jax.devices()[:8])
    task = RegressionTask(noise=0.0)
    batch = make_batch(32, 0)
    params, extra = task.init(jax.random.key(0), batch)
    params = unbox(params)

    def loss(params, rows):
        return task.loss(params, extra, rows, jax.random.key(1), jnp.int32(0))[0]

    with use_mesh(mesh):
        values, grads = jax.jit(per_replica_gradients(loss, mesh, axes))(params, batch)
    assert values.shape == (8,)
    for replica in range(8):
        rows = {name: x[4 * replica : 4 * replica + 4] for name, x in batch.items()}
        expected = jax.grad(loss)(params, rows)
        for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(grads)):
            np.testing.assert_allclose(x, y[replica], rtol=1e-5, atol=1e-6)
    kernel = grads["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (1, 8, 16)


def test_per_replica_gradients_refuse_rows_that_do_not_divide():
    mesh = make_mesh(MeshConfig(data=8), jax.devices()[:8])
    with pytest.raises(ValueError, match="batch of 12 rows is not divisible over 8 replicas"):
        per_replica_gradients(lambda p, b: jnp.sum(p * b["x"]), mesh)(
            jnp.ones(()), {"x": np.ones((12,))}
        )
