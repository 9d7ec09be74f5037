"""BLEU of a batch of sentences on the device, against packages on the host and a dictionary."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import numpy as np

from jaxeff.bench.measure import BenchError, Case, Figure, Round, Sample, Variant
from jaxeff.bench.rows import bleu_baselines as baselines
from jaxeff.bench.rows import bleu_schedules as schedules
from jaxeff.bench.rows import static_schedules
from jaxeff.metrics.bleu import sentence_bleu

VOCABULARY = 151_936
SMALL_VOCABULARY = 100
REPLACED = 0.2  # share of a reference's tokens that are not the candidate's
TOLERANCE = 1e-5
# Candidates x tokens to what the paper's table says against NLTK. Its references are not stated.
PAPER = {
    (128, 256): "10.2x (T4)",
    (128, 1024): "29.2x (A100), 13.4x (T4)",
    (256, 1024): "40.2x (A100)",
    (512, 1024): "37.2x (A100)",
}
MEMORY_BATCHES, MEMORY_LENGTH = (64, 512), 128

HOST_NOTE = (
    "no limit: NLTK and sacrebleu start from lists and strings that are ready on the host, in one "
    "process. Their time is linear in sentences: a name with (from S) is measured on the first S "
    "sentences and scaled to the batch. The dictionary's sizes are the batch's own counts of "
    "distinct n-grams, known beforehand."
)
MEMORY_NOTE = (
    "no limit: temporary memory by the compiler's analysis. Eight times as many sentences should "
    "take eight times as much."
)
SCHEDULE_NOTE = (
    "not measured: static schedules of whole programs, nothing overlapping, all sentences full. "
    f"The limit is the sorting program's cycles over those in which {schedules.VECTOR_SLOTS} "
    "vector instructions issue at a time and comparing 1024 pairs of positions takes "
    f"{schedules.INSTRUCTIONS_PER_REGISTER}."
)

_log = logging.getLogger(__name__)
_score = functools.partial(sentence_bleu, smoothing="floor", pad_id=None)


@dataclasses.dataclass(frozen=True)
class Bleu:
    """Seconds of `sentence_bleu` on a batch that is on the device; see arXiv 2510.05485, table 1.

    Sentences are half full to full, ids about as often as 1 / id below a vocabulary of 151,936,
    references are the candidates with a fifth of the tokens replaced. Scores are checked against
    the packages' before anything is timed.

    Attributes:
      batch_sizes: candidates scored at once.
      lengths: positions of candidates and references.
      num_references: for each candidate. Every combination of these three is a case.
      most_tokens: combinations with more positions than this, references included, are left out.
      host_sentences: the most sentences that the packages on the host score.
      host_tokens: the most candidate positions in them, so that long sentences are fewer.
      dictionary_bytes: the dictionary is left out where its count tensors are larger.
      memory: whether to compare the memory of 64 and 512 sentences.
      schedule_chips: TPUs to compile for; () leaves the static schedules out.
      schedule_lengths: of their cases, 256 sentences each, and 32 where the length is 512.
    """

    batch_sizes: tuple[int, ...] = (32, 256, 1024, 4096)
    lengths: tuple[int, ...] = (32, 128, 512, 1024)
    num_references: tuple[int, ...] = (1, 4)
    most_tokens: int = 2**25
    host_sentences: int = 64
    host_tokens: int = 2**12
    dictionary_bytes: int = 2**30
    memory: bool = True
    schedule_chips: tuple[str, ...] = ("v5e", "v6e")
    schedule_lengths: tuple[int, ...] = (32, 128, 512, 1024)

    ROUNDS: ClassVar[int] = 3

    def cases(self, device: jax.Device) -> Iterator[Case]:
        """Yields the static schedules, the memory and one case for each combination of sizes."""
        yield from self._schedule_cases()
        with jax.default_device(device):
            if self.memory:
                yield _memory_case(device)
            for num_references in self.num_references:
                for length in self.lengths:
                    for batch in self.batch_sizes:
                        yield from self._cell(device, batch, length, num_references)

    def _cell(self, device, batch, length, num_references):
        name = _name(batch, length, num_references)
        tokens = batch * length * (1 + num_references)
        if tokens > self.most_tokens:
            _log.warning(
                "%s is left out: %d positions are more than most_tokens=%d",
                name, tokens, self.most_tokens,
            )  # fmt: skip
            return
        candidates, references = make_batch(batch, length, num_references)
        sentences = max(1, min(batch, self.host_sentences, self.host_tokens // length))
        on_host = [
            baseline(candidates[:sentences], references[:sentences])
            for baseline in (baselines.nltk_baseline, baselines.sacrebleu_baseline)
        ]
        arrays = jax.device_put((candidates, references), device)
        ours = jax.jit(_score)
        _check("nltk", ours(*arrays)[:sentences], on_host[0].scores())
        in_sacrebleu = jax.jit(functools.partial(_score, convention="sacrebleu"))
        _check("sacrebleu", in_sacrebleu(*arrays)[:sentences], on_host[1].scores())

        compared = [
            Variant(host.variant_name(batch), functools.partial(_host_run, host, batch))
            for host in on_host
        ]
        figures = [
            Figure("sentences per second", "1/s", lambda r: batch / r.seconds["sentence_bleu"]),
            _speed_up("sacrebleu", on_host[1].variant_name(batch)),
        ]
        sizes = baselines.distinct_ngrams(candidates, references)
        needed = baselines.dictionary_bytes(batch, num_references, sizes)
        if needed <= self.dictionary_bytes:
            dictionary = jax.jit(functools.partial(baselines.dictionary_bleu, sizes=sizes))
            _check("the dictionary", ours(*arrays), dictionary(*arrays))
            compared.append(Variant("dictionary", lambda: lambda: dictionary(*arrays)))
            figures.append(_speed_up("dictionary", "dictionary"))
        else:
            figures.append(Figure("dictionary, left out, needs", "GB", lambda r: needed / 1e9))
        yield Case(
            name=name,
            technique=Variant("sentence_bleu", lambda: lambda: ours(*arrays)),
            baselines=compared,
            limit_note=HOST_NOTE,
            paper=PAPER.get((batch, length), "") if num_references == 1 else "",
            figures=figures,
        )

    def _schedule_cases(self):
        if not static_schedules.can_compile(self.schedule_chips):
            return
        cells = [
            schedules.Cell(batch, length, num_references)
            for num_references in self.num_references
            for length in self.schedule_lengths
            for batch in ((32, 256) if length == 512 else (256,))
        ]
        for cell, found in schedules.measure_schedules(self.schedule_chips, cells):
            yield _schedule_case(cell, found)


def make_batch(
    batch: int, length: int, num_references: int, vocabulary: int = VOCABULARY, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns candidates (B, L) and references (B, R, L) that share n-grams; int32, -1 behind ends.

    Lengths are uniform in [L / 2, L]; ids are from 1 up, each about as often as 1 / id.
    """
    random = np.random.default_rng(seed)

    def draw(*shape):
        ids = np.floor(vocabulary ** random.random(shape)).astype(np.int32)
        return np.minimum(ids, vocabulary - 1)

    def cut(tokens):
        lengths = random.integers(max(length // 2, 1), length + 1, tokens.shape[:-1])
        return np.where(np.arange(length) < lengths[..., None], tokens, -1).astype(np.int32)

    whole = draw(batch, length)
    shape = (batch, num_references, length)
    references = np.where(random.random(shape) < REPLACED, draw(*shape), whole[:, None])
    return cut(whole), cut(references)


def _name(batch, length, num_references):
    return f"{batch} x {length}, R={num_references}"


def _host_run(host, batch):
    return lambda: host.timed(batch)


def _speed_up(name, variant):
    return Figure(
        f"{name} / sentence_bleu", "", lambda r: r.seconds[variant] / r.seconds["sentence_bleu"]
    )


def _check(name: str, scores: Any, expected: Any) -> None:
    """Raises `BenchError` if scores differ: then times are not of the same thing."""
    difference = np.abs(np.asarray(scores) - np.asarray(expected)).max()
    if not difference <= TOLERANCE:
        raise BenchError(
            f"scores differ from those of {name} by up to {difference:.2g}, "
            f"expected at most {TOLERANCE:.0e}"
        )


def _memory_case(device):
    """Temporary bytes of one call, ours and the dictionary's, at two batch sizes."""
    small, large = MEMORY_BATCHES
    keys = ((small, VOCABULARY), (large, VOCABULARY), (large, SMALL_VOCABULARY))
    data = {key: make_batch(key[0], MEMORY_LENGTH, 1, key[1]) for key in keys}

    def ours():
        programs = {key: jax.jit(_score).lower(*arrays).compile() for key, arrays in data.items()}
        return with_bytes(programs)

    def dictionary():
        programs = {}
        for key, arrays in data.items():
            sizes = baselines.distinct_ngrams(*arrays)
            score = functools.partial(baselines.dictionary_bleu, sizes=sizes)
            programs[key] = jax.jit(score).lower(*arrays).compile()
        return with_bytes(programs)

    def with_bytes(programs):
        found = {
            f"{size} {vocabulary}": float(program.memory_analysis().temp_size_in_bytes)
            for (size, vocabulary), program in programs.items()
        }
        arrays = jax.device_put(data[large, VOCABULARY], device)

        def run():
            jax.block_until_ready(programs[large, VOCABULARY](*arrays))
            return Sample(values=found)

        return run

    def temporaries(r: Round, variant, size=large, vocabulary=VOCABULARY):
        return r.values[variant][f"{size} {vocabulary}"]

    def growth(variant):
        return lambda r: temporaries(r, variant) / temporaries(r, variant, size=small)

    def megabytes(variant, vocabulary):
        return lambda r: temporaries(r, variant, vocabulary=vocabulary) / 1e6

    figures = [Figure(f"growth from {small} to {large}: {v}", "x", growth(v))
               for v in ("sentence_bleu", "dictionary")]  # fmt: skip
    figures += [
        Figure(f"{v}, vocabulary {vocabulary:,}", "MB", megabytes(v, vocabulary))
        for v in ("sentence_bleu", "dictionary")
        for vocabulary in (VOCABULARY, SMALL_VOCABULARY)
    ]
    return Case(
        name=f"memory, {_name(large, MEMORY_LENGTH, 1)}",
        technique=Variant("sentence_bleu", ours),
        baselines=(Variant("dictionary", dictionary),),
        ratio=lambda r: temporaries(r, "dictionary") / temporaries(r, "sentence_bleu"),
        ratio_name="temporary bytes: dictionary / sentence_bleu",
        limit_note=MEMORY_NOTE,
        paper="-",
        figures=figures,
    )


def _schedule_case(cell: schedules.Cell, found: schedules.Schedule) -> Case:
    """Times by static schedules: the same in every round."""

    def variant(name, cycles):
        return Variant(name, lambda: lambda: Sample(cycles / found.clock))

    def constant(name, unit, value):
        return Figure(name, unit, lambda r: value)

    return Case(
        name=f"{found.chip} static, {_name(cell.batch, cell.length, cell.num_references)}",
        technique=variant("kernel", found.kernel),
        baselines=(variant("sort", found.sort),),
        limit=found.sort / cell.bound,
        limit_note=SCHEDULE_NOTE,
        paper="-",
        figures=(
            constant("kernel, cycles per sentence", "", found.kernel / cell.batch),
            constant("sort, cycles per sentence", "", found.sort / cell.batch),
            constant("bound / kernel alone", "%", 100 * cell.bound / found.kernel_alone),
            constant("bound / program with kernel", "%", 100 * cell.bound / found.kernel),
        ),
    )
