"""Parity of bits by one ParaGRU layer trained through Newton's method (CPU, two minutes).

python -m jaxeff.train --config configs/pararnn_parity.py
python -m jaxeff.train --config configs/pararnn_parity.py --config.model.mixer=linear
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.task = "synthetic_sequences"
    config.seed = 0
    config.model = ConfigDict({"mixer": "gru", "width": 32, "num_heads": 1})
    config.model.newton = ConfigDict({"num_iterations": 31, "tolerance": 1e-4})
    config.data = ConfigDict({"task": "parity", "seq_len": 32, "batch_size": 32, "vocab_size": 2})
    config.optimizer = ConfigDict(
        {
            "name": "adam",
            "learning_rate": 3e-3,
            "schedule": "constant",
            "b2": 0.999,
            "max_grad_norm": None,
        }
    )
    config.options = ConfigDict({"eval_lengths": (64, 128, 256), "eval_sequences": 512})
    config.training = ConfigDict({"num_steps": 2000, "log_every": 100})
    return config
