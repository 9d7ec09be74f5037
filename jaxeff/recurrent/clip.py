"""Recurrent weights kept small enough for Newton's method to converge (arXiv 2510.21450)."""

import jax
import jax.numpy as jnp
import optax

NAMES = ("a", "peephole")


def clip_recurrent(max_abs: float) -> optax.GradientTransformationExtraArgs:
    """An optax transformation after which every entry of a recurrent weight is in [-m, m].

    To stand last in a chain: it changes the updates of the leaves named `a` or `peephole` such that
    `optax.apply_updates` lands in the interval. The norm of a diagonal operator is its largest
    entry, which is how the paper's bound of 0.5 is read here.

    Args:
      max_abs: m, above zero.

    Raises:
      ValueError: if `max_abs` is not above zero, or `update` is called without `params`.
    """
    if not max_abs > 0:
        raise ValueError(f"max_abs={max_abs}, expected above zero")

    def clipped(path, update, param):
        if not is_recurrent(path):
            return update
        return jnp.clip(param + update, -max_abs, max_abs) - param

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("clip_recurrent needs params in update, got None")
        return jax.tree_util.tree_map_with_path(clipped, updates, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def is_recurrent(path: tuple) -> bool:
    """Whether a leaf of a tree of parameters, boxed or not, is a recurrent weight, by its path."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return bool(names) and names[-1] in NAMES
