"""Tracking: what arrives in TensorBoard's and W&B's files is the curve, each point once, and no error comes out."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from jaxgpt import RunConfig, launch, override, store, sweep, track
from jaxgpt.config import BadInput, flatten, to_dict

RUN = "0123456789ab"


def points(*steps, retry=0):
    return [{"step": step, "retry": retry, "train_loss": 5.0 - step / 8, "tokens": 64 * step} for step in steps]


@dataclass
class Recorder:
    """A tracker that remembers what it is told."""

    sessions: list = field(default_factory=list)
    logged: list = field(default_factory=list)
    finished: list = field(default_factory=list)
    error: Exception | None = None
    name: str = "recorder"

    @property
    def __name__(self):
        return self.name

    def __call__(self, session):
        self.sessions.append(session)
        return track.Sink(self.log, self.finished.append)

    def log(self, new):
        if self.error:
            raise self.error
        self.logged += [(p["retry"], p["step"]) for p in new]


@pytest.fixture
def recorder():
    return Recorder()


def begin(folder, *trackers, warn=pytest.fail):
    return track.start(trackers, folder, RUN, RunConfig(), warn)


def append(folder, tracker, new):
    """What train does: onto the disk, then to the tracker."""
    store.append_curve(folder, RUN, new)
    tracker.log(new)


# --- once, in order ------------------------------------------------------------------------------------------------


def test_a_tracker_gets_each_point_once_and_the_row(tmp_path, recorder):
    tracker = begin(tmp_path, recorder)
    append(tmp_path, tracker, points(1, 2))
    append(tmp_path, tracker, points(3))
    tracker.finish({"run_id": RUN, "steps_done": 3})
    assert recorder.logged == [(0, 1), (0, 2), (0, 3)]
    assert recorder.finished == [{"run_id": RUN, "steps_done": 3}]
    (session,) = recorder.sessions
    assert (session.folder, session.run_id, session.last_step) == (tmp_path, RUN, 0)
    assert session.config == flatten(to_dict(RunConfig()))


def test_a_run_that_goes_on_sends_no_step_twice(tmp_path, recorder):
    first = begin(tmp_path, recorder)
    append(tmp_path, first, points(1, 2, 3))
    first.finish(None)
    store.truncate_curve(tmp_path, RUN, 1)  # the last checkpoint was at step 1; the rest is trained again
    second = begin(tmp_path, recorder)
    append(tmp_path, second, points(2, 3, 4))
    second.finish({"steps_done": 4})
    assert recorder.logged == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert recorder.finished == [None, {"steps_done": 4}]
    assert [session.last_step for session in recorder.sessions] == [0, 3]
    assert len({session.token for session in recorder.sessions}) == 1


def test_what_was_trained_without_a_tracker_is_sent_when_it_is_met_with_one(tmp_path, recorder):
    store.append_curve(tmp_path, RUN, points(1, 2))
    tracker = begin(tmp_path, recorder)
    append(tmp_path, tracker, points(3))
    assert recorder.logged == [(0, 1), (0, 2), (0, 3)]


def test_a_run_that_was_done_before_is_sent_whole_and_only_once(tmp_path, recorder):
    store.append_curve(tmp_path, RUN, points(1, 2))
    for _ in range(2):
        begin(tmp_path, recorder).finish({"steps_done": 2})
    assert recorder.logged == [(0, 1), (0, 2)]
    assert recorder.finished == [{"steps_done": 2}]
    assert len(recorder.sessions) == 1


def test_after_a_roll_back_the_steps_that_are_new_are_sent(tmp_path, recorder):
    tracker = begin(tmp_path, recorder)
    append(tmp_path, tracker, points(1, 2, 3))
    store.truncate_curve(tmp_path, RUN, 1)
    append(tmp_path, tracker, points(2, 3, retry=1))
    assert recorder.logged == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]


def test_nothing_to_send_leaves_nothing_behind(tmp_path, recorder):
    tracker = begin(tmp_path, recorder)
    tracker.log([])
    tracker.finish(None)
    assert list(tmp_path.iterdir()) == []
    assert recorder.sessions == []


# --- errors --------------------------------------------------------------------------------------------------------


def test_an_error_is_one_line_and_switches_off_that_tracker_alone(tmp_path):
    bad, good, said = Recorder(error=RuntimeError("no\nroute"), name="bad"), Recorder(), []
    tracker = begin(tmp_path, bad, good, warn=said.append)
    append(tmp_path, tracker, points(1))
    append(tmp_path, tracker, points(2))
    tracker.finish({"steps_done": 2})
    assert said == [f"tracker bad is off for run {RUN}: RuntimeError: no"]
    assert bad.finished == [None]  # closed, not finished
    assert good.logged == [(0, 1), (0, 2)]


def test_an_error_at_opening_or_on_a_full_disk_is_said_too(tmp_path, monkeypatch):
    def refuses(_session):
        raise ConnectionError("down")

    said = []
    append(tmp_path, begin(tmp_path, refuses, warn=said.append), points(1))
    monkeypatch.setattr(store, "write_json", lambda *_: (_ for _ in ()).throw(store.StoreError("x: no space left")))
    append(tmp_path, begin(tmp_path, Recorder(), warn=said.append), points(2))
    assert said == [
        f"tracker refuses is off for run {RUN}: ConnectionError: down",
        f"tracker recorder is off for run {RUN}: StoreError: x: no space left",
    ]


def test_a_broken_mark_is_said_and_does_not_stop_the_run(tmp_path, recorder):
    (tmp_path / "recorder").mkdir()
    (tmp_path / "recorder" / f"{RUN}.json").write_text("{")
    said = []
    append(tmp_path, begin(tmp_path, recorder, warn=said.append), points(1))
    assert len(said) == 1
    assert "is not a JSON file" in said[0]


@pytest.mark.parametrize(
    ("trackers", "line"),
    [
        (["tensorbord"], "tracker=tensorbord is not allowed; it must be tensorboard or wandb"),
        (["absent"], "tracker=absent needs no_such_package: pip install 'jaxgpt[absent]'"),
        (["absent", "absent"], "tracker=absent is given twice"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_starts(monkeypatch, trackers, line):
    monkeypatch.setitem(track.TRACKERS, "absent", pytest.fail)
    if "tensorbord" in trackers:
        monkeypatch.delitem(track.TRACKERS, "absent")
    monkeypatch.setitem(track._PACKAGES, "absent", "no_such_package")
    with pytest.raises(BadInput) as refused:
        track.check(trackers)
    assert str(refused.value) == line


def test_own_trackers_are_allowed_under_names_of_their_own(recorder):
    track.check([recorder, Recorder(name="another")])
    with pytest.raises(BadInput, match=r"^tracker=recorder is given twice$"):
        track.check([recorder, Recorder()])


# --- TensorBoard ---------------------------------------------------------------------------------------------------


def events(folder):
    """All events below a folder, files in the order written: TensorBoard's records by their published framing
    (length as uint64, its masked crc32, data, its masked crc32)."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted(folder.rglob("events.out.tfevents.*"), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars(found, tag):
    return [(e.step, v.simple_value) for e in found for v in e.summary.value if v.tag == tag]


def test_tensorboard_holds_the_curve_the_config_and_the_row(tmp_path):
    pytest.importorskip("tensorboardX", reason="pip install 'jaxgpt[tensorboard]'")
    track.check(["tensorboard"])
    first = begin(tmp_path, "tensorboard")
    append(tmp_path, first, points(1, 2))
    first.finish(None)
    second = begin(tmp_path, "tensorboard")
    append(tmp_path, second, [points(3)[0] | {"train_loss": float("nan"), "validation_loss": 2.5}])
    second.finish({"run_id": RUN, "status": "done", "steps_done": 3, "final_loss": 2.5, "train.steps": 3, "x": None})
    found = events(tmp_path / "tensorboard" / RUN)
    assert scalars(found, "train_loss") == [(1, 4.875), (2, 4.75)]
    assert scalars(found, "tokens") == [(1, 64.0), (2, 128.0), (3, 192.0)]
    assert scalars(found, "validation_loss") == [(3, 2.5)]
    assert scalars(found, "row/final_loss") == [(3, 2.5)]
    config = [v.tensor.string_val[0] for e in found for v in e.summary.value if v.tag.startswith("config")]
    assert len(config) == 1
    assert b"model.d_model=64" in config[0]
    assert {v.tag for e in found for v in e.summary.value} >= {"retry"}
    assert not any(v.tag in ("row/train.steps", "row/x", "step") for e in found for v in e.summary.value)


def test_tensorboard_is_told_that_a_roll_back_voids_what_it_has(tmp_path):
    pytest.importorskip("tensorboardX", reason="pip install 'jaxgpt[tensorboard]'")
    tracker = begin(tmp_path, "tensorboard")
    append(tmp_path, tracker, points(1, 2, 3))
    store.truncate_curve(tmp_path, RUN, 1)
    append(tmp_path, tracker, points(2, retry=1))
    tracker.finish(None)
    found = events(tmp_path)
    starts = [i for i, e in enumerate(found) if e.WhichOneof("what") == "session_log"]
    assert [(found[i].step, found[i].session_log.status) for i in starts] == [(2, 1)]
    assert scalars(found[: starts[0]], "train_loss") == [(1, 4.875), (2, 4.75), (3, 4.625)]
    assert scalars(found[starts[0] :], "train_loss") == [(2, 4.75)]


# --- Weights & Biases ----------------------------------------------------------------------------------------------

OFFLINE = """
import json, sys
from pathlib import Path
from jaxgpt import RunConfig, launch, override, store, sweep, track

folder, run, points = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
track.check(["wandb"])
for part in (points[:2], points[2:]):
    tracker = track.start(["wandb"], folder, run, RunConfig(), lambda line: sys.exit(line))
    store.append_curve(folder, run, part)
    tracker.log(part)
    tracker.finish({"steps_done": 3, "final_loss": 4.5} if part[-1]["step"] == 3 else None)
"""


def records(path):
    """The records of an offline run: a LevelDB log (blocks of 32 KiB; parts with crc32, length and type, of which 1 is
    whole, 2 first, 3 middle, 4 last) behind 7 bytes that say what the file is."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole = (b"" if kind in (1, 2) else whole) + data[at + 7 : at + 7 + size]
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(whole)
        at += 7 + size
        at += -at % 2**15 if -at % 2**15 < 7 else 0


def items(record_items):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record_items}


def test_wandb_offline_holds_the_curve_the_config_and_the_row(tmp_path):
    pytest.importorskip("wandb", reason="pip install 'jaxgpt[wandb]'")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    words = [sys.executable, "-W", "error", "-c", OFFLINE, str(tmp_path), RUN, json.dumps(points(1, 2, 3))]
    done = subprocess.run(words, env=environment | {"WANDB_MODE": "offline"}, capture_output=True, text=True,
                          timeout=100, check=False)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns)
    assert len(files) == 2
    found = [record for file in files for record in records(file)]
    history = [items(r.history.item) for r in found if r.WhichOneof("record_type") == "history"]
    assert [(h["step"], h["train_loss"], h["tokens"]) for h in history] == [
        (1, 4.875, 64), (2, 4.75, 128), (3, 4.625, 192)]  # fmt: skip
    runs = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    token = store.read_json(tmp_path / "wandb" / f"{RUN}.json")["token"]
    assert {(run.run_id, run.display_name, run.project) for run in runs} == {(f"{RUN}-{token}", RUN, "jaxgpt")}
    assert items(runs[0].config.update)["model.d_model"] == 64
    summary = [items(r.summary.update) for r in found if r.WhichOneof("record_type") == "summary"]
    assert {"final_loss": 4.5}.items() <= {k: v for part in summary for k, v in part.items()}.items()


def test_wandb_without_a_key_says_what_to_do(tmp_path):
    pytest.importorskip("wandb", reason="pip install 'jaxgpt[wandb]'")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}
    code = "from jaxgpt import track\ntry: track.check(['wandb'])\nexcept ValueError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path,
                          timeout=100, check=True)  # fmt: skip
    assert done.stdout.startswith("tracker=wandb has no API key; run `wandb login`, set WANDB_API_KEY or WANDB_MODE")


# --- through a sweep -----------------------------------------------------------------------------------------------


def rows_of(folder):
    rows = {path.name: store.read_json(path) for path in (folder / "runs").iterdir()}
    timed = ("wall_seconds", "tokens_per_second", "mfu")
    return {name: {k: v for k, v in row.items() if k not in timed} for name, row in rows.items()}


def curves_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "curves").iterdir()}


def test_a_tracked_sweep_that_is_stopped_sends_its_curves_once_and_computes_the_same(tiny, tmp_path):
    configs = [override(tiny, {"train.steps": 20, "train.seed": seed}) for seed in (0, 1)]
    sweep(configs, tmp_path / "plain", progress=False)
    recorder, stops = Recorder(), iter([False] * 6 + [True] * 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch._Stop, "__call__", lambda self: next(stops))
        sweep(configs, tmp_path / "tracked", progress=False, trackers=[recorder], devices=1)
    assert recorder.finished == [None, None]
    sweep(configs[:1], tmp_path / "tracked", progress=False)  # one is finished by a process without the tracker
    sweep(configs, tmp_path / "tracked", progress=False, trackers=[recorder])
    assert curves_of(tmp_path / "tracked") == curves_of(tmp_path / "plain")
    assert rows_of(tmp_path / "tracked") == rows_of(tmp_path / "plain")
    by_run = {s.run_id: [p["step"] for p in store.read_curve(tmp_path / "plain", s.run_id)] for s in recorder.sessions}
    assert len(by_run) == 2
    assert sorted(step for _, step in recorder.logged) == sorted(step for steps in by_run.values() for step in steps)
    assert {row["run_id"] for row in recorder.finished[2:]} == set(by_run)
    before = list(recorder.logged)
    sweep(configs, tmp_path / "tracked", progress=False, trackers=[recorder])
    assert (recorder.logged, len(recorder.finished)) == (before, 4)


def test_a_tracker_that_fails_changes_nothing_but_a_line(tiny, tmp_path, capsys):
    config = override(tiny, {"train.steps": 20})
    sweep([config], tmp_path / "plain", progress=False)
    sweep([config], tmp_path / "tracked", trackers=[Recorder(error=OSError("gone"))])
    assert capsys.readouterr().err.count("tracker recorder is off") == 1
    assert curves_of(tmp_path / "tracked") == curves_of(tmp_path / "plain")
    assert rows_of(tmp_path / "tracked") == rows_of(tmp_path / "plain")


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(track._PACKAGES, "tensorboard", "no_such_package")
    with pytest.raises(BadInput, match=r"pip install 'jaxgpt\[tensorboard\]'"):
        sweep([tiny], tmp_path / "s", trackers=["tensorboard"])
    assert not (tmp_path / "s").exists()
