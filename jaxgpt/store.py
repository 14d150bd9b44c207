"""The run table on disk: a sweep's folder of rows and curves, written so that a kill loses nothing that was whole.

    results/raw/<experiment>/<scale>/
        sweep.json               what the sweep is
        runs/<run_id>.json       one row per run
        curves/<run_id>.jsonl    one line per logged step
        checkpoints/ leases/     see checkpoint.py and lease.py

Whole files are written under a temporary name and renamed. Curves are append-only: a line without its newline is
torn and counts as never written. Each file has one writer at a time (lease.py sees to it); readers need no lock.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import platform
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.config import BadInput, flatten

if TYPE_CHECKING:
    import pandas

FOLDERS = ("runs", "curves", "checkpoints", "leases")
RUN_COLUMNS = ("run_id", "status", "code_version")  # stand in every table, also an empty one
CURVE_COLUMNS = ("run_id", "step")
# Grain orders the windows of streamed corpora, tokenizers makes tokens; null where they are not installed.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "tokenizers")

log = logging.getLogger("jaxgpt")


class StoreError(OSError):
    """The disk did not do what was asked. The message is one line and names the path."""


def store_error(path: Path | str, error: BaseException) -> StoreError:
    """The one-line StoreError for an error of the operating system (or of a library that wraps one)."""
    if out_of_space(error):
        return StoreError(f"{path}: no space left on the disk; free some and run the same command again")
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
    return StoreError(f"{path}: cannot be written: {reason}")


def out_of_space(error: BaseException) -> bool:
    """Whether a full disk or a used-up quota is behind an error, also one that a library raised in its own type."""
    code = getattr(error, "errno", None)
    return code in (errno.ENOSPC, errno.EDQUOT) or "no space left" in str(error).lower()


# --- folders -------------------------------------------------------------------------------------------------------


def prepare(folder: Path | str) -> Path:
    """Makes a sweep folder and its sub-folders, or raises BadInput, before anything is made, if they cannot be."""
    folder = Path(folder)
    wanted = [folder, *(folder / name for name in FOLDERS)]
    for path in wanted:
        nearest = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
        if not nearest.is_dir():
            raise BadInput(f"{folder}: {nearest} is a file; a folder is needed")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise BadInput(f"{folder}: no permission to write in {nearest}")
    for path in wanted:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise store_error(path, error) from error
    return folder


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder outlast a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


# --- whole files ---------------------------------------------------------------------------------------------------


def jsonable(value: Any) -> Any:
    """The same in JSON's types: NaN and infinities become null, arrays and scalars of NumPy and JAX numbers."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(name): jsonable(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(part) for part in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    raise TypeError(f"{value!r} of type {type(value).__name__} has no JSON form")


def write_json(path: Path | str, obj: Any) -> None:
    """Writes a whole JSON file: after a kill at any moment the path holds the old content or the new one.

    Raises StoreError when the disk is full or refuses; the old content then stands and nothing is left behind.
    """
    write_bytes(path, (json.dumps(jsonable(obj), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path | str) -> Any:
    """What `write_json` wrote. Raises FileNotFoundError, or BadInput naming a file that is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:  # not JSON, or not even text
        raise BadInput(f"{path} is not a JSON file: {error}") from error


def write_bytes(path: Path | str, data: bytes) -> None:
    """`write_json` for bytes that are already made."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                _write(descriptor, data)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise store_error(path, error) from error


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:  # a disk that fills up takes a part first and fails on the rest
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


# --- rows ----------------------------------------------------------------------------------------------------------


def row_path(folder: Path | str, run_id: str) -> Path:
    """Where a run's row lies."""
    return Path(folder) / "runs" / f"{run_id}.json"


def write_row(folder: Path | str, row: Mapping[str, Any]) -> None:
    """Writes the row of run `row["run_id"]`, replacing an older one whole. Raises StoreError."""
    path = row_path(folder, row["run_id"])
    _make_parent(path)
    write_json(path, row)


def read_row(folder: Path | str, run_id: str, warn: Callable[[str], None] = log.warning) -> dict[str, Any] | None:
    """The row of a run, or None without one.

    A row file that cannot be read as a JSON object is warned about in one line and counts as absent: a row is made
    from the run's checkpoint and curve, so training it again costs time but a half-read row would cost truth.
    """
    path = row_path(folder, run_id)
    try:
        row = read_json(path)
    except FileNotFoundError:
        return None
    except (BadInput, OSError) as error:
        warn(f"{path} cannot be read and counts as absent: {error}")
        return None
    if not isinstance(row, dict):
        warn(f"{path} holds no row and counts as absent")
        return None
    return row


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise store_error(path.parent, error) from error


# --- curves --------------------------------------------------------------------------------------------------------


def curve_path(folder: Path | str, run_id: str) -> Path:
    """Where a run's curve lies."""
    return Path(folder) / "curves" / f"{run_id}.jsonl"


def append_curve(folder: Path | str, run_id: str, points: Iterable[Mapping[str, Any]]) -> None:
    """Appends points, one JSON object per line, and waits once for the disk. A torn last line is cut first.

    Raises StoreError when the disk is full; the file then ends where it ended before.
    """
    path = curve_path(folder, run_id)
    data = "".join(json.dumps(jsonable(point), allow_nan=False) + "\n" for point in points).encode()
    if not data:
        return
    _make_parent(path)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            end = _whole_lines(descriptor)
            os.ftruncate(descriptor, end)
            os.lseek(descriptor, end, os.SEEK_SET)
            try:
                _write(descriptor, data)
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise store_error(path, error) from error


def _whole_lines(descriptor: int) -> int:
    """Bytes up to and with the last newline."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return size
    return os.pread(descriptor, size, 0).rfind(b"\n") + 1


def read_curve(folder: Path | str, run_id: str) -> list[dict[str, Any]]:
    """The points of a run in the order written; [] without a file. A torn last line (no newline) is dropped.

    Raises BadInput naming file and line for a broken line that is not torn.
    """
    return [point for _, point in _lines(curve_path(folder, run_id))]


def truncate_curve(folder: Path | str, run_id: str, step: int) -> None:
    """Keeps the points up to and with `step`, their bytes unchanged; the file is replaced whole. Raises StoreError."""
    path = curve_path(folder, run_id)
    kept = b"".join(line + b"\n" for line, point in _lines(path) if point["step"] <= step)
    if path.exists() and path.stat().st_size != len(kept):
        write_bytes(path, kept)


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            point = json.loads(line)
        except ValueError:
            point = None
        if not isinstance(point, dict) or not isinstance(point.get("step"), int):
            raise BadInput(f"{path}, line {number}, is not a point of a curve; delete the line or the file")
        found.append((line, point))
    return found


# --- the tables ----------------------------------------------------------------------------------------------------


def load(path: Path | str, warn: Callable[[str], None] = log.warning) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """(runs, curves) of a sweep folder: one line per run, and one per run and logged step. null becomes NaN.

    As `load_runs`; raises BadInput for a broken curve too.
    """
    runs = load_runs(path, warn)
    points = [
        {"run_id": p.stem, **point}
        for p in sorted((Path(path) / "curves").glob("*.jsonl"))
        for point in read_curve(path, p.stem)
    ]
    return runs, _frame(points, CURVE_COLUMNS)


def load_runs(path: Path | str, warn: Callable[[str], None] = log.warning) -> pandas.DataFrame:
    """The runs of a sweep folder, one line each; no curve is read. null becomes NaN.

    Nested fields of a row become dotted columns. Rows of mixed code versions and rows that cannot be read are warned
    about, one line each. Raises BadInput for a path that is not a sweep folder.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path} does not exist; a sweep folder is needed, such as results/raw/demo/laptop")
    if not path.is_dir():
        raise BadInput(f"{path} is a file; a sweep folder is needed, such as results/raw/demo/laptop")
    if not (path / "sweep.json").is_file() and not (path / "runs").is_dir():
        raise BadInput(f"{path} is not a sweep folder: it holds neither sweep.json nor runs/")
    ids = sorted(p.stem for p in (path / "runs").glob("*.json") if not p.name.startswith("."))
    rows = [row for name in ids if (row := read_row(path, name, warn)) is not None]
    runs = _frame([flatten(row) for row in rows], RUN_COLUMNS)
    if line := mixed_versions(runs):
        warn(line)
    return runs


def planned(folder: Path | str) -> dict[str, dict[str, Any]]:
    """The runs that a folder's sweep.json plans, by id: config, identity, planned_by. {} without the file.

    Raises BadInput naming a sweep.json that lists no runs.
    """
    path = Path(folder) / "sweep.json"
    found = read_json(path) if path.exists() else {"runs": {}}
    runs = found.get("runs") if isinstance(found, dict) else None
    if not isinstance(runs, dict) or not all(isinstance(run, dict) and "config" in run for run in runs.values()):
        raise BadInput(f"{path} does not list the runs of a sweep; delete it, and the next sweep writes it again")
    return runs


def _frame(records: list[dict[str, Any]], columns: tuple[str, ...]) -> pandas.DataFrame:
    import pandas

    names = list(dict.fromkeys([*columns, *(name for record in records for name in record)]))
    frame = pandas.DataFrame.from_records(records, columns=names)
    filled = frame.count().to_dict()
    empty = [name for name in names if not filled[name]]
    # A column of nulls is a column of numbers that nobody has measured, unless it says which run it is.
    return frame.astype({name: "str" if name in RUN_COLUMNS else "float64" for name in empty if len(frame)})


def mixed_versions(runs: pandas.DataFrame) -> str | None:
    """A warning line if rows of several code versions stand in one table, else None."""
    if "code_version" not in runs:
        return None
    counts = runs["code_version"].fillna("unknown").value_counts()
    if len(counts) < 2:
        return None
    listed = ", ".join(f"{version} ({count} run{'s' if count > 1 else ''})" for version, count in counts.items())
    return f"these runs come from {len(counts)} code versions: {listed}; a fit over them may mix different programs"


# --- versions ------------------------------------------------------------------------------------------------------


@cache  # the code that this process runs does not change under it
def code_version() -> str:
    """The git commit ("1a2b3c4d5e6f", "-dirty" if tracked .py files differ), else the package version. Never fails."""
    return _git_version(Path(__file__).resolve().parent.parent) or _package_version("jaxgpt") or "unknown"


def _git_version(root: Path) -> str | None:
    """None where `root` is not a checkout that tracks jaxgpt (a package installed inside somebody's repository)."""
    import subprocess

    # Inside a git hook GIT_DIR points at the repository that is being committed to, whatever -C says.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *words],
            env=environment,
            check=True,
            timeout=10,
            capture_output=True,
            text=True,
        ).stdout

    try:
        git("ls-files", "--error-unmatch", "jaxgpt/__init__.py")
        status = git(
            "status",
            "--porcelain=v2",
            "--branch",
            "--untracked-files=no",
            "--",
            "jaxgpt/*.py",
            "experiments/*.py",
            "analysis/*.py",
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    commit = re.search(r"^# branch\.oid ([0-9a-f]{12})", status, re.MULTILINE)
    changed = any(not line.startswith("#") for line in status.splitlines())
    return commit and commit[1] + ("-dirty" if changed else "")


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that the numbers depend on; null for one that is not installed."""
    return {"python": platform.python_version()} | {name: _package_version(name) for name in PACKAGES}


def joined(values: Iterable[Any]) -> str:
    """The distinct values in order, as "a+b": what a run that went on under another version has for its version."""
    return "+".join(dict.fromkeys(map(str, values)))


def _package_version(name: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
