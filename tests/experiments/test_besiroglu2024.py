"""Besiroglu et al. 2024: whether its verdicts can come out in each way, and the command on the published points."""

import json
import math
import os
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.laws import CHINCHILLA
from experiments.chinchilla_points import BESIROGLU, HOFFMANN, points
from experiments.claims import verdict
from experiments.scaling import besiroglu2024 as paper

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
FILE = Path(os.environ.get("JAXGPT_DATA") or SHARED) / "svg_extracted_data.csv"
published = pytest.mark.skipif(not FILE.exists(), reason=f"{FILE} is absent (set JAXGPT_DATA to the data folder)")


@pytest.fixture(autouse=True)
def data(monkeypatch):
    monkeypatch.setenv("JAXGPT_DATA", str(FILE.parent) if FILE.exists() else "")


def of_law(law, noise, number=240, seed=0):
    """Points like the published ones, of a law with Gaussian noise of log loss."""
    rng = np.random.default_rng(seed)
    c = 10 ** rng.uniform(18.5, 21.5, number)
    n = np.sqrt(c / 120) * np.exp(rng.normal(0, 0.9, number))
    table = pd.DataFrame({"N": n, "D": c / (6 * n), "C": c})
    return table.assign(loss=CHINCHILLA.predict(law, table) * np.exp(noise * rng.standard_normal(number)))


def verdicts(table):
    size = paper.SIZES["smoke"]
    fitted = paper._fit(table, 20, size.bootstraps)
    measured, numbers = paper.measure(table, fitted, size)
    return {claim.id: verdict(claim, measured[claim.id]) for claim in paper.CLAIMS}, measured, numbers


def test_where_the_first_report_is_right_the_refit_is_contradicted():
    said, measured, _ = verdicts(of_law(HOFFMANN, noise=0.002))
    assert said["bias"] == "reproduced"
    assert "contradicted" in (said["beta"], said["B"], said["E"])
    assert said["optimum"] == "contradicted"
    assert measured["points_needed"].value < math.log10(6e5)  # so little noise needs fewer points


def test_where_the_refit_is_right_it_is_reproduced_and_its_digits_may_hide_the_optimum():
    said, measured, numbers = verdicts(of_law(BESIROGLU, noise=1e-4))
    for name in ("E", "A", "B", "alpha", "beta", "a"):
        assert said[name] == "reproduced", name
        assert measured[name].value == pytest.approx(BESIROGLU.get(name, 0.5126), rel=0.05)
    assert numbers["objective"] <= numbers["least_objective_that_rounds_to_the_printed_refit"] * (1 + 1e-9)
    assert said["bias"] == "contradicted"


def test_the_objective_is_the_summed_huber_loss():
    small, large = 0.5 * paper.HUBER_DELTA, 4 * paper.HUBER_DELTA
    expected = small**2 / 2 + paper.HUBER_DELTA * (large - paper.HUBER_DELTA / 2)
    assert paper.objective(np.array([small, -large])) == pytest.approx(expected)


def test_the_grid_of_starts_is_hoffmanns():
    grid = paper.starts()
    assert {len(values) for values in grid.values()} == {4500}
    assert sorted(set(grid["alpha"])) == [0, 0.5, 1, 1.5, 2]
    assert np.log(sorted(set(grid["B"]))) == pytest.approx([0, 5, 10, 15, 20, 25])
    assert np.log(sorted(set(grid["E"]))) == pytest.approx([-1, -0.5, 0, 0.5, 1])
    assert len(paper.starts(90)["E"]) == 50


@published
def test_the_points_are_240_with_tokens_from_compute():
    table = points()
    assert len(table) == 240
    assert table["loss"].max() < 3.44699
    np.testing.assert_allclose(6 * table["N"] * table["D"], table["C"])


@published
def test_half_of_the_points_widen_the_interval_by_the_root_of_two():
    table = points()
    widths = [
        paper._width(paper._fit(table.sample(frac=share, random_state=0), 10, 150)) for share in (1.0, 0.25)
    ]  # fmt: skip
    assert widths[1] / widths[0] == pytest.approx(2, rel=0.5)


@published
def test_the_command_shows_that_the_first_report_cannot_hold(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "besiroglu2024", "--scale", "smoke", "--json", "out.json")
    assert said.code == 0, said.err
    outcome = tmp_path / "results/raw/besiroglu2024/smoke/outcome"
    assert sorted(path.name for path in outcome.iterdir()) == [
        "claims.json", "figure.png", "figure.svg", "run.json", "summary.csv"]  # fmt: skip
    assert xml.etree.ElementTree.parse(outcome / "figure.svg").getroot().tag.endswith("svg")
    found = {c["id"]: c for c in json.loads((outcome / "claims.json").read_text())}
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["objective"] <= 1.0182741e-3
    assert numbers["objective"] < numbers["least_objective_that_rounds_to_the_printed_refit"]
    assert numbers["least_objective_that_rounds_to_the_printed_refit"] < numbers["objective_of_the_printed_refit"]
    assert numbers["objective_of_the_first_report"] > 1.2 * numbers["objective"]
    assert found["a"]["verdict"] == "reproduced"
    assert found["a"]["interval"][0] > 0.455  # outside of what was reported first
    assert found["optimum"]["verdict"] == found["bias"]["verdict"] == "contradicted"
    assert len(pd.read_csv(outcome / "summary.csv")) == 240
