"""Recall tasks of the ParaRNN paper by one layer: keep_nth, mqar, k_hop or 2_hop (CPU).

python -m jaxeff.train --config configs/pararnn_synthetic.py:mqar
python -m jaxeff.train --config configs/pararnn_synthetic.py:k_hop --config.model.mixer=linear
"""

from ml_collections import ConfigDict

TASKS = {
    "keep_nth": {"task": "keep_nth", "vocab_size": 128, "n": 5},
    "mqar": {"task": "mqar", "vocab_size": 128, "num_pairs": 2},
    "k_hop": {"task": "k_hop", "vocab_size": 10, "num_hops": 1},
    "2_hop": {"task": "k_hop", "vocab_size": 5, "num_hops": 2},
}


def get_config(task: str = "mqar") -> ConfigDict:
    """Returns the config of a task."""
    if task not in TASKS:
        raise ValueError(f"no task {task!r}; there are {', '.join(TASKS)}")
    config = ConfigDict()
    config.task = "synthetic_sequences"
    config.seed = 0
    config.model = ConfigDict(
        {
            "mixer": "gru",
            "width": 64,
            "num_heads": 4,
            "block": "bare" if task == "keep_nth" else "gated",
            "positional": task == "keep_nth",
            "max_recurrent_weight": 0.9,
        }
    )
    config.data = ConfigDict({"seq_len": 64, "batch_size": 32, **TASKS[task]})
    config.optimizer = ConfigDict(
        {
            "name": "adam",
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "final_learning_rate_ratio": 0.0,
            "b2": 0.999,
            "max_grad_norm": 1.0,
        }
    )
    config.options = ConfigDict({"eval_lengths": (128,), "eval_sequences": 512})
    config.training = ConfigDict({"num_steps": 3000, "log_every": 100})
    return config
