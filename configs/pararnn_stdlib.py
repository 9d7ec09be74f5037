"""ParaGRU language model (0.5 M parameters) on the Python standard library's sources; CPU will do.

Trained through Newton's method, three iterations, and, for comparison, step by step:
python -m jaxeff.train --config configs/pararnn_stdlib.py
python -m jaxeff.train --config configs/pararnn_stdlib.py --config.model.method=sequential
The two learning curves lie on one another.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.task = "recurrent_language_model"
    config.seed = 0
    config.model = ConfigDict(
        {
            "vocab_size": 259,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_layers": 2,
            "num_heads": 4,
            "cell": "gru",
            "dtype": "float32",
        }
    )
    config.data = ConfigDict(
        {"corpus": "stdlib", "seq_len": 128, "batch_size": 32, "eval_batches": 40}
    )
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 5e-3,
            "schedule": "cosine",
            "warmup_steps": 60,
            "final_learning_rate_ratio": 0.0,
            "weight_decay": 1e-3,
        }
    )
    config.options = ConfigDict({"z_loss": 1e-4})
    config.training = ConfigDict({"num_steps": 600, "log_every": 20, "eval_every": 100})
    config.checkpoint = ConfigDict({"every": 100, "keep": 2})
    return config
