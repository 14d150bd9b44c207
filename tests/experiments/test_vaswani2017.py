"""The scale of attention's scores: what is read off weights against arithmetic, claims that can fail."""

import json

import numpy as np
import pandas as pd
import pytest

from experiments.architecture import vaswani2017 as paper
from experiments.claims import verdict

CLAIMS = {claim.id: claim for claim in paper.CLAIMS}
SIZE = paper.Size(2, (4, 16), 16, 16, 2, (2, 12), 2)


def test_numbers_are_those_of_scores_and_of_the_jacobian_itself():
    scores = 2 * np.random.default_rng(0).standard_normal((5, 7))
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    found = paper.numbers(p)
    jacobians = [np.diag(row) - np.outer(row, row) for row in p]
    assert found["variance"] == pytest.approx(scores.var(axis=1, ddof=1).mean())
    assert found["norm"] == pytest.approx(np.mean([np.linalg.norm(j) for j in jacobians]))
    assert found["trace"] == pytest.approx(np.mean([np.trace(j) for j in jacobians]))
    assert found["entropy"] == pytest.approx(-(p * np.log(p)).sum(axis=1).mean())
    assert found["largest"] == p.max(axis=1).mean()


def test_without_the_scale_scores_are_larger_by_the_root_of_the_heads_width():
    scaled, plain = (paper.numbers(paper.attention(SIZE, 16, 12, 3, kind)[0]) for kind in (True, False))
    assert plain["variance"] == pytest.approx(16 * scaled["variance"], rel=1e-3)
    assert plain["entropy"] < scaled["entropy"]


def test_fewer_keys_are_softmax_over_these_alone_and_of_two_norm_and_trace_are_one_number():
    table = paper.over_keys(SIZE).set_index(["keys", "kind", "seed"])
    pattern, _ = paper.attention(SIZE, 16, 12, paper.FIRST_SEED, True)
    score = np.log(pattern[..., :2])  # up to a constant of each query
    first = 1 / (1 + np.exp(score[..., 1] - score[..., 0]))
    found = table.loc[2, "scaled", paper.FIRST_SEED]
    assert found["norm"] == pytest.approx((2 * first * (1 - first)).mean())
    assert found["trace"] == pytest.approx(found["norm"])
    assert table.loc[12, "scaled", paper.FIRST_SEED]["norm"] == pytest.approx(paper.numbers(pattern)["norm"], rel=1e-6)


# --- from tables to verdicts -----------------------------------------------------------------------------------------


def planted(**plain):
    """What theory says, unless told otherwise of the rows without the scale."""
    rows = []
    for width in SIZE.widths:
        for seed in range(4):
            common = {"width": width, "seed": seed, "gradient": 1.0}
            rows.append({**common, "kind": "scaled", "variance": 1.0 + 0.01 * seed, "entropy": np.log(paper.KEYS) - 0.5,
                         "largest": 0.2, "norm": 0.2, "trace": 0.9})  # fmt: skip
            rows.append({**common, "kind": "plain", "variance": width * (1 + 0.01 * seed), "entropy": 0.3,
                         "largest": 0.9, "norm": 0.01, "trace": 0.05, **plain})  # fmt: skip
    return pd.DataFrame(rows)


def verdicts(table):
    return {name: verdict(CLAIMS[name], found) for name, found in paper.measure(table, SIZE).items()}


def test_where_theory_is_right_all_is_reproduced():
    assert verdicts(planted()) == dict.fromkeys(CLAIMS, "reproduced")


@pytest.mark.parametrize(
    ("plain", "claims"),
    [
        ({"variance": 4.0}, {"variance_plain", "power_plain"}),
        ({"largest": 0.2}, {"largest_plain"}),
        ({"norm": 0.3}, {"jacobian_norm"}),
        ({"trace": 0.8}, {"jacobian_trace"}),
    ],
)
def test_each_claim_can_come_out_the_other_way(plain, claims):
    other = {name: said for name, said in verdicts(planted(**plain)).items() if said != "reproduced"}
    assert other == {name: "not seen at this scale" if "jacobian" in name else "contradicted" for name in claims}


@pytest.mark.slow  # it compiles an attention layer of three widths
def test_the_command_leaves_claims_summary_and_figure(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "vaswani2017", "--scale", "smoke")
    assert said.code == 0, said.err
    outcome = tmp_path / "results/raw/vaswani2017/smoke/outcome"
    assert [c["id"] for c in json.loads((outcome / "claims.json").read_text())] == list(CLAIMS)
    assert len(pd.read_csv(outcome / "summary.csv")) == (3 + 3) * 2 * 2
