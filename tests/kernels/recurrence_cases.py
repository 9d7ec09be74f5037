"""Linear recurrences for tests: operands, and their states by a loop in float64."""

import numpy as np


def operands(seed, batch, steps, channels, structure="diagonal"):
    """Transitions, offsets and an initial state in float32.

    Args:
      structure: "diagonal", "dense", or the number of blocks.
    """
    rng = np.random.default_rng(seed)
    if structure == "diagonal":
        shape, state, scale = (channels,), (channels,), 1.0
    elif structure == "dense":
        shape, state, scale = (channels, channels), (channels,), 1 / np.sqrt(channels)
    else:
        shape, state = (structure, structure, channels), (structure, channels)
        scale = 1 / np.sqrt(structure)
    a = scale * rng.uniform(-1, 1, (batch, steps, *shape))
    b, h0 = rng.normal(size=(batch, steps, *state)), rng.normal(size=(batch, *state))
    return tuple(x.astype(np.float32) for x in (a, b, h0))


def looped(a, b, h0=None, reverse=False):
    """The states, one step after the other."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    product = {3: "bh,bh->bh", 4: "bij,bj->bi", 5: "bijh,bjh->bih"}[a.ndim]
    h = np.zeros_like(b[:, 0]) if h0 is None else np.asarray(h0, np.float64)
    states = np.empty_like(b)
    steps = range(b.shape[1])
    for t in reversed(steps) if reverse else steps:
        h = np.einsum(product, a[:, t], h) + b[:, t]
        states[:, t] = h
    return states
