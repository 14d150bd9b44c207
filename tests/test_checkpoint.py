"""Checkpoints: the bits come back, damage is noticed and named, and a kill or a full disk costs no good checkpoint."""

import asyncio
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import checkpoint
from jaxgpt.config import BadInput
from jaxgpt.store import StoreError

ROOT = Path(checkpoint.__file__).parent.parent


class State(NamedTuple):
    params: dict
    opt: tuple
    step: jax.Array
    key: jax.Array


def small(value, n=6):
    return {"w": np.full((n, n), value, np.float32), "step": np.int32(value)}


def saved(folder, *steps, **kwargs):
    for step in steps:
        checkpoint.save(folder, step, small(step), {"step": step}, **kwargs)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


@pytest.fixture
def said():
    return []


# --- what is saved comes back --------------------------------------------------------------------------------------


def test_a_training_state_comes_back_bit_for_bit_in_its_own_types(tmp_path, said):
    params = {"block/0": {"w": jax.random.normal(jax.random.key(0), (5, 3)), "b": jnp.zeros((0, 4))}, "s": jnp.ones(())}
    state = State(
        params,
        optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params),
        jnp.int32(7),
        jax.random.key_data(jax.random.key(3)),
    )
    checkpoint.save(tmp_path, 7, state, {"step": 7, "retry": 1, "loss": float("nan"), "name": "é"})
    for like in (state, jax.eval_shape(lambda: state)):
        found, meta = checkpoint.restore_latest(tmp_path, like, said.append)
        assert_same_bits(found, state)
        assert meta == {"step": 7, "retry": 1, "loss": None, "name": "é"}
    assert said == []


def test_every_bit_pattern_of_every_dtype_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    shapes = [(), (1,), (33,), (3, 5), (2, 3, 4)]
    dtypes = ["float32", "bfloat16", "float16", "float64", "uint32", "int32", "int64", "uint8", "int8"]
    state = {
        d: [np.frombuffer(rng.bytes(int(np.prod(s)) * jnp.dtype(d).itemsize), jnp.dtype(d)).reshape(s) for s in shapes]
        for d in dtypes
    }
    state["bool"] = [rng.random(s) < 0.5 for s in shapes]
    # Orbax leaves out chunks that equal their fill value: -0.0 is equal to 0.0 and has other bits.
    state["zeros"] = {
        "plus": np.zeros((4, 4), np.float32),
        "minus": -np.zeros((4, 4), np.float32),
        "minus16": -jnp.zeros((9,), jnp.bfloat16),
        "nan": np.full((3,), np.nan, np.float32),
    }
    state["python"] = (3, 2.5, True)
    checkpoint.save(tmp_path, 0, state, {})
    assert_same_bits(checkpoint.restore_latest(tmp_path, state)[0], state)


def test_without_like_a_checkpoint_opens_as_nested_dicts(tmp_path):
    params = {"a": {"w": np.arange(6.0).reshape(2, 3)}}
    checkpoint.save(tmp_path, 3, State(params, (np.int32(1), optax.EmptyState()), np.int32(3), np.zeros((0, 2))), {})
    found, _ = checkpoint.restore_latest(tmp_path)
    assert found.keys() == {"params", "opt", "step", "key"}
    assert found["params"]["a"]["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["opt"] == {"0": 1}
    assert found["key"].shape == (0, 2)
    checkpoint.save(tmp_path, 4, np.arange(3), {})
    assert checkpoint.restore_latest(tmp_path)[0]["state"].tolist() == [0, 1, 2]


def test_a_state_of_another_shape_type_or_tree_is_not_restored_and_the_leaf_is_named(tmp_path, said):
    saved(tmp_path / "ab", 1)
    for like, message in [
        (small(0, n=7), "state['w'] is float32[6, 6], wanted: float32[7, 7]"),
        (small(0) | {"w": np.zeros((6, 6), np.float16)}, "state['w'] is float32[6, 6], wanted: float16[6, 6]"),
        ({"w": np.zeros((6, 6), np.float32)}, "state['step'] is int32[], wanted: absent"),
        (small(0) | {"new": np.int8(0)}, "state['new'] is absent, wanted: int8[]"),
    ]:
        assert checkpoint.restore_latest(tmp_path / "ab", like, said.append) is None
        assert said.pop() == (
            f"checkpoint step_00000001 of ab does not fit this run ({message}); there is no good older one"
        )
    assert said == []


def test_what_cannot_be_saved_is_refused_and_named(tmp_path):
    for leaf, message in [
        (jax.random.key(0), "is a typed PRNG key"),
        ("text", "is no array of numbers"),
        (object(), "is no array of numbers"),
    ]:
        with pytest.raises(TypeError, match=rf"state\['x'\] {message}"):
            checkpoint.save(tmp_path, 1, {"x": leaf}, {})
    with pytest.raises(ValueError, match="keep=0"):
        checkpoint.save(tmp_path, 1, small(1), {}, keep=0)
    assert names(tmp_path) == []


def test_saving_and_restoring_work_inside_an_event_loop_as_in_a_notebook(tmp_path):
    async def cell():
        saved(tmp_path, 1)
        return checkpoint.restore_latest(tmp_path, small(0))

    assert_same_bits(asyncio.run(cell())[0], small(1))


# --- names, pruning, replacement -----------------------------------------------------------------------------------


def test_the_newest_are_kept_and_an_empty_folder_has_none(tmp_path, said):
    assert checkpoint.steps(tmp_path / "absent") == []
    assert checkpoint.restore_latest(tmp_path / "absent", small(0), said.append) is None
    saved(tmp_path, 1, 20, 300)
    assert names(tmp_path) == ["step_00000020", "step_00000300"]
    assert checkpoint.steps(tmp_path) == [20, 300]
    saved(tmp_path, 4000, keep=1)
    assert checkpoint.steps(tmp_path) == [4000]
    saved(tmp_path, 5000, 6000, keep=3)
    assert checkpoint.steps(tmp_path) == [4000, 5000, 6000]
    saved(tmp_path, 7000, 8000, keep=1, spare=(5000, 5500))
    assert checkpoint.steps(tmp_path) == [5000, 8000]
    assert said == []


def test_going_back_to_an_earlier_step_never_deletes_what_was_just_saved(tmp_path):
    saved(tmp_path, 100, 200)
    saved(tmp_path, 50, keep=1)
    assert checkpoint.steps(tmp_path) == [50, 100, 200]
    saved(tmp_path, 150, keep=1)
    assert checkpoint.steps(tmp_path) == [150, 200]


def test_a_step_is_restored_by_number_and_a_missing_one_is_said(tmp_path):
    saved(tmp_path, 1, 2)
    assert_same_bits(checkpoint.restore(tmp_path, small(0), 1)[0], small(1))
    with pytest.raises(BadInput, match=r"has no checkpoint of step 3; there: 1, 2$"):
        checkpoint.restore(tmp_path, small(0), 3)
    (tmp_path / "step_00000001" / "manifest.json").unlink()
    with pytest.raises(checkpoint.Damaged, match=r"step_00000001 of .* is damaged \(file manifest.json: missing\)$"):
        checkpoint.restore(tmp_path, small(0), 1)


def test_the_same_step_is_replaced(tmp_path):
    saved(tmp_path, 1, 2)
    checkpoint.save(tmp_path, 2, small(22), {"again": True})
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    found, meta = checkpoint.restore_latest(tmp_path, small(0))
    assert_same_bits(found, small(22))
    assert meta == {"again": True}


def test_before_and_after_each_rename_and_deletion_of_a_save_the_newest_can_be_restored(tmp_path, monkeypatch, said):
    saved(tmp_path, 1, 2)
    moments = []

    def watch(module, name):
        real = getattr(module, name)

        def function(*args, **kwargs):
            for call in (lambda: None, lambda: real(*args, **kwargs)):
                call()
                moments.append(int(checkpoint.restore_latest(tmp_path, small(0), said.append)[0]["step"]))

        monkeypatch.setattr(module, name, function)

    watch(checkpoint.os, "replace")
    watch(checkpoint.shutil, "rmtree")
    checkpoint.save(tmp_path, 2, small(22), {})
    saved(tmp_path, 3)
    assert list(dict.fromkeys(moments)) == [2, 22, 3]
    assert said == []


def test_a_kill_between_the_two_renames_of_a_replacement_costs_nothing(tmp_path, said):
    saved(tmp_path, 1, 2)
    os.replace(tmp_path / "step_00000002", tmp_path / "step_00000002.replaced")  # killed here
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert_same_bits(checkpoint.restore_latest(tmp_path, small(0), said.append)[0], small(2))
    saved(tmp_path, 3)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    shutil.copytree(tmp_path / "step_00000002", tmp_path / "step_00000003.replaced")  # killed after the second rename
    assert_same_bits(checkpoint.restore_latest(tmp_path, small(0), said.append)[0], small(3))
    saved(tmp_path, 4)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]
    assert said == []


def test_what_dead_saves_left_is_ignored_and_removed_by_the_next_save(tmp_path, said):
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "tmp.123.ab")
    (tmp_path / "tmp.123.ab" / "manifest.json").unlink()
    (tmp_path / "tmp.4.cd").mkdir()
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.restore_latest(tmp_path, small(0), said.append)[1] == {"step": 1}
    saved(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    assert said == []


# --- damage --------------------------------------------------------------------------------------------------------


def flip(data, position, bit=1):
    return data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :]


DAMAGES = {
    "flipped first byte": lambda data: flip(data, 0),
    "flipped middle byte": lambda data: flip(data, len(data) // 2, 128),
    "flipped last byte": lambda data: flip(data, len(data) - 1),
    "truncated by a byte": lambda data: data[:-1],
    "truncated by half": lambda data: data[: len(data) // 2],
    "emptied": lambda _: b"",
    "removed": lambda _: None,
    "garbage": lambda data: b"garbage" * (len(data) // 7) + b"g" * (len(data) % 7),
    "garbage after its end": lambda data: data + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_noticed_named_in_one_line_and_the_last_good_one_is_used(tmp_path, said, damage):
    folder = saved(tmp_path / "ab", 100, 200)
    files = sorted(path for path in (folder / "step_00000200").rglob("*") if path.is_file())
    assert len(files) > 5
    for path in files:
        before = path.read_bytes()
        if not before and damage not in ("removed", "garbage after its end"):
            continue
        after = DAMAGES[damage](before)
        path.unlink()
        if after is not None:
            path.write_bytes(after)
        found, meta = checkpoint.restore_latest(folder, small(0), said.append)
        path.write_bytes(before)
        assert_same_bits(found, small(100))
        assert meta == {"step": 100}
        file = path.relative_to(folder / "step_00000200").as_posix()
        assert len(said) == 1
        assert said[0].startswith(f"checkpoint step_00000200 of ab is damaged (file {file}: ")
        assert said.pop().endswith("); using step_00000100")
    assert_same_bits(checkpoint.restore_latest(folder, small(0), said.append)[0], small(200))
    assert said == []


def test_no_byte_of_the_manifest_can_change_unnoticed(tmp_path):
    path = saved(tmp_path, 1) / "step_00000001" / "manifest.json"
    data = path.read_bytes()
    for position in [*range(0, len(data), 5), data.index(b'"step": 1') + len(b'"step": ')]:
        path.write_bytes(flip(data, position, 1 << position % 8))
        with pytest.raises(checkpoint.Damaged, match="manifest"):
            checkpoint._read_manifest(path.parent)


def test_a_manifest_that_is_other_json_is_damage(tmp_path, said):
    path = saved(tmp_path / "ab", 1) / "step_00000001" / "manifest.json"
    whole = json.loads(path.read_text())
    for content in ("null", "[]", "{}", json.dumps(whole), json.dumps(whole["manifest"]), "[" * 10**5):
        path.write_text(content)
        assert checkpoint.restore_latest(tmp_path / "ab", small(0), said.append) is None
        assert said.pop() == (
            "checkpoint step_00000001 of ab is damaged (file manifest.json: sha256 differs); there is no good older one"
        )


def test_each_of_two_damaged_ones_is_named(tmp_path, said):
    folder = saved(tmp_path / "ab", 1, 2, 3, keep=3)
    (folder / "step_00000003" / "manifest.json").unlink()
    (folder / "step_00000002" / "arrays" / "state" / "_METADATA").write_text("x")
    assert checkpoint.restore_latest(folder, small(0), said.append)[1] == {"step": 1}
    assert [line.split(" of ")[0] for line in said] == ["checkpoint step_00000003", "checkpoint step_00000002"]
    assert all(line.endswith("; using step_00000001") for line in said)


def test_a_damaged_one_is_replaced_by_a_good_one_when_training_comes_there_again(tmp_path, said):
    saved(tmp_path, 1, 2)
    (tmp_path / "step_00000002" / "manifest.json").write_text("x")
    saved(tmp_path, 2)
    assert_same_bits(checkpoint.restore_latest(tmp_path, small(0), said.append)[0], small(2))
    assert said == []


# --- a full disk ---------------------------------------------------------------------------------------------------


def raising(error):
    def function(*_args, **_kwargs):
        raise error

    return function


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
# What tensorstore makes of a full disk (seen on a tmpfs of 300 kB).
FULL_IN_ORBAX = ValueError('RESOURCE_EXHAUSTED: Error writing "state.w/c/0": No space left on device')


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (os, "posix_fallocate", FULL),
        (os, "mkdir", FULL),
        (os, "fsync", FULL),
        (os, "replace", FULL),
        (checkpoint, "_orbax_save", FULL_IN_ORBAX),
    ],
)
def test_a_full_disk_is_one_line_and_costs_no_older_checkpoint(tmp_path, monkeypatch, said, capfd, owner, name, error):
    saved(tmp_path, 1, 2)
    for step in (2, 3):  # replacing one, and a new one
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, raising(error))
            with pytest.raises(StoreError, match=f"step_0000000{step}: no space left on the disk") as caught:
                checkpoint.save(tmp_path, step, small(9), {})
        assert "\n" not in str(caught.value)
        assert names(tmp_path) == ["step_00000001", "step_00000002"]
        assert_same_bits(checkpoint.restore_latest(tmp_path, small(0), said.append)[0], small(2))
    assert said == []
    assert capfd.readouterr() == ("", "")


def test_an_error_that_is_not_the_disk_is_not_called_one(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_orbax_save", raising(ValueError("a mistake of ours")))
    with pytest.raises(ValueError, match="a mistake of ours"):
        saved(tmp_path, 1)
    assert names(tmp_path) == []


# --- kills ---------------------------------------------------------------------------------------------------------

SAVER = """
import sys
import jax, numpy as np
from orbax.checkpoint import v1
from jaxgpt import checkpoint
sys.stdin.readline()
folder = sys.argv[1]
found = checkpoint.restore_latest(folder)
step = int(found[0]["step"]) + 1 if found else 0
while True:
    state = {"w": np.full((200, 200), step, np.float32), "step": np.int32(step)}
    for repeat in range(2):  # the second time the step is replaced
        checkpoint.save(folder, step, state, {"at": step})
        print("saved", step, flush=True)
    step += 1
"""


def test_a_kill_at_any_moment_of_a_save_leaves_what_was_saved(tmp_path, said):
    rng, last = random.Random(0), -1
    like = {"w": np.zeros((200, 200), np.float32), "step": np.int32(0)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(5)
    ]  # each waits for its turn: they import at the same time
    try:
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
            lines = [child.stdout.readline() for _ in range(3)]
            time.sleep(rng.uniform(0, 0.15))
            child.kill()
            lines += child.communicate()[0].splitlines(keepends=True)
            assert all(line.startswith("saved ") for line in lines), "".join(lines)
            assert int(lines[0].split()[1]) > last
            last = int(lines[-1].split()[1])
            state, meta = checkpoint.restore_latest(tmp_path, like, said.append)
            assert int(state["step"]) == meta["at"] in (last, last + 1)
            assert (state["w"] == meta["at"]).all()
            assert said == []
    finally:
        for child in children:
            child.kill()
            child.communicate()
    saved(tmp_path, last + 2)
    assert not [name for name in names(tmp_path) if not name.startswith("step_") or name.endswith("replaced")]


# --- start-up ------------------------------------------------------------------------------------------------------


def test_importing_is_light_and_saving_and_restoring_say_nothing_on_the_terminal(tmp_path):
    code = f"""
import sys, numpy as np
from jaxgpt import checkpoint
assert not {{"jax", "orbax", "orbax.checkpoint", "pandas"}} & set(sys.modules), "heavy import"
checkpoint.save({str(tmp_path)!r}, 1, {{"w": np.ones(3)}}, {{}})
assert checkpoint.restore_latest({str(tmp_path)!r})[0]["w"].tolist() == [1, 1, 1]
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
