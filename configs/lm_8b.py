"""Llama-3-8B shape, sequences of 8192, fsdp x tensor: for 64 to 256 TPU chips.

Size it before renting the slice:
python -m jaxeff.aot --config configs/lm_8b.py --target v5p:4x4x4
python -m jaxeff.aot --config configs/lm_8b.py --target v5e:16x16

Train it, on every host of the slice, on your own text:
python -m jaxeff.train --config configs/lm_8b.py --distributed --workdir SHARED/DIR \\
    --config.data.corpus=PATH --config.data.tokenizer=PATH/tokenizer.json
"""

import dataclasses

from ml_collections import ConfigDict

from jaxeff.language import preset


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.task = "language_model"
    config.seed = 0
    config.model = ConfigDict(dataclasses.asdict(preset("llama3-8b")))
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    # The corpus is a stand-in that every machine has; the vocabulary is the model's, so a
    # tokenizer.json belongs to a real run.
    config.data = ConfigDict(
        {"corpus": "stdlib", "seq_len": 8192, "batch_size": 64, "eval_batches": 4}
    )
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 3e-4,
            "schedule": "cosine",
            "warmup_steps": 2000,
            "weight_decay": 0.1,
        }
    )
    config.training = ConfigDict({"num_steps": 100_000, "log_every": 10, "eval_every": 1000})
    config.checkpoint = ConfigDict({"every": 1000, "keep": 2})
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 4})
    return config
