"""Text corpora: documents as bytes, in a fixed order, split into training and held-out ones.

A document is the content of one file, or one line of a JSON-lines file. Files are read as bytes
and never decoded here, so a file in any encoding (or in none) is a valid document. The whole
corpus is held in memory.

The split looks at content only: a document is held out when the hash of its bytes falls below
``heldout_fraction``. The same document is therefore on the same side on every machine and under
every path, and two equal files are never on different sides.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jaxeff.data.config import DataConfig

# What counts as text when a whole directory is given. Files named directly, or matched by a
# glob, are taken whatever their suffix.
_TEXT_NAMES = (
    "bash c cc cfg cpp cs css cu cuh csv go h hpp htm html ini java jl js json jsonl kt lua m md "
    "ml php pl py pyi pyx r rb rs rst scala sh sql swift tex toml ts tsv tsx txt xml yaml yml"
)
TEXT_SUFFIXES = frozenset("." + name for name in _TEXT_NAMES.split())
_INSTALLED_PACKAGES = frozenset(("site-packages", "dist-packages"))


@dataclasses.dataclass(frozen=True)
class Document:
    """One text. ``name`` says where it came from and is used in messages only."""

    name: str
    data: bytes = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of both splits, each in the order of the sources (paths sorted)."""

    train: tuple[Document, ...] = dataclasses.field(repr=False)
    heldout: tuple[Document, ...] = dataclasses.field(repr=False)

    @property
    def train_bytes(self) -> int:
        return sum(len(d.data) for d in self.train)

    @property
    def heldout_bytes(self) -> int:
        return sum(len(d.data) for d in self.heldout)


def load_corpus(config: DataConfig) -> Corpus:
    """Reads the documents that ``config.corpus`` names and splits them.

    Sources:
      ``"stdlib"``: every ``*.py`` below the standard library of the running interpreter, without
        installed packages. Write ``./stdlib`` for a file of that name.
      a directory: every file below it whose suffix is in ``TEXT_SUFFIXES``; hidden files and
        folders, ``__pycache__`` and installed packages are left out, linked folders are not
        entered.
      a glob (``**`` descends): what it matches, files of any suffix, directories as above.
      a file: the file, whatever its suffix.
      ``*.jsonl``, wherever it is found: one document per line, ``{config.text_field: "..."}``.

    Files reached twice count once. Empty documents are dropped. A corpus of a single document
    cannot be split by hash: its last ``heldout_fraction`` of bytes, from a character boundary on,
    is held out.

    Raises:
      FileNotFoundError: a path does not exist, or a glob matches nothing.
      ValueError: the corpus has no text, one split would be empty, or a JSON-lines file has a
        line that is not a JSON object with the text field (the message gives ``file:line``).
    """
    documents = tuple(d for d in _read(config) if d.data)
    if not documents:
        raise ValueError(f"corpus {config.corpus!r} is empty: no document has any text")
    return split(documents, config.heldout_fraction)


def split(documents: tuple[Document, ...], heldout_fraction: float) -> Corpus:
    """Splits documents by the hash of their content (see ``load_corpus``).

    Raises:
      ValueError: one of the two splits would be empty; the message says what would help.
    """
    if heldout_fraction == 0:
        return Corpus(train=documents, heldout=())
    if len(documents) == 1:
        return _split_tail(documents[0], heldout_fraction)
    places = [hash_place(d.data) for d in documents]
    train = tuple(d for d, p in zip(documents, places, strict=True) if p >= heldout_fraction)
    heldout = tuple(d for d, p in zip(documents, places, strict=True) if p < heldout_fraction)
    if not heldout:
        raise ValueError(
            f"no held-out documents: none of the {len(documents)} documents has a hash below "
            f"heldout_fraction={heldout_fraction}; use more documents, a fraction above "
            f"{min(places):.4f}, or heldout_fraction=0 to train without evaluation"
        )
    if not train:
        raise ValueError(
            f"no training documents: heldout_fraction={heldout_fraction} holds out all "
            f"{len(documents)} documents; use more documents or a fraction below {max(places):.4f}"
        )
    return Corpus(train=train, heldout=heldout)


def hash_place(data: bytes) -> float:
    """Returns the place in [0, 1) that the content's hash gives a document."""
    digest = hashlib.blake2b(data, digest_size=8).digest()
    # 53 bits: a float holds them exactly, so that the result stays below 1.
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def fingerprint(documents: Iterable[Document]) -> str:
    """Returns a hash of the documents' contents, boundaries and order."""
    digest = hashlib.blake2b(digest_size=16)
    for document in documents:
        digest.update(len(document.data).to_bytes(8, "big"))
        digest.update(document.data)
    return digest.hexdigest()


def _split_tail(document: Document, heldout_fraction: float) -> Corpus:
    data = document.data
    cut = len(data) - max(1, round(len(data) * heldout_fraction))
    while cut > 0 and data[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
        cut -= 1
    if cut == 0:
        raise ValueError(
            f"no training documents: {document.name} has {len(data)} bytes, too few to hold out "
            f"heldout_fraction={heldout_fraction} of them"
        )
    train = Document(f"{document.name}[:{cut}]", data[:cut])
    return Corpus(train=(train,), heldout=(Document(f"{document.name}[{cut}:]", data[cut:]),))


def _read(config: DataConfig) -> Iterator[Document]:
    sources = config.corpus if isinstance(config.corpus, tuple) else (config.corpus,)
    seen = set()
    for source in sources:
        for path, name in _files(source):
            real = os.path.realpath(path)
            if real in seen:
                continue
            seen.add(real)
            if path.suffix.lower() == ".jsonl":
                yield from _read_jsonl(path, name, config.text_field)
            else:
                yield Document(name, path.read_bytes())


def _files(source: str) -> Iterator[tuple[Path, str]]:
    """Yields the files of one source, and their names, in sorted order."""
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        yield from _walk(root, lambda p: p.suffix == ".py", "stdlib/")
        return
    path = Path(source).expanduser()
    if path.exists():
        yield from _expand(path)
        return
    if not glob.has_magic(source):
        raise FileNotFoundError(f"corpus {source!r} does not exist (looked for {path.absolute()})")
    matches = sorted(glob.glob(str(path), recursive=True))
    if not matches:
        raise FileNotFoundError(f"corpus {source!r} matches no file")
    for match in matches:
        if os.path.exists(match):
            yield from _expand(Path(match))


def _expand(path: Path) -> Iterator[tuple[Path, str]]:
    if path.is_file():
        yield path, str(path)
        return
    if not path.is_dir():
        raise ValueError(f"corpus {str(path)!r} is neither a file nor a directory")
    yield from _walk(path, lambda p: p.suffix.lower() in TEXT_SUFFIXES, f"{path}/")


def _walk(root: Path, wanted: Callable[[Path], bool], prefix: str) -> Iterator[tuple[Path, str]]:
    found = []
    for folder, subfolders, files in os.walk(root, onerror=_raise):
        subfolders[:] = [s for s in subfolders if not _is_left_out(s)]
        paths = (Path(folder, f) for f in files if not _is_left_out(f))
        found += [p for p in paths if wanted(p) and p.is_file()]
    # Sorted as text with "/" everywhere, so that the order is the same on every file system.
    for name, path in sorted((p.relative_to(root).as_posix(), p) for p in found):
        yield path, prefix + name


def _raise(error: OSError) -> None:
    raise error


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__" or name in _INSTALLED_PACKAGES


def _read_jsonl(path: Path, name: str, text_field: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            text = _text_of_line(line, f"{name}:{number}", text_field)
            # JSON can hold lone surrogates, which strict UTF-8 cannot; as bytes they are fine.
            yield Document(f"{name}:{number}", text.encode("utf-8", errors="surrogatepass"))


def _text_of_line(line: bytes, where: str, text_field: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:  # JSONDecodeError, or a line that is not UTF-8
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
    if text_field not in record:
        raise ValueError(
            f"{where}: no field {text_field!r} (text_field); the line has {sorted(record)}"
        )
    if not isinstance(record[text_field], str):
        raise ValueError(
            f"{where}: field {text_field!r} holds {type(record[text_field]).__name__}, "
            "expected a string"
        )
    return record[text_field]
