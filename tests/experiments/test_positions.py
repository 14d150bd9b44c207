"""Positions: encodings against closed forms and a second computation, symmetries, and verdicts each way."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from experiments.architecture import encodings
from experiments.architecture import positions as paper
from experiments.claims import verdict
from jaxgpt.config import RunConfig, override, to_dict
from jaxgpt.model import sinusoidal_TxD

CLAIMS = {claim.id: claim for claim in paper.CLAIMS}
SIZE = paper.SIZES["laptop"]


# --- encodings -----------------------------------------------------------------------------------------------------


def test_the_right_encoding_is_the_models():
    assert np.allclose(encodings.encoding("right", 50, 16), sinusoidal_TxD(jnp.arange(50), 16), atol=1e-5)


def test_the_misprint_at_places_computed_by_hand():
    code_PxD = encodings.encoding("wrong", 20, 64)
    assert code_PxD[7, 4] == pytest.approx(np.sin(7 / 64 ** (8 / 10000)))
    assert code_PxD[13, 5] == pytest.approx(np.cos(13 / 64 ** (10 / 10000)))
    assert encodings.encoding("sine", 20, 64)[13, 5] == pytest.approx(np.sin(13 / 10000 ** (5 / 64)))


@pytest.mark.parametrize("shift", [1, 5])
def test_a_rotation_of_each_pair_shifts_the_right_encoding(shift):
    code_PxD = encodings.encoding("right", 300, 8)
    angle = shift / 10000 ** (np.arange(4) / 4)
    turned = np.empty_like(code_PxD)
    turned[:, 0::2] = code_PxD[:, 0::2] * np.cos(angle) + code_PxD[:, 1::2] * np.sin(angle)
    turned[:, 1::2] = code_PxD[:, 1::2] * np.cos(angle) - code_PxD[:, 0::2] * np.sin(angle)
    assert np.allclose(turned[:-shift], code_PxD[shift:])
    assert encodings.shift_residual(code_PxD, shift) < 1e-10


def test_what_no_matrix_shifts_leaves_what_theory_says():
    """Over many positions a sine has nothing in common with its cosine: sin(w (p + k)) keeps cos(w k) of itself."""
    code_PxD = np.sin(np.outer(np.arange(20_000), [0.3, 1.1]))
    left = encodings.shift_residual(code_PxD, 2)
    assert left == pytest.approx(np.sqrt((np.sin(0.6) ** 2 + np.sin(2.2) ** 2) / 2), abs=1e-3)


@pytest.mark.parametrize("kind", encodings.KINDS)
def test_the_nearest_is_that_of_a_plain_search(kind):
    code_PxD = encodings.encoding(kind, 80, 32)
    far_PxP = cdist(code_PxD, code_PxD) + np.diag(np.full(80, np.inf))
    there_P = far_PxP[np.arange(80), (np.arange(80) + encodings.nearest(code_PxD)).clip(max=79)]
    before_P = far_PxP[np.arange(80), (np.arange(80) - encodings.nearest(code_PxD)).clip(min=0)]
    assert np.allclose(np.minimum(there_P, before_P), far_PxP.min(axis=1))


# --- symmetry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", paper.ORDERS)
def test_only_a_bag_is_equivariant_and_nothing_is_invariant(kind):
    config = override(RunConfig(), dict(paper.SIZES["smoke"].order))
    far = paper.symmetry(paper.ordered(config, kind).model, 3)
    assert (far["equivariant"] < 1e-5) == (far["pooled"] < 1e-5) == (kind == "bag")
    assert far["invariant"] > 0.1


# --- verdicts ------------------------------------------------------------------------------------------------------


def planted(*, grows, right, none=0.0, far=0.0):
    """Measured numbers of four seeds: losses beyond the trained length that grow by so much, and so on."""
    scatter_S = 0.003 * np.asarray([-1.0, 1.0, -1.0, 1.0])
    symmetry = {(kind, name): np.abs(scatter_S) * 1e-4 + (0 if (kind, name) != ("bag", "invariant") else far)
                for kind in paper.ORDERS for name in ("equivariant", "invariant", "pooled")}  # fmt: skip
    known = {"right": paper.Encoded({}, {1: 1e-14, 8: 1e-13}, np.ones(9)),
             "sine": paper.Encoded({}, {1: far, 8: 0.0}, np.ones(9)),
             "wrong": paper.Encoded({}, {1: 0.0, 8: far}, np.full(9, 1 if far == 0 else 13))}  # fmt: skip
    longer = {kind: paper.Beyond({n: 2 + grows[kind] * (n - 1) + scatter_S * n for n in paper.TIMES}, np.zeros((4, 9)))
              for kind in ("sinusoidal", "rope", "alibi")}  # fmt: skip
    longer["learned"] = paper.Beyond({1: 2 + scatter_S}, np.zeros((4, 9)))
    loss = dict.fromkeys(("none", "wrong", "sine"), 2 + none + scatter_S)
    loss |= dict.fromkeys(("learned", "sinusoidal", "alibi"), np.full(4, 2.0))
    found = paper.measure(symmetry, known, {kind: right[kind] + scatter_S for kind in right}, loss, longer, 4)
    assert set(found) == set(CLAIMS)
    return found, {name: verdict(claim, found[name]) for name, claim in CLAIMS.items()}


RIGHT = {"causal": 0.97, "bag": 0.5, "placed": 0.98}
GROWS = {"sinusoidal": 0.5, "rope": 0.3, "alibi": 0.0}


def test_what_theory_and_papers_say_comes_out_so():
    found, said = planted(grows=GROWS, right=RIGHT, far=0.5)
    wrong = {"invariant", "shift_wrong", "near_wrong", "shift_sine"}
    assert {name for name in said if said[name] == "contradicted"} == wrong
    assert {name for name in said if said[name] == "reproduced"} == set(said) - wrong
    assert found["sinusoidal_4"].value == pytest.approx(1.5)
    assert found["shift_right"].value == 1e-13  # of all shifts the worst


def test_the_contrary_comes_out_as_the_contrary():
    grows = {"sinusoidal": 0.0, "rope": 0.0, "alibi": 0.2}
    _, said = planted(grows=grows, right={"causal": 0.5, "bag": 0.7, "placed": 0.5}, none=0.3)
    seen_otherwise = (
        "alibi_2",
        "alibi_4",
        "sinusoidal_2",
        "sinusoidal_4",
        "rope_4",
        "order_causal",
        "none_learned",
        "none_sinusoidal",
        "none_alibi",
        "text_wrong",
        "text_sine",
    )
    assert {said[name] for name in seen_otherwise} == {"not seen at this scale"}
    assert said["order_bag"] == "contradicted"
    assert said["invariant"] == said["shift_wrong"] == "reproduced"


def test_a_failure_may_be_large_and_a_gain_is_no_failure():
    found, said = planted(grows={"sinusoidal": 2.5, "rope": 2.0, "alibi": -0.4}, right=RIGHT, far=0.5)
    for name in ("sinusoidal_2", "sinusoidal_4", "rope_4", "alibi_2", "alibi_4"):
        assert said[name] == "reproduced"
    assert found["alibi_4"].value == 0


def test_a_seed_that_diverged_leaves_the_claim_open():
    found, said = planted(grows=GROWS, right={**RIGHT, "causal": np.asarray([0.97, np.nan, 0.98, 0.97])})
    assert said["order_causal"] == "inconclusive"
    assert "1 of 4 seeds have no value" in found["order_causal"].remark


@pytest.mark.parametrize("scale", paper.SIZES)
def test_kinds_differ_in_nothing_but_mask_and_positions(scale):
    size = paper.SIZES[scale]
    for configs, free in (
        (paper.order_configs(size), {"causal", "positions"}),
        (paper.text_configs(size), {"positions"}),
    ):
        trees = [to_dict(c) for c in configs]
        assert len({json.dumps(tree) for tree in trees}) == len(trees)
        for tree in trees:
            tree["train"].pop("seed")
            for name in free:
                tree["model"].pop(name)
        assert all(tree == trees[0] for tree in trees)
    assert all(c.model.n_layers >= 2 for c in paper.order_configs(size))  # behind one layer the mark sees a bag


@pytest.mark.slow  # it compiles a program for each kind
def test_the_command_leaves_claims_summary_and_figure(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "positions", "--scale", "smoke")
    assert said.code == 0, said.err
    assert "refused: its table ends" in said.out
    outcome = tmp_path / "results/raw/positions/smoke/outcome"
    assert sorted(path.name for path in outcome.iterdir()) == [
        "claims.json", "figure.png", "figure.svg", "run.json", "summary.csv"]  # fmt: skip
    claims = {c["id"]: c for c in json.loads((outcome / "claims.json").read_text())}
    assert set(claims) == set(CLAIMS)
    for name, said in (("equivariant", "reproduced"), ("invariant", "contradicted"), ("shift_wrong", "contradicted")):
        assert claims[name]["verdict"] == said
