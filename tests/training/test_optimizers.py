"""Optimisers take their learning rate from the plan; schedules hit their marks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff.training import ConfigError, OptimizerConfig, make_optimizer, make_schedule
from jaxeff.training.optimizers import decay_mask


def params():
    rng = np.random.default_rng(0)
    return {
        "layers": {"proj": {"kernel": jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32)}},
        "norm": {"scale": jnp.ones(4)},
    }


def labels(tree):
    return {"layers": {"proj": {"kernel": "matrix"}}, "norm": {"scale": "other"}}


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "sgd", "muon"])
def test_the_update_is_proportional_to_the_learning_rate_of_the_call(name):
    optimizer = make_optimizer(OptimizerConfig(name=name), labels)
    tree = params()
    grads = jax.tree.map(jnp.sin, tree)
    state = optimizer.init(tree)
    small, _ = optimizer.update(grads, state, tree, learning_rate=jnp.float32(1e-3))
    large, _ = optimizer.update(grads, state, tree, learning_rate=jnp.float32(2e-3))
    for x, y in zip(jax.tree.leaves(small), jax.tree.leaves(large)):
        assert np.abs(x).max() > 0
        np.testing.assert_allclose(2 * np.asarray(x), y, rtol=1e-6)


def test_adamw_is_optax_adamw():
    config = OptimizerConfig(weight_decay=0.1, b1=0.8, b2=0.9, eps=1e-6, max_grad_norm=None)
    ours, tree = make_optimizer(config), params()
    theirs = optax.adamw(3e-3, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.1, mask=decay_mask)
    a, b = ours.init(tree), theirs.init(tree)
    for step in range(3):
        grads = jax.tree.map(lambda p, s=step: jnp.cos(p + s), tree)
        x, a = ours.update(grads, a, tree, learning_rate=3e-3)
        y, b = theirs.update(grads, b, tree)
        for u, v in zip(jax.tree.leaves(x), jax.tree.leaves(y)):
            np.testing.assert_allclose(u, v, rtol=1e-6, atol=1e-9)


def test_muon_updates_are_orthogonal_and_of_adams_size():
    optimizer = make_optimizer(OptimizerConfig(name="muon", max_grad_norm=None), labels)
    tree = params()
    updates, _ = optimizer.update(
        jax.tree.map(jnp.sin, tree), optimizer.init(tree), tree, learning_rate=1.0
    )
    for matrix in updates["layers"]["proj"]["kernel"]:
        singular = np.linalg.svd(matrix / (0.2 * np.sqrt(6)), compute_uv=False)
        assert singular.max() < 1.3 and singular.min() > 0.5
    assert np.abs(updates["norm"]["scale"]).max() == pytest.approx(1, rel=1e-3)


def test_clipping_bounds_the_global_norm():
    config = OptimizerConfig(name="sgd", b1=0.0, max_grad_norm=0.5)
    optimizer, tree = make_optimizer(config), params()
    updates, _ = optimizer.update(tree, optimizer.init(tree), tree, learning_rate=1.0)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5, rel=1e-5)


def test_the_final_transformation_comes_after_learning_rate_and_decay():
    def update(updates, state, params):
        return jax.tree.map(lambda u, p: jnp.full_like(p, 7) - p, updates, params), state + 1

    final = optax.GradientTransformation(lambda params: jnp.int32(0), update)
    optimizer, tree = make_optimizer(OptimizerConfig(weight_decay=0.1), final=final), params()
    updates, state = optimizer.update(tree, optimizer.init(tree), tree, learning_rate=0.3)
    for x in jax.tree.leaves(optax.apply_updates(tree, updates)):
        np.testing.assert_allclose(x, 7, rtol=1e-6)
    assert int(state[-1]) == 1


def test_decay_spares_gains_and_biases():
    assert decay_mask(params()) == {
        "layers": {"proj": {"kernel": True}},
        "norm": {"scale": False},
    }


@pytest.mark.parametrize(
    "settings, marks",
    [
        ({"schedule": "constant"}, {0: 1.0, 50: 1.0, 99: 1.0}),
        ({"schedule": "linear"}, {0: 1.0, 50: 0.55, 100: 0.1}),
        ({"schedule": "cosine"}, {0: 1.0, 50: 0.55, 100: 0.1}),
        ({"schedule": "cosine", "warmup_steps": 10}, {0: 1 / 11, 10: 1.0, 55: 0.55, 100: 0.1}),
        ({"schedule": "wsd", "decay_steps": 20}, {0: 1.0, 79: 1.0, 90: 0.55, 100: 0.1}),
        ({"schedule": "rsqrt", "warmup_steps": 9}, {0: 0.1, 9: 1.0, 36: 0.5, 81: 1 / 3}),
        ({"schedule": "wsd"}, {0: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
    ],
)
def test_schedules_hit_their_marks(settings, marks):
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, **settings), 100)
    for step, value in marks.items():
        assert float(schedule(step)) == pytest.approx(value, rel=1e-5), step


@pytest.mark.parametrize("schedule", ["constant", "rsqrt"])
def test_some_schedules_do_not_depend_on_the_length_of_the_run(schedule):
    config = OptimizerConfig(schedule=schedule, warmup_steps=10)
    short, long = make_schedule(config, 5), make_schedule(config, 500)
    assert [float(short(s)) for s in range(40)] == [float(long(s)) for s in range(40)]


def test_schedules_longer_than_the_run_are_refused():
    with pytest.raises(ConfigError, match="warmup_steps is 100; expected fewer than"):
        make_schedule(OptimizerConfig(warmup_steps=100), 100)
    with pytest.raises(ConfigError, match="decay_steps is 95; expected at most the 90"):
        config = OptimizerConfig(schedule="wsd", warmup_steps=10, decay_steps=95)
        make_schedule(config, 100)


def test_muon_without_labels_is_refused():
    with pytest.raises(ConfigError, match="needs a task that labels its matrices"):
        make_optimizer(OptimizerConfig(name="muon"))
