"""Conventions: mixed ones are refused, and Kaplan's exponent follows from Chinchilla's law without embeddings."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from analysis.conventions import (
    Convention,
    Counting,
    chinchilla_exponent,
    convention_of,
    counted_surface,
    kaplan_gap,
    local_exponent,
)
from analysis.fit import FitError
from analysis.laws import CHINCHILLA
from analysis.planning import surface

LAW = {"E": 1.6934, "A": 406.4, "B": 410.7, "alpha": 0.3392, "beta": 0.2849}  # Hoffmann et al. 2022
N, D = np.geomspace(1e6, 1e9, 6), np.geomspace(1e9, 1e8, 6)


def test_without_embeddings_the_local_exponent_is_that_of_an_independent_minimisation():
    counting = Counting()

    def best(flops):
        def loss(log_n):
            n = np.exp(log_n)
            return float(CHINCHILLA.predict(LAW, {"N": n + counting.omega * n ** (1 / 3), "D": flops / (6 * n)}))

        return minimize_scalar(loss, bracket=(10, 20), options={"xtol": 1e-12}).x

    ends = np.log([1e17, 1.001e17])
    expected = (best(1.001e17) - best(1e17)) / (ends[1] - ends[0])
    got = local_exponent(counted_surface(surface(CHINCHILLA, LAW), counting), (1e17, 1.001e17), points=2)
    assert got == pytest.approx(expected, abs=2e-4)  # minimisers are good to about 1e-8, over a step of 1e-3
    assert chinchilla_exponent(LAW, counting, np.exp(best(1e17))) == pytest.approx(expected, abs=2e-4)


def test_the_closed_form_is_the_slope_over_any_range():
    sizes = np.geomspace(1e3, 1e10, 8)
    without = counted_surface(surface(CHINCHILLA, LAW), Counting())
    for n, expected in zip(sizes, chinchilla_exponent(LAW, Counting(), sizes), strict=True):
        all_n = Counting().total(n)
        # compute at which n is the best, from the condition that the loss is stationary there
        pull = LAW["alpha"] * LAW["A"] * all_n ** (-LAW["alpha"] - 1) * (1 + Counting().omega / 3 * n ** (-2 / 3))
        tokens = (LAW["beta"] * LAW["B"] / (pull * n)) ** (1 / LAW["beta"])
        flops = 6 * n * tokens
        assert local_exponent(without, (flops * 0.9, flops / 0.9), points=9) == pytest.approx(expected, abs=2e-3)


def test_the_exponent_goes_from_the_small_to_the_large_limit():
    alpha, beta = LAW["alpha"], LAW["beta"]
    small, large = chinchilla_exponent(LAW, Counting(), [1.0, 1e18])
    assert small == pytest.approx(beta / (beta + alpha / 3), abs=1e-3)
    assert large == pytest.approx(beta / (beta + alpha), abs=1e-5)


def test_chinchillas_law_shows_kaplans_exponent_at_kaplans_sizes_without_embeddings():
    """Pearce & Song 2024: 768 to 1.5 billion parameters outside embeddings; Kaplan et al. 2020 found .73."""
    with_embeddings, without = kaplan_gap(surface(CHINCHILLA, LAW), (768.0, 1.5e9))
    assert with_embeddings == pytest.approx(LAW["beta"] / (LAW["alpha"] + LAW["beta"]), abs=1e-4)
    assert 0.72 < without < 0.77


def test_no_embeddings_no_gap():
    with_embeddings, without = kaplan_gap(surface(CHINCHILLA, LAW), (1e5, 1e8), Counting(omega=0.0))
    assert with_embeddings == pytest.approx(without, abs=1e-4)


# --- what a table's columns say ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "columns", "expected"),
    [
        ({"N": "params_total", "D": "tokens"}, {}, Convention("total", "6nd")),
        ({"N": "params_non_embedding"}, {}, Convention("non_embedding", "6nd")),
        ({"C": "flops_exact"}, {"c": N * D}, Convention("unknown", "exact")),
        (
            {"N": "params_total", "C": "flops_exact"},  # may be 6 N D by chance
            {"n": N, "d": D, "c": 6 * N * D * np.array([1, 1, 1, 1.5, 1, 1])},
            Convention("total", "exact"),
        ),
        (
            {"N": "size", "C": "flops"},  # rounded to three digits
            {"n": N, "d": D, "c": 6 * N * D * (1 + 0.004 * np.sin(np.arange(6)))},
            Convention("unknown", "6nd"),
        ),
        ({"N": "params_total", "C": "flops_exact"}, {"n": N, "d": D, "c": 6.3 * N * D}, Convention("total", "exact")),
        ({"N": "size", "C": "flops"}, {"n": N, "d": D, "c": 6 * N * D}, Convention("unknown", "6nd")),
        ({"N": "size", "C": "flops"}, {"n": N, "d": D, "c": 7 * N * D}, Convention("unknown", "exact")),
        ({"N": "size", "C": "flops"}, {"derives_d": True}, Convention("unknown", "6nd")),
    ],
)
def test_names_and_numbers_tell_the_convention(names, columns, expected):
    assert convention_of(names, **columns) == expected
    assert "N counts" in str(expected)


MIXED = {
    "other parameters": ({"N": "params_non_embedding", "C": "flops_6nd"}, {}, "params_non_embedding counts non-emb"),
    "D of an exact C": ({"N": "params_total", "C": "flops_exact"}, {"derives_d": True}, "counted exactly"),
    "not all rows": (
        {"N": "n", "C": "c"},
        {"n": N, "d": D, "c": 6 * N * D * np.array([1, 1, 1, 1.5, 1, 1])},
        r"6 N D in 5 rows and not in 1 others \(row 3: 1.5",
    ),
    "another 6nd": ({"N": "n", "C": "flops_6nd"}, {"n": N, "d": D, "c": 8 * N * D}, "1.33 to 1.33 times 6 N D"),
}


@pytest.mark.parametrize(("names", "columns", "message"), MIXED.values(), ids=MIXED)
def test_mixed_conventions_are_refused_in_one_line(names, columns, message):
    with pytest.raises(FitError, match=message) as refusal:
        convention_of(names, **columns)
    assert str(refusal.value).startswith("mixed conventions: ")
    assert "\n" not in str(refusal.value)
