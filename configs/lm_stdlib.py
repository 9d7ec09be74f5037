"""Byte-level decoder (0.8 M parameters) on the Python standard library's sources; a CPU is enough.

python -m jaxeff.train --config configs/lm_stdlib.py
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
            "num_kv_heads": 4,
            "tie_embeddings": False,
            "max_position_embeddings": 128,
            "scale_residual_init": True,
            # The matrices are small and the default machine is a CPU, which has no fast bfloat16.
            "dtype": "float32",
        }
    )
    config.data = ConfigDict(
        {"corpus": "stdlib", "seq_len": 128, "batch_size": 32, "eval_batches": 40}
    )
    config.optimizer = ConfigDict(
        {
            "name": "muon",
            "learning_rate": 1e-2,
            # Does not depend on num_steps: a run that is prolonged equals a longer one.
            "schedule": "rsqrt",
            "warmup_steps": 40,
            "weight_decay": 0.01,
        }
    )
    config.training = ConfigDict({"num_steps": 600, "log_every": 20, "eval_every": 100})
    config.checkpoint = ConfigDict({"every": 100, "keep": 2})
    return config
