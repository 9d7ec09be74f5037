"""The decoder in plain PyTorch modules, for comparison; imports torch, so import it late.

It computes what ``jaxeff.language`` computes for models without experts, biases, query/key norm or
long-context RoPE: RMS norm, half-split RoPE, grouped-query attention within segments, SwiGLU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from jaxeff.language import DecoderConfig


class Attention(nn.Module):
    """Projections, RoPE, ``scaled_dot_product_attention``, output projection."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        head_dim, d = config.resolved_head_dim, config.hidden_size
        self.q_proj = nn.Linear(d, config.num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d, config.num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(d, config.num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * head_dim, d, bias=False)

    def forward(self, x, cos, sin, mask):
        batch, length, _ = x.shape

        def heads(y, count):  # (B, heads, T, D)
            return y.view(batch, length, count, -1).transpose(1, 2)

        q = rotate(heads(self.q_proj(x), self.num_heads), cos, sin)
        k = rotate(heads(self.k_proj(x), self.num_kv_heads), cos, sin)
        v = heads(self.v_proj(x), self.num_kv_heads)
        grouped = self.num_heads != self.num_kv_heads
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask):
        x = x + self.attention(self.input_norm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_norm(x))


class TorchDecoder(nn.Module):
    """The whole model; ``forward`` returns the mean loss of a batch.

    Args:
      config: the decoder.

    Raises:
      ValueError: for a model that this file does not describe.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        others = ("moe", "qk_norm", "attention_bias", "qkv_bias", "mlp_bias", "sliding_window")
        unsupported = [name for name in others if getattr(config, name)]
        if config.rope.rope_type != "default":
            unsupported.append("rope.rope_type")
        if unsupported:
            raise ValueError(f"there is no PyTorch model with {', '.join(unsupported)}")
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        head_dim = config.resolved_head_dim
        pairs = torch.arange(0, head_dim, 2, dtype=torch.float64)
        frequencies = config.rope.theta ** (-pairs / head_dim)
        self.register_buffer("inv_freq", frequencies.float(), persistent=False)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        positions, segments = batch["positions"], batch["segment_ids"]
        angles = positions[:, None, :, None] * self.inv_freq  # (B, 1, T, D/2)
        cos, sin = angles.cos(), angles.sin()
        earlier = positions[:, :, None] >= positions[:, None, :]
        mask = (earlier & (segments[:, :, None] == segments[:, None, :]))[:, None]
        x = self.embed(batch["tokens"])
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        logits = self.lm_head(self.final_norm(x))
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the two halves of every head, (B, heads, T, D)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def from_params(config: DecoderConfig, params: Mapping[str, Any], device: str) -> TorchDecoder:
    """Returns the PyTorch decoder with the weights of unstacked ``jaxeff`` parameters."""
    model = TorchDecoder(config)
    state = {
        "embed.weight": params["embed"]["embedding"],
        "final_norm.weight": params["final_norm"]["scale"],
    }
    if not config.tie_embeddings:
        state["lm_head.weight"] = np.asarray(params["lm_head"]["kernel"]).T
    for index in range(config.num_layers):
        for piece, group in params[f"layers_{index}"].items():
            prefix = f"layers.{index}.{piece}"
            if piece.endswith("norm"):
                state[f"{prefix}.weight"] = group["scale"]
                continue
            for name, leaf in group.items():
                state[f"{prefix}.{name}.weight"] = np.asarray(leaf["kernel"]).T
    tensors = {name: torch.tensor(np.array(value, np.float32)) for name, value in state.items()}
    model.load_state_dict(tensors, strict=not config.tie_embeddings)
    return model.to(device)


def to_tensors(batch: Mapping[str, np.ndarray], device: str) -> dict[str, torch.Tensor]:
    """Returns a host batch as tensors; targets that are masked out become label -100."""
    labels = np.where(np.asarray(batch["loss_mask"]) > 0, batch["targets"], -100)
    arrays = {name: np.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids")}
    arrays["labels"] = labels
    return {
        name: torch.tensor(array, dtype=torch.int64, device=device)
        for name, array in arrays.items()
    }
