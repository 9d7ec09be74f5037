"""How documents become one stream of tokens, and how the stream becomes rows."""

from collections import Counter

import numpy as np
import pytest

from jaxeff.data import DataConfig, Document, Windows, load_corpus, tokenize

BOS, EOS, PAD = 256, 257, 258


def all_rows(windows):
    return windows.rows(np.arange(len(windows)))


def slow_rows(documents, seq_len, packing):
    """The rows, written down one token at a time from the definition."""
    if packing:
        chains = [[(i, t) for i, d in enumerate(documents) for t in d]]
    else:
        chains = [[(i, t) for t in d] for i, d in enumerate(documents)]
    for chain in chains:
        for start in range(0, len(chain) - 1, seq_len):
            row = {k: [] for k in ("tokens", "targets", "positions", "segment_ids", "loss_mask")}
            segment, position, last = 0, 0, None
            for column in range(start, min(start + seq_len, len(chain) - 1)):
                (document, token), (next_document, target) = chain[column], chain[column + 1]
                if document != last:
                    segment, position, last = segment + 1, 0, document
                row["tokens"].append(token)
                row["targets"].append(target)
                row["positions"].append(position)
                row["segment_ids"].append(segment)
                row["loss_mask"].append(float(next_document == document))
                position += 1
            fill = {"tokens": PAD, "targets": PAD}
            for name, values in row.items():
                values += [fill.get(name, 0)] * (seq_len - len(values))
            yield row


class TestTokenize:
    def test_documents_are_framed_and_joined(self, make_stream):
        stream = make_stream(b"ab", b"c")
        assert stream.tokens.tolist() == [BOS, 97, 98, EOS, BOS, 99, EOS]
        assert stream.offsets.tolist() == [0, 4, 7]
        assert (stream.num_tokens, stream.num_documents, stream.num_bytes) == (7, 2, 3)

    def test_bytes_per_target_counts_the_end_of_each_document(self, make_stream):
        assert make_stream(b"ab", b"c").bytes_per_target == 3 / 5

    @pytest.mark.parametrize(
        ("vocab_size", "dtype"),
        [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)],
    )
    def test_the_smallest_dtype_is_used(self, tokenizer, vocab_size, dtype):
        tokenizer.vocab_size, tokenizer.pad_id = vocab_size, 0
        tokenizer.bos_id = tokenizer.eos_id = None
        assert tokenize([Document("d", b"abc")], tokenizer).tokens.dtype == dtype

    def test_a_tokenizer_without_bos_and_eos_adds_none(self, tokenizer):
        tokenizer.bos_id = tokenizer.eos_id = None
        stream = tokenize([Document("a", b"ab"), Document("b", b"c")], tokenizer)
        assert stream.tokens.tolist() == [97, 98, 99]
        assert stream.offsets.tolist() == [0, 2, 3]

    def test_no_documents_give_an_empty_stream(self, make_stream):
        assert (make_stream().num_tokens, make_stream().num_documents) == (0, 0)

    def test_any_bytes_can_be_tokenised_as_bytes(self, make_stream):
        raw = bytes(range(256))
        assert make_stream(raw).tokens[1:-1].tolist() == list(raw)

    def test_the_fingerprint_sees_tokens_boundaries_and_vocabulary(self, make_stream, tokenizer):
        prints = [make_stream(*t).fingerprint for t in ((b"ab", b"c"), (b"a", b"bc"), (b"abc",))]
        tokenizer.bos_id = tokenizer.eos_id = None
        for texts in ((b"ab", b"c"), (b"a", b"bc")):
            prints.append(tokenize([Document("d", t) for t in texts], tokenizer).fingerprint)
        assert len(set(prints)) == len(prints)
        assert make_stream(b"ab", b"c").fingerprint == make_stream(b"ab", b"c").fingerprint

    def test_an_id_outside_the_vocabulary_is_reported_with_its_document(self, tokenizer):
        tokenizer.encode = lambda text: np.array([5, 400])
        with pytest.raises(ValueError, match=r"book.txt gave id 400, .* \[0, 259\)"):
            tokenize([Document("book.txt", b"x")], tokenizer)

    def test_a_failing_tokenizer_is_reported_with_its_document(self, tokenizer):
        def fail(text):
            raise RuntimeError("no such merge")

        tokenizer.encode = fail
        with pytest.raises(ValueError, match=r"tokenising book.txt failed: no such merge"):
            tokenize([Document("book.txt", b"x")], tokenizer)

    @pytest.mark.parametrize("name", ["bos_id", "eos_id", "pad_id"])
    def test_a_special_id_outside_the_vocabulary_is_refused(self, tokenizer, name):
        setattr(tokenizer, name, 259)
        with pytest.raises(ValueError, match=f"{name} is 259"):
            tokenize([Document("d", b"x")], tokenizer)

    @pytest.mark.optional_dependency
    def test_bytes_that_are_not_utf8_pass_a_tokenizer_file_as_replacement_characters(
        self, tmp_path
    ):
        tokenizers = pytest.importorskip("tokenizers")
        from jaxeff.language.tokenizers import FileTokenizer

        words = {"<unk>": 0, "a": 1, "\ufffd": 2}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        model.save(str(tmp_path / "tokenizer.json"))
        stream = tokenize([Document("d", b"a\xffa")], FileTokenizer(tmp_path / "tokenizer.json"))
        assert stream.tokens.tolist() == [1, 2, 1]


class TestCache:
    documents = (Document("a", b"some text"), Document("b", b"more"))

    def cached(self, folder, tokenizer, documents=documents):
        stream = tokenize(documents, tokenizer, folder)
        fresh = tokenize(documents, tokenizer)
        assert stream.fingerprint == fresh.fingerprint
        np.testing.assert_array_equal(stream.tokens, fresh.tokens)
        np.testing.assert_array_equal(stream.offsets, fresh.offsets)
        assert (stream.num_bytes, stream.pad_id) == (fresh.num_bytes, fresh.pad_id)
        return stream

    def count_encodings(self, tokenizer, monkeypatch):
        calls, encode = [], tokenizer.encode
        monkeypatch.setattr(tokenizer, "encode", lambda t: calls.append(t) or encode(t))
        return calls

    def test_the_second_run_reads_what_the_first_one_wrote(self, tmp_path, tokenizer, monkeypatch):
        self.cached(tmp_path, tokenizer)
        calls = self.count_encodings(tokenizer, monkeypatch)
        stream = tokenize(self.documents, tokenizer, tmp_path)
        assert calls == [b"some textmore"]  # the probe of the key, and no document
        assert stream.tokens.tolist()[:5] == [BOS, *b"some"]

    def test_cached_tokens_are_mapped_and_batches_are_plain_arrays(self, tmp_path, tokenizer):
        stream = self.cached(tmp_path, tokenizer)
        assert isinstance(stream.tokens.base, np.memmap)
        assert {type(a) for a in Windows(stream, 4).rows([0]).values()} == {np.ndarray}

    def test_nothing_but_the_entry_is_left_in_the_folder(self, tmp_path, tokenizer):
        self.cached(tmp_path / "new" / "folder", tokenizer)
        names = sorted(p.name.split(".", 1)[1] for p in (tmp_path / "new" / "folder").iterdir())
        assert names == ["json", "offsets.npy", "tokens.npy"]

    def test_other_text_or_another_tokenizer_is_another_entry(self, tmp_path, tokenizer):
        self.cached(tmp_path, tokenizer)
        self.cached(tmp_path, tokenizer, self.documents[::-1])
        tokenizer.eos_id = None
        self.cached(tmp_path, tokenizer)
        tokenizer.encode = lambda text: np.frombuffer(text, np.uint8)[::-1].astype(np.int32)
        self.cached(tmp_path, tokenizer)
        assert len(list(tmp_path.glob("*.json"))) == 4

    @pytest.mark.parametrize("suffix", ["json", "tokens.npy", "offsets.npy"])
    @pytest.mark.parametrize("damage", ["truncated", "missing", "changed"])
    def test_a_damaged_entry_is_built_anew(self, tmp_path, tokenizer, suffix, damage):
        self.cached(tmp_path, tokenizer)
        (file,) = tmp_path.glob(f"*.{suffix}")
        content = file.read_bytes()
        if damage == "missing":
            file.unlink()
        elif damage == "truncated":
            file.write_bytes(content[: len(content) // 2])
        else:
            file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        self.cached(tmp_path, tokenizer)

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path, tokenizer):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(OSError, match="file"):
            tokenize(self.documents, tokenizer, tmp_path / "file")


class TestRows:
    def test_an_example_packed(self, make_stream):
        rows = all_rows(Windows(make_stream(b"ab", b"c"), 4))
        a, b, c = b"abc"
        assert rows["tokens"].tolist() == [[BOS, a, b, EOS], [BOS, c, PAD, PAD]]
        assert rows["targets"].tolist() == [[a, b, EOS, BOS], [c, EOS, PAD, PAD]]
        assert rows["loss_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
        assert rows["segment_ids"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
        assert rows["positions"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]

    def test_an_example_with_a_document_that_begins_inside_a_row(self, make_stream):
        rows = all_rows(Windows(make_stream(b"ab", b"c"), 6))
        assert rows["tokens"].tolist() == [[BOS, 97, 98, EOS, BOS, 99]]
        assert rows["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2]]
        assert rows["positions"].tolist() == [[0, 1, 2, 3, 0, 1]]
        assert rows["loss_mask"].tolist() == [[1, 1, 1, 0, 1, 1]]

    def test_an_example_not_packed(self, make_stream):
        rows = all_rows(Windows(make_stream(b"abcd", b"e"), 3, packing=False))
        assert rows["tokens"].tolist() == [[BOS, 97, 98], [99, 100, PAD], [BOS, 101, PAD]]
        assert rows["targets"].tolist() == [[97, 98, 99], [100, EOS, PAD], [101, EOS, PAD]]
        assert rows["positions"].tolist() == [[0, 1, 2], [0, 1, 0], [0, 1, 0]]
        assert rows["segment_ids"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]
        assert rows["loss_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]

    @pytest.mark.parametrize("packing", [True, False])
    @pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 64, 5000])
    def test_rows_are_those_written_down_one_token_at_a_time(self, random_stream, seq_len, packing):
        documents = np.split(random_stream.tokens.tolist(), random_stream.offsets[1:-1])
        expected = list(slow_rows([d.tolist() for d in documents], seq_len, packing))
        rows = all_rows(Windows(random_stream, seq_len, packing=packing))
        assert len(expected) == len(rows["tokens"])
        for name, values in rows.items():
            assert values.dtype == (np.float32 if name == "loss_mask" else np.int32)
            np.testing.assert_array_equal(values, [row[name] for row in expected], err_msg=name)

    @pytest.mark.parametrize("packing", [True, False])
    @pytest.mark.parametrize("seq_len", [1, 5, 64, 5000])
    def test_every_token_but_the_first_of_a_document_is_predicted_once(
        self, random_stream, seq_len, packing
    ):
        rows = all_rows(Windows(random_stream, seq_len, packing=packing))
        predicted = Counter(rows["targets"][rows["loss_mask"] > 0].tolist())
        not_first = np.delete(random_stream.tokens, random_stream.offsets[:-1])
        assert predicted == Counter(not_first.tolist())

    def test_packed_rows_are_full_but_for_the_last(self, random_stream):
        segments = all_rows(Windows(random_stream, 16))["segment_ids"]
        assert np.all(segments[:-1] > 0)
        assert np.count_nonzero(segments) == random_stream.num_tokens - 1

    def test_any_rows_in_any_order_and_padding_can_be_asked_for(self, random_stream):
        windows = Windows(random_stream, 16)
        everything, some = all_rows(windows), windows.rows(np.array([5, -1, 0, 5]))
        for name in everything:
            np.testing.assert_array_equal(some[name][[0, 2, 3]], everything[name][[5, 0, 5]])
        assert np.all(some["tokens"][1] == PAD) and np.all(some["targets"][1] == PAD)
        for name in ("loss_mask", "segment_ids", "positions"):
            assert not some[name][1].any()

    def test_a_batch_is_the_consumers_own(self, random_stream):
        windows = Windows(random_stream, 16)
        windows.rows([3])["tokens"][:] = 0
        assert windows.rows([3])["tokens"].any()

    def test_documents_of_one_token_do_no_harm(self, tokenizer):
        tokenizer.bos_id = tokenizer.eos_id = None
        texts = (b"a", b"bc", b"d", b"e")
        stream = tokenize([Document("d", t) for t in texts], tokenizer)
        packed = all_rows(Windows(stream, 4))
        assert packed["segment_ids"].tolist() == [[1, 2, 2, 3]]
        assert packed["loss_mask"].tolist() == [[0, 1, 0, 0]]
        single = all_rows(Windows(stream, 4, packing=False))
        assert single["tokens"].tolist() == [[98, PAD, PAD, PAD]]

    def test_a_stream_with_nothing_to_predict_is_refused(self, tokenizer):
        tokenizer.bos_id = tokenizer.eos_id = None
        stream = tokenize([Document("d", b"a"), Document("d", b"b")], tokenizer)
        with pytest.raises(ValueError, match="nothing to predict: 2 documents hold 2 tokens"):
            Windows(stream, 4)

    def test_the_standard_library_survives_the_round_trip(self, tokenizer):
        corpus = load_corpus(DataConfig())
        rows = all_rows(Windows(tokenize(corpus.heldout, tokenizer), 128))
        real = rows["segment_ids"] > 0
        text = tokenizer.decode_bytes(rows["tokens"][real].tolist())
        assert text == b"".join(d.data for d in corpus.heldout)
