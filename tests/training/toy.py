"""A regression task small enough to train hundreds of steps in a test."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.training import Aux


class CountingIterator:
    """Batches that depend on seed and position alone; position is the whole state."""

    def __init__(self, batch_size, seed, shard_index, shard_count):
        self.position = 0
        self.wait_seconds = 0.0
        self._size, self._seed = batch_size, seed
        self._rows = slice(
            shard_index * batch_size // shard_count, (shard_index + 1) * batch_size // shard_count
        )
        self.closed = False

    def __iter__(self):
        return self

    def __next__(self):
        batch = make_batch(self._size, self._seed * 100_003 + self.position)
        self.position += 1
        return {name: rows[self._rows] for name, rows in batch.items()}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]

    def close(self):
        self.closed = True


def make_batch(size, seed):
    """Rows of a noisy linear map from 8 to 4 values, with uneven weights."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 8)).astype(np.float32)
    true = np.random.default_rng(7).normal(size=(8, 4)).astype(np.float32)
    noise = 0.01 * rng.normal(size=(size, 4)).astype(np.float32)
    weight = rng.integers(0, 5, size=size).astype(np.float32)
    return {"x": x, "y": (x @ true + noise).astype(np.float32), "weight": weight}


class RegressionTask:
    """Two sharded matrices, dropout-like noise from the step's key, uneven row weights."""

    unit = "rows"

    def __init__(self, batch_size=16, hidden=16, seed=0, noise=0.01, poison_at=None):
        self.batch_size, self.hidden, self.seed = batch_size, hidden, seed
        self.noise, self.poison_at = noise, poison_at
        self.iterators = []

    def batch_spec(self):
        size = self.batch_size
        return {
            "x": jax.ShapeDtypeStruct((size, 8), jnp.float32),
            "y": jax.ShapeDtypeStruct((size, 4), jnp.float32),
            "weight": jax.ShapeDtypeStruct((size,), jnp.float32),
        }

    def init(self, key, batch):
        def boxed(key, shape, names):
            init = nn.with_logical_partitioning(nn.initializers.normal(0.3), names)
            return init(key, shape, jnp.float32)

        first, second = jax.random.split(key)
        params = {
            "up": {"kernel": boxed(first, (8, self.hidden), ("embed", "mlp"))},
            "down": {
                "kernel": boxed(second, (self.hidden, 4), ("mlp", None)),
                "bias": jnp.zeros((4,)),
            },
        }
        return params, {"steps_seen": jnp.zeros((), jnp.int32)}

    def loss(self, params, extra, batch, key, step):
        hidden = jnp.tanh(batch["x"] @ params["up"]["kernel"])
        hidden = hidden + self.noise * jax.random.normal(key, hidden.shape)
        error = hidden @ params["down"]["kernel"] + params["down"]["bias"] - batch["y"]
        weight = jnp.sum(batch["weight"])
        loss = jnp.sum(batch["weight"] * jnp.mean(error**2, -1)) / jnp.maximum(weight, 1)
        if self.poison_at is not None:
            loss = jnp.where(step == self.poison_at, jnp.nan, loss)
        extra = {"steps_seen": extra["steps_seen"] + 1}
        return loss, Aux(weight, {"error": jnp.sqrt(loss)}, extra)

    def train_iterator(self, shard_index, shard_count):
        self.iterators.append(
            CountingIterator(self.batch_size, self.seed, shard_index, shard_count)
        )
        return self.iterators[-1]

    def evaluate(self, params, extra, place):
        batch = place(make_batch(self.batch_size, 1_000_000))
        hidden = jnp.tanh(batch["x"] @ params["up"]["kernel"])
        error = hidden @ params["down"]["kernel"] + params["down"]["bias"] - batch["y"]
        return {"loss": float(jnp.mean(error**2))}
