"""Parity of bits by one ParaGRU layer trained through Newton's method (CPU, half a minute).

python -m jaxeff.train --config configs/pararnn_parity.py
python -m jaxeff.train --config configs/pararnn_parity.py --config.model.mixer=linear
Expected: from step 400 on every answer is right, also at 8 times the training length, and the same
weights run step by step answer alike; a linear recurrence guesses. Recurrent weights grow above 1,
for which 3 Newton iterations are not enough (7 or 8 are): --config.model.newton.num_iterations=3
--config.model.newton.tolerance=0.0 learns weights that are right step by step, and solves for
states that are wrong from 128 bits on, at some seeds from 32.
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
