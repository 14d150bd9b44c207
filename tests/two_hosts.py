"""One of the processes that train one model together: what test_hosts.py starts, once alone and once as two.

Arguments: results folder, checkpoint folder, address, count, index. Writes `<results>/<count>_<index>.npz`.
"""

import os
import signal
import sys
from itertools import islice
from pathlib import Path

import jax
import numpy as np

from jaxgpt import RunConfig, checkpoint, override, parallel, stream
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


def main(results, checkpoints, address, count, index):
    signalled = []
    signal.signal(signal.SIGTERM, lambda *_: signalled.append(True))  # before the start, which must leave it there
    if count > 1:
        parallel.start_hosts(address, count, index)
    layout = Layout(data=2, model=2, fsdp=True) if count > 1 else Layout()
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
    np.savez(results / f"{count}_{index}.npz", **found)


if __name__ == "__main__":
    results, checkpoints, address, count, index = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2 if int(count) > 1 else 1)
    main(Path(results), Path(checkpoints), address, int(count), int(index))
