"""Text as bytes: read, split by document without a leak, named by its sha256. NumPy only: it imports fast.

Three kinds of corpus: `stdlib` (the running Python's own library, there wherever Python is), a text file, a
folder of text. A file is a document; a stream is documents one after the other, a NUL byte between two.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from jaxgpt.config import BadInput

# A byte that no text holds, so that a model can see where a document ends.
SEPARATOR = b"\0"

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


def load(name: str, validation_fraction: float, context: int) -> Corpus:
    """The corpus called `name`: `stdlib`, a text file or a folder (`./stdlib` for a folder of that name).

    validation_fraction: share of the bytes held out, in (0, 0.5). context: tokens per training window; each
    stream must hold at least one byte more. Equal documents count once, so none is on both sides. Whole
    documents are held out; a lone one is cut, its tail is held out. Raises BadInput.
    """
    try:
        documents, left_out = _read(name)
    except OSError as error:
        _refuse(name, f"cannot be read: {error.strerror} ({error.filename})")
    skipped = _in_words(left_out)
    if not documents:
        _refuse(name, f"holds no text{f' ({skipped})' if skipped else ''}; it must hold files of UTF-8 text")
    if len(documents) == 1:
        (text,) = documents.values()
        train, validation = _cut(text, validation_fraction)
        counts = (1, 1)
    else:
        held_out = _held_out(documents, validation_fraction)
        train = SEPARATOR.join(text for digest, text in documents.items() if digest not in held_out)
        validation = SEPARATOR.join(text for digest, text in documents.items() if digest in held_out)
        counts = (len(documents) - len(held_out), len(held_out))
    for side, stream in (("training", train), ("validation", validation)):
        if len(stream) <= context:
            _refuse(
                name,
                f"is too short: the {side} stream has {len(stream)} bytes and needs {context + 1} "
                f"(model.context={context}, data.validation_fraction={validation_fraction:g})",
            )
    sha256 = hashlib.sha256()
    for stream in (train, validation):
        sha256.update(len(stream).to_bytes(8, "little"))
        sha256.update(stream)
    return Corpus(
        name, np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8), sha256.hexdigest(), counts, skipped
    )


# --- reading ------------------------------------------------------------------------------------------------


def _read(name: str) -> tuple[dict[bytes, bytes], Counter[str]]:
    """The distinct documents by digest, in order of path; how many files were left out, by reason."""
    if name == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return _read_files(root, (path for path in _paths(root, STDLIB_LEFT_OUT) if path.endswith(".py")))
    root = Path(os.path.expanduser(name))
    if not name or not root.exists():
        _refuse(name, f"is not there{_near(root)}; it must be `stdlib`, a text file or a folder of text")
    if root.is_dir():
        return _read_files(root, _paths(root))
    if not root.is_file():
        _refuse(name, "is neither a file nor a folder; it must be `stdlib`, a text file or a folder of text")
    text = root.read_bytes()
    if why := _not_text(text):
        _refuse(name, f"is {why}; it must be UTF-8 text")
    return {hashlib.sha256(text).digest(): text}, Counter()


def _read_files(root: Path, paths: Iterable[str]) -> tuple[dict[bytes, bytes], Counter[str]]:
    documents: dict[bytes, bytes] = {}
    left_out: Counter[str] = Counter()
    for path in paths:
        if not (root / path).is_file():  # a broken link, or a pipe that would block for ever
            left_out["not a regular file"] += 1
            continue
        text = (root / path).read_bytes()
        digest = hashlib.sha256(text).digest()
        if why := _not_text(text):
            left_out[why.partition(" (")[0]] += 1
        elif digest in documents:
            left_out["duplicate"] += 1
        else:
            documents[digest] = text
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


def _not_text(data: bytes) -> str:
    """Why these bytes are not a document; '' if they are one."""
    if not data:
        return "empty"
    if SEPARATOR in data:
        return f"binary (a NUL byte at {data.index(SEPARATOR)})"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte 0x{data[error.start]:02x} at {error.start})"
    return ""


# --- splitting ----------------------------------------------------------------------------------------------


def _held_out(documents: dict[bytes, bytes], fraction: float) -> set[bytes]:
    """Digests of the validation documents, chosen in order of digest: random, and blind to names and places.

    A document above half of all bytes stays in training, so that with fraction < 0.5 neither side is empty.
    One that would fill half of the held-out bytes comes last: a validation loss should be of many texts.
    """
    total, size = sum(map(len, documents.values())), 0
    chosen: set[bytes] = set()
    for digest in sorted(documents, key=lambda d: (2 * len(documents[d]) > fraction * total, d)):
        if size >= fraction * total:
            break
        if 2 * len(documents[digest]) <= total:
            chosen.add(digest)
            size += len(documents[digest])
    return chosen


def _cut(text: bytes, fraction: float) -> tuple[bytes, bytes]:
    """One document in two: the tail is held out, from the line that starts nearest to the fraction.

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
    return text[:at], text[at:]


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
