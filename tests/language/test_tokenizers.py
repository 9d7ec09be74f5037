"""Tokenizers: bytes are lossless, files keep their special tokens, streams respect characters."""

import json
import sys

import numpy as np
import pytest

from jaxeff.language.tokenizers import (
    ByteTokenizer,
    FileTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
)

TEXT = "naïve café — 東京 🗼, ok\n"


def stream(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in ids]
    return pieces, decoder.finish()


class TestByteTokenizer:
    def test_ids_are_the_utf8_bytes(self):
        ids = ByteTokenizer().encode("aé")
        assert ids.dtype == np.int32
        assert ids.tolist() == [97, 0xC3, 0xA9]

    def test_every_byte_string_survives(self):
        raw = bytes(range(256)) + b"\xff\xfe\x00"
        tokenizer = ByteTokenizer()
        assert tokenizer.decode_bytes(tokenizer.encode(raw)) == raw

    def test_special_ids_surround_and_decode_to_nothing(self):
        tokenizer = ByteTokenizer()
        ids = tokenizer.encode("hi", add_bos=True, add_eos=True)
        assert ids.tolist() == [256, 104, 105, 257]
        assert tokenizer.decode([*ids, tokenizer.pad_id]) == "hi"

    @pytest.mark.parametrize(("multiple", "size"), [(1, 259), (64, 320), (128, 384), (259, 259)])
    def test_vocabulary_rounds_up_to_the_multiple(self, multiple, size):
        assert ByteTokenizer(pad_to_multiple=multiple).vocab_size == size

    def test_padded_ids_decode_to_nothing(self):
        assert ByteTokenizer(64).decode([104, 300, 105]) == "hi"

    def test_empty_text_gives_no_ids(self):
        assert ByteTokenizer().encode("").shape == (0,)
        assert ByteTokenizer().decode([]) == ""

    def test_bad_arguments_are_refused(self):
        with pytest.raises(ValueError, match="ids hold -1"):
            ByteTokenizer().decode([104, -1])
        with pytest.raises(ValueError, match="pad_to_multiple=0"):
            ByteTokenizer(0)

    def test_it_is_a_tokenizer(self):
        assert isinstance(ByteTokenizer(), Tokenizer)


class TestStreamDecoder:
    def test_pieces_make_up_the_text(self):
        pieces, rest = stream(ByteTokenizer(), TEXT.encode())
        assert "".join(pieces) + rest == TEXT

    def test_a_character_appears_with_its_last_byte(self):
        pieces, rest = stream(ByteTokenizer(), "é🗼".encode())
        assert pieces == ["", "é", "", "", "", "🗼"]
        assert rest == ""

    def test_bytes_that_never_become_a_character_do_not_block_the_stream(self):
        raw = b"ok\xff\xff\xff\xff\xff\xff!"
        pieces, rest = stream(ByteTokenizer(), raw)
        assert "".join(pieces[:-1]) == "ok" + "\ufffd" * 3  # at most three are held back
        assert "".join(pieces) + rest == raw.decode("utf-8", "replace")

    def test_finish_releases_what_was_held_and_begins_anew(self):
        decoder = StreamDecoder(ByteTokenizer())
        assert decoder.push(0xE2) == ""
        assert decoder.finish() == "\ufffd"
        assert decoder.push(ord("a")) == "a"

    def test_special_ids_give_no_text(self):
        pieces, rest = stream(ByteTokenizer(), [256, 104, 257])
        assert ("".join(pieces), rest) == ("h", "")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE trained on a sentence, so small that characters split into several ids."""
    package = pytest.importorskip("tokenizers")
    trained = package.Tokenizer(package.models.BPE())
    trained.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=265,
        special_tokens=["<s>", "</s>", "<mine>"],
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(["the cat and the hat and the bat"], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    trained.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.optional_dependency
class TestFileTokenizer:
    def test_text_survives(self, tokenizer_folder):
        tokenizer = FileTokenizer(tokenizer_folder)
        ids = tokenizer.encode(TEXT)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == TEXT
        assert tokenizer.decode_bytes(ids) == TEXT.encode()
        assert isinstance(tokenizer, Tokenizer)

    def test_bytes_are_read_as_utf8(self, tokenizer_folder):
        tokenizer = FileTokenizer(tokenizer_folder / "tokenizer.json")
        np.testing.assert_array_equal(tokenizer.encode("é".encode()), tokenizer.encode("é"))

    def test_merges_shorten_what_was_trained_on(self, tokenizer_folder):
        assert len(FileTokenizer(tokenizer_folder).encode("the cat")) < len("the cat")

    def test_vocabulary_covers_every_id(self, tokenizer_folder):
        assert FileTokenizer(tokenizer_folder).vocab_size == 265

    def test_streaming_respects_characters(self, tokenizer_folder):
        tokenizer = FileTokenizer(tokenizer_folder)
        ids = tokenizer.encode(TEXT)
        pieces, rest = stream(tokenizer, ids)
        assert "".join(pieces) + rest == TEXT
        assert not any("\ufffd" in piece for piece in pieces)
        assert "" in pieces  # the tower takes more than one id

    def test_usual_names_are_found_without_a_config(self, tokenizer_folder):
        tokenizer = FileTokenizer(tokenizer_folder)
        assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
        assert tokenizer.pad_id == tokenizer.eos_id  # there is no padding token

    def test_declared_special_tokens_win(self, tokenizer_folder, tmp_path):
        content = (tokenizer_folder / "tokenizer.json").read_text("utf-8")
        (tmp_path / "tokenizer.json").write_text(content, "utf-8")
        declared = {"eos_token": {"content": "<mine>", "lstrip": False}, "pad_token": "<s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
        tokenizer = FileTokenizer(tmp_path)
        assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)
        assert tokenizer.decode([2, *tokenizer.encode("hat"), 0]) == "hat"

    def test_special_tokens_surround_on_demand(self, tokenizer_folder):
        ids = FileTokenizer(tokenizer_folder).encode("hat", add_bos=True, add_eos=True)
        assert (ids[0], ids[-1]) == (0, 1)

    def test_a_special_token_it_lacks_is_left_out(self, tmp_path):
        package = pytest.importorskip("tokenizers")
        plain = package.Tokenizer(package.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
        plain.save(str(tmp_path / "tokenizer.json"))
        tokenizer = FileTokenizer(tmp_path)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, None, 0)
        assert tokenizer.encode("a", add_bos=True, add_eos=True).tolist() == [0]

    def test_it_knows_whether_its_template_begins_with_bos(self, tokenizer_folder, tmp_path):
        package = pytest.importorskip("tokenizers")
        assert not FileTokenizer(tokenizer_folder).adds_bos
        trained = package.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
        trained.post_processor = package.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
        trained.save(str(tmp_path / "tokenizer.json"))
        tokenizer = FileTokenizer(tmp_path)
        assert tokenizer.adds_bos
        assert 0 not in tokenizer.encode("hat")  # only on demand

    def test_a_file_of_something_else_is_refused(self, tmp_path):
        pytest.importorskip("tokenizers")
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match="is not a tokenizer file"):
            FileTokenizer(tmp_path)

    def test_without_the_package_the_install_line_is_given(self, tmp_path, monkeypatch):
        (tmp_path / "tokenizer.json").write_text("{}")
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(ImportError, match=r'pip install "jaxeff\[hub\]"'):
            FileTokenizer(tmp_path)


class TestLoadTokenizer:
    def test_names_and_objects(self):
        assert isinstance(load_tokenizer("bytes"), ByteTokenizer)
        own = ByteTokenizer(64)
        assert load_tokenizer(own) is own

    @pytest.mark.optional_dependency
    def test_a_path_is_a_file_tokenizer(self, tokenizer_folder):
        assert load_tokenizer(str(tokenizer_folder)).vocab_size == 265

    def test_a_path_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"neither 'bytes' nor the path"):
            load_tokenizer(tmp_path / "none.json")
        with pytest.raises(FileNotFoundError, match="no tokenizer file"):
            FileTokenizer(tmp_path)
