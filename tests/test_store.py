"""The run table on disk: what a kill, a full disk or a torn line leaves is whole, and what is broken says so."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxgpt import store
from jaxgpt.config import BadInput


def points(*steps):
    return [{"step": s, "loss": 1.0 / s} for s in steps]


def one_line(error):
    return "\n" not in str(error.value)


@pytest.fixture
def full_disk(monkeypatch):
    """Fills the disk: the named os function raises ENOSPC, after letting `allow` calls through."""

    def fill(name, allow=0, code=errno.ENOSPC):
        real, calls = getattr(os, name), []

        def function(*args, **kwargs):
            calls.append(args)
            if len(calls) > allow:
                raise OSError(code, os.strerror(code))
            if name == "write":  # a disk that fills up takes a part first
                return real(args[0], bytes(args[1])[:5])
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, function)

    return fill


# --- whole files ---------------------------------------------------------------------------------------------------


def test_what_is_not_a_number_is_written_as_null_and_numpy_becomes_plain_json(tmp_path):
    obj = {
        "nan": float("nan"),
        "inf": [float("inf"), -np.inf],
        "f32": np.float32(0.1),
        "bad": np.float32("nan"),
        "i": np.int64(7),
        "b": np.bool_(True),
        "a": np.array([[1.0, np.nan]]),
        "deep": {"x": (1, None, "s")},
        3: False,
    }
    store.write_json(tmp_path / "x.json", obj)
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
        "nan": None,
        "inf": [None, None],
        "f32": float(np.float32(0.1)),
        "bad": None,
        "i": 7,
        "b": True,
        "a": [[1.0, None]],
        "deep": {"x": [1, None, "s"]},
        "3": False,
    }
    assert store.read_json(tmp_path / "x.json") == json.loads((tmp_path / "x.json").read_text())


def test_what_has_no_json_form_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="has no JSON form"):
        store.write_json(tmp_path / "x.json", {"a": 1, "b": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "x.json").write_bytes(b'{"a": 1')
    with pytest.raises(BadInput, match=r"x\.json is not a JSON file") as error:
        store.read_json(tmp_path / "x.json")
    assert one_line(error)


@pytest.mark.parametrize(("name", "allow"), [("open", 0), ("write", 0), ("write", 2), ("fsync", 0), ("replace", 0)])
def test_a_full_disk_leaves_the_old_file_whole_and_nothing_behind(tmp_path, full_disk, name, allow):
    path = tmp_path / "x.json"
    store.write_json(path, {"a": "old"})
    before = path.read_bytes()
    full_disk(name, allow)
    with pytest.raises(store.StoreError, match=r"x\.json: no space left on the disk") as error:
        store.write_json(path, {"a": "new"})
    assert one_line(error)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_used_up_quota_is_a_full_disk_and_another_error_keeps_its_reason(tmp_path, full_disk, monkeypatch):
    full_disk("fsync", code=errno.EDQUOT)
    with pytest.raises(store.StoreError, match="no space left"):
        store.write_json(tmp_path / "x.json", {})
    monkeypatch.undo()
    with pytest.raises(store.StoreError, match="cannot be written: No such file or directory"):
        store.write_json(tmp_path / "absent" / "x.json", {})


# --- folders -------------------------------------------------------------------------------------------------------


def test_prepare_makes_the_folders_and_may_be_called_again(tmp_path):
    for _ in range(2):
        assert store.prepare(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["checkpoints", "curves", "leases", "runs"]


@pytest.mark.parametrize("blocked", ["raw", "raw/demo", "raw/demo/smoke", "raw/demo/smoke/curves"])
def test_a_file_where_a_folder_should_be_is_named_before_anything_is_made(tmp_path, blocked):
    file = tmp_path / blocked
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=f"{file} is a file; a folder is needed") as error:
        store.prepare(tmp_path / "raw/demo/smoke")
    assert one_line(error)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_write_permission_is_named_before_anything_is_made(tmp_path, monkeypatch):
    real = os.access  # root may write anywhere, so the answer is injected
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and real(path, mode))
    with pytest.raises(BadInput, match=f"no permission to write in {tmp_path}$"):
        store.prepare(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


# --- rows ----------------------------------------------------------------------------------------------------------


def test_a_row_comes_back_and_a_later_one_replaces_it_whole(tmp_path):
    store.write_row(tmp_path, {"run_id": "ab", "status": "running", "extra": 1})
    store.write_row(tmp_path, {"run_id": "ab", "status": "done", "loss": float("nan")})
    assert store.read_row(tmp_path, "ab") == {"run_id": "ab", "status": "done", "loss": None}
    assert store.read_row(tmp_path, "cd") is None


@pytest.mark.parametrize("content", [b"", b'{"run_id": "a', b"[1]", b"\xff\xfe\x00"])
def test_a_row_that_cannot_be_read_counts_as_absent_and_is_said_in_one_line(tmp_path, content):
    store.write_row(tmp_path, {"run_id": "ab"})
    store.row_path(tmp_path, "ab").write_bytes(content)
    said = []
    assert store.read_row(tmp_path, "ab", said.append) is None
    assert len(said) == 1
    assert str(store.row_path(tmp_path, "ab")) in said[0]
    assert "\n" not in said[0]


# --- curves --------------------------------------------------------------------------------------------------------


def test_points_are_appended_in_order_and_nan_becomes_null(tmp_path):
    assert store.read_curve(tmp_path, "ab") == []
    store.append_curve(tmp_path, "ab", points(1, 2))
    store.append_curve(tmp_path, "ab", [])
    store.append_curve(tmp_path, "ab", [{"step": np.int32(3), "loss": np.float32("nan")}])
    assert store.read_curve(tmp_path, "ab") == [*points(1, 2), {"step": 3, "loss": None}]


@pytest.mark.parametrize("torn", [b"{", b'{"step": 3, "lo', b'{"step": 3}', b"\0" * 50, b"\xff"])
def test_a_torn_last_line_is_dropped_when_read_and_cut_before_the_next_point(tmp_path, torn):
    store.append_curve(tmp_path, "ab", points(1, 2))
    path = store.curve_path(tmp_path, "ab")
    with open(path, "ab") as file:
        file.write(torn)
    assert store.read_curve(tmp_path, "ab") == points(1, 2)
    store.append_curve(tmp_path, "ab", points(3))
    assert store.read_curve(tmp_path, "ab") == points(1, 2, 3)
    assert torn not in path.read_bytes().split(b"\n")


def test_a_curve_that_is_nothing_but_a_torn_line_starts_again(tmp_path):
    path = store.curve_path(tmp_path, "ab")
    path.parent.mkdir()
    path.write_bytes(b'{"ste')
    store.append_curve(tmp_path, "ab", points(1))
    assert store.read_curve(tmp_path, "ab") == points(1)


@pytest.mark.parametrize("broken", [b"{", b"[1]", b"", b'{"loss": 1}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path, broken):
    path = store.curve_path(tmp_path, "ab")
    path.parent.mkdir()
    path.write_bytes(b'{"step": 1}\n' + broken + b'\n{"step": 3}\n')
    with pytest.raises(BadInput, match=r"ab\.jsonl, line 2, ") as error:
        store.read_curve(tmp_path, "ab")
    assert one_line(error)


def test_truncating_keeps_the_bytes_of_the_points_up_to_and_with_the_step(tmp_path):
    store.append_curve(tmp_path, "ab", points(1, 3, 7))
    path = store.curve_path(tmp_path, "ab")
    lines = path.read_bytes().splitlines(keepends=True)
    with open(path, "ab") as file:
        file.write(b"{torn")
    for step, kept in [(9, 3), (7, 3), (6, 2), (3, 2), (0, 0)]:
        store.truncate_curve(tmp_path, "ab", step)
        assert path.read_bytes() == b"".join(lines[:kept])
    store.truncate_curve(tmp_path, "absent", 3)
    assert not store.curve_path(tmp_path, "absent").exists()


@pytest.mark.parametrize(("name", "allow"), [("write", 0), ("write", 3), ("fsync", 0)])
def test_a_full_disk_leaves_a_curve_ending_where_it_ended(tmp_path, full_disk, name, allow):
    store.append_curve(tmp_path, "ab", points(1))
    before = store.curve_path(tmp_path, "ab").read_bytes()
    full_disk(name, allow)
    with pytest.raises(store.StoreError, match=r"ab\.jsonl: no space left on the disk"):
        store.append_curve(tmp_path, "ab", points(2, 3, 4))
    assert store.curve_path(tmp_path, "ab").read_bytes() == before


# --- tables --------------------------------------------------------------------------------------------------------


def sweep(folder):
    store.prepare(folder)
    store.write_json(folder / "sweep.json", {})
    return folder


def test_load_gives_one_line_per_run_and_one_per_run_and_step(tmp_path):
    folder = sweep(tmp_path / "s")
    store.write_row(
        folder,
        {
            "run_id": "a",
            "status": "done",
            "code_version": "v1",
            "loss": 1.5,
            "gap": None,
            "config": {"model": {"d_model": 8}},
        },
    )
    store.write_row(folder, {"run_id": "b", "status": "diverged", "code_version": "v1", "loss": None, "gap": None})
    store.append_curve(folder, "a", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "eval_loss": 1.75}])
    store.append_curve(folder, "b", [{"step": 1, "loss": None}])
    said = []
    runs, curves = store.load(folder, said.append)
    assert said == []
    assert list(runs["run_id"]) == ["a", "b"]
    assert list(runs["status"]) == ["done", "diverged"]
    assert runs["config.model.d_model"][0] == 8
    assert runs["loss"].dtype == runs["gap"].dtype == np.float64
    assert runs["loss"][0] == 1.5
    assert runs[["loss", "gap"]].isna().sum().to_dict() == {"loss": 1, "gap": 2}
    assert curves[["run_id", "step"]].to_numpy().tolist() == [["a", 1], ["a", 2], ["b", 1]]
    assert curves["eval_loss"].fillna(-1).tolist() == [-1, 1.75, -1]


def test_the_runs_alone_are_read_whatever_is_wrong_with_a_curve(tmp_path):
    folder = sweep(tmp_path / "s")
    store.write_row(folder, {"run_id": "a", "versions": {"jax": "1"}})
    store.curve_path(folder, "b").write_text("broken\n")
    assert store.load_runs(folder)["versions.jax"].tolist() == ["1"]
    with pytest.raises(BadInput, match=r"b\.jsonl, line 1"):
        store.load(folder)


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"runs": []}', '{"runs": {"a": {}}}', '{"runs": {"a": 1}}'])
def test_a_sweep_file_that_lists_no_runs_is_named(tmp_path, content):
    assert store.planned(tmp_path) == {}
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(BadInput, match=r"sweep\.json does not list the runs of a sweep; delete it") as error:
        store.planned(tmp_path)
    assert one_line(error)


def test_versions_are_joined_each_once_in_order():
    assert store.joined(["a1", "b2", "a1", None]) == "a1+b2+None"
    assert store.joined([]) == ""


def test_an_empty_sweep_gives_empty_tables_with_the_standard_columns(tmp_path):
    runs, curves = store.load(sweep(tmp_path / "s"))
    assert (list(runs), len(runs)) == (list(store.RUN_COLUMNS), 0)
    assert (list(curves), len(curves)) == (list(store.CURVE_COLUMNS), 0)
    assert store.mixed_versions(runs) is None


def test_load_drops_a_torn_last_line_and_says_which_row_it_could_not_read(tmp_path):
    folder = sweep(tmp_path / "s")
    store.write_row(folder, {"run_id": "a"})
    store.row_path(folder, "b").write_text("{")
    store.append_curve(folder, "a", points(1))
    with open(store.curve_path(folder, "a"), "a") as file:
        file.write('{"step": 2')
    said = []
    runs, curves = store.load(folder, said.append)
    assert (list(runs["run_id"]), list(curves["step"]), len(said)) == (["a"], [1], 1)
    assert "b.json" in said[0]


def test_what_is_no_sweep_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in [("absent", "does not exist"), ("file", "is a file"), ("empty", "is not a sweep folder")]:
        with pytest.raises(BadInput, match=f"{tmp_path / name} {message}") as error:
            store.load(tmp_path / name)
        assert one_line(error)


def test_rows_of_several_code_versions_in_one_table_are_warned_about(tmp_path):
    folder = sweep(tmp_path / "s")
    for name, version in [("a", "v1"), ("b", "v1")]:
        store.write_row(folder, {"run_id": name, "code_version": version})
    assert store.mixed_versions(store.load(folder)[0]) is None
    store.write_row(folder, {"run_id": "c", "code_version": "v2-dirty"})
    said = []
    runs, _ = store.load(folder, said.append)
    assert said == [store.mixed_versions(runs)]
    assert "v1 (2 runs), v2-dirty (1 run)" in said[0]


# --- versions ------------------------------------------------------------------------------------------------------


def git(folder, *words):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    settings = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", "-C", folder, *settings, *words], env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_code_version_is_the_commit_and_says_when_the_packages_differ(tmp_path, monkeypatch):
    (tmp_path / "jaxgpt" / "tasks").mkdir(parents=True)
    for name in ("jaxgpt/__init__.py", "jaxgpt/tasks/a.py", "README.md"):
        (tmp_path / name).write_text("")
    git(tmp_path, "init", "-q")
    assert store._git_version(tmp_path) is None  # nothing is tracked yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert store._git_version(tmp_path) == commit
    (tmp_path / "README.md").write_text("words change no numbers")
    (tmp_path / "jaxgpt" / "new.py").write_text("untracked")
    assert store._git_version(tmp_path) == commit
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as inside a git hook
    (tmp_path / "jaxgpt" / "tasks" / "a.py").write_text("x = 1\n")
    assert store._git_version(tmp_path) == commit + "-dirty"


def test_outside_git_or_without_it_the_code_version_is_the_package_version(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")  # somebody else's repository, with an environment in it
    installed = tmp_path / "site-packages"
    (installed / "jaxgpt").mkdir(parents=True)
    (installed / "jaxgpt" / "__init__.py").write_text("")
    assert store._git_version(installed) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert store._git_version(Path(store.__file__).parent.parent) is None
    assert store.code_version.__wrapped__() == store._package_version("jaxgpt") is not None


def test_package_versions_are_those_that_are_imported():
    versions = store.package_versions()
    assert versions["numpy"] == np.__version__
    assert versions["python"] == sys.version.split()[0]
    assert {"jax", "flax", "optax", "orbax-checkpoint"} < versions.keys()
    assert store._package_version("no-such-package-of-ours") is None


def test_importing_the_store_imports_neither_pandas_nor_jax():
    code = "import sys, jaxgpt.store, jaxgpt.lease; print([m for m in ('pandas', 'jax', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
