"""muP's experiment: whether its verdicts can come out in each way that they should, and the command at smoke scale."""

import itertools
import json
import math
import xml.etree.ElementTree

import numpy as np
import pandas as pd
import pytest

from experiments.claims import verdict
from experiments.scaling import mup
from jaxgpt.config import to_dict

# --- the best rate of a grid ---------------------------------------------------------------------------------------

RATES = np.arange(-10.0, -2.0)


@pytest.mark.parametrize("best", [-8.6, -7.0, -5.5, -4.1])
def test_the_best_rate_of_a_parabola_is_its_vertex(best):
    assert mup.best_rate(RATES, 2 + 0.1 * (RATES - best) ** 2) == (pytest.approx(best), True)


@pytest.mark.parametrize(("best", "end"), [(-12.0, -10.0), (-10.4, -10.0), (-2.8, -3.0), (1.0, -3.0)])
def test_a_best_rate_at_an_end_of_the_grid_is_not_held_by_it(best, end):
    assert mup.best_rate(RATES, 2 + 0.1 * (RATES - best) ** 2) == (end, False)


def test_runs_that_diverged_are_left_out_of_the_best_rate():
    losses = np.where(RATES > -5.5, np.nan, 2 + 0.1 * (RATES + 6.8) ** 2)
    assert mup.best_rate(RATES, losses) == (pytest.approx(-6.8), True)
    assert mup.best_rate(RATES, np.where(RATES == -7, 2.0, np.nan)) == (-7.0, True)
    best, held = mup.best_rate(RATES, np.full(8, np.nan))
    assert math.isnan(best)
    assert not held


def test_noise_does_not_carry_the_best_rate_past_the_neighbours_of_the_lowest_loss():
    rng = np.random.default_rng(0)
    for _ in range(200):
        losses = rng.standard_normal(8)
        best, held = mup.best_rate(RATES, losses)
        assert abs(best - RATES[losses.argmin()]) <= 1
        assert held == (0 < losses.argmin() < 7)


def test_the_interval_is_students():
    # Student's t with 3 degrees of freedom leaves 5 % above 2.353363.
    values = np.asarray([1.0, 2.0, 4.0, 5.0])
    half = 2.353363 * np.std(values, ddof=1) / 2
    assert mup.mean_and_interval(values) == (3.0, pytest.approx(3 - half), pytest.approx(3 + half))
    assert mup.mean_and_interval(values[:1]) == (1.0, -math.inf, math.inf)


# --- what a world that is known beforehand gives -------------------------------------------------------------------


def trainings(drift, *, scatter=0.02, centre=-6.0):
    """Runs whose loss is a parabola in the log of the rate; its best drifts by so much per doubling of the width."""
    rng, size = np.random.default_rng(0), mup.SIZES["laptop"]
    rows = []
    for config in mup.configs(size):
        doublings = math.log2(config.model.d_model / size.widths[0])
        best = centre + drift[config.model.parametrization] * doublings + scatter * rng.standard_normal()
        loss = 2 + 0.05 * (math.log2(config.optimizer.learning_rate) - best) ** 2
        rows.append({"model.d_model": config.model.d_model, "model.parametrization": config.model.parametrization,
                     "train.seed": config.train.seed, "optimizer.learning_rate": config.optimizer.learning_rate,
                     "final_loss": loss})  # fmt: skip
    return pd.DataFrame(rows)


def check(power, *, scatter=0.02):
    """Runs of the coordinate check in which every change goes as the width to a power."""
    rng, rows = np.random.default_rng(1), []
    for config in mup.check_configs(mup.SIZES["laptop"]):
        c = config.model
        row = {"model.d_model": c.d_model, "model.parametrization": c.parametrization, "train.seed": config.train.seed}
        for name in mup.QUANTITIES:
            row[f"change_{name}"] = c.d_model ** power[c.parametrization] * math.exp(scatter * rng.standard_normal())
            # At the base width both parametrizations are one run: the powers begin there.
            row[f"change_{name}"] /= 32 ** power[c.parametrization]
        rows.append(row)
    return pd.DataFrame(rows)


def verdicts(drift, power, **how):
    found = mup.measure(trainings(drift, **how), check(power))
    return found, {claim.id: verdict(claim, found[claim.id]) for claim in mup.CLAIMS}


def test_where_mup_does_what_the_paper_says_all_is_reproduced():
    found, said = verdicts({"standard": -1.0, "mup": 0.0}, {"standard": 1.0, "mup": 0.0}, centre=-5.0)
    assert said == dict.fromkeys(said, "reproduced")
    assert found["rate_standard"].value == pytest.approx(-1, abs=0.05)
    assert found["coordinates_standard"].value == pytest.approx(1, abs=0.05)
    assert found["rate_mup"].seeds == mup.SIZES["laptop"].seeds


def test_where_mup_does_nothing_its_claims_fail_and_where_width_does_nothing_the_others_do():
    _, said = verdicts({"standard": -1.0, "mup": -1.0}, {"standard": 1.0, "mup": 1.0}, centre=-5.0)
    assert said == {"coordinates_mup": "contradicted", "coordinates_standard": "reproduced",
                    "rate_mup": "not seen at this scale", "rate_standard": "reproduced"}  # fmt: skip
    _, said = verdicts({"standard": 0.0, "mup": 0.0}, {"standard": 0.0, "mup": 0.0})
    assert said == {"coordinates_mup": "reproduced", "coordinates_standard": "contradicted",
                    "rate_mup": "reproduced", "rate_standard": "not seen at this scale"}  # fmt: skip


def test_one_activation_that_grows_is_enough_to_contradict_mup():
    checks = check({"standard": 1.0, "mup": 0.0})
    grows = checks["model.d_model"] / 32 * (checks["model.parametrization"] == "mup")
    checks["change_mlp.out"] *= np.maximum(grows, 1) ** 0.4
    found = mup.measure(trainings({"standard": -1.0, "mup": 0.0}, centre=-5.0), checks)["coordinates_mup"]
    assert found.value == pytest.approx(0.4, abs=0.05)
    assert verdict(mup.CLAIMS[0], found) == "contradicted"


def test_where_the_best_rate_leaves_the_grid_nothing_is_decided_of_it():
    found, said = verdicts({"standard": -1.0, "mup": 0.0}, {"standard": 1.0, "mup": 0.0}, centre=-8.0)
    assert said["rate_standard"] == "inconclusive"
    assert found["rate_standard"].remark == "without muP the best rate at width 64, 128 is not inside the grid"
    assert said["rate_mup"] == "reproduced"


def test_where_seeds_disagree_nothing_is_decided():
    _, said = verdicts({"standard": -1.0, "mup": 0.0}, {"standard": 1.0, "mup": 0.0}, centre=-5.0, scatter=3.0)
    assert {said["rate_mup"], said["rate_standard"]} == {"inconclusive"}


@pytest.mark.parametrize("scale", mup.SIZES)
def test_the_runs_are_widths_times_rates_times_seeds_with_and_without_mup_and_all_different(scale):
    size = mup.SIZES[scale]
    for configs, widths, seeds in [
        (mup.configs(size), size.widths, size.seeds),
        (mup.check_configs(size), size.check_widths, size.check_seeds),
    ]:
        assert len({json.dumps(to_dict(config)) for config in configs}) == len(configs)
        shapes = {(c.model.parametrization, c.model.d_model, c.train.seed) for c in configs}
        everything = set(itertools.product(("standard", "mup"), widths, range(seeds)))
        assert everything - shapes == {("mup", widths[0], seed) for seed in range(seeds)}
        assert shapes < everything
        for config in configs:
            wider = config.model.d_model / widths[0] if config.model.parametrization == "mup" else 1.0
            assert config.model.width_ratio == wider
            assert config.model.n_heads == size.settings["model.n_heads"]


# --- from the command to the figure --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory, command):
    """The smoke reproduction, called twice in a folder of its own: what each call said, and the folder."""
    home = tmp_path_factory.mktemp("mup")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        first = command("reproduce", "mup", "--scale", "smoke")
        outcome = home / "results/raw/mup/smoke/outcome"
        before = {path.name: path.read_bytes() for path in outcome.iterdir()}
        return first, command("reproduce", "mup", "--scale", "smoke"), outcome, before


@pytest.mark.slow
def test_the_command_leaves_claims_summary_and_figure(done):
    said, _, outcome, _ = done
    assert said.code == 0, said.err
    assert sorted(path.name for path in outcome.iterdir()) == [
        "claims.json", "figure.png", "figure.svg", "run.json", "summary.csv"]  # fmt: skip
    assert (outcome / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert xml.etree.ElementTree.parse(outcome / "figure.svg").getroot().tag.endswith("svg")
    assert [c["id"] for c in json.loads((outcome / "claims.json").read_text())] == [c.id for c in mup.CLAIMS]


@pytest.mark.slow
def test_the_summary_holds_what_the_claims_were_measured_on(done):
    *_, outcome, _ = done
    table = pd.read_csv(outcome / "summary.csv")
    runs, checks = table[table["final_loss"].notna()], table[table["final_loss"].isna()]
    size = mup.SIZES["smoke"]
    assert len(runs) == len(mup.configs(size))
    assert len(checks) == len(mup.check_configs(size))
    assert (checks[[f"{what}_{name}" for what in ("size", "change") for name in mup.QUANTITIES]] > 0).all(axis=None)
    for c in json.loads((outcome / "claims.json").read_text()):
        assert c["measured"] == pytest.approx(mup.measure(runs, checks)[c["id"]].value)


@pytest.mark.slow
def test_a_second_call_measures_nothing_again(done):
    first, again, outcome, before = done
    assert again.code == 0, again.err
    assert again.out == first.out
    assert "18 of them are done already" in again.err
    assert {name: (outcome / name).read_bytes() for name in before if name != "run.json"} == {
        name: content for name, content in before.items() if name != "run.json"
    }
    assert json.loads((outcome / "run.json").read_text())["seconds_this_call"] < 30
