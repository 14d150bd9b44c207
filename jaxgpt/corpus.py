"""Text as bytes: read, split by document without a leak, named by its sha256. NumPy only: it imports fast.

Three kinds of corpus: `stdlib` (the running Python's own library, there wherever Python is), a text file, a
folder of text. A file is a document; a stream is documents one after the other, a NUL byte between two.
`load` holds the streams in memory; `scan` only says where they stand on disk, split and named in the same way.
"""

from __future__ import annotations

import codecs
import difflib
import fnmatch
import hashlib
import mmap
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from jaxgpt.config import BadInput

# A byte that no text holds, so that a model can see where a document ends.
SEPARATOR = b"\0"

DECODED = 2**20  # bytes that are decoded at once to see whether they are text; at least a character's 4

# Glob patterns. The last three are not Python's own but written by whoever built or packaged this one.
STDLIB_LEFT_OUT = (
    "test",
    "tests",
    "idle_test",
    "encodings",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "config-*",
    "_sysconfigdata*",
    "sitecustomize.py",
)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Two streams of bytes that share no document.

    name: as it was asked for. train, validation: uint8 arrays [bytes], read-only. sha256: 64 hex digits of
    the two streams, each behind its length. documents: (train, validation); one that was cut in two counts in
    both. skipped: how many files were left out and why, in one line; '' for none.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    sha256: str
    documents: tuple[int, int]
    skipped: str


@dataclass(frozen=True, eq=False)
class Listing:
    """Where the two streams of a corpus stand on disk; about 200 bytes of memory per document.

    name, sha256, documents, skipped: as in Corpus. train, validation: the documents in order.
    """

    name: str
    train: list[Part]
    validation: list[Part]
    sha256: str
    documents: tuple[int, int]
    skipped: str

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the two streams, separators included."""
        return _size(self.train), _size(self.validation)


class Part(NamedTuple):
    """A document on disk, or a part of one: the bytes from start to stop. digest: the whole document's sha256."""

    digest: bytes
    path: str
    start: int
    stop: int


def load(name: str, validation_fraction: float, context: int) -> Corpus:
    """The corpus called `name`: `stdlib`, a text file or a folder (`./stdlib` for a folder of that name).

    validation_fraction: share of the bytes held out, in (0, 0.5). context: tokens per training window; each
    stream must hold at least one byte more. Equal documents count once, so none is on both sides. Whole
    documents are held out; a lone one is cut, its tail is held out. Raises BadInput.
    """
    documents, skipped = _documents(name, _in_memory)
    if len(documents) == 1:
        (text,) = documents.values()
        at = _cut(text, validation_fraction)
        train, validation = text[:at], text[at:]
        counts = (1, 1)
    else:
        held_out = _held_out({digest: len(text) for digest, text in documents.items()}, validation_fraction)
        train = SEPARATOR.join(text for digest, text in documents.items() if digest not in held_out)
        validation = SEPARATOR.join(text for digest, text in documents.items() if digest in held_out)
        counts = (len(documents) - len(held_out), len(held_out))
    check_length(name, (len(train), len(validation)), "bytes", context, validation_fraction)
    sha256 = hashlib.sha256()
    for stream in (train, validation):
        sha256.update(len(stream).to_bytes(8, "little"))
        sha256.update(stream)
    return Corpus(
        name, np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8), sha256.hexdigest(), counts, skipped
    )


def scan(name: str, validation_fraction: float, context: int) -> Listing:
    """What `load` would read, with the same split and sha256, but left on disk: for a corpus larger than memory.

    Files are mapped into memory one at a time, twice; they must not shrink meanwhile. Raises BadInput.
    """
    documents, skipped = _documents(name, _on_disk)
    if len(documents) == 1:
        (part,) = documents.values()
        with opened(part) as text:
            at = _cut(text, validation_fraction)
        train, validation = [part._replace(stop=at)], [part._replace(start=at)]
    else:
        held_out = _held_out({digest: part.stop for digest, part in documents.items()}, validation_fraction)
        train = [part for digest, part in documents.items() if digest not in held_out]
        validation = [part for digest, part in documents.items() if digest in held_out]
    check_length(name, (_size(train), _size(validation)), "bytes", context, validation_fraction)
    sha256 = hashlib.sha256()
    try:
        for parts in (train, validation):
            for piece in stream(parts):
                sha256.update(piece)
    except OSError as error:
        _refuse(name, f"cannot be read: {error.strerror} ({error.filename})")
    return Listing(name, train, validation, sha256.hexdigest(), (len(train), len(validation)), skipped)


def stream(parts: list[Part]) -> Iterator[Any]:
    """One stream as its sha256 sees it, in pieces: its length, then its documents with a separator between two."""
    yield _size(parts).to_bytes(8, "little")
    for number, part in enumerate(parts):
        if number:
            yield SEPARATOR
        with opened(part) as text, memoryview(text) as view, view[part.start : part.stop] as piece:
            yield piece


@contextmanager
def opened(part: Part) -> Iterator[Any]:
    """The whole document of a part, mapped into memory: sliced and searched as bytes are, read when looked at."""
    with _mapped(part.path) as text:
        yield text


def sampled(text: Corpus | Listing) -> Iterator[Any]:
    """The training documents in order of digest: the first ones are a random sample, blind to names and places."""
    if isinstance(text, Corpus):
        yield from sorted(text.train.tobytes().split(SEPARATOR), key=lambda one: hashlib.sha256(one).digest())
        return
    for part in sorted(text.train):
        with opened(part) as whole, memoryview(whole) as view, view[part.start : part.stop] as piece:
            yield piece


def check_length(name: str, lengths: tuple[int, int], unit: str, context: int, validation_fraction: float) -> None:
    """Raises BadInput if the training or the validation stream is too short for a window of `context` and its target.

    lengths: of the two streams, in `unit`s.
    """
    for side, length in zip(("training", "validation"), lengths, strict=True):
        if length <= context:
            _refuse(
                name,
                f"is too short: the {side} stream has {length} {unit} and needs {context + 1} "
                f"(model.context={context}, data.validation_fraction={validation_fraction:g})",
            )


def _size(parts: list[Part]) -> int:
    return sum(part.stop - part.start for part in parts) + len(SEPARATOR) * (len(parts) - 1)


# --- reading ------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """What is seen in a file: why it is no document ('' if it is one), its digest, and what is kept of it."""

    why: str
    digest: bytes
    kept: Any


def _in_memory(path: Path) -> Look:
    text = path.read_bytes()
    return Look(_not_text(text), hashlib.sha256(text).digest(), text)


def _on_disk(path: Path) -> Look:
    with _mapped(path) as text:
        digest = hashlib.sha256(text).digest()
        return Look(_not_text(text), digest, Part(digest, str(path), 0, len(text)))


@contextmanager
def _mapped(path: Path | str) -> Iterator[Any]:
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:  # nothing to map
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            yield text


def _documents(name: str, look: Callable[[Path], Look]) -> tuple[dict[bytes, Any], str]:
    """What is kept of the distinct documents, by digest, in order of path; and which files were left out, in words."""
    try:
        documents, left_out = _read(name, look)
    except OSError as error:
        _refuse(name, f"cannot be read: {error.strerror} ({error.filename})")
    skipped = _in_words(left_out)
    if not documents:
        _refuse(name, f"holds no text{f' ({skipped})' if skipped else ''}; it must hold files of UTF-8 text")
    return documents, skipped


def _read(name: str, look: Callable[[Path], Look]) -> tuple[dict[bytes, Any], Counter[str]]:
    """What is kept of the distinct documents; how many files were left out, by reason."""
    if name == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return _read_files(root, (path for path in _paths(root, STDLIB_LEFT_OUT) if path.endswith(".py")), look)
    root = Path(os.path.expanduser(name))
    if not name or not root.exists():
        _refuse(name, f"is not there{_near(root)}; it must be `stdlib`, a text file or a folder of text")
    if root.is_dir():
        return _read_files(root, _paths(root), look)
    if not root.is_file():
        _refuse(name, "is neither a file nor a folder; it must be `stdlib`, a text file or a folder of text")
    why, digest, kept = look(root)
    if why:
        _refuse(name, f"is {why}; it must be UTF-8 text")
    return {digest: kept}, Counter()


def _read_files(
    root: Path, paths: Iterable[str], look: Callable[[Path], Look]
) -> tuple[dict[bytes, Any], Counter[str]]:
    documents: dict[bytes, Any] = {}
    left_out: Counter[str] = Counter()
    for path in paths:
        if not (root / path).is_file():  # a broken link, or a pipe that would block for ever
            left_out["not a regular file"] += 1
            continue
        why, digest, kept = look(root / path)
        if why:
            left_out[why.partition(" (")[0]] += 1
        elif digest in documents:
            left_out["duplicate"] += 1
        else:
            documents[digest] = kept
    return documents, left_out


def _paths(root: Path, left_out: tuple[str, ...] = ()) -> list[str]:
    """Files below root as relative posix paths, sorted, so that the order is the same on every machine.

    Hidden names and names that match a pattern of left_out are skipped. Links are followed, but a folder is
    entered once and never when it holds root: links in a circle end, and no link widens the corpus upwards.
    """

    def wanted(names: list[str]) -> list[str]:
        return sorted(
            name
            for name in names
            if not name.startswith(".") and not any(fnmatch.fnmatchcase(name, pattern) for pattern in left_out)
        )

    entered = {_inode(folder) for folder in root.resolve().parents}
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_raise, followlinks=True):
        inode = _inode(folder)
        if inode in entered:
            subfolders.clear()
            continue
        entered.add(inode)
        subfolders[:] = wanted(subfolders)
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in wanted(names)]
    return sorted(found)


def _inode(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _raise(error: OSError) -> NoReturn:
    raise error


def _not_text(data: Any) -> str:
    """Why these bytes (or a mapped file) are not a document; '' if they are one."""
    if not len(data):
        return "empty"
    nul = data.find(SEPARATOR)
    if nul >= 0:
        return f"binary (a NUL byte at {nul})"
    done = 0
    with memoryview(data) as view:
        while done < len(data):
            end = done + DECODED
            try:
                # A character that the end cuts in two is left for the next round.
                done += codecs.utf_8_decode(view[done:end], "strict", end >= len(data))[1]
            except UnicodeDecodeError as error:
                return f"not UTF-8 (byte 0x{data[done + error.start]:02x} at {done + error.start})"
    return ""


# --- splitting ----------------------------------------------------------------------------------------------


def _held_out(sizes: dict[bytes, int], fraction: float) -> set[bytes]:
    """Digests of the validation documents, from the bytes of each by digest.

    Chosen in order of digest: random, and blind to names and places.
    A document above half of all bytes stays in training, so that with fraction < 0.5 neither side is empty.
    One that would fill half of the held-out bytes comes last: a validation loss should be of many texts.
    """
    total, size = sum(sizes.values()), 0
    chosen: set[bytes] = set()
    for digest in sorted(sizes, key=lambda d: (2 * sizes[d] > fraction * total, d)):
        if size >= fraction * total:
            break
        if 2 * sizes[digest] <= total:
            chosen.add(digest)
            size += sizes[digest]
    return chosen


def _cut(text: Any, fraction: float) -> int:
    """Where one document is cut in two: the tail is held out, from the line that starts nearest to the fraction.

    Text without a line there (half the held-out bytes to either side) is cut between two characters.
    """
    at = min(round(len(text) * (1 - fraction)), len(text) - 1)
    reach = (len(text) - at) // 2
    # A line starts one byte behind a newline; 0 is the start of the text, where nothing was found.
    starts = [text.rfind(b"\n", max(at - reach - 1, 0), at) + 1, text.find(b"\n", at, at + reach) + 1]
    starts = [start for start in starts if start > 0]
    if starts:
        at = min(starts, key=lambda start: abs(start - at))
    else:
        while at > 0 and text[at] & 0xC0 == 0x80:  # inside a UTF-8 character
            at -= 1
    return at


# --- messages -----------------------------------------------------------------------------------------------


def _refuse(name: str, why: str) -> NoReturn:
    shown = name if name and name.isprintable() else repr(name)
    raise BadInput(f"data.corpus={shown} {why}") from None


def _near(path: Path) -> str:
    """A hint at what the user may have meant, from the folder that should hold it."""
    names = {entry.name: str(entry) for entry in path.parent.iterdir()} if path.parent.is_dir() else {}
    if path.parent == Path("."):
        names["stdlib"] = "stdlib"
    near = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {names[near[0]]}?)" if near else ""


def _in_words(left_out: Counter[str]) -> str:
    if not left_out:
        return ""
    files = "1 file" if left_out.total() == 1 else f"{left_out.total()} files"
    return f"{files} left out: " + ", ".join(f"{count} {why}" for why, count in sorted(left_out.items()))
