"""ParaGRU language model of 6.8 B parameters, sequences of 2048, fsdp: for 64 TPU chips.

The paper's run (arXiv 2510.21450): 33,000 steps of 2048 sequences, 138 billion tokens.

Size it before renting the slice:
python -m jaxeff.aot --config configs/pararnn_7b.py --target v5p:4x4x4

Train it, on every host of the slice, on your own text:
python -m jaxeff.train --config configs/pararnn_7b.py --distributed --workdir SHARED/DIR \\
    --config.data.corpus=PATH --config.data.tokenizer=PATH/tokenizer.json
"""

import dataclasses

from ml_collections import ConfigDict

from jaxeff.recurrent import preset


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.task = "recurrent_language_model"
    config.seed = 0
    config.model = ConfigDict(
        dataclasses.asdict(preset("pararnn-7b", method="fused", reset_at_documents=False))
    )
    # 64 chips of 95 GB keep the states and the MLP's products of 16 rows each: 71 GiB in all.
    config.model.remat = "names"
    # The corpus is a stand-in that every machine has; the vocabulary is the model's, so a
    # tokenizer.json belongs to a real run.
    config.data = ConfigDict(
        {"corpus": "stdlib", "seq_len": 2048, "batch_size": 2048, "eval_batches": 4}
    )
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "warmup_steps": 3300,
            "final_learning_rate_ratio": 0.0,
            "weight_decay": 1e-4,
        }
    )
    config.options = ConfigDict({"z_loss": 5e-6})
    config.training = ConfigDict(
        {"num_steps": 33_000, "accumulation_steps": 2, "log_every": 10, "eval_every": 1000}
    )
    config.checkpoint = ConfigDict({"every": 1000, "keep": 2})
    config.mesh = ConfigDict({"data": 1, "fsdp": -1})
    return config
