"""The figure is written, says what its axes are, survives grey, and is the same bytes each time."""

import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from analysis.fit import fit
from analysis.laws import CHINCHILLA
from analysis.plots import scaling_figure, short, size_styles

TRUTH = {"E": 1.05, "A": 8.0, "B": 160.0, "alpha": 0.22, "beta": 0.36}


def tables():
    """Runs and curves of 3 sizes x 3 budgets, with lines that hold no validation loss."""
    rng = np.random.default_rng(0)
    runs, curves = [], []
    for n in (3_000, 12_000, 49_000):
        for tokens in (4e5, 8e5, 1.6e6):
            run_id = f"{n}-{tokens:.0f}"
            seen = np.linspace(0.05, 1, 20) * tokens
            loss = CHINCHILLA.predict(TRUTH, {"N": n, "D": seen}) * np.exp(0.01 * rng.normal(size=20))
            runs.append((run_id, n, tokens, 6 * n * tokens, loss[-1], 0.01))
            curves += [
                (run_id, i, d, 6 * n * d, value if i % 2 else np.nan, value)
                for i, (d, value) in enumerate(zip(seen, loss, strict=True))
            ]
    run_columns = ["run_id", "N", "D", "C", "final_loss", "final_loss_sem"]
    curve_columns = ["run_id", "step", "D", "C", "validation_loss", "train_loss"]
    return pd.DataFrame(runs, columns=run_columns), pd.DataFrame(curves, columns=curve_columns)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    runs, curves = tables()
    fitted = fit(
        CHINCHILLA,
        {"N": runs["N"], "D": runs["D"]},
        runs["final_loss"],
        starts=20,
        bootstraps=40,
    )
    folder = tmp_path_factory.mktemp("figures")
    return [scaling_figure(runs, curves, fitted, folder / name / "figure") for name in ("first", "second")]


def test_png_and_svg_are_written_and_no_partial_file_stays(drawn):
    first = drawn[0]
    assert [path.name for path in first] == ["figure.png", "figure.svg"]
    assert sorted(path.name for path in first[0].parent.iterdir()) == ["figure.png", "figure.svg"]
    assert first[0].read_bytes().startswith(b"\x89PNG")


def test_the_same_table_gives_the_same_bytes(drawn):
    for first, second in zip(*drawn, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_axes_carry_units_and_the_legend_names_each_size(drawn):
    said = set(re.findall(r"<!-- (.*?) -->", drawn[0][1].read_text()))  # the SVG keeps each text as a comment
    assert {
        "training compute C = 6ND (FLOPs; N counts all parameters)",
        "validation loss (nats per token)",
        "training data D (tokens)",
        "compute-optimal frontier, 90% interval",
        "N = 3k",
        "N = 12k",
        "N = 49k",
    } <= said


def test_sizes_differ_in_lightness_and_marker_so_that_grey_is_enough():
    styles = size_styles([1e6, 1e4, 1e5, 1e7, 1e3])
    lightness = [np.dot(to_rgb(colour), [0.299, 0.587, 0.114]) for colour, _ in styles.values()]
    assert list(styles) == [1e3, 1e4, 1e5, 1e6, 1e7]
    assert np.all(np.diff(lightness) < -0.05)
    assert lightness[0] < 0.75  # still visible on white
    assert len({marker for _, marker in styles.values()}) == 5


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12"), (999.7, "1k"), (12_345, "12.3k"), (2e6, "2M"), (7e10, "70B"), (1.4e12, "1.4T")]
)
def test_counts_are_written_short(count, text):
    assert short(count) == text
