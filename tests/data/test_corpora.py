"""Which documents a corpus holds, in which order, and on which side of the split."""

import json
import os
import sys
import sysconfig

import pytest

from jaxeff.data import DataConfig, Document, load_corpus
from jaxeff.data.corpora import hash_place, split


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(corpus, **settings):
    """The contents of all documents in order, without a split."""
    settings = {"heldout_fraction": 0.0, **settings}
    return [d.data for d in load_corpus(DataConfig(corpus=corpus, **settings)).train]


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus(DataConfig())


class TestStandardLibrary:
    def test_it_holds_the_sources_of_this_interpreter(self, stdlib):
        names = {d.name for d in (*stdlib.train, *stdlib.heldout)}
        assert {"stdlib/json/decoder.py", "stdlib/os.py", "stdlib/asyncio/events.py"} <= names
        assert all(name.endswith(".py") for name in names)
        assert not any("-packages/" in name or "__pycache__" in name for name in names)
        assert stdlib.train_bytes > 5_000_000

    def test_about_five_percent_of_the_documents_are_held_out(self, stdlib):
        share = len(stdlib.heldout) / (len(stdlib.train) + len(stdlib.heldout))
        assert 0.03 < share < 0.07

    def test_reading_it_twice_gives_the_same_documents_in_the_same_order(self, stdlib):
        assert load_corpus(DataConfig()) == stdlib

    def test_names_are_sorted_within_each_split(self, stdlib):
        for documents in (stdlib.train, stdlib.heldout):
            names = [d.name for d in documents]
            assert names == sorted(names)

    def test_no_document_is_on_both_sides(self, stdlib):
        assert not {d.data for d in stdlib.train} & {d.data for d in stdlib.heldout}

    def test_installed_packages_and_caches_are_left_out(self, tmp_path, monkeypatch):
        """The layouts of Debian, conda and pyenv: packages live below the library."""
        for name in ("b.py", "a/c.py", "a.py"):
            write(tmp_path / name, name)
        for name in (
            "site-packages/jax/x.py",
            "dist-packages/numpy/x.py",
            "a/__pycache__/c.py",
            ".hidden/x.py",
            "EXTERNALLY-MANAGED",
            "lib-dynload/x.so",
        ):
            write(tmp_path / name, "no")
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        assert read("stdlib") == [b"a.py", b"a/c.py", b"b.py"]

    def test_a_file_called_stdlib_is_reached_by_its_path(self, tmp_path, monkeypatch):
        write(tmp_path / "stdlib", "mine")
        monkeypatch.chdir(tmp_path)
        assert read("./stdlib") == [b"mine"]


class TestSources:
    def test_a_directory_gives_its_text_files_sorted_by_path(self, tmp_path):
        for name in ("z.txt", "b/a.md", "b.py", "B.TXT"):
            write(tmp_path / name, name)
        for name in ("image.png", "weights.bin", ".git/config.txt", ".secret.txt", "no_suffix"):
            write(tmp_path / name, "no")
        assert read(str(tmp_path)) == [b"B.TXT", b"b.py", b"b/a.md", b"z.txt"]

    def test_a_named_file_is_taken_whatever_its_suffix(self, tmp_path):
        assert read(str(write(tmp_path / "book.dat", "text"))) == [b"text"]

    def test_a_glob_takes_what_it_matches_sorted(self, tmp_path):
        for name in ("x/2.dat", "x/1.dat", "y/0.dat", "y/0.txt"):
            write(tmp_path / name, name)
        assert read(str(tmp_path / "**" / "*.dat")) == [b"x/1.dat", b"x/2.dat", b"y/0.dat"]

    def test_a_file_with_glob_characters_in_its_name_is_a_file(self, tmp_path):
        assert read(str(write(tmp_path / "a[1].txt", "text"))) == [b"text"]

    def test_a_tuple_keeps_the_order_of_its_sources(self, tmp_path):
        first, second = write(tmp_path / "b.txt", "b"), write(tmp_path / "a.txt", "a")
        assert read((str(first), str(second))) == [b"b", b"a"]

    def test_a_file_reached_twice_counts_once(self, tmp_path):
        path = write(tmp_path / "a.txt", "a")
        os.symlink(path, tmp_path / "link.txt")
        assert read((str(tmp_path), str(path), str(tmp_path / "*.txt"))) == [b"a"]

    def test_the_home_directory_is_expanded(self, tmp_path, monkeypatch):
        write(tmp_path / "a.txt", "home")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert read("~/a.txt") == [b"home"]

    def test_links_that_lead_nowhere_or_in_circles_are_passed_over(self, tmp_path):
        write(tmp_path / "a.txt", "a")
        os.symlink(tmp_path / "gone.txt", tmp_path / "broken.txt")
        os.symlink(tmp_path, tmp_path / "circle")
        assert read(str(tmp_path)) == [b"a"]

    def test_bytes_that_are_no_text_are_kept_as_they_are(self, tmp_path):
        raw = bytes(range(256)) + b"\xff\xfe\r\n\x00"
        assert read(str(write(tmp_path / "a.txt", raw))) == [raw]

    def test_empty_files_are_dropped(self, tmp_path):
        write(tmp_path / "a.txt", "")
        write(tmp_path / "b.txt", "b")
        assert read(str(tmp_path)) == [b"b"]


class TestJsonLines:
    def test_each_line_is_a_document(self, tmp_path):
        lines = [json.dumps({"text": t, "id": 1}) for t in ("one", "zwei\nZeilen", "três")]
        path = write(tmp_path / "a.jsonl", "\n".join(lines) + "\n\n")
        assert read(str(path)) == [b"one", b"zwei\nZeilen", "três".encode()]

    def test_the_field_can_be_chosen(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"content": "x", "text": "y"}')
        assert read(str(path), text_field="content") == [b"x"]

    def test_it_is_understood_inside_a_directory_too(self, tmp_path):
        write(tmp_path / "a.jsonl", '{"text": "x"}\n{"text": "y"}')
        write(tmp_path / "b.txt", "z")
        assert read(str(tmp_path)) == [b"x", b"y", b"z"]

    def test_a_lone_surrogate_is_no_error(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"text": "a\\ud800b"}')
        assert read(str(path)) == [b"a\xed\xa0\x80b"]

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ('{"text": "x"', "not valid JSON"),
            (b'{"text": "\xff\xff"}', "not valid JSON"),
            ('["text"]', "expected a JSON object, found list"),
            ('{"body": "x"}', r"no field 'text' \(text_field\); the line has \['body'\]"),
            ('{"text": 3}', "field 'text' holds int, expected a string"),
        ],
    )
    def test_a_bad_line_is_reported_with_file_and_line(self, tmp_path, line, complaint):
        line = line if isinstance(line, bytes) else line.encode()
        path = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n\n' + line)
        with pytest.raises(ValueError, match=complaint) as error:
            read(str(path))
        assert f"{path}:3: " in str(error.value)


class TestBadInput:
    @pytest.mark.parametrize("name", ["nowhere", "no/*.txt"])
    def test_a_missing_path_is_named(self, tmp_path, name):
        with pytest.raises(FileNotFoundError, match=r"nowhere|no/\*\.txt"):
            read(str(tmp_path / name))

    def test_an_empty_corpus_is_refused(self, tmp_path):
        write(tmp_path / "a.txt", "")
        with pytest.raises(ValueError, match="is empty: no document has any text"):
            read(str(tmp_path))

    @pytest.mark.skipif(sys.platform == "win32", reason="named pipes are POSIX")
    def test_a_pipe_is_refused_instead_of_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="neither a file nor a directory"):
            read(str(tmp_path / "pipe"))


class TestSplit:
    def test_it_depends_on_content_alone(self, tmp_path):
        texts = [f"document {i}" for i in range(60)]
        for i, text in enumerate(texts):
            write(tmp_path / "one" / f"{i:02}.txt", text)
            write(tmp_path / "two" / f"{59 - i:02}.md", text)
        one, two = (
            load_corpus(DataConfig(corpus=str(tmp_path / d), heldout_fraction=0.3))
            for d in ("one", "two")
        )
        assert {d.data for d in one.heldout} == {d.data for d in two.heldout}
        assert 5 < len(one.heldout) < 30

    def test_equal_files_are_on_the_same_side(self, tmp_path):
        for i in range(60):
            write(tmp_path / f"{i}.txt", f"document {i % 20}")
        corpus = load_corpus(DataConfig(corpus=str(tmp_path), heldout_fraction=0.3))
        assert len(corpus.train) + len(corpus.heldout) == 60
        assert not {d.data for d in corpus.train} & {d.data for d in corpus.heldout}

    def test_a_larger_fraction_holds_out_more_and_keeps_what_was_held_out(self):
        documents = tuple(Document(str(i), b"%d" % i) for i in range(200))
        small, large = split(documents, 0.1), split(documents, 0.2)
        assert set(small.heldout) < set(large.heldout)

    def test_nothing_is_held_out_at_fraction_zero(self, tmp_path):
        write(tmp_path / "a.txt", "a")
        corpus = load_corpus(DataConfig(corpus=str(tmp_path), heldout_fraction=0.0))
        assert corpus.heldout == () and len(corpus.train) == 1

    def test_places_are_in_the_unit_interval_and_fixed_for_ever(self):
        assert hash_place(b"") == (0xE4A6A0577479B2B4 >> 11) / 2**53
        assert all(0 <= hash_place(b"%d" % i) < 1 for i in range(100))

    def test_the_end_of_a_single_document_is_held_out(self, tmp_path):
        path = write(tmp_path / "book.txt", bytes(range(100)))
        corpus = load_corpus(DataConfig(corpus=str(path), heldout_fraction=0.2))
        assert [d.data for d in corpus.train] == [bytes(range(80))]
        assert [d.data for d in corpus.heldout] == [bytes(range(80, 100))]

    def test_a_single_document_is_not_cut_inside_a_character(self, tmp_path):
        path = write(tmp_path / "book.txt", "€" * 20)
        corpus = load_corpus(DataConfig(corpus=str(path), heldout_fraction=0.17))
        assert corpus.train[0].data.decode() + corpus.heldout[0].data.decode() == "€" * 20

    def test_a_document_too_short_to_split_is_refused(self, tmp_path):
        path = write(tmp_path / "a.txt", "x")
        with pytest.raises(ValueError, match=r"no training documents: .* has 1 bytes"):
            load_corpus(DataConfig(corpus=str(path)))

    def test_the_error_without_held_out_documents_names_a_fraction_that_works(self):
        documents = tuple(Document(str(i), b"%d" % i) for i in range(4))
        lowest = min(hash_place(d.data) for d in documents)
        with pytest.raises(ValueError, match="no held-out documents: none of the 4") as error:
            split(documents, lowest / 2)
        assert f"above {lowest:.4f}" in str(error.value)
        assert len(split(documents, lowest + 1e-4).heldout) == 1

    def test_the_error_without_training_documents_names_a_fraction_that_works(self):
        documents = tuple(Document(str(i), b"%d" % i) for i in range(4))
        highest = max(hash_place(d.data) for d in documents)
        with pytest.raises(ValueError, match="no training documents") as error:
            split(documents, (1 + highest) / 2)
        assert f"below {highest:.4f}" in str(error.value)
