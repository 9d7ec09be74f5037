"""Optimisers and schedules by name, built from optax.

The learning rate is not baked into the optimiser: it comes from the controller's plan at every
step, as the extra argument ``learning_rate`` of ``update``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxeff.training.config import ConfigError, OptimizerConfig


def scale_by_learning_rate_argument() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by ``-learning_rate``, an argument of ``update``."""

    def update_fn(updates, state, params=None, *, learning_rate, **unused):
        del params, unused
        return jax.tree.map(lambda u: (-learning_rate * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, for steps ``0 .. num_steps - 1``.

    Raises:
      ConfigError: when warm-up (and decay) are longer than the run.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate_ratio
    warmup = config.warmup_steps
    rest = num_steps - warmup
    if rest < 1 and config.schedule not in ("constant", "rsqrt"):
        raise ConfigError(
            f"optimizer.warmup_steps is {warmup}; expected fewer than training.num_steps "
            f"({num_steps})"
        )
    if config.schedule == "constant":
        main = optax.constant_schedule(peak)
    elif config.schedule == "rsqrt":
        main = _inverse_square_root(peak, max(warmup, 1))
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, final, rest)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, alpha=config.final_learning_rate_ratio)
    else:
        main = _stable_then_decay(config, peak, final, rest)
    if not warmup:
        return main
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([ramp, main], [warmup])


def _inverse_square_root(peak: float, warmup: int) -> optax.Schedule:
    """``peak`` at the end of the warm-up, then falling with the square root of the step."""
    return lambda step: peak * jnp.sqrt(warmup / (jnp.asarray(step, jnp.float32) + warmup))


def _stable_then_decay(
    config: OptimizerConfig, peak: float, final: float, steps: int
) -> optax.Schedule:
    decay = max(1, steps // 5) if config.decay_steps is None else config.decay_steps
    if decay > steps:
        raise ConfigError(
            f"optimizer.decay_steps is {decay}; expected at most the {steps} steps after warm-up"
        )
    stable = optax.constant_schedule(peak)
    return optax.join_schedules(
        [stable, optax.linear_schedule(peak, final, decay)], [steps - decay]
    )


def make_optimizer(
    config: OptimizerConfig,
    matrices: Any | None = None,
    final: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimiser of ``config``; its ``update`` takes ``learning_rate=``.

    Args:
      config: names and constants.
      matrices: for ``muon``: a tree of labels like the parameters, or a function of the
        parameters that returns one, ``"matrix"`` where Muon applies. Required for ``muon``.
      final: what changes the updates last of all, learning rate and weight decay included, such as
        a projection of the new parameters; its state is part of the optimiser's.
    """
    steps = []
    if config.max_grad_norm is not None:
        steps.append(optax.clip_by_global_norm(config.max_grad_norm))
    if config.name == "muon":
        if matrices is None:
            raise ConfigError(
                "optimizer.name is 'muon', which needs a task that labels its matrices "
                "(param_labels)"
            )
        steps.append(
            optax.partition({"matrix": _muon(config), "other": _rule(config, "adamw")}, matrices)
        )
    else:
        steps.append(_rule(config, config.name))
    if config.weight_decay:
        steps.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    steps.append(scale_by_learning_rate_argument())
    if final is not None:
        steps.append(final)
    return optax.with_extra_args_support(optax.chain(*steps))


def decay_mask(params: Any) -> Any:
    """Returns True for the parameters that weight decay applies to: matrices, not gains or biases.

    Layers stacked for a scan add a leading axis, so vectors are told by their name.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) not in ("scale", "bias"), params
    )


def _rule(config: OptimizerConfig, name: str) -> optax.GradientTransformation:
    if name in ("adamw", "adam"):
        return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if name == "lion":
        return optax.scale_by_lion(b1=config.b1, b2=config.b2)
    return optax.trace(decay=config.b1)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon with updates of the same root mean square as Adam's, so one learning rate serves both.

    Newton-Schulz orthogonalisation (Jordan et al. 2024) gives singular values near 1; the factor
    ``0.2 sqrt(max(in, out))`` matches Adam's update size (Liu et al., "Muon is scalable for LLM
    training", arXiv 2502.16982, eq. 4).
    """

    def dimensions(params):
        return jax.tree.map(
            lambda p: optax.contrib.MuonDimensionNumbers(p.ndim - 2, p.ndim - 1), params
        )

    def rescale(updates, params=None):
        del params
        return jax.tree.map(lambda u: u * (0.2 * jnp.sqrt(float(max(u.shape[-2:])))), updates)

    return optax.chain(
        optax.contrib.scale_by_muon(beta=config.muon_momentum, weight_dimension_numbers=dimensions),
        optax.stateless(rescale),
    )
