"""Tracking: the points of a run's curve sent on to TensorBoard or Weights & Biases while it trains.

The curve on disk is the truth; a tracker only repeats it. It never changes a result and never breaks a run: an error
is one warning line, and the tracker is switched off for that run. What was sent is marked in
`<sweep folder>/<tracker>/<run_id>.json`, so that a run that goes on sends no step twice, and one that was trained
without a tracker is sent whole when it is next met with one. After a kill -9 the tracker may lack points that the curve
has: W&B holds some in memory.

    sweep(configs, folder, trackers=["tensorboard", "wandb"])

Both are optional packages: pip install 'jaxgpt[tensorboard]' or 'jaxgpt[wandb]'.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt import store
from jaxgpt.config import BadInput, RunConfig, flatten, to_dict

Points = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Session:
    """What a tracker is opened with: the run, and what it was sent before."""

    folder: Path  # the sweep's
    run_id: str
    config: Mapping[str, Any]  # by dotted path
    token: str  # 8 hex digits, the same whenever this run in this folder goes on
    last_step: int  # the last that was sent before; 0 for none


@dataclass(frozen=True)
class Sink:
    """An open tracker of one run. `log` is given each point of the curve once, in order; after a roll-back the steps
    start again from an earlier one, with a higher `retry`. `finish` is given the row, or None when the run was stopped.
    """

    log: Callable[[Points], None]
    finish: Callable[[Mapping[str, Any] | None], None]


Open = Callable[[Session], Sink]


@dataclass(frozen=True)
class Tracker:
    """A run's trackers together, guarded; for `train(run, log=tracker.log)`."""

    log: Callable[[Points], None]
    finish: Callable[[Mapping[str, Any] | None], None]


def check(trackers: Sequence[str | Open]) -> None:
    """Raises BadInput for a tracker that is not known, not installed, or (wandb) has no account to log to."""
    names = [_name(tracker) for tracker in trackers]
    for tracker, name in zip(trackers, names, strict=True):
        if tracker == name not in TRACKERS:
            raise BadInput(f"tracker={name} is not allowed; it must be {' or '.join(TRACKERS)}")
        if names.count(name) > 1:
            raise BadInput(f"tracker={name} is given twice")
        if tracker == name and importlib.util.find_spec(_PACKAGES[name]) is None:
            raise BadInput(f"tracker={name} needs {_PACKAGES[name]}: pip install 'jaxgpt[{name}]'")
    if "wandb" in trackers and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise BadInput("tracker=wandb has no API key; run `wandb login`, set WANDB_API_KEY or WANDB_MODE=offline")


def _name(tracker: str | Open) -> str:
    """Also the folder in which the marks lie."""
    return tracker if isinstance(tracker, str) else getattr(tracker, "__name__", "tracker")


def start(
    trackers: Sequence[str | Open], folder: Path, run_id: str, config: RunConfig, warn: Callable[[str], None]
) -> Tracker:
    """The trackers of one run. Nothing is opened or written before there is something to send.

    `warn` is given one line for each tracker that fails. The run must be held (lease.py): one process sends.
    """
    each = [_Guarded(tracker, folder, run_id, config, warn) for tracker in trackers]

    def log(points: Points) -> None:
        for one in each:
            one.log(points)

    def finish(row: Mapping[str, Any] | None) -> None:
        for one in each:
            one.finish(row)

    return Tracker(log, finish)


class _Guarded:
    """One tracker of one run: each point once, and no error comes out."""

    def __init__(self, tracker: str | Open, folder: Path, run_id: str, config: RunConfig, warn: Callable[[str], None]):
        self.name = _name(tracker)
        self.open = TRACKERS[tracker] if isinstance(tracker, str) else tracker
        self.folder, self.run_id, self.config, self.warn = folder, run_id, config, warn
        self.path = folder / self.name / f"{run_id}.json"
        self.mark: dict[str, Any] = {}  # read at the first call
        self.sink: Sink | None = None
        self.off = False

    def log(self, points: Points) -> None:
        self._attempt(lambda: self._send(points))

    def finish(self, row: Mapping[str, Any] | None) -> None:
        self._attempt(lambda: self._finish(row))

    def _attempt(self, action: Callable[[], None]) -> None:
        if self.off:
            return
        try:
            action()
        except Exception as error:
            self.off = True
            reason = (str(error).splitlines() or [""])[0]
            self.warn(f"tracker {self.name} is off for run {self.run_id}: {type(error).__name__}: {reason}")
            if self.sink is not None:
                with contextlib.suppress(Exception):
                    self.sink.finish(None)

    def _send(self, points: Points) -> None:
        if not self.mark:
            known = store.read_json(self.path) if self.path.exists() else {}
            self.mark = {"token": secrets.token_hex(4), "retry": 0, "step": 0, "finished": False} | known
            # Whatever the run logged before this process began is on disk; so are these points.
            points = store.read_curve(self.folder, self.run_id)
        sent = (self.mark["retry"], self.mark["step"])
        new = [point for point in points if (point.get("retry", 0), point["step"]) > sent]
        if not new:
            return
        sink = self._opened()
        # Marked first: a kill between the two may leave a gap in the tracker, never a step that stands there twice.
        self._remember(retry=new[-1].get("retry", 0), step=new[-1]["step"], finished=False)
        sink.log(new)

    def _finish(self, row: Mapping[str, Any] | None) -> None:
        self._send(())
        if row is not None and not self.mark["finished"]:
            sink = self._opened()
            self._remember(finished=True)
            sink.finish(row)
        elif self.sink is not None:
            self.sink.finish(None)
        self.sink = None

    def _opened(self) -> Sink:
        if self.sink is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            config = flatten(to_dict(self.config))
            self.sink = self.open(Session(self.folder, self.run_id, config, self.mark["token"], self.mark["step"]))
        return self.sink

    def _remember(self, **changes: Any) -> None:
        self.mark |= changes
        store.write_json(self.path, self.mark)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn: finite numbers."""
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


# --- the two -------------------------------------------------------------------------------------------------------


def _tensorboard(run: Session) -> Sink:
    """Event files in `<sweep folder>/tensorboard/<run_id>`: curves by step, the row's numbers as row/*."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.summary import scalar, text

    folder = run.folder / "tensorboard" / run.run_id
    folder.mkdir(parents=True, exist_ok=True)
    # Not SummaryWriter: it writes from a thread, where a full disk would show a traceback and then hang the run. The
    # token: file names have a resolution of one second.
    writer, last = EventsWriter(str(folder / "events"), f".{secrets.token_hex(4)}"), run.last_step
    if not last:
        config = "\n".join(f"    {name}={value}" for name, value in run.config.items())
        writer.write_event(Event(wall_time=time.time(), step=0, summary=text("config", config)))

    def write(numbers: Mapping[str, float], step: int, prefix: str = "") -> None:
        for name, value in numbers.items():
            writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(prefix + name, value)))

    def log(points: Points) -> None:
        nonlocal last
        for point in points:
            if point["step"] <= last:  # a roll-back: TensorBoard drops what it has from this step on
                void = SessionLog(status=SessionLog.START)
                writer.write_event(Event(wall_time=time.time(), step=point["step"], session_log=void))
            last = point["step"]
            write({name: value for name, value in _numbers(point).items() if name != "step"}, last)
        writer.flush()

    def finish(row: Mapping[str, Any] | None) -> None:
        if row is not None:
            settings = run.config.keys()
            write({n: v for n, v in _numbers(flatten(row)).items() if n not in settings}, row["steps_done"], "row/")
        writer.close()

    return Sink(log, finish)


def _wandb(run: Session) -> Sink:
    """A run of Weights & Biases with the x-axis `step`; its files lie in `<sweep folder>/wandb`.

    The project is WANDB_PROJECT, else jaxgpt; the group is the sweep's folder. Offline runs (WANDB_MODE=offline) are
    sent later by `wandb sync`.
    """
    import wandb

    session = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "jaxgpt"),
        id=f"{run.run_id}-{run.token}",  # the same run in another folder is another one there
        name=run.run_id,
        group=run.folder.name,
        dir=run.folder,
        config=dict(run.config),
        resume="allow",
        reinit="create_new",  # leaves alone what else this process logs
        settings=wandb.Settings(silent=True, console="off", disable_git=True, x_save_requirements=False),
    )
    session.define_metric("step")
    session.define_metric("*", step_metric="step")  # wandb's own step may not go back, as a roll-back does

    def log(points: Points) -> None:
        for point in points:
            session.log(_numbers(point))

    def finish(row: Mapping[str, Any] | None) -> None:
        if row is not None:
            session.summary.update({name: value for name, value in flatten(row).items() if name not in run.config})
        session.finish()

    return Sink(log, finish)


TRACKERS: dict[str, Open] = {"tensorboard": _tensorboard, "wandb": _wandb}
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
