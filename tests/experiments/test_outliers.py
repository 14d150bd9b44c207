"""Outliers: measures of streams against numpy, ablations against the plain loss, verdicts that come out each way."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.anatomy import family, streams
from experiments.anatomy import outliers as paper
from experiments.claims import verdict
from jaxgpt import build
from jaxgpt.config import RunConfig, override

CLAIMS = {claim.id: claim for claim in paper.CLAIMS}
SMALL = {**family.SIZES["smoke"].settings, "model.d_model": 16, "model.n_heads": 2, "model.n_layers": 1}
MODEL = override(RunConfig(), SMALL).model
WINDOWS = np.random.default_rng(0).integers(0, 256, (2, 33)).astype(np.int32)
WIDTH = 16


@pytest.fixture(scope="module")
def state():
    """Initial parameters with one dimension of the embedding made an outlier: 200 everywhere."""
    params = jax.tree.map(jnp.asarray, build.init_params(MODEL, 0))
    table_VxD = np.array(params["embed"]["embedding"][...])
    table_VxD[:, 3] = 200.0
    params["embed"]["embedding"][...] = jnp.asarray(table_VxD)
    return params


@pytest.fixture(scope="module")
def seen(state):
    """What `activity` says of it."""
    found = streams.activity(MODEL)(state, WINDOWS, streams.rotation(WIDTH))
    return {name: np.asarray(x) for name, x in found.items()}


def test_a_planted_outlier_is_seen_in_every_stream_and_not_in_a_random_basis(state, seen):
    table, place = (np.asarray(state[name]["embedding"][...]) for name in ("embed", "position"))
    x_WxTxD = table[WINDOWS[:, :-1]] + place[:32]
    assert seen["kurtosis"][0] == pytest.approx(stats.kurtosis(x_WxTxD, axis=-1, fisher=False).mean(), rel=1e-5)
    size_WxN = np.sort(abs(x_WxTxD).reshape(2, -1), axis=1)
    assert seen["top"][0] == pytest.approx(size_WxN[:, -3:].mean(), rel=1e-5)
    assert seen["median"][0] == pytest.approx(np.median(size_WxN, axis=1).mean(), rel=1e-5)
    assert (seen["largest_D"].argmax(axis=1) == 3).all()
    assert (seen["kurtosis"] > 3 * seen["turned"]).all()
    np.testing.assert_allclose(seen["mean_D"][0], x_WxTxD.mean(axis=(0, 1)), rtol=1e-4, atol=1e-4)


def test_the_basis_is_orthogonal():
    basis = streams.rotation(WIDTH)
    np.testing.assert_allclose(basis @ basis.T, np.eye(WIDTH), atol=1e-6)


def test_heads_stay_within_the_range_of_their_values(seen):
    assert seen["leaves"].shape == (1, 2)
    assert (seen["leaves"] < 1e-6).all()
    assert (seen["gain"] <= 1 + 1e-6).all()


def test_weights_that_do_not_sum_to_1_are_found_out():
    v_TxHxK = np.random.default_rng(0).standard_normal((6, 1, 4)).astype(np.float32) + 5
    mean_TxHxK = np.cumsum(v_TxHxK, axis=0) / np.arange(1, 7)[:, None, None]
    assert float(streams.leaves(jnp.asarray(mean_TxHxK), jnp.asarray(v_TxHxK))[0]) < 1e-6
    assert float(streams.leaves(jnp.asarray(1.5 * mean_TxHxK), jnp.asarray(v_TxHxK))[0]) > 0.1
    later = np.broadcast_to(v_TxHxK[-1:] + 3, v_TxHxK.shape)  # values that a query cannot see yet
    assert float(streams.leaves(jnp.asarray(later), jnp.asarray(v_TxHxK))[0]) > 0.1


def test_ablating_nothing_changes_nothing_and_a_constant_dimension_may_take_its_mean(state, seen):
    run, mean_D = streams.ablated(MODEL, 0), seen["mean_D"][0]
    plain = float(run(state, WINDOWS, np.zeros(WIDTH, bool), mean_D))
    assert plain == pytest.approx(float(family.losses(MODEL)(state, WINDOWS).mean()), rel=1e-6)
    third = np.arange(WIDTH) == 3
    with_mean, with_zero = (float(run(state, WINDOWS, third, value)) for value in (mean_D, 0 * mean_D))
    assert abs(with_mean - plain) < 0.1 * abs(with_zero - plain)


@given(st.lists(st.floats(0.1, 5), min_size=2, max_size=8, unique=True), st.floats(0, 1))
def test_a_curve_is_read_where_its_loss_comes_by(losses, share):
    loss_E = np.sort(losses)[::-1]
    target = loss_E[-1] + share * (loss_E[0] - loss_E[-1])
    value = streams.at_loss(loss_E, 10 * loss_E + 1, float(np.clip(target, loss_E[-1], loss_E[0])))
    assert value == pytest.approx(10 * target + 1, rel=1e-6)


def test_a_curve_that_is_never_there_has_no_value():
    loss_E = np.array([3.0, 2.0, 1.0])
    assert np.isnan(streams.at_loss(loss_E, loss_E, 3.1))
    assert np.isnan(streams.at_loss(loss_E, loss_E, 0.9))


def test_lengths_are_ranked_over_tokens_that_occur():
    count = np.array([0, 1, 10, 100, 1000])
    vectors = np.eye(5) * np.array([99.0, 8, 4, 2, 1])[:, None]
    assert streams.norms(vectors, count) == (pytest.approx(-1), pytest.approx(8))
    assert np.isnan(streams.norms(np.eye(5), count)[0])


def planted(**changed):
    """Tables of models that do what beliefs and papers say, unless told otherwise."""
    plain = {"leaves": 0.0, "sgd": 4.0, "adam": 10.0, "turned": 3.0, "massive": 3.0, "int8": 2.0, "top": 0.8,
             "mean": 0.01, "random": 0.05, "rho": -0.7, "sgd_loss": 2.1,
             "ratio": (10, 1000, 1010, 1020, 1030)} | changed  # fmt: skip
    seen, ablations, matrices, draw = [], [], [], np.random.default_rng(0)
    for seed in range(4):
        for width, name in ((16, paper.ADAM), (24, paper.ADAM), (16, paper.SGD)):
            known = {"run_id": f"{seed} {width} {name}", "optimizer": name, "width": width, "seed": seed}
            wobble = float(np.exp(0.01 * draw.standard_normal()))
            ends = 2.0 if name == paper.ADAM else plain["sgd_loss"]
            for step, loss in ((100, 3.0), (200, ends)):
                for stream, ratio in enumerate(plain["ratio"]):
                    kurtosis = wobble * plain["adam" if name == paper.ADAM else "sgd"]
                    seen.append(known | {"step": step, "last": step == 200, "loss": loss, "stream": stream,
                                         "turned": plain["turned"], "kurtosis": kurtosis, "ratio": ratio,
                                         **{of: plain[of] for of in ("leaves", "massive", "int8")}})  # fmt: skip
            for matrix in paper.MATRICES.values():
                matrices.append(known | {"matrix": matrix, "trained": True, "rho": plain["rho"] * wobble})
            if name == paper.ADAM:
                for choice, value in (("top", "zero"), ("top", "mean"), ("random", "zero"), ("random", "mean")):
                    nats = plain[{"topzero": "top", "topmean": "mean"}.get(choice + value, "random")] * wobble
                    ablations.append(known | {"dimensions": 1, "choice": choice, "value": value, "nats": nats})
    return paper.Found(*map(pd.DataFrame, (seen, ablations, matrices, [])))


def verdicts(**changed):
    found = paper.measure(planted(**changed), 4)
    return {name: verdict(CLAIMS[name], found[name]) for name in CLAIMS}


def test_where_beliefs_and_papers_are_right_all_is_reproduced():
    assert verdicts() == dict.fromkeys(CLAIMS, "reproduced")


@pytest.mark.parametrize(
    ("changed", "claim", "said"),
    [
        ({"leaves": 0.01}, "convex", "contradicted"),
        ({"sgd": 10.0}, "adam", "not seen at this scale"),
        ({"massive": 0.0}, "massive", "not seen at this scale"),
        ({"massive": 0.0}, "constant", "inconclusive"),
        ({"massive": 0.0}, "bias", "inconclusive"),
        ({"int8": 0.0}, "matter", "inconclusive"),
        ({"ratio": (50, 40, 30, 20, 10)}, "layer_by_layer", "not seen at this scale"),
        ({"ratio": (10, 100, 200, 400, 800)}, "constant", "not seen at this scale"),
        ({"top": 0.05}, "matter", "not seen at this scale"),
        ({"mean": 0.5}, "bias", "not seen at this scale"),
        ({"mean": -0.5}, "bias", "not seen at this scale"),
        ({"random": -0.1}, "matter", "inconclusive"),
        ({"rho": 0.5}, "rare_token", "not seen at this scale"),
        ({"rho": 0.5}, "rare_output", "not seen at this scale"),
    ],
)
def test_each_claim_can_fail(changed, claim, said):
    assert verdicts(**changed)[claim] == said


def test_a_seed_of_which_a_size_diverged_leaves_claims_open():
    found = planted()
    short = [
        rows[(rows["width"] != 24) | (rows["seed"] != 2)] for rows in (found.seen, found.ablations, found.matrices)
    ]
    measured = paper.measure(paper.Found(*short, found.tokens), 4)
    for name in ("layer_by_layer", "constant", "matter", "bias", "rare_token", "rare_output"):
        assert measured[name].seeds == 3
        assert "1 of 4 seeds have no value" in measured[name].remark


def test_optimizers_are_compared_where_both_have_the_loss_of_the_worse():
    both = paper.matched(planted().seen)
    assert both["loss"].tolist() == [2.1] * 4
    assert both["SGD step"].tolist() == [200] * 4
    assert both["Adam step"].to_numpy() == pytest.approx([190] * 4)


def test_without_outliers_by_adam_there_is_nothing_to_compare():
    found = paper.measure(planted(adam=3.0, sgd=2.0), 4)["adam"]
    assert verdict(CLAIMS["adam"], found) == "inconclusive"
    assert "no more kurtosis" in found.remark


def test_an_optimizer_that_is_ahead_from_the_first_checkpoint_leaves_the_claim_open():
    found = paper.measure(planted(sgd_loss=3.5), 4)["adam"]
    assert verdict(CLAIMS["adam"], found) == "inconclusive"
    assert "4 of 4 seeds have no value" in found.remark


@pytest.mark.parametrize("scale", paper.SIZES)
def test_sgd_starts_from_the_same_parameters_on_the_same_data_as_the_familys_middle_width(scale):
    size = family.SIZES[scale]
    theirs = [c for c in family.configs(size) if c.model.d_model == size.widths[len(size.widths) // 2]]
    for mine, adam in zip(paper.configs(scale), theirs, strict=True):
        assert (mine.model, mine.train, mine.data) == (adam.model, adam.train, adam.data)
        o = mine.optimizer
        assert o.name == "sgd"
        assert o.learning_rate * o.weight_decay == pytest.approx(paper.SHRINK)


@pytest.mark.slow  # it trains the family's smoke models and two more
def test_the_command_leaves_claims_summary_and_figure(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "outliers", "--scale", "smoke")
    assert said.code == 0, said.err
    folder = tmp_path / "results/raw/outliers/smoke/outcome"
    claims = json.loads((folder / "claims.json").read_text(), parse_constant=str)
    assert [claim["id"] for claim in claims] == list(CLAIMS)
    assert len(pd.read_csv(folder / "summary.csv")) == 6
    assert (folder / "figure.png").stat().st_size > 10_000
