"""Arithmetic of the decoder, counted from its configuration."""

from jaxeff.language.config import DecoderConfig


def matmul_parameters(config: DecoderConfig) -> int:
    """Number of weights that one token is multiplied with: no embedding, chosen experts only."""
    attention = (config.num_heads + config.num_kv_heads) * config.resolved_head_dim
    total = config.vocab_size * config.hidden_size
    for layer in range(config.num_layers):
        total += 2 * config.hidden_size * attention
        width = config.intermediate_size
        if layer in config.moe_layers:
            width = (config.moe.intermediate_size or width) * config.moe.num_experts_per_token
            total += config.hidden_size * config.moe.num_experts
        total += 3 * config.hidden_size * width
    return total


def flops_per_token(config: DecoderConfig, seq_len: int) -> float:
    """Forward flops per token in sequences of `seq_len` tokens, a multiply-add counted as two.

    Matrix products only. Attention counts the positions that causality (and the sliding window)
    lets a query see, half of the square; the convention of PaLM (arXiv 2204.02311, appendix B)
    counts the whole square, so utilisation stated with this count is the lower one. A training
    step is three times this.
    """
    window = min(config.sliding_window or seq_len, seq_len)
    # Position i sees min(i + 1, window) keys.
    seen = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
    attention = 4 * config.num_layers * config.num_heads * config.resolved_head_dim * seen
    return 2 * matmul_parameters(config) + attention
