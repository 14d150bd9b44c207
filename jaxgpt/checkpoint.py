"""Checkpoints: Orbax keeps the arrays, a manifest of ours says what must be there, bit for bit.

    <folder>/step_00001234/
        arrays/          an Orbax checkpoint of one flat dict {path of the leaf: array}
        manifest.json    sha256 and size of every file, the tree's shapes and dtypes, meta; written last

A checkpoint is made under a temporary name and renamed when it is whole and on disk, so a folder named step_* was
whole once. The manifest is needed because a flipped byte in an Orbax array file loads silently with wrong values.
One process at a time saves into a folder (lease.py); any number may read. Several that train one model (parallel.py)
call `save`, `restore_latest` and `discard_after` together, on a folder that all of them see, and process 0 writes.

Orbax sees a flat dict of host arrays, never the tree itself: NamedTuples and optax states then come back through
`like`, and another version of flax or optax, or another number of devices, changes nothing on disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import BadInput
from jaxgpt.store import StoreError, jsonable, out_of_space, store_error, sync_folder

FORMAT = 1  # of the folder's layout
_ONE_CALL = threading.Lock()  # lanes of a sweep save from threads; Orbax fails when two use its event loops at once


class Damaged(StoreError):
    """A checkpoint that is not what was saved, or not what is asked for. The message says which file or leaf."""


# --- public --------------------------------------------------------------------------------------------------------


def save(
    folder: Path | str, step: int, state: Any, meta: dict[str, Any], keep: int = 2, spare: Collection[int] = ()
) -> Path:
    """Saves a pytree of arrays and numbers as `folder/step_<step>`, on disk when it returns, and gives its path.

    An older checkpoint of the same step is replaced. Of the steps up to this one the newest `keep` stay, and those in
    `spare`. `meta` is a JSON dict (NaN becomes null). Raises StoreError when the disk is full or refuses; what stood
    before then stands.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would delete the checkpoint that was just saved")
    import jax

    from jaxgpt import parallel

    folder = Path(folder)
    arrays, final = _flatten(state), folder / _name(step)  # all processes: each has a part of the arrays
    temporary = _temporary(folder)
    if jax.process_count() > 1:  # they save into one folder
        temporary = folder / f"tmp.{parallel.agree(os.getpid())}.{parallel.agree(secrets.randbits(31)):08x}"

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        temporary.mkdir()
        _reserve(temporary, sum(array.nbytes for array in arrays.values()), len(arrays))

    def finish() -> None:
        _write_manifest(temporary, step, state, arrays, meta)
        for path in (temporary, *(p for p in temporary.rglob("*") if p.is_dir())):
            sync_folder(path)
        _commit(temporary, final)
        for old in [s for s in steps(folder) if s <= step][:-keep]:
            if old not in spare:
                _discard(folder / _name(old))

    try:
        parallel.by_writer(prepare, f"save {final}")
        # Orbax refuses arrays without elements; the manifest says enough to make them again.
        _orbax_save(temporary / "arrays", {name: array for name, array in arrays.items() if array.size})
        parallel.by_writer(finish, f"save {final}")
    except OSError as error:
        raise store_error(final, error) from error
    except Exception as error:
        if out_of_space(error):  # Orbax passes on a full disk as a ValueError
            raise store_error(final, error) from error
        raise
    finally:
        if parallel.is_writer():
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def steps(folder: Path | str) -> list[int]:
    """The committed steps in a folder, ascending; [] without a folder. Damage is found only by restoring."""
    return sorted({step for step, _ in _committed(Path(folder))})


def restore_latest(
    folder: Path | str, like: Any = None, say: Callable[[str], None] = print
) -> tuple[Any, dict[str, Any]] | None:
    """(state, meta) of the newest checkpoint that is whole and fits `like`, or None.

    `like` is a pytree of arrays or jax.ShapeDtypeStructs; None gives nested dicts. Leaves are NumPy arrays with the
    saved bits, shapes and dtypes. One that is damaged or does not fit is named in one line through `say`.
    """
    from jaxgpt import parallel

    # Process 0 chooses: two that look at different moments might find different ones.
    step, found = _newest_good(Path(folder), like, say) if parallel.is_writer() else (-1, None)
    step = parallel.agree(step)
    return found if parallel.is_writer() or step < 0 else restore(folder, like, step)


def _newest_good(folder: Path, like: Any, say: Callable[[str], None]) -> tuple[int, tuple[Any, dict[str, Any]] | None]:
    bad: list[str] = []
    for step, path in _committed(folder):
        try:
            found = _load(path, like)
        except Damaged as error:
            bad.append(f"checkpoint {_name(step)} of {folder.name} {error}")
            continue
        for line in bad:
            say(f"{line}; using {_name(step)}")
        return step, found
    for line in bad:
        say(f"{line}; there is no good older one")
    return -1, None


def discard_after(folder: Path | str, step: int) -> None:
    """Deletes the checkpoints of later steps: those that a roll-back to this step has made void."""

    def discard() -> None:
        for later, path in _committed(Path(folder)):
            if later > step:
                _discard(path)

    from jaxgpt import parallel

    parallel.by_writer(discard, f"delete the checkpoints behind step {step} of {folder}")


def restore(folder: Path | str, like: Any, step: int) -> tuple[Any, dict[str, Any]]:
    """(state, meta) of one step, as `restore_latest` gives it. Raises BadInput without it, Damaged if not good."""
    path = _path(Path(folder), step)
    try:
        return _load(path, like)
    except Damaged as error:
        raise Damaged(f"checkpoint {_name(step)} of {path.parent.name} {error}") from error


def check(folder: Path | str, step: int) -> dict[str, Any]:
    """The meta of a checkpoint of which every file is as it was saved; reads no array. Raises as `restore` does."""
    path = _path(Path(folder), step)
    try:
        return _read_manifest(path)["meta"]
    except Damaged as error:
        raise Damaged(f"checkpoint {_name(step)} of {path.parent.name} {error}") from error


def _path(folder: Path, step: int) -> Path:
    paths = [path for s, path in _committed(folder) if s == step]
    if not paths:
        there = ", ".join(map(str, steps(folder))) or "none"
        raise BadInput(f"{folder} has no checkpoint of step {step}; there: {there}")
    return paths[0]


# --- names and commits ---------------------------------------------------------------------------------------------


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _temporary(folder: Path) -> Path:
    return folder / f"tmp.{os.getpid()}.{secrets.token_hex(4)}"


def _committed(folder: Path) -> list[tuple[int, Path]]:
    """(step, path), the one to try first first. A crash inside `_commit` may leave a step only as `.replaced`."""
    if not folder.is_dir():
        return []
    found = [
        (int(match[1]), match[2] is None, path)
        for path in folder.iterdir()
        if path.is_dir() and (match := re.fullmatch(r"step_(\d{8,})(\.replaced)?", path.name))
    ]
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _commit(temporary: Path, final: Path) -> None:
    """Renames into place. At every moment the step's old or new checkpoint stands under a name that readers try."""
    aside = final.with_name(f"{final.name}.replaced")
    if final.exists():
        os.replace(final, aside)  # a folder cannot be renamed over one that is not empty
    os.replace(temporary, final)
    sync_folder(final.parent)
    if aside.exists():
        _discard(aside)


def _tidy(folder: Path) -> None:
    """Removes what saves that were killed left behind, and puts back a checkpoint that was about to be replaced."""
    for aside in folder.glob("step_*.replaced"):
        final = aside.with_suffix("")
        if final.exists():
            _discard(aside)
        else:
            os.replace(aside, final)
    for left in folder.glob("tmp.*"):
        shutil.rmtree(left, ignore_errors=True)


def _discard(path: Path) -> None:
    """Deletes a checkpoint; renamed first, so that a kill leaves no half of one under a good name."""
    try:
        doomed = _temporary(path.parent)
        os.replace(path, doomed)
    except OSError:
        return  # tried again at the next save
    shutil.rmtree(doomed, ignore_errors=True)


def _reserve(folder: Path, size: int, leaves: int) -> None:
    """Raises OSError if `size` bytes in `leaves` arrays do not fit on the disk (or the quota) together with what
    describes them. Orbax would notice too, but it prints a hundred lines from its threads before it raises."""
    path = folder / "reserved"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(descriptor, 0, size + size // 50 + 1024 * leaves + 256 * 1024)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot reserve
            raise
    finally:
        os.close(descriptor)
        path.unlink()


# --- the tree as a flat dict ---------------------------------------------------------------------------------------


def _leaves(tree: Any) -> dict[str, tuple[list[str], Any]]:
    """{"state.params['w']": (["params", "w"], leaf)} in the tree's order."""
    import jax

    simple = jax.tree_util.keystr
    flat = jax.tree_util.tree_leaves_with_path(tree)
    found = {f"state{simple(path)}": ([simple((key,), simple=True) for key in path], leaf) for path, leaf in flat}
    if len(found) != len(flat):
        raise TypeError("two leaves of the state have the same path")
    return found


def _flatten(state: Any) -> dict[str, np.ndarray]:
    import jax

    from jaxgpt import parallel

    arrays = {}
    for name, (_, leaf) in _leaves(state).items():
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{name} is a typed PRNG key; save jax.random.key_data of it")
        arrays[name] = parallel.gather(leaf)
        if arrays[name].dtype.hasobject or arrays[name].dtype.kind in "USMm":
            raise TypeError(f"{name} is no array of numbers: {leaf!r}")
    return arrays


def _unflatten(manifest: dict[str, Any], arrays: dict[str, np.ndarray], like: Any) -> Any:
    import jax

    if like is not None:
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in _leaves(like)])
    tree: dict[str, Any] = {}
    for entry in manifest["tree"]:
        node = tree
        for key in entry["path"][:-1]:
            node = node.setdefault(key, {})
        node[entry["path"][-1] if entry["path"] else "state"] = arrays[entry["name"]]
    return tree


def _misfit(manifest: dict[str, Any], like: Any) -> str | None:
    """The first leaf in which the saved tree differs from `like`, in words."""
    saved = {entry["name"]: f"{entry['dtype']}{entry['shape']}" for entry in manifest["tree"]}
    wanted = {}
    for name, (_, leaf) in _leaves(like).items():
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        wanted[name] = f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
    for name in [*wanted, *saved]:
        if saved.get(name) != wanted.get(name):
            return f"{name} is {saved.get(name, 'absent')}, wanted: {wanted.get(name, 'absent')}"
    return None


# --- the manifest --------------------------------------------------------------------------------------------------


def _write_manifest(folder: Path, step: int, state: Any, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    tree = [
        {"name": name, "path": path, "dtype": arrays[name].dtype.name, "shape": list(arrays[name].shape)}
        for name, (path, _) in _leaves(state).items()
    ]
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            files[path.relative_to(folder).as_posix()] = {"size": os.fstat(file.fileno()).st_size, "sha256": digest}
    manifest = {"format": FORMAT, "step": step, "meta": jsonable(meta), "tree": tree, "files": files}
    with open(folder / "manifest.json", "wb") as file:
        file.write(_render(manifest))
        file.flush()
        os.fsync(file.fileno())


def _render(manifest: dict[str, Any]) -> bytes:
    """The one way to write a manifest, with its own sha256: any changed byte makes it differ from what it says."""
    text = json.dumps(manifest, indent=1, allow_nan=False)
    return f'{{"sha256": "{hashlib.sha256(text.encode()).hexdigest()}", "manifest": {text}}}\n'.encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint of which every file is as it was saved. Raises Damaged."""
    try:
        data = (path / "manifest.json").read_bytes()
    except FileNotFoundError as error:
        raise Damaged("is damaged (file manifest.json: missing)") from error
    except OSError as error:
        raise Damaged(f"is damaged (file manifest.json: {error.strerror})") from error
    try:
        manifest = json.loads(data)["manifest"]
        intact = _render(manifest) == data
    except (ValueError, TypeError, KeyError, RecursionError):
        intact = False
    if not intact:
        raise Damaged("is damaged (file manifest.json: sha256 differs)")
    if manifest["format"] != FORMAT:
        raise Damaged(f"has format {manifest['format']}, which this version does not read")
    for name, expected in manifest["files"].items():
        if trouble := _trouble(path / name, expected):
            raise Damaged(f"is damaged (file {name}: {trouble})")
    return manifest


def _trouble(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected["size"]:
                return f"{size} bytes instead of {expected['size']}"
            return None if hashlib.file_digest(file, "sha256").hexdigest() == expected["sha256"] else "sha256 differs"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return error.strerror


# --- Orbax ---------------------------------------------------------------------------------------------------------


def _load(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    manifest = _read_manifest(path)
    if like is not None and (misfit := _misfit(manifest, like)):
        raise Damaged(f"does not fit this run ({misfit})")
    stored = _orbax_load(path / "arrays")
    arrays = {}
    for entry in manifest["tree"]:
        shape, dtype = tuple(entry["shape"]), np.dtype(entry["dtype"])
        arrays[entry["name"]] = stored[entry["name"]] if 0 not in shape else np.zeros(shape, dtype)
        got = arrays[entry["name"]]
        if (got.shape, got.dtype) != (shape, dtype):
            raise Damaged(f"is damaged ({entry['name']} was read as {got.dtype}{list(got.shape)})")
    return _unflatten(manifest, arrays, like), manifest["meta"]


def _orbax_save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    from orbax.checkpoint import v1 as ocp

    _quietly(lambda: ocp.save(str(path.absolute()), arrays))


def _orbax_load(path: Path) -> dict[str, np.ndarray]:
    import jax
    from orbax.checkpoint import v1 as ocp

    # Each process by itself, while `save` is done by all of a model's together.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )

    def load() -> dict[str, np.ndarray]:
        with ocp.Context(multiprocessing_options=alone):
            return ocp.load(str(path.absolute()))

    return _quietly(load)


def _quietly(call: Callable[[], Any]) -> Any:
    """Runs an Orbax call in a thread of its own: in a notebook this one has an event loop, where Orbax refuses to work.

    On Ctrl-C the call is waited for, so that nothing writes into a folder that is being removed.
    """
    with _ONE_CALL:
        absl, before = logging.getLogger("absl"), logging.getLogger("absl").level
        absl.setLevel(logging.CRITICAL)  # Orbax reports its progress there, and what it raises anyway
        try:
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="orbax") as thread:
                return thread.submit(call).result()
        finally:
            absl.setLevel(before)
