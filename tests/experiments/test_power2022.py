"""Grokking: from planted curves to verdicts, each of which can come out otherwise."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from experiments.claims import verdict
from experiments.emergence import power2022 as paper
from jaxgpt.config import to_dict

CLAIMS = {claim.id: claim for claim in paper.CLAIMS}
STEPS = np.arange(50, 7001, 50)
DECAYS = (0.0, 0.25, 0.5, 1.0)


def rise(middle, width, low, high):
    """A logistic curve in log steps, from low to high."""
    return low + (high - low) / (1 + np.exp(-np.log(STEPS / middle) / width))


def planted(power=-1.0, seeds=4, known=150.0, found=2500.0, lead=0.6, width=0.1, spread=0.02, zero=0.0, top=0.95):
    """Runs and curves where held-out accuracy rises at found x (decay / .25)^power, and the Gini coefficient at `lead`
    of that; without decay held-out accuracy ends at `zero`.
    """
    rng = np.random.default_rng(0)
    rows, points = [], []
    for decay in DECAYS:
        for seed in range(seeds):
            at = found * (max(decay, 0.25) / 0.25) ** power * math.exp(spread * rng.standard_normal())
            accuracy = rise(at, width, 0.0, 1.0) if decay else np.full(len(STEPS), zero)
            id_ = f"{decay}-{seed}"
            rows.append({"run_id": id_, "decay": decay, "seed": seed, "params_total": 1, "train.steps": 7000,
                         "status": "done", "final_loss": 0.1, "wall_seconds": 1.0, "code_version": "x"})  # fmt: skip
            curve = {
                "run_id": id_, "step": STEPS, "validation_train_accuracy": rise(known, 0.1, 0.0, 1.0),
                "validation_accuracy": accuracy, "validation_gini": rise(lead * at, width, 0.05, 0.5),
                "validation_top": rise(lead * at, width, 0.2, top),
            }  # fmt: skip
            points.append(pd.DataFrame(curve))
    return pd.DataFrame(rows), pd.concat(points, ignore_index=True)


def verdicts(runs, curves, seeds=4):
    found = paper.measure(paper.looked_at(runs, curves), seeds)
    assert set(found) == set(CLAIMS)
    return {name: verdict(CLAIMS[name], found[name]) for name in CLAIMS}


def test_where_all_is_as_stated_all_is_reproduced():
    assert verdicts(*planted()) == dict.fromkeys(CLAIMS, "reproduced")


@pytest.mark.parametrize(
    ("changed", "failing"),
    [
        ({"known": 2400.0}, {"delay", "by_heart"}),
        ({"width": 0.45, "found": 4800.0}, {"abrupt"}),
        ({"zero": 0.9}, {"no_decay"}),
        ({"power": -0.5}, {"slope"}),
        ({"top": 0.4}, {"sparse"}),
        ({"lead": 1.5}, {"foretold_tenth", "foretold_half"}),
    ],
)
def test_each_claim_can_fail(changed, failing):
    said = verdicts(*planted(**changed))
    assert {said[name] for name in failing} == {"not seen at this scale"}


def test_what_is_told_is_of_the_papers_decay_whoever_finds_the_rule_at_another():
    whole = paper.measure(paper.looked_at(*planted()), 4)
    runs, curves = planted()
    curves.loc[curves["run_id"] == "0.5-2", "validation_accuracy"] *= 0.5
    table = paper.looked_at(runs, curves)
    found = paper.measure(table, 4)
    assert math.isinf(table.set_index("run_id").loc["0.5-2", "found"])
    for name in ("delay", "abrupt", "sparse", "foretold_tenth", "foretold_half"):
        assert found[name] == whole[name]
    # Held-out pairs at 2500 / 4 x e^(.1 ln 19) steps, training pairs at 150 x the same.
    assert found["delay"].value == pytest.approx(math.log10(625 / 150), abs=0.05)
    assert math.isnan(found["slope"].value)
    assert found["slope"].remark == (
        "4 of 4 seeds have no value: a slope needs 3 decays above 0 at which every seed finds the rule, and there are 2"
    )


def test_where_a_seed_never_finds_the_rule_what_is_told_of_it_stays_open():
    runs, curves = planted()
    curves.loc[curves["run_id"] == "1.0-2", "validation_accuracy"] *= 0.5
    table = paper.looked_at(runs, curves)
    found = paper.measure(table, 4)
    for name in ("delay", "abrupt", "sparse", "foretold_tenth", "foretold_half"):
        assert found[name].remark.startswith("1 of 4 seeds have no value: at decay 1 the rule was not found")
        assert (found[name].seeds, verdict(CLAIMS[name], found[name])) == (3, "inconclusive")
    # Those that found it are shown, and counted.
    assert paper.course_words(table) == "Weight decay 1, the 3 of 4 seeds that find the rule"
    assert list(paper.course_rows(table)[0]["run_id"]) == ["1.0-0", "1.0-1", "1.0-3"]


def test_a_run_that_diverged_knows_nothing():
    runs, curves = planted()
    runs.loc[runs["run_id"] == "0.25-0", "status"] = "diverged"
    row = paper.looked_at(runs, curves).set_index("run_id").loc["0.25-0"]
    assert math.isinf(row["known"])
    assert math.isinf(row["found"])
    assert math.isinf(row["gini_at_0.5"])
    said = verdicts(runs, curves)
    assert said["by_heart"] == said["slope"] == "inconclusive"


def test_a_level_is_reached_between_two_points_or_never():
    steps, values = np.asarray([10.0, 20, 30, 40]), np.asarray([0.2, 0.1, 0.5, 0.3])
    assert paper.reached(steps, values, 0.3) == pytest.approx(25)
    assert paper.reached(steps, values, 0.2) == 10
    assert paper.reached(steps, values, 0.6) == math.inf


def test_the_way_of_a_curve_begins_when_the_training_pairs_are_known():
    steps, values = np.asarray([0.0, 10, 20, 30]), np.asarray([0.0, 0.4, 0.4, 1.0])
    assert paper.on_its_way(steps, values, 0.5, 15.0) == pytest.approx(25)  # from .4 on, not from 0
    assert paper.on_its_way(steps, values, 0.5, 0.0) == pytest.approx(20 + 10 / 6)
    assert paper.on_its_way(steps, values[::-1], 0.5, 0.0) == math.inf
    assert paper.on_its_way(steps, values, 0.5, math.inf) == math.inf


def test_the_slope_leaves_out_decays_at_which_a_seed_is_censored():
    decay = np.asarray([0.0, 0.1, 0.2, 0.4, 0.8])
    found = 100 / np.maximum(decay, 0.01)[:, None] ** np.asarray([1.0, 0.5])
    np.testing.assert_allclose(paper.slopes(decay, found), [-1, -0.5])
    censored = found.copy()
    censored[1, 0] = math.inf
    np.testing.assert_allclose(paper.slopes(decay, censored), [-1, -0.5])
    censored[2, 1] = math.inf
    assert np.isnan(paper.slopes(decay, censored)).all()


@pytest.mark.parametrize("scale", paper.SIZES)
def test_runs_are_decays_by_seeds_that_differ_in_nothing_else(scale):
    size = paper.SIZES[scale]
    configs = paper.configs(size)
    assert len({json.dumps(to_dict(c)) for c in configs}) == len(configs) == len(size.decays) * size.seeds
    assert len({(c.model, c.train.steps, c.optimizer.learning_rate) for c in configs}) == 1
    assert size.decays[0] == 0
    assert paper.DECAY in size.decays
    assert list(size.decays) == sorted(set(size.decays))
    if scale != "smoke":
        assert size.seeds >= 4
        assert size.first + size.seeds <= 100  # on which the settings were chosen


def test_tables_and_figure_tell_who_never_finds_the_rule(tmp_path):
    runs, curves = planted()
    curves.loc[curves["run_id"] == "0.25-2", "validation_accuracy"] *= 0.5
    table = paper.looked_at(runs, curves)
    said = paper.decay_table(table).set_index("weight decay")["held-out pairs"]
    assert said["0"] == "never"
    assert said["0.25"].endswith("; 1 of 4 never")
    assert "never" not in said["1"]
    assert not paper.course_table(table).isin(["nan", "inf"]).any(axis=None)
    size = paper.Size(59, 1218, DECAYS, 7000, 4, 140, {})
    drawn = paper.draw(table, curves, size, tmp_path / "figure")
    assert [path.name for path in drawn] == ["figure.png", "figure.svg"]


def test_tables_and_figure_stand_where_no_run_finds_the_rule(tmp_path):
    runs, curves = planted()
    curves["validation_accuracy"] *= 0.5
    table = paper.looked_at(runs, curves)
    assert paper.course_words(table) == "Weight decay 1, the 0 of 4 seeds that find the rule"
    assert (paper.course_table(table).drop(columns="of the way of") == "never").all(axis=None)
    size = paper.Size(59, 1218, DECAYS, 7000, 4, 140, {})
    assert len(paper.draw(table, curves, size, tmp_path / "figure")) == 2


@pytest.mark.slow  # it compiles a program
def test_the_command_leaves_claims_summary_and_figure(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "power2022", "--scale", "smoke")
    assert said.code == 0, said.err
    outcome = tmp_path / "results/raw/power2022/smoke/outcome"
    assert [c["id"] for c in json.loads((outcome / "claims.json").read_text())] == list(CLAIMS)
    assert len(pd.read_csv(outcome / "summary.csv")) == len(paper.configs(paper.SIZES["smoke"]))
