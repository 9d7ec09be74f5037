"""Helpers on pytrees, for every room."""

from __future__ import annotations

from typing import Any

import jax
from flax.core import meta


def unbox(tree: Any) -> Any:
    """Returns parameters without the boxes of their axis names; plain ones stay as they are.

    Unlike ``flax.core.meta.unbox`` it constrains nothing, so that it also serves abstract
    parameters while a mesh is set.
    """

    def is_box(x):
        return isinstance(x, meta.AxisMetadata)

    return jax.tree.map(
        lambda x: x.unbox(apply_constraint=False) if is_box(x) else x, tree, is_leaf=is_box
    )
