"""Byte-level mixture of experts (8 experts, 2 per token) on the standard library's sources.

python -m jaxeff.train --config configs/lm_moe.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.task = "language_model"
    config.seed = 0
    config.model = ConfigDict(
        {
            "vocab_size": 259,
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": 2,
            "qk_norm": True,
            "max_position_embeddings": 128,
            "scale_residual_init": True,
            "dtype": "float32",
            "moe": {
                "num_experts": 8,
                "num_experts_per_token": 2,
                "intermediate_size": 176,
                "router_aux_loss_coef": 0.01,
                "router_z_loss_coef": 0.001,
            },
        }
    )
    config.data = ConfigDict(
        {"corpus": "stdlib", "seq_len": 128, "batch_size": 32, "eval_batches": 40}
    )
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 3e-3,
            "schedule": "linear",
            "warmup_steps": 20,
            "final_learning_rate_ratio": 0.02,
            "weight_decay": 0.01,
        }
    )
    config.training = ConfigDict({"num_steps": 600, "log_every": 20, "eval_every": 100})
    config.checkpoint = ConfigDict({"every": 100, "keep": 2})
    return config
