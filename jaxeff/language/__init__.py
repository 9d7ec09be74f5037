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
from jaxeff.language.generation import (
    GenerateOutput,
    StreamedTokens,
    generate,
    generate_stream,
    pad_prompts,
    sequence_logprobs,
)
from jaxeff.language.huggingface import TensorMismatchError, load_hf, save_hf
from jaxeff.language.huggingface_config import config_from_hf, config_to_hf
from jaxeff.language.layers import MLP, Linear, RMSNorm
from jaxeff.language.losses import chunked_cross_entropy, cross_entropy
from jaxeff.language.moe import MoE, router_loss
from jaxeff.language.presets import list_presets, preset
from jaxeff.language.rope import apply_rope, rerotate, rope_frequencies
from jaxeff.language.sampling import SamplingConfig, warp_logits
from jaxeff.language.tokenizers import (
    ByteTokenizer,
    FileTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
)

__all__ = [
    "MLP",
    "ByteTokenizer",
    "CachedKeys",
    "Decoder",
    "DecoderConfig",
    "DecoderOutput",
    "FileTokenizer",
    "GenerateOutput",
    "KVCache",
    "Linear",
    "MoE",
    "MoEConfig",
    "RMSNorm",
    "RopeConfig",
    "SamplingConfig",
    "StreamDecoder",
    "StreamedTokens",
    "TensorMismatchError",
    "Tokenizer",
    "apply_rope",
    "attention",
    "chunked_cross_entropy",
    "compact",
    "concat_spans",
    "config_from_hf",
    "config_to_hf",
    "count_parameters",
    "cross_entropy",
    "generate",
    "generate_stream",
    "head_kernel",
    "init_cache",
    "list_presets",
    "load_hf",
    "load_tokenizer",
    "pad_prompts",
    "preset",
    "rerotate",
    "roll_back",
    "rope_frequencies",
    "router_loss",
    "save_hf",
    "sequence_logprobs",
    "slice_span",
    "stack_layers",
    "unstack_layers",
    "warp_logits",
    "write",
]
