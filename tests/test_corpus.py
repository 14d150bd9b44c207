import hashlib
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxgpt import corpus
from jaxgpt.config import BadInput


def write(root: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(root)


def documents(stream: np.ndarray) -> list[bytes]:
    return stream.tobytes().split(b"\0")


def refusal(name: str, context: int = 1) -> str:
    with pytest.raises(BadInput) as error:
        corpus.load(name, 0.1, context)
    message = str(error.value)
    assert message.startswith("data.corpus=")
    assert "\n" not in message
    return message


# --- the standard library -----------------------------------------------------------------------------------


def test_stdlib_is_this_pythons_library_without_its_tests():
    read = corpus.load("stdlib", 0.1, 128)
    train, validation = documents(read.train), documents(read.validation)
    assert (len(train), len(validation)) == read.documents
    assert 8e6 < read.train.size + read.validation.size < 14e6
    assert 0.1 <= read.validation.size / (read.train.size + read.validation.size) < 0.16
    assert max(map(len, validation)) < 0.06 * read.train.size
    assert not set(train) & set(validation)
    root = Path(sysconfig.get_path("stdlib"))
    held = {*train, *validation}
    for present in ("argparse.py", "json/decoder.py", "asyncio/events.py"):
        assert (root / present).read_bytes() in held
    absent = (
        "encodings/ascii.py",
        "test/test_json/test_decode.py",
        "idlelib/idle_test/htest.py",
        *(path.name for path in root.glob("_sysconfigdata*.py")),
    )
    for name in absent:
        if (root / name).exists():
            assert (root / name).read_bytes() not in held
    assert str(root).encode() not in read.train.tobytes() + read.validation.tobytes()


def test_corpus_is_read_without_jax():
    code = "import sys, jaxgpt.corpus; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


# --- a folder -----------------------------------------------------------------------------------------------


def test_folder_exactly(tmp_path):
    files = {"b.txt": b"bb" * 4, "a/z.txt": b"zz" * 4, "a/y.md": b"yy" * 4, "c": b"cc" * 4, "d": b"dd" * 4}
    read = corpus.load(write(tmp_path, files), 0.1, 1)
    # Equal sizes, so one document reaches a tenth: the one with the smallest digest.
    first = min(files.values(), key=lambda text: hashlib.sha256(text).digest())
    rest = [files[name] for name in ("a/y.md", "a/z.txt", "b.txt", "c", "d") if files[name] != first]
    assert read.validation.tobytes() == first
    assert read.train.tobytes() == b"\0".join(rest)
    assert read.documents == (4, 1)
    assert (read.name, read.skipped) == (str(tmp_path), "")
    assert read.train.dtype == read.validation.dtype == np.uint8
    stream, held = read.train.tobytes(), read.validation.tobytes()
    expected = len(stream).to_bytes(8, "little") + stream + len(held).to_bytes(8, "little") + held
    assert read.sha256 == hashlib.sha256(expected).hexdigest()


def test_left_out_files_are_counted_and_hidden_ones_are_not_there(tmp_path):
    name = write(
        tmp_path,
        {
            "a": b"alpha",
            "b": b"beta",
            "again": b"beta",
            "nul": b"x\0y",
            "latin1": b"caf\xe9",
            "nothing": b"",
            ".hidden": b"hidden",
            ".git/config": b"hidden too",
        },
    )
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    read = corpus.load(name, 0.1, 1)
    assert sorted([*documents(read.train), *documents(read.validation)]) == [b"alpha", b"beta"]
    assert read.skipped == ("6 files left out: 1 binary, 1 duplicate, 1 empty, 1 not UTF-8, 2 not a regular file")


def test_links_are_followed_once_and_not_in_a_circle(tmp_path):
    write(tmp_path, {"outside": b"delta", "real/c": b"gamma", "corpus/a": b"alpha", "corpus/sub/b": b"beta"})
    root = tmp_path / "corpus"
    links = {"link": tmp_path / "real", "self": root, "up": tmp_path, "sub/back": root / "sub"}
    for link, target in links.items():
        (root / link).symlink_to(target, target_is_directory=True)
    (root / "loop").symlink_to(root / "loop")
    read = corpus.load(str(root), 0.1, 1)
    assert sorted([*documents(read.train), *documents(read.validation)]) == [b"alpha", b"beta", b"gamma"]


def test_a_folder_with_one_distinct_document_is_cut_as_a_file_is(tmp_path):
    text = b"".join(b"line %d\n" % i for i in range(100))
    folder = corpus.load(write(tmp_path / "folder", {"a": text, "b": text}), 0.2, 8)
    file = corpus.load(write(tmp_path, {"a": text}) + "/a", 0.2, 8)
    assert folder.sha256 == file.sha256
    assert folder.documents == file.documents == (1, 1)


def test_a_large_document_stays_in_training(tmp_path):
    files = {f"small{i}": b"%03d\n" % i * 10 for i in range(20)}  # 40 bytes each
    for size in (900, 300):  # above half of all bytes; more than half of the held-out tenth
        for letter in b"abcdefgh":
            big = bytes([letter]) * size
            read = corpus.load(write(tmp_path / f"{size}{letter}", {**files, "big": big}), 0.1, 1)
            assert big in documents(read.train)
            assert read.validation.size >= 0.1 * (800 + size)


# Texts of few letters, so that duplicates come up; sizes from 1 byte to a document that outweighs the rest.
TEXTS = st.lists(
    st.text("aé\n", min_size=1, max_size=8).map(str.encode) | st.integers(20, 400).map(lambda n: b"long" * n),
    min_size=2,
    max_size=12,
)
FRACTIONS = st.floats(0.01, 0.49)


@settings(max_examples=60, deadline=None)
@given(TEXTS, FRACTIONS, st.randoms(use_true_random=False))
def test_split_invariants(texts, fraction, random):
    assume(len(set(texts)) > 1)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        names = [f"{i:02d}" for i in range(len(texts))]
        read = corpus.load(write(Path(one), dict(zip(names, texts, strict=True))), fraction, 0)
        train, validation = documents(read.train), documents(read.validation)
        assert not set(train) & set(validation)
        assert train
        assert validation
        assert sorted([*train, *validation]) == sorted(set(texts))
        assert read.documents == (len(train), len(validation))
        total = sum(map(len, set(texts)))
        assert all(2 * len(text) <= total for text in validation)
        movable = sum(len(text) for text in set(texts) if 2 * len(text) <= total)
        assert sum(map(len, validation)) >= min(fraction * total, movable)
        # Path order inside each stream: that of a document's first file.
        assert train == sorted(train, key=texts.index)
        assert validation == sorted(validation, key=texts.index)
        # The same texts under other names, in other folders, written in another order: the same two sets.
        random.shuffle(names)
        files = {f"x{name}/{name}.txt": text for name, text in zip(names, texts, strict=True)}
        moved = corpus.load(write(Path(other), files), fraction, 0)
        assert set(documents(moved.train)) == set(train)
        assert set(documents(moved.validation)) == set(validation)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=8), min_size=3, max_size=6, unique=True), st.data())
def test_sha256_names_the_bytes_and_their_order_only(texts, data):
    texts = [text.encode() for text in texts]
    files = {f"{i}": text for i, text in enumerate(texts)}

    def load(files: dict[str, bytes], fraction: float = 0.2) -> corpus.Corpus:
        with tempfile.TemporaryDirectory() as folder:
            return corpus.load(write(Path(folder), files), fraction, 0)

    read = load(files)
    assert load(dict(reversed(files.items()))).sha256 == read.sha256
    changed = data.draw(st.sampled_from(sorted(files)))
    assert load({**files, changed: files[changed] + b"c"}).sha256 != read.sha256
    for other in (load(files, 0.49), load(dict(zip(files, reversed(texts), strict=True)))):
        same = np.array_equal(other.train, read.train) and np.array_equal(other.validation, read.validation)
        assert (other.sha256 == read.sha256) == same


def test_sha256_changes_with_split_and_order(tmp_path):
    texts = [b"%02d" % i * 8 for i in range(10)]
    ahead = write(tmp_path / "ahead", {f"{i}": text for i, text in enumerate(texts)})
    back = write(tmp_path / "back", {f"{9 - i}": text for i, text in enumerate(texts)})
    read = [corpus.load(ahead, 0.1, 1), corpus.load(ahead, 0.3, 1), corpus.load(back, 0.1, 1)]
    assert len({one.sha256 for one in read}) == 3


def test_sha256_tells_apart_what_a_moved_border_would_not(tmp_path):
    # The same bytes in a row, cut elsewhere: only the lengths differ.
    path = write(tmp_path, {"a": b"abc\n" * 50}) + "/a"
    one, two = corpus.load(path, 0.1, 1), corpus.load(path, 0.2, 1)
    assert one.train.tobytes() + one.validation.tobytes() == two.train.tobytes() + two.validation.tobytes()
    assert one.sha256 != two.sha256


# --- a file -------------------------------------------------------------------------------------------------


def test_a_file_is_cut_where_a_line_starts(tmp_path):
    text = b"".join(b"%09d\n" % i for i in range(100))
    for fraction, lines in ((0.1, 10), (0.104, 10), (0.106, 11), (0.25, 25)):
        read = corpus.load(write(tmp_path, {"t": text}) + "/t", fraction, 8)
        assert read.train.tobytes() == text[: -10 * lines]
        assert read.validation.tobytes() == text[-10 * lines :]
        assert read.documents == (1, 1)


def test_a_file_without_lines_is_cut_between_characters(tmp_path):
    text = "é€𝄞" * 100  # 2, 3 and 4 bytes
    for fraction in (0.1, 0.101, 0.102, 0.103, 0.104, 0.105):
        # The only newline is far from where the cut belongs, and must not be taken for it.
        read = corpus.load(write(tmp_path, {"t": b"title\n" + text.encode()}) + "/t", fraction, 8)
        parts = read.train.tobytes().decode(), read.validation.tobytes().decode()
        assert "".join(parts) == "title\n" + text
        assert read.validation.size / 906 == pytest.approx(fraction, abs=4 / 906)


@settings(max_examples=80, deadline=None)
@given(st.text("ab\né𝄞", min_size=8, max_size=200), FRACTIONS)
def test_cut_keeps_every_byte_and_both_sides(text, fraction):
    with tempfile.TemporaryDirectory() as folder:
        read = corpus.load(write(Path(folder), {"t": text.encode()}) + "/t", fraction, 0)
    assert read.train.tobytes().decode() + read.validation.tobytes().decode() == text
    asked = fraction * len(text.encode())
    assert 0 < read.validation.size <= 1.5 * asked + 5
    assert read.validation.size >= 0.5 * asked - 1


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, {"text/a": b"alpha", "text/b": b"beta"})
    assert corpus.load("~/text", 0.1, 1).documents == (1, 1)


# --- bad input ----------------------------------------------------------------------------------------------


def test_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"shakespeare.txt": b"To be"})
    assert refusal("nowhere/at/all") == (
        "data.corpus=nowhere/at/all is not there; it must be `stdlib`, a text file or a folder of text"
    )
    assert "(did you mean shakespeare.txt?)" in refusal("shakespear.txt")
    assert f"(did you mean {tmp_path}/shakespeare.txt?)" in refusal(f"{tmp_path}/shakespare.txt")
    assert "(did you mean stdlib?)" in refusal("stdlb")
    assert refusal("").startswith("data.corpus='' is not there")
    refusal("a\nb")
    refusal("x" * 5000)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty; it must be UTF-8 text"),
        (b"PK\x03\x04\0\0", "is binary (a NUL byte at 4); it must be UTF-8 text"),
        (b"caf\xe9 au lait", "is not UTF-8 (byte 0xe9 at 3); it must be UTF-8 text"),
    ],
)
def test_a_file_that_is_not_text(tmp_path, data, why):
    path = write(tmp_path, {"f": data}) + "/f"
    assert refusal(path) == f"data.corpus={path} {why}"


def test_a_folder_without_text(tmp_path):
    path = str(tmp_path)
    assert refusal(path) == f"data.corpus={path} holds no text; it must hold files of UTF-8 text"
    write(tmp_path, {"a.png": b"\x89PNG\0", "b": b""})
    assert "holds no text (2 files left out: 1 binary, 1 empty)" in refusal(path)


def test_a_pipe_is_refused_and_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is neither a file nor a folder" in refusal(str(tmp_path / "pipe"))


def test_too_short_says_how_many_bytes_there_are_and_are_needed(tmp_path):
    path = write(tmp_path, {"t": b"123456789\n" * 100}) + "/t"
    assert corpus.load(path, 0.1, 99).validation.size == 100
    assert refusal(path, context=100) == (
        f"data.corpus={path} is too short: the validation stream has 100 bytes and needs 101 "
        "(model.context=100, data.validation_fraction=0.1)"
    )
    assert "the training stream has 900 bytes and needs 1001" in refusal(path, context=1000)
    for tiny in (b"x", b"xy"):
        assert "is too short" in refusal(write(tmp_path, {"tiny": tiny}) + "/tiny")


@pytest.mark.parametrize("name", ["folder", "folder/a"])
def test_unreadable(tmp_path, monkeypatch, name):
    write(tmp_path, {"folder/a": b"alpha", "folder/b": b"beta"})

    def denied(path):  # root reads everything, so the refusal is made here and not with chmod
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    path = tmp_path / name
    assert refusal(str(path)) == (f"data.corpus={path} cannot be read: Permission denied ({tmp_path}/folder/a)")


def test_an_unreadable_subfolder_is_not_passed_over(tmp_path, monkeypatch):
    write(tmp_path, {"a": b"alpha", "b": b"beta", "locked/c": b"gamma"})
    scandir = os.scandir

    def denied(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert f"cannot be read: Permission denied ({tmp_path}/locked)" in refusal(str(tmp_path))
