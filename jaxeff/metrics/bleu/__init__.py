"""BLEU on token ids, computed where the ids are.

Clipped n-gram matches, n-grams and lengths of every sentence are integers counted on the device
(`pallas_kernels.ngram_counts`); scores are functions of these, those of a corpus of their sums.
The scores are NLTK's or sacrebleu's on the same ids (not those of another tokenisation: what is
reported in the end still needs sacrebleu on text). After "TensorBLEU: Vectorized GPU-based BLEU
Score Implementation for Per-Sentence In-Training Evaluation" (arXiv 2510.05485), whose results
differ from NLTK's where an order has no match, a reference is missing, or two reference lengths are
as close as each other; these do not.

Sentences are padded on the right. Where one ends is said by `pad_id` or, better, by lengths: with
lengths every id may be a token. A negative entry is never a token. A reference without any token is
absent, not a reference of length 0. All functions run under `jit`, `vmap` and sharded over batch
axes, and their memory grows with batch times length, never with the vocabulary.
"""

from jaxeff.metrics.bleu.packing import PackedSentences, pack_sentences
from jaxeff.metrics.bleu.reward import bleu_reward
from jaxeff.metrics.bleu.scores import (
    BleuAccumulator,
    bleu_from_statistics,
    corpus_bleu,
    sentence_bleu,
)
from jaxeff.metrics.bleu.statistics import BleuStats, bleu_statistics

__all__ = [
    "BleuAccumulator",
    "BleuStats",
    "PackedSentences",
    "bleu_from_statistics",
    "bleu_reward",
    "bleu_statistics",
    "corpus_bleu",
    "pack_sentences",
    "sentence_bleu",
]
