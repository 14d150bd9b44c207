"""Training: accumulation, the non-finite guard, and results that depend on neither chunks nor interruptions."""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import RunConfig, checkpoint, override, parts, population, store
from jaxgpt.launch import plan, sweep
from jaxgpt.optimizer import hparams
from jaxgpt.run import Run, Source, Stopped, provenance, rollback_every
from jaxgpt.step import CHUNK, advance, data_key, first_state, init_state, mean_loss_and_gradient, program
from jaxgpt.tasks.text import TextTask
from jaxgpt.train import train

KEY = jax.random.key(0)


# --- a task that fails when it is told to --------------------------------------------------------------------------


class Points(NamedTuple):
    """Data of Regression: the true weights, and the keys of the batches that go wrong."""

    truth_K: np.ndarray
    bad_Nx2: np.ndarray


@dataclass(frozen=True)
class Regression:
    """y = w . x, whose loss (or only one entry of its gradient) becomes non-finite in chosen batches."""

    batch_size: int = 4
    fails: str = "batch"  # batch: an entry is `value`; loss: only it; gradient: the loss is finite, one entry inf
    value: float = math.inf  # not NaN: equal tasks share a program, and NaN is not equal to itself

    def init(self, seed):
        return {"kernel": np.random.default_rng(seed).standard_normal(3).astype(np.float32), "bias": np.zeros(())}

    def sample(self, data, key, step):  # noqa: ARG002
        x_BxK = jax.random.normal(key, (self.batch_size, 3))
        bad = (jax.random.key_data(key) == data.bad_Nx2).all(-1).any()
        bad_B = bad & (jnp.arange(self.batch_size) == self.batch_size - 1)  # one sequence of the batch is enough
        return {"x": x_BxK, "y": x_BxK @ data.truth_K, "bad": bad_B, "weight": jnp.ones(self.batch_size)}

    def loss(self, params, batch, _key):
        if self.fails == "batch":
            batch = batch | {"x": jnp.where(batch["bad"][:, None], self.value, batch["x"])}
        error_B = batch["x"] @ params["kernel"] + params["bias"] - batch["y"]
        total, bad = (batch["weight"] * error_B**2).sum(), batch["bad"].any()
        if self.fails == "loss":
            total = total + jnp.where(bad, self.value, 0.0)
        if self.fails == "gradient":  # the root of 0 is 0 and its slope is inf
            first = params["kernel"][0]
            zero = jnp.where(bad, first - jax.lax.stop_gradient(first), 1.0)
            total = total + jnp.where(bad, jnp.sqrt(zero), 0.0)
        return total, batch["weight"].sum()

    def evaluate(self, params, data):
        return (params["kernel"] - data.truth_K) ** 2

    def summarise(self, loss_W):
        return {"validation_loss": float(loss_W.mean()), "validation_loss_sem": float(loss_W.std())}


def setup(bad=(), **fields):
    """What `sweep` wants: regression in which the batches of the (step, retry) in `bad` go wrong, for every seed or,
    as (seed, step, retry), for one."""

    def source(config):
        h = hparams(config)
        # For every seed: runs of one identity share their data.
        every = [(seed, *b) for b in bad if len(b) == 2 for seed in {*range(4), config.train.seed}]
        bad_Nx2 = np.zeros((512, 2), np.uint32)
        for i, (seed, step, retry) in enumerate(every + [b for b in bad if len(b) == 3]):
            key = data_key(h._replace(data_seed=np.uint32(seed)), np.int32(step), np.int32(retry))
            bad_Nx2[i] = jax.random.key_data(key)
        points = Points(np.asarray([1.0, -2.0, 0.5], np.float32), bad_Nx2)
        return Source(Regression(**fields), lambda: points, "regression")

    return source


def config(**settings):
    fields = {"steps": 50, "batch_size": 4, "max_bad_steps": 3, "log_every": 1, "eval_every": 10,
              "checkpoint_every": 10} | settings  # fmt: skip
    settings = {f"train.{name}": value for name, value in fields.items()}
    return override(RunConfig(), {"model.context": 1, "optimizer.learning_rate": 0.1, **settings})


def one_run(folder, bad=(), settings=None, **fields):
    (run,) = plan([config(**(settings or {}))], folder, setup(bad, **fields))
    store.prepare(folder)
    return run


def same_bits(a, b):
    """Whether two pytrees have equal leaves, bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype for x, y in pairs)


def copied(tree):
    """On the host: `advance` donates its state."""
    return jax.tree.map(np.array, tree)


def final(run):
    """What a run leaves behind, without its times."""
    row = {
        k: v for k, v in store.read_row(run.folder, run.id).items() if k not in ("wall_seconds", "tokens_per_second")
    }
    state, meta = checkpoint.restore_latest(run.checkpoints, None, pytest.fail) or ({}, {"step": None})
    leaves = [(jax.tree_util.keystr(path), leaf.tobytes()) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
    return row, store.curve_path(run.folder, run.id).read_bytes(), meta["step"], leaves


# --- gradient accumulation -------------------------------------------------------------------------------------


def assert_equals_large_batch(task, params, batch, tolerance):
    whole = jax.jit(partial(mean_loss_and_gradient, task, key=KEY, microbatches=1))(params, batch)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(whole[-1]))
    for cuts in (2, 4):
        step = jax.jit(partial(mean_loss_and_gradient, task, key=KEY, microbatches=cuts))
        for got, expected in zip(jax.tree.leaves(step(params, batch)), jax.tree.leaves(whole), strict=True):
            assert got.dtype == expected.dtype
            np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * scale)
    return whole


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
def test_microbatches_of_text_equal_the_large_batch(tiny, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        task = TextTask(override(tiny, {"model.param_dtype": dtype}).model, 4, 8)
        params = jax.tree.map(lambda p: jnp.asarray(p, dtype), task.init(0))
        loss, *_ = assert_equals_large_batch(task, params, np.arange(36, dtype=np.int32).reshape(4, 9), tolerance)
        assert loss.dtype == dtype


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
def test_microbatches_of_unequal_weights_equal_the_large_batch(dtype, tolerance):
    rng = np.random.default_rng(3)
    with jax.enable_x64(dtype == "float64"):
        batch = {"x": rng.standard_normal((8, 3)), "y": rng.standard_normal(8), "weight": 10.0 ** np.arange(-4, 4)}
        batch = {name: jnp.asarray(x, dtype) for name, x in batch.items()} | {"bad": jnp.zeros(8, bool)}
        params = {"kernel": jnp.ones(3, dtype), "bias": jnp.zeros((), dtype)}
        loss, *_ = assert_equals_large_batch(Regression(), params, batch, tolerance)
        halves = [mean_loss_and_gradient(Regression(), params, {k: v[i : i + 4] for k, v in batch.items()}, KEY, 1)[0]
                  for i in (0, 4)]  # fmt: skip
        # What a mean of the parts' means would give is far off, so the test above sees the weights.
        assert abs(float(sum(halves)) / 2 / float(loss) - 1) > 0.01


def test_a_run_in_microbatches_ends_where_the_run_of_large_batches_ends(tmp_path):
    ends = []
    for cuts in (1, 2):
        run = one_run(tmp_path / str(cuts), settings={"microbatches": cuts})
        train(run)
        ends.append(checkpoint.restore_latest(run.checkpoints, None)[0]["params"]["kernel"])
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-4)


# --- one program, any chunks -------------------------------------------------------------------------------------


def advanced(prog, h, data, chunks, seed=0):
    """The state and the metrics of all steps after dispatches of these lengths."""
    state, seen = init_state(prog, h, seed), []
    for n in chunks:
        state, metrics = advance(prog, state, np.int32(n), h, data)
        seen.append(np.asarray([metrics[name][:n] for name in sorted(metrics)]))
    return copied(state), np.concatenate(seen, axis=1)


def test_steps_one_by_one_and_in_any_chunks_give_the_same_bits(tiny, tmp_path):
    (run,) = plan([override(tiny, {"train.steps": 2 * CHUNK + 2})], tmp_path)
    prog, h, data = program(run.config, run.source.task), hparams(run.config), run.source.data()
    alone = advanced(prog, h, data, [1] * (2 * CHUNK + 2))
    assert int(alone[0].step) == 2 * CHUNK + 2
    assert np.isfinite(alone[1]).all()
    for chunks in ([CHUNK, CHUNK, 2], [3, CHUNK, 1, CHUNK - 2], [7] * 36 + [6]):
        assert sum(chunks) == 2 * CHUNK + 2
        together = advanced(prog, h, data, chunks)
        assert same_bits(together, alone)


def test_one_compiled_program_serves_runs_that_differ_in_numbers_only(tiny, tmp_path):
    changes = [
        {},
        {"optimizer.learning_rate": 0.5, "optimizer.weight_decay": 0.0, "optimizer.clip": None},
        {"optimizer.warmup_steps": 7, "optimizer.final_fraction": 0.0, "optimizer.decay_fraction": 1.0},
        {"train.steps": 1000, "train.seed": 5, "train.data_seed": 6, "train.log_every": 7},
    ]
    runs = plan([override(tiny, change) for change in changes], tmp_path)
    ends, sizes = [], []
    for run in runs:
        prog, h = program(run.config, run.source.task), hparams(run.config)
        ends.append(advanced(prog, h, run.source.data(), [3], run.config.train.seed)[0].params)
        sizes.append(advance._cache_size())
    assert len(runs) == 4
    assert len(set(sizes)) == 1
    assert not any(same_bits(ends[0], other) for other in ends[1:])


def test_a_second_run_of_one_program_compiles_nothing_before_its_first_step(tmp_path):
    def programs():
        return [jitted._cache_size() for jitted in (first_state, population.advance, population.evaluate)]

    sizes, said = [programs()], []
    for seed in (0, 1):
        run = one_run(tmp_path, settings={"seed": seed, "steps": 50 + seed, "eval_every": 1}, batch_size=5)
        with pytest.raises(Stopped):
            train(run, stop=lambda: bool(said), report=said.append)
        said.clear()
        sizes.append(programs())
        with pytest.raises(Stopped):  # nor does resuming
            train(run, stop=lambda: True)
        sizes.append(programs())
    assert [after - before for before, after in zip(*sizes[:2], strict=True)] == [1, 1, 1]
    assert sizes[2:] == [sizes[1]] * 3


def test_a_run_is_the_same_alone_and_after_others_in_one_process(tiny, tmp_path):
    configs = [override(tiny, {"train.seed": seed}) for seed in range(3)]
    sweep(configs, tmp_path / "together", progress=False)
    sweep(configs[2:], tmp_path / "alone", progress=False)
    together, alone = plan(configs, tmp_path / "together")[2], plan(configs[2:], tmp_path / "alone")[0]
    assert final(together) == final(alone)


def test_initial_parameters_may_be_arrays_that_somebody_else_holds(tmp_path):
    held = {"kernel": jnp.ones(3), "bias": jnp.zeros(())}

    @dataclass(frozen=True)
    class Held(Regression):
        def init(self, _seed):
            return held

    data = setup()(config()).data
    for folder in ("first", "again"):  # `advance` donates its state, which must not be the caller's arrays
        run = Run(config(), Source(Held(), data, "held"), store.prepare(tmp_path / folder))
        assert train(run)["status"] == "done"
    assert held["kernel"].tolist() == [1, 1, 1]


@pytest.mark.usefixtures("short_dispatches")
def test_a_task_may_make_its_parameters_in_ways_that_jax_cannot_trace_and_still_resumes(tmp_path):
    @dataclass(frozen=True)
    class Host(Regression):
        def init(self, seed):
            return {"kernel": np.asarray(jax.random.normal(jax.random.key(seed), 3)), "bias": np.zeros(())}

    run = Run(config(), Source(Host(), setup()(config()).data, "host"), store.prepare(tmp_path))
    stopped_at(run, 12)
    assert train(run)["status"] == "done"


# --- the guard ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(("fails", "value"), [("batch", math.nan), ("loss", math.inf), ("gradient", 0.0)])
def test_a_bad_step_changes_nothing_but_the_counters(tmp_path, fails, value, microbatches):
    settings = {"microbatches": microbatches}
    run = one_run(tmp_path, bad=[(3, 0), (4, 0), (7, 0)], settings=settings, fails=fails, value=value)
    prog, h, data = program(run.config, run.source.task), hparams(run.config), run.source.data()
    state, seen = init_state(prog, h, 0), []
    for _ in range(9):
        before = copied(state)
        state, metrics = advance(prog, state, np.int32(1), h, data)
        after = copied(state)
        seen.append([int(after.bad_in_a_row), int(after.bad_steps)])
        assert after.step == before.step + 1
        bad = int(before.step) in (3, 4, 7)
        assert same_bits((before.params, before.opt_state), (after.params, after.opt_state)) == bad
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
        finite = {name: bool(np.isfinite(metrics[name][0])) for name in ("train_loss", "grad_norm")}
        assert finite == {"train_loss": not bad or fails == "gradient", "grad_norm": not bad or fails == "loss"}
    assert seen == [[0, 0], [0, 0], [0, 0], [1, 1], [2, 2], [0, 2], [0, 2], [1, 3], [0, 3]]


def test_a_dispatch_ends_after_as_many_bad_steps_in_a_row_as_are_allowed(tmp_path):
    run = one_run(tmp_path, bad=[(2, 0), *((s, 0) for s in range(5, 20))])
    prog, h, data = program(run.config, run.source.task), hparams(run.config), run.source.data()
    state, metrics = advance(prog, init_state(prog, h, 0), np.int32(CHUNK), h, data)
    assert (int(state.step), int(state.bad_in_a_row), int(state.bad_steps)) == (8, 3, 4)
    assert np.isfinite(metrics["learning_rate"]).sum() == 8


# --- roll-backs ----------------------------------------------------------------------------------------------------


def test_after_too_many_bad_steps_the_run_goes_back_to_its_checkpoint_with_other_batches_and_ends(tmp_path):
    said = []
    run = one_run(tmp_path, bad=[(14, 0), (15, 0), (16, 0)])
    row = train(run, report=lambda r: said.append(r.note))
    assert (row["status"], row["rollbacks"], row["bad_steps"], row["steps_done"]) == ("done", 1, 3, 50)
    assert [note for note in said if note] == ["3 non-finite steps in a row: back from step 17 to 10"]
    curve = store.read_curve(run.folder, run.id)
    assert [point["step"] for point in curve] == list(range(1, 51))
    assert [point["retry"] for point in curve] == [0] * 10 + [1] * 40
    # By hand: ten steps, then the counter, then forty.
    prog, h, data = program(run.config, run.source.task), hparams(run.config), run.source.data()
    state, _ = advance(prog, init_state(prog, h, 0), np.int32(10), h, data)
    state = state._replace(retry=np.int32(1), bad_steps=np.int32(3))
    state, _ = advance(prog, state, np.int32(40), h, data)
    saved, _ = checkpoint.restore_latest(run.checkpoints, copied(state))
    assert same_bits(saved, copied(state))
    assert row["final_loss"] == curve[-1]["validation_loss"]
    undisturbed = one_run(tmp_path / "undisturbed")
    assert train(undisturbed)["final_loss"] != row["final_loss"]


def test_without_a_checkpoint_it_goes_back_to_the_start(tmp_path):
    run = one_run(tmp_path, bad=[(0, 0), (1, 0), (2, 0)])
    row = train(run)
    assert (row["status"], row["rollbacks"]) == ("done", 1)
    assert [p["retry"] for p in store.read_curve(run.folder, run.id)] == [1] * 50


def test_a_run_that_fails_again_and_again_is_given_up_and_the_others_go_on(tmp_path):
    bad = [(1, step, retry) for retry in range(4) for step in range(12, 17)]
    configs = [config(seed=seed) for seed in range(3)]
    table = sweep(configs, tmp_path, setup=setup(bad), progress=False)
    assert list(table["train.seed"]) == [0, 1, 2]
    assert list(table["status"]) == ["done", "diverged", "done"]
    lost = table.loc[1]
    assert (lost["rollbacks"], lost["bad_steps"], lost["steps_done"]) == (3, 12, 15)
    row = store.read_row(tmp_path, lost["run_id"])
    assert row["final_loss"] is row["final_loss_sem"] is row["final_bits_per_byte"] is None
    assert table["final_loss"].notna().tolist() == [True, False, True]
    curve = store.read_curve(tmp_path, lost["run_id"])
    assert [p["step"] for p in curve] == list(range(1, 16))
    assert [p["train_loss"] is None for p in curve] == [False] * 12 + [True] * 3
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    sweep(configs, tmp_path, setup=setup(bad), progress=False)  # what is given up is not tried again
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}


def test_with_no_roll_backs_allowed_the_first_bad_stretch_ends_the_run(tmp_path):
    run = one_run(tmp_path, bad=[(s, 0) for s in range(3, 9)], settings={"max_rollbacks": 0})
    assert (train(run)["status"], train(run)["steps_done"]) == ("diverged", 6)


def test_a_final_loss_that_is_not_finite_is_null_and_not_an_earlier_one(tmp_path):
    @dataclass(frozen=True)
    class Overflows(Regression):
        def summarise(self, _loss_W):
            calls.append(1)
            return {"validation_loss": math.inf if len(calls) == 5 else 1.0}

    calls = []
    run = Run(config(), Source(Overflows(), setup()(config()).data, "overflows"), store.prepare(tmp_path))
    train(run)
    row = store.read_row(tmp_path, run.id)
    assert (row["status"], row["final_loss"], row["best_loss"]) == ("done", None, 1.0)


# --- interruptions -------------------------------------------------------------------------------------------------


def interrupted(run, rng, chance, save=True):
    """Trains a run that is stopped at random again and again; the number of stops. save: stops are clean ones."""
    stops = 0
    while True:
        dispatches = rng.geometric(chance)
        asked = iter(range(1, 10**6))
        try:
            if save:
                train(run, stop=lambda: next(asked) > dispatches)  # noqa: B023
            else:  # as a kill: nothing is written any more
                train(run, held=lambda: next(asked) <= dispatches)  # noqa: B023
            return stops
        except Stopped:
            stops += 1


@pytest.fixture
def short_dispatches(monkeypatch):
    monkeypatch.setattr("jaxgpt.train.SECONDS_PER_DISPATCH", 1e-9)


@pytest.mark.usefixtures("short_dispatches")
def test_a_run_on_text_that_is_interrupted_at_random_steps_ends_with_the_same_bits(tiny, tmp_path):
    (undisturbed,), (stopped,) = plan([tiny], tmp_path / "a"), plan([tiny], tmp_path / "b")
    for run in (undisturbed, stopped):
        store.prepare(run.folder)
    train(undisturbed)
    assert interrupted(stopped, np.random.default_rng(5), 0.1) > 2
    assert final(stopped) == final(undisturbed)


@pytest.mark.usefixtures("short_dispatches")
@pytest.mark.parametrize(
    ("bad", "status"),
    [
        ([], "done"),
        ([(5, 0), *((s, 0) for s in range(18, 21)), *((s, 1) for s in range(13, 16)), (25, 2), (39, 2)], "done"),
        ([(s, r) for s in range(14, 19) for r in range(4)], "diverged"),
    ],
    ids=["good", "rolled back", "diverged"],
)
@pytest.mark.parametrize("save", [True, False], ids=["stopped", "lost its lease"])
def test_interruptions_change_no_bit_whatever_happens_to_the_run(tmp_path, bad, status, save):
    undisturbed, stopped = one_run(tmp_path / "a", bad), one_run(tmp_path / "b", bad)
    assert train(undisturbed)["status"] == status
    assert interrupted(stopped, np.random.default_rng(6), 0.15 if save else 0.6, save) > 2
    kept = 4 if status == "done" else 2  # a diverged run has no final checkpoint, only those that it passed
    assert final(stopped)[:kept] == final(undisturbed)[:kept]


@pytest.mark.usefixtures("short_dispatches")
def test_stops_between_two_checkpoints_do_not_push_out_the_one_that_a_roll_back_needs(tmp_path):
    bad = [(s, 0) for s in range(16, 19)]
    undisturbed, stopped = one_run(tmp_path / "a", bad), one_run(tmp_path / "b", bad)
    train(undisturbed)
    for last in (12, 13, 14, 15):
        at = []
        with pytest.raises(Stopped):
            train(stopped, stop=lambda: bool(at) and at[-1] >= last, report=lambda r: at.append(r.step))  # noqa: B023
    said = []
    train(stopped, report=lambda r: said.append(r.note))
    assert "3 non-finite steps in a row: back from step 19 to 10" in said
    assert final(stopped) == final(undisturbed)
    assert checkpoint.steps(stopped.checkpoints) == [40, 50]  # and what the stops saved is gone in the end


@pytest.mark.usefixtures("short_dispatches")
def test_after_a_roll_back_resuming_goes_on_from_it_and_not_from_a_stop_before_it(tmp_path):
    run = one_run(tmp_path, [(s, 0) for s in range(16, 19)])
    steps, notes = [], []

    def report(r):
        (notes if r.note else steps).append(r.note or r.step)

    with pytest.raises(Stopped):
        train(run, stop=lambda: steps[-1:] == [15], report=report)
    with pytest.raises(Stopped):
        train(run, stop=lambda: steps[-2:] == [11, 12] and 19 in steps, report=report)
    train(run, report=report)
    assert [note for note in notes if "goes on" in note] == ["goes on from step 15", "goes on from step 12"]


@pytest.mark.parametrize("every", [3, 7, 50])
def test_a_roll_back_lands_where_it_does_whatever_checkpoint_every_says(tmp_path, every):
    bad = [*((s, 0) for s in range(26, 29)), *((s, 1) for s in range(23, 26))]
    usual, other = one_run(tmp_path / "a", bad), one_run(tmp_path / "b", bad, {"checkpoint_every": every})
    assert usual.id == other.id
    assert train(usual)["rollbacks"] == 2
    said = []
    train(other, report=lambda r: said.append(r.note))
    assert [note.rpartition(" ")[2] for note in said if note] == ["20", "20"]
    ends = [final(run) for run in (usual, other)]
    for end in ends:
        end[0].pop("train.checkpoint_every")
    assert ends[0] == ends[1]
    assert len(checkpoint.steps(other.checkpoints)) <= 4  # not all of them are kept


def test_checkpoints_that_are_to_be_kept_stay_and_change_nothing_else(tmp_path):
    bad = [(s, 0) for s in range(26, 29)]  # a roll-back to step 20
    usual, kept = one_run(tmp_path / "a", bad), one_run(tmp_path / "b", bad, {"keep_every": 7})
    assert usual.id == kept.id
    ends = [train(run) and final(run) for run in (usual, kept)]
    for end in ends:
        end[0].pop("train.keep_every")
    assert ends[0] == ends[1]
    assert checkpoint.steps(kept.checkpoints) == [7, 14, 21, 28, 35, 42, 49, 50]  # not those of its roll-backs
    assert len(checkpoint.steps(usual.checkpoints)) == 2


def test_the_grid_of_roll_backs_is_a_fifth_of_the_run_and_at_most_1000_steps():
    steps = [1, 4, 5, 99, 5_000, 10**6]
    assert [rollback_every(config(steps=n).train) for n in steps] == [1, 1, 1, 19, 1000, 1000]


def test_a_roll_back_passes_over_a_damaged_checkpoint_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxgpt.train.SECONDS_PER_DISPATCH", 1e-9)  # so that it can be stopped at any step
    run, said, at = one_run(tmp_path, bad=[(s, 0) for s in range(33, 36)]), [], []
    with pytest.raises(Stopped):  # between two states that it could go back to, so that these are on disk only
        train(run, stop=lambda: at[-1:] >= [31], report=lambda r: at.append(r.step))
    assert at[-1] < 33
    for file in (run.checkpoints / "step_00000030" / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert train(run, report=lambda r: said.append(r.note))["status"] == "done"
    notes = [note for note in said if note]
    assert [note for note in notes if "step_00000030" in note and "damaged" in note]
    assert notes[-1].endswith("back from step 36 to 20")


def test_who_lost_the_run_to_another_process_writes_nothing_any_more(tmp_path):
    run = one_run(tmp_path, bad=[(s, 0) for s in range(3, 9)], settings={"max_rollbacks": 0})
    with pytest.raises(Stopped):
        train(run, held=lambda: False)
    assert store.read_row(tmp_path, run.id) is None
    assert store.read_curve(tmp_path, run.id) == []
    assert checkpoint.steps(run.checkpoints) == []


# --- provenance ----------------------------------------------------------------------------------------------------


def stopped_at(run, step):
    at = []
    with pytest.raises(Stopped):
        train(run, stop=lambda: at[-1:] >= [step], report=lambda r: at.append(r.step))


@pytest.mark.usefixtures("short_dispatches")
def test_the_row_says_what_the_run_was_trained_with(tmp_path):
    run = one_run(tmp_path)
    stopped_at(run, 12)
    said = []
    train(run, report=lambda r: said.append(r.note))
    assert [note for note in said if note] == ["goes on from step 12"]
    row = store.read_row(tmp_path, run.id)
    assert {name: row[name] for name in ("code_version", "versions", "backend")} == provenance(run)
    assert row["versions"] == store.package_versions()
    assert store.load(tmp_path)[0]["versions.jax"].tolist() == [jax.__version__]


@pytest.mark.usefixtures("short_dispatches")
def test_going_on_under_other_versions_is_said_in_one_line_and_stands_in_the_row(tmp_path, monkeypatch):
    run = one_run(tmp_path)
    stopped_at(run, 12)
    was, packages = store.code_version(), store.package_versions()
    monkeypatch.setattr(store, "code_version", lambda: "c3d4")
    monkeypatch.setattr(store, "package_versions", lambda: packages | {"jax": "99"})
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    stopped_at(run, 15)
    said = []
    train(run, report=lambda r: said.append(r.note))
    assert [note for note in said if note] == ["goes on from step 15"]  # said once
    row = store.read_row(tmp_path, run.id)
    assert row["code_version"] == f"{was}+c3d4"
    assert row["versions"] == packages | {"jax": f"{jax.__version__}+99"}
    assert row["backend"] == "cpu float32+tpu bfloat16"
    store.write_row(tmp_path, row | {"run_id": "other", "code_version": was})
    said = []
    store.load_runs(tmp_path, said.append)
    assert len(said) == 1
    assert f"{was}+c3d4 (1 run)" in said[0]


@pytest.mark.usefixtures("short_dispatches")
def test_the_line_about_other_versions_names_those_that_differ(tmp_path, monkeypatch):
    run, said = one_run(tmp_path), []
    stopped_at(run, 12)
    was, packages = store.code_version(), store.package_versions()
    monkeypatch.setattr(store, "code_version", lambda: "c3d4")
    monkeypatch.setattr(store, "package_versions", lambda: packages | {"jax": "99"})
    train(run, report=lambda r: said.append(r.note))
    assert [note for note in said if note][1:] == [
        f"goes on under other versions than before: code {was} -> c3d4, jax {jax.__version__} -> 99; "
        "the result is no longer bit-identical to an undisturbed one"
    ]
    store.row_path(tmp_path, run.id).unlink()
    monkeypatch.undo()
    train(run)  # no step is left to do: only the row is written again, and it was not trained by this code
    assert store.read_row(tmp_path, run.id)["code_version"] == f"{was}+c3d4"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_backend_in_the_row_has_the_dtype_that_the_model_computes_in(tiny, tmp_path, dtype):
    (run,) = plan([override(tiny, {"model.compute_dtype": dtype})], tmp_path)
    computes_in = parts.dtypes(run.config.model)["dtype"]
    assert provenance(run)["backend"] == f"cpu {computes_in}"
