"""Runs by name: an id or its beginning finds the run, and its model is the one that was trained."""

import jax
import numpy as np
import pytest

from jaxgpt import checkpoint, launch, override, store, sweep
from jaxgpt.config import BadInput
from jaxgpt.step import evaluate
from jaxgpt.trained import config_of, find, load_model, sweeps


@pytest.fixture(scope="module")
def short(tiny):
    return override(tiny, {"train.steps": 4, "train.checkpoint_every": 2, "optimizer.ema": 0.5})


@pytest.fixture(scope="module")
def folder(short, tmp_path_factory):
    """A sweep of two runs below a folder of sweeps; not to be written to."""
    folder = tmp_path_factory.mktemp("raw") / "group" / "sweep"
    sweep([short, override(short, {"train.seed": 1})], folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def ids(folder):
    return list(store.planned(folder))


def refusal(action, *words, **options):
    with pytest.raises(BadInput) as refused:
        action(*words, **options)
    return str(refused.value)


def test_a_run_is_found_by_its_id_or_the_beginning_of_it_below_any_folder(folder, ids):
    for root in (folder, folder.parent, folder.parent.parent):
        assert sweeps(root) == [folder]
        for run_id in ids:
            assert find(run_id, root) == find(run_id[:6], root) == (folder, run_id)
            assert find(f"{root}/{run_id}", "elsewhere") == (folder, run_id)


def test_a_beginning_that_several_runs_share_lists_them(tmp_path):
    for name in ("abc111", "abc222", "abd333"):
        store.write_row(tmp_path / "s", {"run_id": name})
    (tmp_path / "s" / "curves").mkdir()
    assert find("abd", tmp_path) == (tmp_path / "s", "abd333")
    said = refusal(find, "abc", tmp_path)
    assert said == f"run=abc is not one run: 2 fit it, name one as FOLDER/ID: {tmp_path}/s/abc111, {tmp_path}/s/abc222"
    store.write_row(tmp_path / "t", {"run_id": "abd333"})
    (tmp_path / "t" / "curves").mkdir()
    assert refusal(find, "abd333", tmp_path).endswith(
        f"2 fit it, name one as FOLDER/ID: {tmp_path}/s/abd333, {tmp_path}/t/abd333"
    )
    assert find(f"{tmp_path}/t/abd", tmp_path) == (tmp_path / "t", "abd333")


def test_an_id_that_is_the_beginning_of_another_is_that_run(tmp_path):
    for name in ("abc", "abcd"):
        store.write_row(tmp_path, {"run_id": name})
    (tmp_path / "curves").mkdir()
    assert find("abc", tmp_path) == (tmp_path, "abc")


def test_an_unknown_run_names_near_ones(folder, ids):
    wrong = ids[0][:5] + "x" + ids[0][6:]
    assert refusal(find, wrong, folder).startswith(f"run={wrong} is not there below {folder}; near it: {ids[0]}")
    assert refusal(find, "zzzz", folder).endswith("there are 2 runs; `jaxgpt runs` shows them")
    assert refusal(find, "zzzz", folder / "nowhere").endswith("; there are none")
    assert "is not there" in refusal(find, "", folder)


@pytest.mark.parametrize("unreadable", [False, True])
def test_a_broken_sweep_somewhere_else_is_said_and_does_not_stop_the_search(unreadable, tmp_path, monkeypatch, caplog):
    for name in ("abc111", "abc222"):
        store.write_row(tmp_path / "good", {"run_id": name})
    (tmp_path / "good" / "curves").mkdir()
    bad = tmp_path / "bad" / "sweep.json"
    store.write_row(bad.parent, {"run_id": "abc111"})
    bad.write_text("{")
    why = f"{bad} is not a JSON file: "
    if unreadable:
        planned = store.planned

        def denied(folder):
            if folder == bad.parent:
                raise PermissionError(13, "Permission denied", str(bad))
            return planned(folder)

        monkeypatch.setattr(store, "planned", denied)
        why = f"{bad} cannot be read: Permission denied"
    assert find("abc111", tmp_path) == (tmp_path / "good", "abc111")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].startswith(f"passed over: {why}")
    said = []
    assert find("abc2", tmp_path, said.append) == (tmp_path / "good", "abc222")
    assert said == caplog.messages
    missing = refusal(find, "zzzz", tmp_path)
    assert missing.startswith(f"run=zzzz is not there below {tmp_path}; there are 2 runs; ")
    assert f"; {why}" in missing
    assert "\n" not in missing
    assert why in refusal(find, "abc111", bad.parent)
    assert len(caplog.records) == 1  # a refusal says it itself


def test_a_folder_without_weights_is_said_to_be_one(folder, ids, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ids[0][:3]
    (tmp_path / "model").mkdir()
    (tmp_path / short).mkdir()
    says = "is a folder that holds no config.json, and not the id of one run"
    for name in ("model", "model/", str(tmp_path / "model"), "."):
        assert refusal(load_model, name, folder) == f"run={name} {says}"
    # Where several ids begin with its name, too.
    for name in ("e1", "e2"):
        store.write_row(tmp_path / "raw", {"run_id": name})
    (tmp_path / "raw" / "curves").mkdir()
    (tmp_path / "e").mkdir()
    assert refusal(load_model, "e", tmp_path / "raw") == f"run=e {says}"
    # But a run is a run, also if a folder has the same name, and FOLDER/ID.
    assert load_model(short, folder).config == load_model(f"{folder}/{short}").config == config_of(folder, ids[0])[0]
    assert "is not there" in refusal(load_model, "", folder)


def test_the_config_of_a_run_comes_from_the_plan_and_without_it_from_the_row(folder, ids, short, tmp_path):
    planned = config_of(folder, ids[1])
    assert planned == (override(short, {"train.seed": 1}), store.planned(folder)[ids[1]]["identity"])
    store.write_row(tmp_path, store.read_row(folder, ids[1]))
    assert config_of(tmp_path, ids[1]) == planned


@pytest.mark.parametrize("ema", [False, True])
def test_a_loaded_model_gives_the_validation_loss_of_its_row(folder, ids, ema):
    from flax import nnx

    trained = load_model(ids[1], folder, ema=ema)
    assert (trained.step, trained.config.train.seed) == (4, 1)
    assert trained.tokenizer.encode(b"abc").tolist() == [97, 98, 99]
    (run,) = launch.plan([trained.config], folder)
    losses = evaluate(run.source.task, nnx.state(trained.model), run.source.data())
    found = run.source.task.summarise(jax.tree.map(np.asarray, losses))["validation_loss"]
    row = store.read_row(folder, ids[1])
    assert found == row["final_loss_ema" if ema else "final_loss"]
    assert row["final_loss_ema"] != row["final_loss"]


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(folder, ids, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "s")
    newest = tmp_path / "s" / "checkpoints" / ids[0] / "step_00000004" / "manifest.json"
    newest.write_bytes(newest.read_bytes()[:-10])
    said = []
    trained = load_model(ids[0], tmp_path, say=said.append)
    assert trained.step == checkpoint.steps(newest.parent.parent)[-2]
    assert len(said) == 1
    assert "step_00000004" in said[0]


def test_what_has_no_model_to_load_says_why(folder, ids, tmp_path, short):
    import shutil

    launch.sweep([short], tmp_path / "planned", max_minutes=0, progress=False)
    assert "has no good checkpoint" in refusal(load_model, ids[0], tmp_path / "planned")
    plain = override(short, {"optimizer.ema": None, "train.steps": 2})
    (run_id,) = sweep([plain], tmp_path / "plain", progress=False)["run_id"]
    assert "optimizer.ema=null" in refusal(load_model, run_id, tmp_path / "plain", ema=True)
    shutil.copytree(folder, tmp_path / "s")
    planned = store.read_json(tmp_path / "s" / "sweep.json")
    planned["runs"][ids[0]]["config"]["model"]["d_model"] = 16
    store.write_json(tmp_path / "s" / "sweep.json", planned)
    assert "holds another model than its config says" in refusal(load_model, ids[0], tmp_path / "s")
