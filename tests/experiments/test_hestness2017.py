"""Learning curves: whether verdicts can come out each way on worlds that are known, and the command at smoke scale."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from experiments.claims import verdict
from experiments.scaling import hestness2017 as paper

SIZE = paper.SIZES["laptop"]


def world(alpha, *, lstm=None, floor=0.0, share=5.0, scatter=1e-3):
    """Runs whose best loss is floor + share m^-alpha for the best size, 5 % more for the others."""
    rng, rows = np.random.default_rng(0), []
    for config in paper.configs(SIZE):
        c, m = config.model, config.data.training_tokens
        of_lstm = c.architecture == "lstm"
        power = alpha if lstm is None or not of_lstm else lstm
        loss = floor + (1.1 if of_lstm else 1.0) * share * m**-power
        loss *= math.exp(abs(scatter * rng.standard_normal())) * (1.0 if c.d_model in (32, 48) else 1.05)
        rows.append({"model.architecture": c.architecture, "model.d_model": c.d_model, "data.training_tokens": m,
                     "train.seed": config.train.seed, "best_loss": loss, "params_total": c.d_model})  # fmt: skip
    return paper.best(pd.DataFrame(rows))


def verdicts(points):
    found = paper.measure(points, SIZE)
    return found, {claim.id: verdict(claim, found[claim.id]) for claim in paper.CLAIMS}


def test_the_best_size_counts_for_each_training_set_and_seed():
    points = world(0.094)
    assert set(points.loc[points["model.architecture"] == "transformer", "params_total"]) == {32}
    assert len(points) == 2 * len(SIZE.unique) * SIZE.seeds


def test_where_the_papers_power_law_holds_all_is_reproduced():
    found, said = verdicts(world(0.094))
    assert said == dict.fromkeys(said, "reproduced")
    assert found["exponent"].value == pytest.approx(0.094, abs=0.002)


def test_another_exponent_an_lstm_that_learns_otherwise_and_a_floor_are_seen():
    _, said = verdicts(world(0.2, lstm=0.3))
    assert said["exponent"] == said["architecture"] == "not seen at this scale"
    found, said = verdicts(world(0.45, floor=1.0, share=100.0))
    assert said["extrapolation"] == "not seen at this scale"
    assert found["extrapolation"].value < -0.03  # a power law without the floor promises too much


def test_scatter_that_hides_the_exponent_decides_nothing():
    _, said = verdicts(world(0.094, scatter=0.5))
    assert said["exponent"] == said["architecture"] == "inconclusive"


@pytest.mark.parametrize("scale", paper.SIZES)
def test_every_run_sees_its_text_equally_often(scale):
    size = paper.SIZES[scale]
    configs = paper.configs(size)
    assert len(configs) == len(size.models) * len(size.unique) * size.seeds
    assert all(c.tokens == size.epochs * c.data.training_tokens for c in configs)


@pytest.mark.slow
def test_the_command_leaves_claims_summary_and_figure(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "hestness2017", "--scale", "smoke")
    assert said.code == 0, said.err
    outcome = tmp_path / "results/raw/hestness2017/smoke/outcome"
    assert {"claims.json", "figure.png", "figure.svg", "run.json", "summary.csv"} == {p.name for p in outcome.iterdir()}
    claims = json.loads((outcome / "claims.json").read_text())
    assert [c["id"] for c in claims] == [c.id for c in paper.CLAIMS]
    assert all(math.isfinite(c["measured"]) for c in claims)
    assert len(pd.read_csv(outcome / "summary.csv")) == len(paper.configs(paper.SIZES["smoke"]))
