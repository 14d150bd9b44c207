"""Kernel regression with a planted spectrum: theory against closed forms, and whether verdicts come out each way."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from experiments.claims import verdict
from experiments.scaling import bordelon2020 as paper

CLAIMS = {claim.id: claim for claim in paper.CLAIMS}
FLAT = paper.Modes(np.full(60, 0.3), np.full(60, 1 / 60), ridge=0.0, noise=0.0)


def test_with_equal_eigenvalues_what_is_not_learnt_is_the_share_of_directions_without_a_sample():
    # Then the regression is the projection onto the samples: 1 - P / K of a target of length 1 is left.
    for samples in (6, 30, 54):
        assert paper.theory(FLAT, samples) == pytest.approx(1 - samples / 60, rel=1e-9)
    measured = [paper.error(FLAT, 30, np.random.default_rng(seed)) for seed in range(200)]
    assert np.mean(measured) == pytest.approx(0.5, abs=4 * np.std(measured) / math.sqrt(200))


def test_without_samples_the_error_is_the_targets_power():
    m = paper.modes(paper.SPECTRA[0], 100)
    assert paper.theory(m, 0) == pytest.approx(m.power_K.sum() + m.noise)
    assert m.power_K.sum() + m.noise == pytest.approx(2.6123753, rel=1e-6)  # zeta(3/2)


@pytest.mark.parametrize("spectrum", paper.SPECTRA, ids=lambda s: s.name)
def test_the_modes_that_are_left_out_act_as_ridge_and_noise(spectrum):
    few, many = (paper.theory(paper.modes(spectrum, count), 64) for count in (2_000, 200_000))
    assert few == pytest.approx(many, rel=1e-3)


@pytest.mark.parametrize("spectrum", paper.SPECTRA, ids=lambda s: s.name)
def test_the_equations_error_falls_with_the_analytic_exponent_when_samples_are_many(spectrum):
    m = paper.modes(spectrum, 1_000_000)
    few, many = paper.theory(m, 20_000), paper.theory(m, 40_000)
    assert math.log2(few / many) == pytest.approx(spectrum.exponent, rel=0.03)


@pytest.mark.parametrize("spectrum", paper.SPECTRA, ids=lambda s: s.name)
def test_measured_errors_scatter_around_the_equations(spectrum):
    m = paper.modes(spectrum, 500)
    measured = [paper.error(m, 48, np.random.default_rng(seed)) for seed in range(20)]
    sem = np.std(measured, ddof=1) / math.sqrt(20)
    # The equation holds for many samples; at 48 it is a few percent off.
    assert np.mean(measured) == pytest.approx(paper.theory(m, 48), abs=4 * sem + 0.05 * np.mean(measured))


# --- from errors to verdicts -----------------------------------------------------------------------------------------


def planted(exponent, *, scatter=0.05, ratio=1.0):
    """Errors that fall with a given multiple of the analytic exponents."""
    size, rng = paper.SIZES["laptop"], np.random.default_rng(0)
    return pd.DataFrame([
        {"spectrum": s.name, "samples": p, "seed": seed, "theory": theory,
         "error": ratio * theory * math.exp(scatter * rng.standard_normal())}
        for s in paper.SPECTRA
        for p in size.samples
        for theory in [float(p) ** (-exponent * s.exponent)]
        for seed in range(size.seeds)
    ])  # fmt: skip


def verdicts(table):
    found = paper.measure(table, paper.fits(table, paper.SIZES["smoke"]))
    return found, {name: verdict(CLAIMS[name], found[name]) for name in CLAIMS}


def test_where_the_analytic_exponents_hold_all_is_reproduced():
    table = planted(1.0)
    found, said = verdicts(table)
    assert said == dict.fromkeys(CLAIMS, "reproduced")
    for s in paper.SPECTRA:
        assert found[s.name].value == pytest.approx(s.exponent, abs=0.02)
        assert paper.theory_exponent(table, s.name) == pytest.approx(s.exponent, abs=1e-6)


def test_where_other_exponents_or_other_errors_hold_all_is_contradicted():
    _, said = verdicts(planted(0.7, ratio=1.2))
    assert set(said.values()) == {"contradicted"}


def test_where_errors_scatter_widely_nothing_is_decided():
    _, said = verdicts(planted(1.0, scatter=2.0))
    assert said["rough"] == "inconclusive"
    assert said["theory"] != "reproduced"


# --- from the command to the figure ----------------------------------------------------------------------------------


def test_the_command_leaves_claims_summary_and_figure(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "bordelon2020", "--scale", "smoke")
    assert said.code == 0, said.err
    outcome = tmp_path / "results/raw/bordelon2020/smoke/outcome"
    assert sorted(path.name for path in outcome.iterdir()) == [
        "claims.json", "figure.png", "figure.svg", "run.json", "summary.csv"]  # fmt: skip
    assert [c["id"] for c in json.loads((outcome / "claims.json").read_text())] == list(CLAIMS)
    size = paper.SIZES["smoke"]
    assert len(pd.read_csv(outcome / "summary.csv")) == len(paper.SPECTRA) * len(size.samples) * size.seeds
