"""Units that never fire: counted, taken out, followed; a shift of biases; factors' effects."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from experiments.anatomy import dead, factorial, family, injection, units
from experiments.claims import verdict
from jaxgpt import build
from jaxgpt.config import BadInput, ModelConfig, RunConfig, override
from jaxgpt.step import Loss
from jaxgpt.tasks import text

CLAIMS = {claim.id: claim for claim in dead.CLAIMS}
MODEL = ModelConfig(d_model=8, n_layers=2, n_heads=2, context=8, vocab_size=20, bias=True, mlp="relu")
WINDOWS = np.random.default_rng(0).integers(0, 20, (4, 9)).astype(np.int32)
KILLED = np.zeros((2, 32), bool)
KILLED[0, 3], KILLED[1, [5, 6]] = True, True


def state():
    """Of its units those of KILLED are dead on any input that a norm lets through."""
    params = jax.tree.map(jnp.asarray, build.init_params(MODEL, 0))
    arrays = family.arrays_of(params)
    names = [f"layers.{i}.mlp.up.bias" for i in range(2)]
    new = {name: np.where(gone, -100, arrays[name]) for name, gone in zip(names, KILLED, strict=True)}
    return injection.with_arrays(params, {name: x.astype(np.float32) for name, x in new.items()})


@pytest.fixture(scope="module")
def seen():
    return units.watch(MODEL, state(), WINDOWS)


# --- units -----------------------------------------------------------------------------------------------------------


def test_what_is_watched_is_what_the_model_computes(seen):
    from flax import nnx

    model = nnx.merge(build.graphdef(MODEL), state())
    names = [f"layers.{i}.{name}" for i in range(2) for name in ("mlp.pre", "mlp.hidden", "residual_mid")]
    kept = {name: np.asarray(x) for name, x in model.inspect(WINDOWS[:, :-1], keep=names)[1].items()}
    for i in range(2):
        pre, hidden, stream = (kept[f"layers.{i}.{name}"] for name in ("mlp.pre", "mlp.hidden", "residual_mid"))
        assert seen.largest_WxLxF[:, i] == pytest.approx(pre.max(axis=1), abs=1e-5)
        assert seen.active_LxF[i] == pytest.approx((hidden > 0).mean(axis=(0, 1)))
        assert seen.peak_LxF[i] == pytest.approx(hidden.max(axis=(0, 1)), abs=1e-5)
        assert seen.stream_L[i] == pytest.approx(np.linalg.norm(stream, axis=-1).mean(), rel=1e-5)


def test_dead_units_are_found_and_their_removal_changes_no_bit_and_that_of_living_ones_does(seen):
    from flax import nnx

    def logits(params):
        return np.asarray(nnx.merge(build.graphdef(MODEL), params)(WINDOWS[:, :-1]))

    assert (seen.largest_WxLxF.max(axis=0) <= 0)[KILLED].all()
    whole = logits(state())
    assert (logits(units.without_units(state(), KILLED)) == whole).all()
    living = units.as_many(KILLED, np.random.default_rng(0))
    assert not (living & KILLED).any()
    assert living.sum(axis=1).tolist() == [1, 2]
    assert abs(logits(units.without_units(state(), living)) - whole).max() > 1e-3


def test_old_weights_fire_where_the_stream_moved_and_not_where_they_did(monkeypatch):
    monkeypatch.setattr(dead, "FEWEST", 1)
    last, arrays = jax.tree.map(jnp.asarray, build.init_params(MODEL, 0)), family.arrays_of(state())
    still = {name: np.zeros_like(arrays[name]) for name in arrays if "mlp_norm" in name}
    member = family.Member("x", override(RunConfig(), {}), Path(), (10, 20))
    monkeypatch.setattr(family.Member, "model", MODEL)
    for old, fires in ((state(), 0), (injection.with_arrays(last, still), 1)):
        monkeypatch.setattr(family, "params", lambda _, step=None, old=old: old if step == 10 else last)
        watched = dead.Watched(member, np.stack([KILLED, 0 * KILLED]).astype(bool), None, None)
        size = dataclasses.replace(dead.SIZES["smoke"], followed=4)
        assert dead._old_weights(watched, WINDOWS, size) == {"came back": 3, "fires with old weights": fires}


# --- the factorial ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bowl:
    """A task of one bias and one kernel of an MLP."""

    def init(self, seed):
        up = {"bias": jnp.full(3, float(seed)), "kernel": jnp.ones((2, 3))}
        return {"layers": {"0": {"mlp": {"up": up, "down": {"bias": jnp.ones(2)}}}}}

    def sample(self, data, _, step):
        return data + step

    def loss(self, params, batch, _):
        total = sum((leaf**2).sum() for leaf in jax.tree.leaves(params)) * batch.sum()
        return Loss(total, jnp.float32(1))

    def evaluate(self, params, data):
        return self.loss(params, data, None).total


def test_a_shifted_bias_is_trained_as_one_that_started_there():
    task, params, data = factorial.Shifted(Bowl(), "up"), Bowl().init(2), jnp.arange(2.0)
    there = factorial.shifted(params, "up", -0.5)
    assert there["layers"]["0"]["mlp"]["up"]["bias"].tolist() == [1.5] * 3
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params, there)["layers"]["0"]["mlp"]
    assert same == {"up": {"bias": False, "kernel": True}, "down": {"bias": True}}
    numbers = {"shift": jnp.float32(-0.5)}
    batch = task.sample((data, numbers), jax.random.key(0), jnp.int32(1))
    mine = jax.grad(lambda p: task.loss(p, batch, jax.random.key(0)).total)(params)
    theirs = jax.grad(lambda p: Bowl().loss(p, data + 1, jax.random.key(0)).total)(there)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), mine, theirs)))
    assert task.evaluate(params, (data, numbers)) == Bowl().evaluate(there, data)


LEVELS = dead.LEVELS


def cells(dead_at=lambda *_: 0.0, idle=0.0, pushed=0.0, seeds=4):
    noise = np.random.default_rng(0).normal(0, 1e-3, seeds)
    return pd.DataFrame(
        {"activation": kind, "shift": shift, "rate": rate, "decay": decay, "seed": seed,
         "silent": dead_at(shift, rate, decay) + noise[seed], "idle": idle + abs(noise[seed]), "incoming": 0.1,
         "bias": shift + pushed * decay, "loss": 2.0}
        for kind in factorial.ACTIVATIONS for shift in LEVELS.shift for rate in LEVELS.rate for decay in LEVELS.decay
        for seed in range(seeds)
    )  # fmt: skip


def test_a_run_of_the_factorial_is_told_its_shift_by_a_number_and_its_reader_by_the_activation():
    configs = factorial.configs(LEVELS, range(1), {"model.bias": True, "train.eval_windows": 2})
    sources = {c.model.mlp: factorial.setup(-3.0)(c) for c in configs[:: len(configs) // 3]}
    assert {kind: getattr(source.task, "reader", None) for kind, source in sources.items()} == {
        "relu": "up", "gelu": "up", "swiglu": "gate"}  # fmt: skip
    assert all(source.numbers == {"shift": -3.0} for source in sources.values())


def test_an_effect_is_a_difference_of_means_over_the_other_factors():
    table = cells(lambda shift, rate, decay: 0.1 + 0.3 * (shift < 0) + 0.2 * (rate > 0.01) * (decay > 0))
    relu = table[table["activation"] == "relu"]
    for factor, value in (("shift", 0.3), ("rate", 0.1), ("decay", 0.1)):
        assert factorial.effect(relu, factor, "silent", LEVELS).to_numpy() == pytest.approx([value] * 4)


def test_deadly_are_the_combinations_at_which_relu_units_die():
    table = cells(lambda shift, rate, decay: 0.5 * (shift < 0) * (decay > 0))
    assert factorial.deadly(table, LEVELS) == [(-3.0, rate, 1.0) for rate in LEVELS.rate]


def test_a_seed_without_all_combinations_has_no_effect_and_no_idle_share():
    table = cells(lambda shift, rate, decay: 0.1 + 0.7 * (shift < 0))
    gone = (table["seed"] == 2) & (table["shift"] < 0) & (table["rate"] > 0.01) & (table["decay"] > 0)
    short = table[~(gone & (table["activation"] == "relu"))]
    relu = short[short["activation"] == "relu"]
    effect = factorial.effect(relu, "rate", "silent", LEVELS)
    assert np.isnan(effect[2])
    assert effect.drop(2).to_numpy() == pytest.approx([0] * 3)
    assert factorial.idle_where_deadly(short, "gelu", LEVELS).isna().tolist() == [False, False, True, False]
    short = table[~(gone & (table["activation"] == "gelu"))]
    assert factorial.idle_where_deadly(short, "gelu", LEVELS).isna().tolist() == [False, False, True, False]
    assert factorial.idle_where_deadly(short, "swiglu", LEVELS).notna().all()


# --- from lines to verdicts ------------------------------------------------------------------------------------------

SIZE = dead.SIZES["laptop"]


def family_tables(rate=0.3, end=0.05, revived=0.0, seeds=4):
    noise = np.random.default_rng(1).normal(0, 1e-3, seeds)
    lines = [{"width": width, "seed": seed, "step": step, "block": 0,
              "active": 0.5 if step == 0 else end + (0.2 if width == 32 else 0) + noise[seed]}
             for width in (32, 96) for seed in range(seeds) for step in (0, 100)]  # fmt: skip
    table = [{"width": width, "seed": seed, "worst": 0.8 + noise[seed], "early": 0.9 + noise[seed],
              "fewer": 0.5 + noise[seed], "revived": revived + abs(noise[seed]),
              "fires with old weights": 0.8 + noise[seed], "without dead": noise[seed] / 10,
              "without living": 0.3 + noise[seed], f"dead on {SIZE.counts[-1]}": rate * (width == 96) + noise[seed]}
             for width in (32, 96) for seed in range(seeds)]  # fmt: skip
    return pd.DataFrame(lines), pd.DataFrame(table)


def verdicts(lines, table, found_cells):
    found = dead.measure(lines, table, found_cells, SIZE, 4)
    return {name: verdict(CLAIMS[name], found[name]) for name in CLAIMS}


def test_verdicts_follow_what_is_measured():
    killed = cells(lambda shift, rate, decay: 0.1 + 0.4 * (shift < 0) + 0.2 * (rate > 0.01) + 0.1 * (decay > 0))
    said = verdicts(*family_tables(), killed)
    # Wider models are lazier by .2, but the mean of both is .15 of units then, not .03; and dead units are many.
    assert {name for name, word in said.items() if word != "reproduced"} == {"common_rate", "lazy"}
    said = verdicts(*family_tables(revived=0.5), cells(idle=0.5, pushed=-0.4))
    assert (
        said["frozen"] == said["decay_pushes"] == said["bias_kills"] == said["decay_kills"] == "not seen at this scale"
    )
    assert said["gelu_avoids"] == "inconclusive"  # ReLU units died nowhere
    said = verdicts(*family_tables(), cells(lambda *_: 0.5, idle=0.5))
    assert said["gelu_avoids"] == said["swiglu_avoids"] == "not seen at this scale"


def test_seeds_in_which_too_few_units_are_concerned_leave_a_claim_open():
    lines, table = family_tables()
    table.loc[table["seed"] == 1, "revived"] = np.nan
    found = dead.measure(lines, table, cells(), SIZE, 4)
    assert verdict(CLAIMS["frozen"], found["frozen"]) == "inconclusive"
    assert found["frozen"].remark == "1 of 4 seeds have no value: fewer than 10 units are concerned, or it diverged"


def test_a_model_that_diverged_leaves_claims_on_its_family_open():
    lines, table = (rows[(rows["width"] != 32) | (rows["seed"] != 1)] for rows in family_tables())
    found = dead.measure(lines, table, cells(), SIZE, 4)
    for name in ("lazy", "falls", "wider_lazier", "more_with_width"):
        assert found[name].remark == "1 of 4 seeds have no value: a model of the family diverged"
    assert not found["worst_layer"].remark  # of the widest alone


def test_units_that_were_dead_and_are_not_are_counted_by_the_step_at_which_they_were():
    dead_sxlxf = np.zeros((3, 1, 4), bool)
    dead_sxlxf[1, 0, :3], dead_sxlxf[2, 0, 2:] = True, True
    member = family.Member("x", override(RunConfig(), {"train.seed": 3}), Path(), (0, 10, 20))
    watched = dead.Watched(member, dead_sxlxf, np.full((3, 1, 4), 0.25), dead_sxlxf[2:])
    lines = dead.census([watched])
    assert lines[["step", "dead units", "revived"]].to_numpy().tolist() == [[0, 0, 0], [10, 3, 2], [20, 2, 0]]
    assert watched.ever_LxF.sum() == 3
    assert lines["active"].tolist() == [0.25] * 3


# --- from the command to the figure ----------------------------------------------------------------------------------


@pytest.mark.slow  # it trains the smallest family and a factorial
def test_the_command_leaves_claims_summary_and_figure(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "dead", "--scale", "smoke")
    assert said.code == 0, said.err
    outcome = tmp_path / "results/raw/dead/smoke/outcome"
    assert sorted(path.name for path in outcome.iterdir()) == [
        "claims.json", "figure.png", "figure.svg", "run.json", "summary.csv"]  # fmt: skip
    assert {c["id"] for c in json.loads((outcome / "claims.json").read_text())} == set(CLAIMS)
    size = dead.SIZES["smoke"]
    own = 2 * len(factorial.configs(size.levels, range(size.seeds), dict(size.settings)))
    assert len(pd.read_csv(outcome / "summary.csv")) == own + len(family.configs(family.SIZES["smoke"]))


def test_more_windows_begin_as_fewer_are_spread_over_all_text():
    config = override(RunConfig(), {"model.context": 8})
    windows = units.windows(config, 40)
    text_windows = np.asarray(text.reader()(override(config, {"train.eval_windows": 40})).data().validation_WxT1)
    assert sorted(map(tuple, windows)) == sorted(map(tuple, text_windows.astype(np.int32)))
    assert (windows != text_windows).any()
    assert (units.windows(config, 40) == windows).all()


def test_more_windows_than_the_text_holds_are_refused():
    with pytest.raises(BadInput, match=r"validation text holds \d+ windows of 9 tokens; 1000000 are needed"):
        units.windows(override(RunConfig(), {"model.context": 8}), 1_000_000)


@pytest.mark.parametrize("scale", dead.SIZES)
def test_tested_windows_are_not_judged_ones_and_dispatches_are_full(scale):
    size = dead.SIZES[scale]
    for count in (size.followed, size.counts[-1]):
        assert count <= units.AT_ONCE or count % units.AT_ONCE == 0
