"""Corpora larger than memory: tokenized once into files in a cache folder, and read from there through Grain.

    $XDG_CACHE_HOME/jaxgpt/tokens/<identity>/     ~/.cache where the variable is not set
        train.bin validation.bin                  token ids, little-endian, of the type in tokens.json
        tokens.json                               format, type and counts

The folder is made under a temporary name and renamed, so that it is whole whenever it is there; of several processes
that make it at the same time one wins and the others read what it made.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import corpus, store
from jaxgpt.config import BadInput
from jaxgpt.corpus import Listing
from jaxgpt.tokenizer import Tokenizer, Tokens

FORMAT = 1  # raised when the same corpus and tokenizer give other ids
SIDES = ("train", "validation")
ABANDONED = 3600.0  # seconds after its last write at which a temporary folder counts as left by a killed process
# Grain's order of windows is a permutation of 32-bit numbers.
MOST_WINDOWS = 2**32 - 1
THREADS = 4  # that read windows ahead, so that a slow disk is waited for in parallel
AHEAD = 8  # batches that wait in memory


def check_installed() -> None:
    """Raises BadInput without the grain package. Does not import it: that takes a second."""
    if importlib.util.find_spec("grain") is None:
        raise BadInput("data.stream=true needs the grain package: pip install 'jaxgpt[stream]'")


# --- token files ---------------------------------------------------------------------------------------------------


def tokens(listing: Listing, tokenizer: Tokenizer) -> Tokens:
    """The token ids of a corpus as arrays that stand in files, made if they are not there yet.

    Needs a few times TOGETHER bytes of memory (see tokenizer.py), however long the corpus. Raises StoreError when the
    disk is full, and BadInput when the corpus changes while it is read.
    """
    folder = cache_folder() / identity(listing.sha256, tokenizer)
    found = _opened(folder)
    if found is None:
        _make(folder, listing, tokenizer)
        found = _opened(folder)
    if found is None:
        raise BadInput(f"{folder} changed while it was read; run the same command again")
    return found


def cache_folder() -> Path:
    """Where token files stand on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxgpt" / "tokens"


def identity(sha256: str, tokenizer: Tokenizer) -> str:
    """What names a tokenized corpus: the corpus's sha256, and behind a plus sign the tokenizer's unless it is bytes."""
    return f"{sha256}+{tokenizer.sha256}" if tokenizer.sha256 else sha256


def _opened(folder: Path) -> Tokens | None:
    """The arrays of a folder; None where it is not there or not whole (by length: to hash it at each start would take
    as long as to make it).
    """
    try:
        about = store.read_json(folder / "tokens.json")
        if about["format"] != FORMAT:
            return None
        dtype = np.dtype(about["dtype"])
        sides = [np.memmap(folder / f"{side}.bin", dtype, "r") for side in SIDES]
        return Tokens(*sides) if [len(side) for side in sides] == [about[side] for side in SIDES] else None
    except (OSError, ValueError, KeyError, TypeError):  # not there, cut short, or not ours
        return None


def _make(folder: Path, listing: Listing, tokenizer: Tokenizer) -> None:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        _sweep_out(folder)
        try:
            counts = _write(temporary, listing, tokenizer)
            about = {"format": FORMAT, "dtype": tokenizer.dtype.newbyteorder("<").str, **counts}
            store.write_json(temporary / "tokens.json", about)
            if folder.exists() and _opened(folder) is None:  # damaged: out of the way, under a name that is swept out
                os.rename(folder, temporary.with_suffix(".old.tmp"))
            try:
                os.rename(temporary, folder)
            except OSError:
                if _opened(folder) is None:  # else another process was faster
                    raise
            store.sync_folder(folder.parent)
        finally:
            for left in (temporary, temporary.with_suffix(".old.tmp")):
                shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise store.store_error(folder, error) from error


def _write(folder: Path, listing: Listing, tokenizer: Tokenizer) -> dict[str, int]:
    """Writes the ids of both sides and returns how many each has."""
    sha256, counts = hashlib.sha256(), {}

    def hashed(pieces: Iterator[Any]) -> Iterator[Any]:
        for piece in pieces:
            sha256.update(piece)
            yield piece

    for side, parts in zip(SIDES, (listing.train, listing.validation), strict=True):
        pieces = hashed(corpus.stream(parts))
        next(pieces)  # the length
        counts[side] = 0
        with open(folder / f"{side}.bin", "wb") as file:
            for ids in tokenizer.encode_parts(pieces):
                file.write(ids.astype(tokenizer.dtype.newbyteorder("<")).tobytes())
                counts[side] += len(ids)
            file.flush()
            os.fsync(file.fileno())
    if sha256.hexdigest() != listing.sha256:
        raise BadInput(f"data.corpus={listing.name} changed while it was read; run the same command again")
    return counts


def _sweep_out(folder: Path) -> None:
    """Removes what processes that were killed left of the same corpus."""
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        with suppress(OSError):  # another process removed it first
            if time.time() - max(entry.stat().st_mtime for entry in (left, *left.glob("*"))) > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)


# --- batches -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """Windows of `context` + 1 tokens that share their border token: each token but the first is predicted once in an
    epoch, and what does not fill a window at the end never. The borders are the same in each epoch.
    """

    train_n: np.ndarray
    context: int

    def __len__(self) -> int:
        return (len(self.train_n) - 1) // self.context

    def __getitem__(self, index: Any) -> np.ndarray:
        """Window `index`, [T + 1] int32."""
        start = int(index) * self.context
        return self.train_n[start : start + self.context + 1].astype(np.int32)


@dataclass(frozen=True)
class Rows:
    """The rows from `start` to `stop` of each batch of `batch_size` windows, one after the other."""

    ordered: Any  # Grain's windows in their order, without end
    batch_size: int
    start: int
    stop: int

    def __len__(self) -> int:
        return len(self.ordered) // self.batch_size * (self.stop - self.start)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Row `index`, [T + 1] int32."""
        batch, row = divmod(int(index), self.stop - self.start)
        return self.ordered[batch * self.batch_size + self.start + row]


def batches(
    train_n: np.ndarray,
    context: int,
    batch_size: int,
    data_seed: int,
    retry: int,
    step: int,
    rows: slice | None = None,
) -> Iterator[np.ndarray]:
    """Batches [B, T + 1] int32 from `step` on, without end: a function of the numbers alone, and quick for any step.

    All windows once, shuffled, then all again in another order. `rows`: of each batch only these are read and given,
    as `parallel.rows` says for a host. Raises BadInput for more than MOST_WINDOWS windows.
    """
    windows = Windows(train_n, context)
    if len(windows) > MOST_WINDOWS:
        raise BadInput(
            f"data.stream=true can shuffle at most 2^32 - 1 windows, not {len(windows):,}; "
            f"raise model.context={context} or split the corpus"
        )
    import grain

    # Grain numbers an epoch's order seed + epoch; mixed, two seeds do not share orders.
    seed = int(np.random.SeedSequence([data_seed, retry]).generate_state(1)[0])
    ordered = grain.MapDataset.source(windows).shuffle(seed=seed).repeat()
    start, stop, _ = (rows or slice(None)).indices(batch_size)
    if stop - start < batch_size:
        ordered = grain.MapDataset.source(Rows(ordered, batch_size, start, stop))
    reader = iter(
        ordered.batch(stop - start).to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD))
    )
    reader.set_state({"next_index": step})
    try:
        yield from reader
    finally:
        reader.close()
