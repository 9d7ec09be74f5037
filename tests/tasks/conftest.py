"""A corpus of generated text and a config small enough to train in seconds."""

import numpy as np
import pytest

CONFIG = """
def get_config():
    return {{
        "seed": 1,
        "model": dict(vocab_size=264, hidden_size=32, intermediate_size=64, num_layers=2,
                      num_heads=2, num_kv_heads=1, dtype="float32", max_position_embeddings=32),
        "data": dict(corpus={corpus!r}, seq_len=32, batch_size=8, eval_batches=3,
                     heldout_fraction=0.3),
        "optimizer": dict(learning_rate=1e-2, schedule="constant"),
        "training": dict(num_steps=20, log_every=5, eval_every=10),
        "checkpoint": dict(every=10),
        "options": dict(sample_tokens=8),
    }}
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Forty documents over a small alphabet, with a strong pattern."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["alpha ", "beta ", "gamma ", "delta\n"]
    for index in range(40):
        text = "".join(rng.choice(words) for _ in range(rng.integers(20, 80)))
        (folder / f"{index}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def config_file(corpus, tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "small.py"
    file.write_text(CONFIG.format(corpus=str(corpus)))
    return file
