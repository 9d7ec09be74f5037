"""The one decoder-only language model that every language technique stands on."""

from jaxeff.language.attention import attention
from jaxeff.language.cache import (
    CachedKeys,
    KVCache,
    compact,
    concat_spans,
    init_cache,
    roll_back,
    slice_span,
    write,
)
from jaxeff.language.config import DecoderConfig, MoEConfig, RopeConfig
from jaxeff.language.decoder import (
    Decoder,
    DecoderOutput,
    count_parameters,
    head_kernel,
    stack_layers,
    unstack_layers,
)
from jaxeff.language.layers import MLP, Linear, RMSNorm
from jaxeff.language.losses import chunked_cross_entropy, cross_entropy
from jaxeff.language.moe import MoE, router_loss
from jaxeff.language.rope import apply_rope, rerotate, rope_frequencies

__all__ = [
    "MLP",
    "CachedKeys",
    "Decoder",
    "DecoderConfig",
    "DecoderOutput",
    "KVCache",
    "Linear",
    "MoE",
    "MoEConfig",
    "RMSNorm",
    "RopeConfig",
    "apply_rope",
    "attention",
    "chunked_cross_entropy",
    "compact",
    "concat_spans",
    "count_parameters",
    "cross_entropy",
    "head_kernel",
    "init_cache",
    "rerotate",
    "roll_back",
    "rope_frequencies",
    "router_loss",
    "slice_span",
    "stack_layers",
    "unstack_layers",
    "write",
]
