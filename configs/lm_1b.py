"""Llama-3.2-1B shape, sequences of 4096, bfloat16: one GPU of 80 GB, or a v5e / v6e host.

python -m jaxeff.train --config configs/lm_1b.py --config.data.corpus=PATH \\
    --config.data.tokenizer=PATH/tokenizer.json
python -m jaxeff.aot --config configs/lm_1b.py --target h100
"""

import dataclasses

from ml_collections import ConfigDict

from jaxeff.language import preset


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.task = "language_model"
    config.seed = 0
    config.model = ConfigDict(dataclasses.asdict(preset("llama3.2-1b")))
    config.model.dtype = "bfloat16"
    config.model.remat = "names"
    config.data = ConfigDict(
        {"corpus": "stdlib", "seq_len": 4096, "batch_size": 8, "eval_batches": 8}
    )
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 4e-4,
            "schedule": "wsd",
            "warmup_steps": 500,
            "weight_decay": 0.1,
        }
    )
    config.training = ConfigDict({"num_steps": 20_000, "log_every": 10, "eval_every": 1000})
    config.checkpoint = ConfigDict({"every": 1000, "keep": 2})
    config.mesh = ConfigDict({"data": 1, "fsdp": -1})
    return config
