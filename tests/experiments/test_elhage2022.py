"""The toy model of superposition: planted models to verdicts, and the phase change against the exact loss."""

import json

import numpy as np
import pytest
from scipy.optimize import minimize

from experiments.anatomy import elhage2022 as paper
from experiments.claims import verdict
from jaxgpt.tasks.superposition import pair_loss, variance

CLAIMS = {claim.id: claim for claim in paper.CLAIMS}
SIZE = paper.SIZES["laptop"]
N, M = SIZE.features, SIZE.dims


def columns(count):
    """A model whose first `count` features have columns of length 1, dimension after dimension."""
    weight = np.zeros((M, N))
    for i in range(count):
        weight[i % M, i] = (-1) ** (i // M)
    return weight


def linear(density, scale=1.0):
    weight, mean = scale * columns(M), np.full(N, density / 2)
    return paper.Toy(weight, mean - weight.T @ weight @ mean)


def pair(density, jump=True):
    share = paper.pair_optimum(density)[0] if jump else max(0.0, 1 - density)
    return paper.Toy(np.array([[1.0, -share]]), np.zeros(2))


def planted(dense=M, sparse=2 * M, equal=3 * M, scale=1.0, jump=True):
    found = {}
    for seed in range(SIZE.seeds):
        for d in SIZE.densities:
            count = dense if d == 1 else sparse
            found[paper.RANKED, d, seed] = paper.Toy(columns(count), np.zeros(N))
            found[paper.LINEAR, d, seed] = linear(d, scale)
            found[paper.EQUAL, d, seed] = paper.Toy(columns(M if d == 1 else equal), np.zeros(N))
        for d in SIZE.pair_densities:
            found[paper.PAIR, d, seed] = pair(d, jump)
    return found


def verdicts(**how):
    measured = paper.measure(planted(**how), SIZE)
    assert set(measured) == set(CLAIMS)
    return {name: verdict(CLAIMS[name], m) for name, m in measured.items()}


def test_models_as_theory_has_them_bear_out_every_claim():
    assert set(verdicts().values()) == {"reproduced"}


@pytest.mark.parametrize(("how", "missing"), [
    ({"dense": M + 3}, {"dense"}), ({"sparse": M}, {"more"}), ({"equal": M + 2}, {"pairs"}),
    ({"scale": 0.8}, {"linear"}),
])  # fmt: skip
def test_each_claim_can_be_contradicted_alone(how, missing):
    assert {name for name, v in verdicts(**how).items() if v == "contradicted"} == missing


def test_a_gradual_change_is_no_jump():
    assert verdicts(jump=False)["jump"] == "contradicted"


def test_a_run_that_diverged_leaves_its_claims_open():
    found = planted()
    del found[paper.PAIR, SIZE.pair_densities[3], 1]
    measured = paper.measure(found, SIZE)
    for name in CLAIMS:
        open_ = name in ("change", "jump")
        assert (verdict(CLAIMS[name], measured[name]) == "inconclusive") == open_
        assert bool(measured[name].remark) == open_


def test_the_claimed_place_and_height_of_the_change_are_those_of_the_exact_loss():
    """By another search than the command's: from the antipodal side, with derivatives."""
    importance = np.array([1, 0.5])

    def antipodal(density):
        return minimize(lambda v: pair_loss(v[:2], v[2:], density, importance), [1.03, -0.77, 0.05, 0.18])

    def ahead(density):
        return antipodal(density).fun < 0.5 * variance(density)

    assert ahead(paper.CHANGE - 3e-3)
    assert not ahead(paper.CHANGE + 3e-3)

    def share(density):
        first, second = antipodal(density).x[:2] if ahead(density) else (1, 0)
        return abs(second / first)

    # The valley is flat: searches end within .01 of each other, a fifth of the claim's margin.
    assert paper.pair_optimum(paper.CHANGE - 3e-3)[0] == pytest.approx(share(paper.CHANGE - 3e-3), abs=0.01)
    assert max(-np.diff([share(d) for d in paper.PAIRS])) == pytest.approx(paper.DROP, abs=0.01)
    exact = [paper.pair_optimum(d)[0] for d in paper.PAIRS]
    assert max(-np.diff(exact)) == pytest.approx(paper.DROP, abs=1e-3)
    assert paper.pair_optimum(paper.CHANGE + 3e-3)[0] == 0


def test_of_dense_features_the_exact_optimum_is_one_of_them_alone():
    share, loss = paper.pair_optimum(0.9)
    assert (share, loss) == (0, pytest.approx(0.5 * variance(0.9)))


def test_what_is_represented_is_counted_by_the_length_of_columns():
    toy = paper.Toy(np.array([[1.0, 0.6, 0.0], [0.0, 0.6, 0.6]]), np.zeros(3))
    assert toy.represented == 2
    assert toy.per_dimension == pytest.approx((1 + 0.72 + 0.36) / 2)


def test_tables_have_a_line_for_every_density():
    found = planted()
    assert list(paper.feature_table(found, SIZE)["sparsity"])[:2] == ["0", "0.5"]
    assert len(paper.pair_table(found, SIZE)) == len(SIZE.pair_densities)


@pytest.mark.parametrize("scale", paper.SIZES)
def test_every_arm_and_seed_has_an_order_of_data_of_its_own(scale):
    size = paper.SIZES[scale]
    configs = paper.configs(size)
    assert len({c.train.data_seed for c in configs}) == len(configs) == len(paper.arms(size)) * size.seeds
    assert size.seeds < 1000


@pytest.mark.slow
def test_the_command_runs_from_end_to_end(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "elhage2022", "--scale", "smoke", "--json", "out.json")
    assert said.code == 0, said.err
    claims = json.loads((tmp_path / "results/raw/elhage2022/smoke/outcome/claims.json").read_text())
    assert {claim["id"] for claim in claims} == set(CLAIMS)
    assert "nan" not in said.out
