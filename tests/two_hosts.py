"""One of the processes that train one model together: what test_hosts.py starts, once alone and once as two.

Arguments: steps or sweeps, results folder, folder, address, count, index. Writes `<results>/<what>_<count>_<index>` as
.npz or .json.
"""

import errno
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from jaxgpt import RunConfig, checkpoint, override, parallel, population, product, stream, sweep
from jaxgpt.config import BadInput
from jaxgpt.launch import Interrupted
from jaxgpt.optimizer import hparams
from jaxgpt.parallel import Layout
from jaxgpt.step import advance, init_state, program
from jaxgpt.store import StoreError
from jaxgpt.tasks.text import TextData, TextTask

STEPS, BATCH, CONTEXT = 3, 8, 8
CONFIG = override(
    RunConfig(),
    {
        "model.d_model": 16,
        "model.n_layers": 1,
        "model.n_heads": 2,
        "model.context": CONTEXT,
        "train.batch_size": BATCH,
        "train.steps": 20,
        # Adam divides by the root of the second moment: near 0 that would make much of a rounding.
        "optimizer.epsilon": 1e-3,
    },
)
LAYOUT = Layout(data=2, model=2, fsdp=True)
SWEEP_STEPS, STOP_AT = 10, 7


def steps(results, checkpoints, address, count, index):
    """The parts of a training by themselves."""
    signalled = []
    signal.signal(signal.SIGTERM, lambda *_: signalled.append(True))  # before the start, which must leave it there
    if count > 1:
        parallel.start_hosts(address, count, index)
    layout = LAYOUT if count > 1 else Layout()
    (mesh,) = parallel.lanes(layout, jax.devices()[: layout.size])
    found = {"rows": np.arange(BATCH)[parallel.rows(mesh, BATCH)], "devices": np.int32(len(jax.local_devices()))}

    rng = np.random.default_rng(0)
    tokens_n = rng.integers(0, 256, 400).astype(np.uint8)
    windows = rng.integers(0, 256, (4, CONTEXT + 1)).astype(np.uint8)
    data = TextData(None, windows, np.ones(4, np.float32))
    task = TextTask(CONFIG.model, BATCH, 4)
    prog, h = program(CONFIG, task), hparams(CONFIG)
    first = jax.device_get(init_state(prog, h, 0))
    state = parallel.put(first, parallel.shardings(first, mesh, layout, CONFIG.model))
    data = parallel.put(data, parallel.replicated(data, mesh))

    for dispatch in range(2):
        own = stream.batches(tokens_n, CONTEXT, BATCH, 5, 0, STEPS * dispatch, parallel.rows(mesh, BATCH))
        batches_KxBxT1 = np.stack(list(islice(own, STEPS)))
        found[f"batches_{dispatch}"] = batches_KxBxT1
        batches = parallel.from_rows(batches_KxBxT1, mesh, BATCH, axis=1)
        with jax.set_mesh(mesh):
            state, metrics = advance(prog, state, np.int32(parallel.agree(STEPS + index)), h, data, batches)
        found[f"train_loss_{dispatch}"] = parallel.gather(metrics)["train_loss"]

    whole = parallel.gather(state)
    found |= {f"leaf_{i}": leaf for i, leaf in enumerate(jax.tree.leaves(whole))}
    checkpoint.save(checkpoints / "good", 6, state, {"writer": index})
    restored, meta = checkpoint.restore_latest(checkpoints / "good", whole, print)
    found["same"] = all(
        a.tobytes() == b.tobytes() for a, b in zip(*map(jax.tree.leaves, (restored, whole)), strict=True)
    )
    found["meta_writer"] = meta["writer"]
    if parallel.is_writer():
        (checkpoints / "good" / "step_00000009").mkdir()
    checkpoint.discard_after(checkpoints / "good", 6)
    found["steps"] = checkpoint.steps(checkpoints / "good")
    found["nothing"] = checkpoint.restore_latest(checkpoints / "none", whole, print) is None
    (checkpoints / "file").write_bytes(b"")
    try:
        checkpoint.save(checkpoints / "file" / "run", 6, state, {})
    except StoreError as error:
        found["refused"] = str(error)

    found["before"] = parallel.any_host(bool(signalled))
    if index == count - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    found["signalled"] = bool(signalled)
    found["after"] = parallel.any_host(bool(signalled))
    found["agreed"], found["writer"] = parallel.agree(10 + index), parallel.is_writer()
    np.savez(results / f"steps_{count}_{index}.npz", **found)


# --- whole sweeps --------------------------------------------------------------------------------------------------


def configs(corpus, streamed=False):
    """Two runs on a text; on a streamed one the first of them."""
    changes = {
        "model.mlp": "none",  # each array that is brought together costs a message
        "model.tie_output": True,
        "data.corpus": str(corpus),
        "data.stream": streamed,
        "train.steps": SWEEP_STEPS,
        "train.log_every": 1,
        "train.eval_every": 5,
        "train.eval_windows": 10,
        "train.checkpoint_every": 4,
    }
    return product(override(CONFIG, changes), {"train.seed": [0] if streamed else [0, 1]})


@contextmanager
def at_dispatch(number, act):
    """While inside, `act()` is called before the dispatch of this number, and each is one step."""
    calls, real = iter(range(1, 10_000)), population.advance

    def advance(*arguments):
        if next(calls) == number:
            act()
        return real(*arguments)

    with (
        mock.patch("jaxgpt.population.advance", advance),
        mock.patch("jaxgpt.train.SECONDS_PER_DISPATCH", 0),
    ):
        yield


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def error_of(folder, runs):
    """The error that ends a sweep, and how long that took."""
    began = time.monotonic()
    try:
        sweep(runs, folder, layout=LAYOUT, progress=False)
    except (BadInput, StoreError) as error:
        return [type(error).__name__, str(error), time.monotonic() - began]
    return ["", "it ended", time.monotonic() - began]


def sweeps(results, folder, address, count, index):
    """Sweeps that end, that break on process 0 and that process 1 is asked to stop, each in a folder of its own."""
    parallel.start_hosts(address, count, index)
    corpus, found = folder / "letters.txt", {}
    runs = configs(corpus)

    def rows(name, runs):
        table = sweep(runs, folder / name, layout=LAYOUT, progress=False)
        return table[["run_id", "status", "final_loss", "best_loss"]].to_dict("records")

    found["resident"], found["streamed"] = rows("resident", runs), rows("streamed", configs(corpus, streamed=True))

    # Process 1 sees the folder elsewhere, where nothing is amiss: process 0 alone finds a file.
    found["file"] = error_of((corpus if index == 0 else folder) / "below", runs)
    for call in ("posix_fallocate", "fsync"):
        broken = mock.patch.object(os, call, no_space)
        with at_dispatch(3, broken.start if index == 0 else int):
            found[call] = error_of(folder / call, runs[:1])
        mock.patch.stopall()
        found[f"{call}_again"] = rows(call, runs[:1])

    asked = []

    def ask():
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    # Of the second run; while it is under way the handler is the sweep's.
    with at_dispatch(SWEEP_STEPS + STOP_AT, ask if index == 1 else int):
        try:
            rows("stopped", runs)
        except Interrupted as error:
            found["interrupted"] = [error.signum, str(error), time.monotonic() - asked[0] if asked else 0.0]
    (results / f"sweeps_{count}_{index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    what, results, folder, address, count, index = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2 if int(count) > 1 else 1)
    main = {"steps": steps, "sweeps": sweeps}[what]
    main(Path(results), Path(folder), address, int(count), int(index))
