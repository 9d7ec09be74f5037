"""Text data: corpora, packing, and batches that depend on (seed, step) alone.

config = DataConfig(corpus="stdlib", seq_len=128, batch_size=32)
corpus = load_corpus(config)
train = tokenize(corpus.train, tokenizer, config.cache_dir)
heldout = tokenize(corpus.heldout, tokenizer, config.cache_dir)
batches = make_train_iterator(train, config, seed=0)
for batch in eval_batches(heldout, config): ...
"""

from jaxeff.data.config import DataConfig
from jaxeff.data.corpora import TEXT_SUFFIXES, Corpus, Document, load_corpus
from jaxeff.data.loader import (
    DataStateError,
    EvalBatches,
    TrainIterator,
    eval_batches,
    make_train_iterator,
)
from jaxeff.data.packing import TokenStream, Windows, tokenize

__all__ = [
    "TEXT_SUFFIXES",
    "Corpus",
    "DataConfig",
    "DataStateError",
    "Document",
    "EvalBatches",
    "TokenStream",
    "TrainIterator",
    "Windows",
    "eval_batches",
    "load_corpus",
    "make_train_iterator",
    "tokenize",
]
