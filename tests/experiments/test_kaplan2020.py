"""Laws with and without a floor and exponents by convention, on known worlds; and the command at smoke scale."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from planted_isoflop import plant

from experiments.claims import verdict
from experiments.scaling import isoflop
from experiments.scaling import kaplan2020 as paper
from jaxgpt import flops

SIZE, SHARED = paper.SIZES["laptop"], isoflop.SIZES["laptop"]
CLAIM = {claim.id: claim for claim in paper.CLAIMS}


def worlds(loss, entropy):
    """Losses loss(N, chain) of the laptop scale's models, scattered by 0.1 %."""
    found = []
    for chain in range(SIZE.chains):
        rng = np.random.default_rng(chain)
        rows = [{"params_non_embedding": (n := flops.parameters(c.model).non_embedding), "train.seed": chain,
                 "final_loss": loss(n, chain) * math.exp(1e-3 * rng.standard_normal())}
                for c in paper.configs(SIZE) if c.train.seed == chain]  # fmt: skip
        found.append(paper.world(paper.named(pd.DataFrame(rows)), entropy(chain), SIZE))
    return found


def said(measured):
    return {name: verdict(CLAIM[name], one) for name, one in measured.items()}


def test_where_the_floor_is_the_entropy_all_claims_about_it_are_reproduced():
    found = paper.of_worlds(worlds(lambda n, chain: 1.7 + 0.1 * chain + 90 * n**-0.8, lambda chain: 1.7 + 0.1 * chain))
    assert said(found) == dict.fromkeys(found, "reproduced")


def test_where_there_is_no_floor_none_is_preferred_and_the_entropy_is_not_found():
    found = paper.of_worlds(worlds(lambda n, chain: 6 * n**-0.05, lambda chain: 1.7 + 0.1 * chain))
    verdicts = said(found)
    assert verdicts["floor"] == verdicts["choice"] == "not seen at this scale"
    assert verdicts["crossing"] != "reproduced"
    assert "reproduced" not in verdicts.values()


def test_where_models_stay_above_the_entropy_the_floor_is_not_it():
    found = paper.of_worlds(worlds(lambda n, chain: 1.9 + 90 * n**-0.8, lambda chain: 1.7))
    assert said(found)["floor"] == "not seen at this scale"
    assert found["floor"].value == pytest.approx(0.2, abs=0.01)


def test_the_crossing_is_where_the_law_without_a_floor_meets_the_entropy():
    (one, *_) = worlds(lambda n, chain: 1.7 + 90 * n**-0.8, lambda chain: 1.7)
    at = one.n_M[-1] * 10**one.crossing
    assert one.plain.law.predict(one.plain.best, {"N": at}) == pytest.approx(1.7, rel=1e-9)


def text(loss, noise=0.0):
    runs, _ = plant(isoflop.grid(SHARED, seeds=range(SHARED.seeds)), loss, noise=noise)
    return isoflop.labelled(runs, SHARED)


def test_kaplans_own_law_gives_back_its_exponents():
    def law(config, tokens):
        n = flops.parameters(config.model).non_embedding
        return ((3e9 / n) ** (0.076 / 0.095) + 5e9 / tokens) ** 0.095

    found = paper.in_size_and_data(text(law, noise=1e-4), SHARED, "params_non_embedding")
    assert found["alphaN"].value == pytest.approx(0.076, abs=0.002)
    assert found["alphaD"].value == pytest.approx(0.095, abs=0.002)


def test_exponents_in_compute_are_those_of_losses_with_parabolas_of_known_minima():
    rows = [{"trunk": f"{n}/{seed}", "N": n, "C": c, "budget": k,
             "loss": math.exp(-0.06 * math.log(c) + 0.02 * math.log(n / (1e-3 * c**0.6)) ** 2)}
            for k, c in enumerate([1e11, 2e11, 4e11, 8e11]) for n in np.geomspace(1e3, 1e5, 8)
            for seed in (0, 1)]  # fmt: skip
    found = paper.in_compute(pd.DataFrame(rows), 100, 2)
    assert found["a"].value == pytest.approx(0.6, abs=1e-6)
    assert found["alphaC"].value == pytest.approx(0.06, abs=1e-6)
    assert found["a"].remark == found["alphaC"].remark == ""
    assert found["a"].low == pytest.approx(found["a"].high, abs=1e-6)  # no noise, no spread


def test_a_budget_without_a_minimum_leaves_the_exponents_open():
    rows = [{"trunk": str(n), "N": n, "C": c, "budget": k, "loss": 3 - 0.01 * math.log(n)}
            for k, c in enumerate([1e11, 2e11]) for n in np.geomspace(1e3, 1e5, 6)]  # fmt: skip
    found = paper.in_compute(pd.DataFrame(rows), 20, 1)
    assert math.isnan(found["a"].value)
    assert "lowest loss" in found["a"].remark
    assert verdict(CLAIM["size"], found["a"]) == "inconclusive"


def test_leaving_out_embeddings_raises_the_exponent_where_the_law_counts_them():
    def law(config, tokens):
        return 1.2 + 18 * flops.parameters(config.model).total ** -0.34 + 35 * tokens**-0.34

    runs = text(law)
    levels = {
        column: isoflop.at_equal_compute(runs.assign(N=runs[column].astype(float), per_token=6.0 * runs[column]), 4)
        for column in ("params_total", "params_non_embedding")
    }
    a = {column: paper.in_compute(level, 20, 2)["a"].value for column, level in levels.items()}
    assert a["params_non_embedding"] > a["params_total"] + 0.05


def test_xla_counts_more_than_the_matrix_products_and_six_n_counts_tables_that_cost_nothing():
    table = paper.counts(isoflop.SIZES["smoke"], (8,))
    (row,) = table.to_dict("records")
    assert row["without"] < row["all"]
    assert row["causal"] < row["dense"] < row["xla"] < row["all"]
    assert paper.of_counts(table).value == row["xla"] / row["all"]


@pytest.mark.slow  # a model of every width of both sweeps is compiled
def test_the_command_leaves_claims_summary_and_figure(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = command("reproduce", "kaplan2020", "--scale", "smoke", "--json", "out.json")
    assert ran.code == 0, ran.err
    outcome = tmp_path / "results/raw/kaplan2020/smoke/outcome"
    assert {"claims.json", "figure.png", "figure.svg", "run.json", "summary.csv"} == {p.name for p in outcome.iterdir()}
    claims = json.loads((outcome / "claims.json").read_text())
    assert [c["id"] for c in claims] == [c.id for c in paper.CLAIMS]
    assert len(json.loads((tmp_path / "out.json").read_text())["chains"]) == paper.SIZES["smoke"].chains
    assert set(pd.read_csv(outcome / "summary.csv")["source"]) == {"Markov chain", "text"}
