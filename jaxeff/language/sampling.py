"""From logits to the distribution a token is drawn from, and to the token.

The order of the warpers is temperature, top-k, top-p, min-p, each acting on what the one before
left (the order of the `transformers` library). Dropped tokens get a logit of minus infinity.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is drawn from logits.

    Attributes:
      temperature: divides the logits; below 1e-5 the largest logit is taken, the first one on ties.
      top_k: keep tokens whose logit is not below the k-th largest (ties are kept); 0 is off.
      top_p: keep the smallest set of most probable tokens whose probability exceeds this (nucleus
        sampling, arXiv 1904.09751); 1.0 is off.
      min_p: keep tokens at least this probable relative to the most probable one
        (arXiv 2407.01082); 0.0 is off.

    Raises:
      ValueError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be finite and at least 0")
        if self.top_k != int(self.top_k) or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be a whole number of at least 0 (0 is off)")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1] (1 is off)")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p={self.min_p} must be in [0, 1] (0 is off)")

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken and nothing is random."""
        return self.temperature < GREEDY_BELOW


def warp_logits(
    logits: Float[Array, "*batch vocab"], sampling: SamplingConfig
) -> Float[Array, "*batch vocab"]:
    """Returns the logits (float32) of the distribution that tokens are drawn from.

    For greedy sampling that is a point mass: every token but the best (first on ties) is dropped.

    Args:
      logits: of any float dtype.
      sampling: temperature and truncation.
    """
    return apply_warpers(logits, warper_values(sampling), sampling.top_k)


def warper_values(sampling: SamplingConfig) -> dict[str, np.float32]:
    """Returns the numbers of the warpers that are on, keyed by name; top-k is static and not here.

    Passed to a jitted function as arguments, they let its compiled code serve every temperature,
    top-p and min-p: only which warpers are on is fixed by the structure.
    """
    if sampling.greedy:
        return {}
    values = {"temperature": np.float32(sampling.temperature)}
    if sampling.top_p < 1.0:
        values["tail_mass"] = np.float32(1.0 - sampling.top_p)
    if sampling.min_p > 0.0:
        values["log_min_p"] = np.log(np.float32(sampling.min_p))
    return values


def apply_warpers(
    logits: Float[Array, "*batch vocab"], values: dict[str, jax.Array], top_k: int
) -> Float[Array, "*batch vocab"]:
    """Returns warped logits (float32), given the `warper_values` of a sampling configuration."""
    logits = jnp.asarray(logits, jnp.float32)
    if "temperature" not in values:
        return _keep_best(logits)
    logits = logits / values["temperature"]
    if 0 < top_k < logits.shape[-1]:
        kth_largest = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits >= kth_largest, logits, -jnp.inf)
    if "tail_mass" in values:
        logits = _drop_tail(logits, values["tail_mass"])
    if "log_min_p" in values:
        least = logits.max(-1, keepdims=True) + values["log_min_p"]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def draw(key: Key[Array, ""], warped: Float[Array, " vocab"], greedy: bool) -> Int[Array, ""]:
    """Returns one token id (int32) drawn from warped logits of one sequence."""
    if greedy:
        return jnp.argmax(warped).astype(jnp.int32)
    return jax.random.categorical(key, warped).astype(jnp.int32)


def _keep_best(logits: jax.Array) -> jax.Array:
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.where(jnp.arange(logits.shape[-1]) == best, logits, -jnp.inf)


def _drop_tail(logits: jax.Array, tail_mass: jax.Array) -> jax.Array:
    """Drops the least probable tokens whose probabilities sum to at most `tail_mass`.

    The sum runs upwards from the least probable token and includes the token itself. Of equally
    probable tokens the later ones go first, and the best one always stays.
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    up_to_here = jax.lax.cumsum(probabilities, axis=probabilities.ndim - 1, reverse=True)
    keep_sorted = (up_to_here > tail_mass).at[..., 0].set(True)
    keep = jnp.put_along_axis(
        jnp.zeros(logits.shape, bool), order, keep_sorted, axis=-1, inplace=False
    )
    return jnp.where(keep, logits, -jnp.inf)
