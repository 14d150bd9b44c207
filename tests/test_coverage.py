"""The coverage benchmark: what it counts, and that it runs from end to end."""

import json
import sys

import numpy as np
import pytest

from benchmarks import coverage


def test_tables_hold_the_planted_law_and_its_noise():
    at, loss_M, trunk_M = coverage.table("clustered", np.random.default_rng(0))
    assert len(loss_M) == 72
    assert np.bincount(trunk_M).tolist() == [4] * 18
    assert all(len(np.unique(at["N"][trunk_M == trunk])) == 1 for trunk in range(18))
    for noise in ("gaussian", "heavy", "clustered"):
        error_RxM = np.stack([
            np.log(loss_M / coverage.CHINCHILLA.predict(coverage.TRUTH, at))
            for at, loss_M, _ in (coverage.table(noise, np.random.default_rng([1, r])) for r in range(300))
        ])  # fmt: skip
        expected = coverage.NOISE * (1.25**0.5 if noise == "clustered" else 1.0)
        assert error_RxM.std() == pytest.approx(expected, rel=0.1)
        inside_trunk = np.mean(error_RxM[:, 0] * error_RxM[:, 1]) / error_RxM.var()
        assert inside_trunk == pytest.approx(0.8 if noise == "clustered" else 0.0, abs=0.2)


def test_shares_are_percent_with_a_binomial_standard_error():
    held = [[True] * len(coverage.PLANTED)] * 3 + [[False, *[True] * (len(coverage.PLANTED) - 1)]]
    found = coverage.shares(held)
    assert found["E"].value == 75
    assert found["E"].high - found["E"].value == pytest.approx(100 * (0.75 * 0.25 / 4) ** 0.5)
    low, high = coverage.rows("x", found, target=True)
    assert (low.measure.value, low.met) == (75, False)
    assert (high.measure.value, high.met) == (100, False)
    assert [row.met for row in coverage.rows("x", found, target=False)] == [None, None]


def test_the_benchmark_writes_a_figure_for_every_case(tmp_path, monkeypatch):
    words = f"--repetitions 2 --bootstraps 20 --processes 1 --out {tmp_path / 'results'}"
    monkeypatch.setattr(sys, "argv", ["coverage", *words.split()])
    coverage.main()
    found = json.loads((tmp_path / "results" / "coverage.json").read_text())
    assert found["command"] == "python -m benchmarks.coverage --repetitions 2 --bootstraps 20 --processes 1"
    grouped = sum(case.grouped for case in coverage.CASES)
    assert len(found["figures"]) == 2 * len(coverage.CASES) - grouped
    for covered in found["figures"].values():
        assert list(covered) == ["E", "A", "B", "alpha", "beta", "a"]
        assert all(one["value"] in (0, 50, 100) for one in covered.values())
