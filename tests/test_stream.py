"""Corpora on disk: the same split, identity and tokens as in memory, bounded memory, and an order that can be joined
at any step.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import corpus, store, stream, tokenizer
from jaxgpt.config import BadInput, override
from jaxgpt.run import Run, Stopped
from jaxgpt.tasks import text
from jaxgpt.tokenizer import BYTES
from jaxgpt.train import train

pytest.importorskip("grain")
pytest.importorskip("tokenizers")
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxgpt" / "tokens"


def write(root, documents):
    """A folder of these documents."""
    root.mkdir(parents=True, exist_ok=True)
    for number, document in enumerate(documents):
        (root / f"{number:05d}.txt").write_bytes(document)
    return str(root)


def words(seed, size):
    """A document of about `size` bytes, unlike any of another seed."""
    rng = np.random.default_rng(seed)
    return b" ".join(b"%x" % n for n in rng.integers(0, 4000, size // 4)) + b" \xe2\x82\xac\n%d" % seed


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "texts", [words(i, 300 + 40 * i) for i in range(30)])


# --- the same as in memory -----------------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "file", "one line", "stdlib"])
def name(request, folder, tmp_path):
    if request.param == "stdlib":
        return "stdlib"
    if request.param == "folder":
        write(tmp_path / "texts" / "more", [words(3, 420), b"", b"a\0b", b"caf\xe9", words(99, 10)])
        return folder
    path = tmp_path / "one.txt"
    path.write_bytes(b"".join(b"line %d\n" % i for i in range(400)) if request.param == "file" else words(1, 5000))
    return str(path)


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_a_corpus_on_disk_is_split_named_and_reported_as_in_memory(name, fraction):
    listing, held = corpus.scan(name, fraction, 8), corpus.load(name, fraction, 8)
    assert listing.sha256 == held.sha256
    assert (listing.documents, listing.skipped) == (held.documents, held.skipped)
    assert listing.sizes == (len(held.train), len(held.validation))
    assert sorted(bytes(one) for one in corpus.sampled(listing)) == sorted(corpus.sampled(held))
    tokens = stream.tokens(listing, BYTES)
    np.testing.assert_array_equal(tokens.train, held.train)
    np.testing.assert_array_equal(tokens.validation, held.validation)


def test_token_files_hold_what_the_tokenizer_gives_for_the_streams_in_memory(folder, cache):
    listing, held = corpus.scan(folder, 0.2, 8), corpus.load(folder, 0.2, 8)
    bpe = tokenizer.train(corpus.sampled(held), 300)
    assert tokenizer.train(corpus.sampled(listing), 300) == bpe
    tokens = stream.tokens(listing, bpe)
    assert isinstance(tokens.train, np.memmap)
    assert tokens.train.dtype == np.uint16
    np.testing.assert_array_equal(tokens.train, bpe.encode(held.train.tobytes()))
    np.testing.assert_array_equal(tokens.validation, bpe.encode(held.validation.tobytes()))
    assert [path.name for path in cache.iterdir()] == [f"{listing.sha256}+{bpe.sha256}"]


def test_no_document_is_on_both_sides_and_none_is_lost(folder, tmp_path):
    write(tmp_path / "texts" / "copies", [words(i, 300 + 40 * i) for i in range(0, 30, 3)])
    tokens = stream.tokens(corpus.scan(folder, 0.3, 8), BYTES)
    train, held_out = (side.tobytes().split(b"\0") for side in tokens)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(words(i, 300 + 40 * i) for i in range(30))


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([b"", b"\0"], r"holds no text \(2 files left out: 1 binary, 1 empty\)"),
        ([b"a" * 9, b"b" * 9], "is too short: the training stream has 9 bytes and needs 10"),
    ],
)
def test_what_is_refused_in_memory_is_refused_on_disk(tmp_path, documents, message):
    path = write(tmp_path / "texts", documents)
    for read in (corpus.load, corpus.scan):
        with pytest.raises(BadInput, match=message):
            read(path, 0.1, 9)
    for data, why in ((b"caf\xe9 au lait", r"is not UTF-8 \(byte 0xe9 at 3\)"), (b"", "is empty"), (b"ab\0", "binary")):
        (tmp_path / "f").write_bytes(data)
        for read in (corpus.load, corpus.scan):
            with pytest.raises(BadInput, match=why):
                read(str(tmp_path / "f"), 0.1, 1)
    for read in (corpus.load, corpus.scan):
        with pytest.raises(BadInput, match="is not there"):
            read(str(tmp_path / "gone"), 0.1, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=30) | st.text("aé€𝄞", max_size=12).map(str.encode), st.integers(4, 9)
)  # a character has up to 4 bytes
def test_text_is_told_from_other_bytes_however_it_is_cut_for_reading(data, size):
    try:
        data.decode()
        expected = "empty" if not data else ""
    except UnicodeDecodeError as error:
        expected = f"not UTF-8 (byte 0x{data[error.start]:02x} at {error.start})"
    if b"\0" in data:
        expected = f"binary (a NUL byte at {data.index(0)})"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "DECODED", size)
        assert corpus._not_text(data) == expected


# --- memory --------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "TOGETHER", 2**14)
    monkeypatch.setattr(tokenizer, "PIECE", 2**12)

    def peak(files, size):
        path = write(tmp_path / f"{files}_{size}", [words(i, size) for i in range(files)])
        tracemalloc.start()
        try:
            stream.tokens(corpus.scan(path, 0.1, 8), BYTES)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2, 100)  # imports
    small, long, many = peak(100, 1000), peak(100, 40_000), peak(1000, 4000)
    assert long < small + 2**18  # 4 MB of text against 100 kB; a quarter of a MB more
    assert many < small + 1000 * 2**9 + 2**18  # and the list of documents: half a kB for each


# --- the cache -----------------------------------------------------------------------------------------------------


def test_token_files_are_made_once_and_read_again(folder, monkeypatch):
    listing = corpus.scan(folder, 0.2, 8)
    first = stream.tokens(listing, BYTES)
    monkeypatch.setattr(stream, "_make", lambda *_: pytest.fail("made again"))
    np.testing.assert_array_equal(stream.tokens(listing, BYTES).train, first.train)


@pytest.mark.parametrize("damage", ["cut", "gone", "json", "other format", "no json"])
def test_damaged_token_files_are_made_anew(folder, cache, damage):
    listing = corpus.scan(folder, 0.2, 8)
    expected = stream.tokens(listing, BYTES).train.tobytes()
    made = cache / listing.sha256
    if damage == "cut":
        os.truncate(made / "train.bin", 100)
    elif damage == "gone":
        (made / "validation.bin").unlink()
    elif damage == "json":
        (made / "tokens.json").write_text("{")
    elif damage == "no json":
        (made / "tokens.json").unlink()
    else:
        about = json.loads((made / "tokens.json").read_text())
        (made / "tokens.json").write_text(json.dumps(about | {"format": -1}))
    assert stream.tokens(listing, BYTES).train.tobytes() == expected
    assert [path.name for path in cache.iterdir()] == [listing.sha256]


def test_writers_at_the_same_time_all_get_the_whole_files(folder, cache):
    listing = corpus.scan(folder, 0.2, 8)
    expected = corpus.load(folder, 0.2, 8).train.tobytes()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: stream.tokens(listing, BYTES).train.tobytes(), range(16)))
    assert set(found) == {expected}
    assert [path.name for path in cache.iterdir()] == [listing.sha256]


def test_processes_at_the_same_time_all_get_the_whole_files(folder, cache):
    code = (
        "import sys; from jaxgpt import corpus, stream, tokenizer; "
        f"print(len(stream.tokens(corpus.scan({folder!r}, 0.2, 8), tokenizer.BYTES).train))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    counts = {process.communicate(timeout=60)[0].strip() for process in running}
    assert counts == {str(len(corpus.load(folder, 0.2, 8).train))}
    assert [path.name[0] for path in cache.iterdir()] != ["."]


def test_a_full_disk_leaves_nothing_behind(folder, cache, monkeypatch):
    def full(path, _):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(store, "write_json", full)
    with pytest.raises(store.StoreError, match="no space left on the disk"):
        stream.tokens(corpus.scan(folder, 0.2, 8), BYTES)
    assert list(cache.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_and_what_a_live_one_writes_is_not(folder, cache):
    listing = corpus.scan(folder, 0.2, 8)
    for name, age in (("1.dead", 2 * stream.ABANDONED), ("2.live", 10)):
        left = cache / f".{listing.sha256}.{name}.tmp"
        left.mkdir(parents=True)
        (left / "train.bin").write_bytes(b"half")
        for path in (left / "train.bin", left):
            os.utime(path, (time.time() - age,) * 2)
    stream.tokens(listing, BYTES)
    assert sorted(path.name for path in cache.iterdir()) == [f".{listing.sha256}.2.live.tmp", listing.sha256]


def test_a_corpus_that_changes_while_it_is_read_is_refused(folder, cache):
    listing = corpus.scan(folder, 0.2, 8)
    path = Path(listing.train[0].path)
    path.write_bytes(path.read_bytes().replace(b" ", b"_"))
    with pytest.raises(BadInput, match="changed while it was read; run the same command again"):
        stream.tokens(listing, BYTES)
    assert list(cache.iterdir()) == []


# --- batches -------------------------------------------------------------------------------------------------------

T, B = 5, 4


def batches(n, data_seed=0, retry=0, step=0, taken=6):
    made = stream.batches(np.arange(n, dtype=np.uint16), T, B, data_seed, retry, step)
    return list(islice(made, taken))


@pytest.mark.parametrize("step", [0, 1, 7, 40])
def test_batches_from_a_step_are_those_that_an_undisturbed_iterator_gives(step):
    # 8 windows and batches of 4, then 7 windows: batches run over the borders of epochs
    for n in (8 * T + 1, 8 * T):
        whole = batches(n, taken=step + 6)
        np.testing.assert_array_equal(batches(n, step=step), whole[step:])


def test_a_far_step_is_as_quick_as_the_first():
    began = time.monotonic()
    batches(10**4, step=10**9, taken=1)
    assert time.monotonic() - began < 5


def test_each_epoch_has_every_window_once_in_an_order_of_its_own():
    windows = 16
    found = np.concatenate(batches(windows * T + 1, taken=3 * windows // B)).reshape(3, windows, T + 1)
    assert found.dtype == np.int32
    assert (found == found[:, :, :1] + np.arange(T + 1)).all()
    assert (np.sort(found[:, :, 0], axis=1) == np.arange(0, windows * T, T)).all()
    orders = {tuple(epoch) for epoch in found[:, :, 0].tolist()}
    assert len(orders) == 3
    assert tuple(range(0, windows * T, T)) not in orders


@pytest.mark.parametrize("left", [0, 1, T - 1])
def test_each_token_but_the_first_and_what_fills_no_window_is_predicted_once_an_epoch(left):
    targets = np.concatenate(batches(16 * T + 1 + left, taken=16 // B))[:, 1:]
    assert sorted(targets.ravel()) == list(range(1, 16 * T + 1))


def test_the_order_is_a_function_of_data_seed_and_retry():
    def order(**numbers):
        return np.concatenate(batches(100 * T + 1, **numbers))[:, 0].tobytes()

    assert order(data_seed=3, retry=1, step=2) == order(data_seed=3, retry=1, step=2)
    different = [order(), order(data_seed=1), order(retry=1), order(data_seed=1, retry=1), order(step=25)]
    assert len(set(different)) == len(different)
    order(data_seed=2**32 - 1)


def test_one_window_is_enough():
    assert {tuple(window) for batch in batches(T + 1) for window in batch} == {tuple(range(T + 1))}


def test_more_windows_than_can_be_shuffled_are_refused():
    endless = np.broadcast_to(np.uint8(0), 2**33)
    with pytest.raises(BadInput, match=r"at most 2\^32 - 1 windows, not 8,589,934,591; raise model.context=1 or"):
        next(stream.batches(endless, 1, 2, 0, 0, 0))


def test_batches_read_a_token_file(folder):
    listing = corpus.scan(folder, 0.2, 8)
    held = corpus.load(folder, 0.2, 8).train.tobytes()
    for batch in islice(stream.batches(stream.tokens(listing, BYTES).train, T, B, 0, 0, 0), 5):
        assert batch.shape == (B, T + 1)
        assert all(bytes(window.tolist()) in held for window in batch)


# --- runs ----------------------------------------------------------------------------------------------------------


def test_the_source_of_a_streamed_run_holds_validation_on_the_device_and_training_on_disk(tiny, folder):
    settings = {"data.corpus": folder, "data.tokenizer": "bpe", "model.vocab_size": 300}
    source = text.reader()
    held, streamed = (source(override(tiny, settings | {"data.stream": value})) for value in (False, True))
    assert streamed.identity == held.identity
    assert streamed.task == held.task
    assert held.stream is None
    data, expected = streamed.data(), held.data()
    assert data.train_n is None
    np.testing.assert_array_equal(data.validation_WxT1, expected.validation_WxT1)
    np.testing.assert_array_equal(data.bytes_W, expected.bytes_W)
    batch = next(streamed.stream(0, 0, 0))
    assert batch.shape == (tiny.train.batch_size, tiny.model.context + 1)
    assert bytes(np.asarray(expected.train_n)).find(batch[0].astype(np.uint16).tobytes()) >= 0


def test_a_streamed_run_goes_on_after_a_stop_as_if_there_had_been_none(tiny, folder, tmp_path):
    settings = {"data.corpus": folder, "data.stream": True, "train.steps": 20, "train.eval_every": 10}
    config, began = override(tiny, settings), []
    source = text.reader()(config)

    def noted(data_seed, retry, step):
        began.append(step)
        return source.stream(data_seed, retry, step)

    whole, parts = (Run(config, dataclasses.replace(source, stream=noted), tmp_path / name) for name in "ab")
    expected = train(whole)
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        train(parts, stop=lambda: next(asked))
    row = train(parts)
    assert began[:2] == [0, 0]
    assert len(began) == 3
    assert 0 < began[2] < 20
    assert row["final_loss"] == expected["final_loss"] < np.log(256)


def test_without_grain_one_line_says_what_to_install(tiny, folder, monkeypatch):
    monkeypatch.setattr(stream.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BadInput, match=r"data.stream=true needs the grain package: pip install 'jaxgpt\[stream\]'"):
        text.reader()(override(tiny, {"data.corpus": folder, "data.stream": True}))


def test_a_streamed_corpus_of_too_few_tokens_is_refused_when_it_is_planned(tiny, tmp_path):
    path = write(tmp_path / "same", [b"the same " * 9 + b"%d" % i for i in range(10)])
    settings = {"data.corpus": path, "data.stream": True, "data.tokenizer": "bpe", "model.vocab_size": 300}
    config = override(tiny, settings | {"model.context": 64, "data.validation_fraction": 0.01})
    with pytest.raises(BadInput, match=r"is too short: the validation stream has .* tokens and needs 65"):
        text.reader()(config)
