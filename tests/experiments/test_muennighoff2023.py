"""Repeated data: whether verdicts can come out each way on worlds that are known, and the command at smoke scale."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from analysis.laws import effective
from experiments.claims import verdict
from experiments.scaling import muennighoff2023 as paper

SIZE = paper.SIZES["laptop"]


def world(r_star, *, scatter=1e-4, harm=0.0):
    """Runs of the laptop scale whose losses are E + B / D'^beta; harm: nats more per doubling of the epochs past 16."""
    rng, rows = np.random.default_rng(0), []
    for config in paper.configs(SIZE):
        unique = config.data.training_tokens
        at = float(unique or config.tokens)
        worth = math.exp(effective(math.log(config.tokens), math.log(at), math.log(r_star)))
        loss = 1.2 + 40 * worth**-0.35 + harm * max(0.0, math.log2(config.tokens / at / 16))
        rows.append({"data.training_tokens": unique, "tokens": config.tokens, "train.seed": config.train.seed,
                     "final_loss": loss * math.exp(scatter * rng.standard_normal())})  # fmt: skip
    return paper.named(pd.DataFrame(rows))


def verdicts(table):
    fit = paper.fitted(table, SIZE)
    found = paper.measure(table, fit, SIZE.seeds)
    return fit, found, {claim.id: verdict(claim, found[claim.id]) for claim in paper.CLAIMS}


def test_where_the_papers_law_holds_all_is_reproduced():
    fit, found, said = verdicts(world(15.4))
    assert said == dict.fromkeys(said, "reproduced")
    assert fit.best["RD"] == pytest.approx(15.4, rel=0.1)
    assert found["late_epochs"].value == pytest.approx(0.30, abs=0.03)  # what the claim's comment says


def test_where_repeating_wears_out_at_once_nothing_is():
    fit, _, said = verdicts(world(1.0))
    assert fit.best["RD"] == pytest.approx(1.0, rel=0.1)
    assert said["four_epochs"] == said["half_life"] == "not seen at this scale"


def test_where_late_epochs_do_harm_the_loss_is_not_said_to_fall_and_the_law_is_fitted_to_what_falls():
    table = world(15.4, harm=0.2)
    fit, found, said = verdicts(table)
    assert said["late_epochs"] == "not seen at this scale"
    assert found["late_epochs"].value < 0
    assert paper.falling(table).query("text != 'fresh'")["epochs"].max() == 16
    assert fit.best["RD"] == pytest.approx(15.4, rel=0.2)


def test_seeds_that_disagree_decide_nothing():
    _, _, said = verdicts(world(15.4, scatter=0.05))
    assert said["four_epochs"] == "inconclusive"


def test_the_worth_of_a_loss_is_read_off_a_power_law_exactly_and_beyond_its_ends():
    tokens = 2.0 ** np.arange(10, 16)
    wanted = np.array([700.0, 1024.0, 5000.0, 2.0**15, 1e5])
    np.testing.assert_allclose(np.exp(paper.worth(tokens, 3 * tokens**-0.2, 3 * wanted**-0.2)), wanted, rtol=1e-6)
    # a run that came out worse than a shorter one is passed over
    bumpy = np.array([3.0, 2.0, 2.1, 1.0])
    assert np.exp(paper.worth(tokens[:4], bumpy, np.array([2.0])))[0] == pytest.approx(tokens[1])


@pytest.mark.parametrize("scale", paper.SIZES)
def test_every_part_of_the_text_has_a_run_on_as_many_fresh_tokens(scale):
    size = paper.SIZES[scale]
    configs = paper.configs(size)
    fresh = {(c.tokens, c.train.seed) for c in configs if c.data.training_tokens is None}
    assert {(c.tokens, c.train.seed) for c in configs} == fresh
    epochs = {c.tokens / c.data.training_tokens for c in configs if c.data.training_tokens}
    assert epochs == set(map(float, size.epochs))
    assert {paper.FEW, paper.MANY, paper.MOST} <= epochs


@pytest.mark.slow
def test_the_command_leaves_claims_summary_and_figure(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "muennighoff2023", "--scale", "smoke", "--json", "out.json")
    assert said.code == 0, said.err
    outcome = tmp_path / "results/raw/muennighoff2023/smoke/outcome"
    assert {"claims.json", "figure.png", "figure.svg", "run.json", "summary.csv"} == {p.name for p in outcome.iterdir()}
    claims = json.loads((outcome / "claims.json").read_text())
    assert [c["id"] for c in claims] == [c.id for c in paper.CLAIMS]
    assert all(math.isfinite(c["measured"]) for c in claims)
    runs = pd.read_csv(outcome / "summary.csv")
    assert len(runs) == len(paper.configs(paper.SIZES["smoke"]))
    assert json.loads((tmp_path / "out.json").read_text())["fit"]["points"] <= len(runs)
