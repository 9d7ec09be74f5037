"""The one decoder-only language model that every language technique stands on.

Further pieces: `attention.attention` (the door to the kernels), `cache` (operations on the cache),
`rope`, `moe`.
"""

from jaxeff.language.cache import KVCache, init_cache
from jaxeff.language.config import DecoderConfig, MoEConfig, RopeConfig
from jaxeff.language.decoder import (
    Decoder,
    DecoderOutput,
    count_parameters,
    head_kernel,
    stack_layers,
    unstack_layers,
)
from jaxeff.language.flops import flops_per_token, matmul_parameters
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
    "chunked_cross_entropy",
    "config_from_hf",
    "config_to_hf",
    "count_parameters",
    "cross_entropy",
    "flops_per_token",
    "generate",
    "generate_stream",
    "head_kernel",
    "init_cache",
    "list_presets",
    "load_hf",
    "load_tokenizer",
    "matmul_parameters",
    "pad_prompts",
    "preset",
    "rerotate",
    "rope_frequencies",
    "router_loss",
    "save_hf",
    "sequence_logprobs",
    "stack_layers",
    "unstack_layers",
    "warp_logits",
]
