"""Redundancy: what is done to a model is what it is called; from tables to verdicts, which can come out each way."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx

from analysis import pruning
from experiments.anatomy import changes, family
from experiments.anatomy import redundancy as paper
from experiments.claims import verdict
from jaxgpt import build
from jaxgpt.config import RunConfig, override

CLAIMS = {claim.id: claim for claim in paper.CLAIMS}
CONFIG = override(RunConfig(), {**family.SIZES["smoke"].settings, "model.d_model": 16, "model.n_heads": 2})
MEMBER = family.Member("none", CONFIG, None, (0, 1))  # pyright: ignore[reportArgumentType]
WINDOWS = np.random.default_rng(0).integers(0, 256, (2, 33)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    """A tiny model whose "trained" parameters are those of another seed."""
    with pytest.MonkeyPatch.context() as patch:
        seeds = {0: 5, None: 6}
        patch.setattr(
            family, "params", lambda m, step=None: jax.tree.map(jnp.asarray, build.init_params(m.model, seeds[step]))
        )
        yield changes.opened(MEMBER, WINDOWS, WINDOWS)


@pytest.fixture(scope="module")
def inspected():
    """(What the last matrix reads [W, T, F], losses without what block 1 adds) of the same model, another way."""
    taps = ("layers.1.attention.out", "layers.1.mlp.out")

    @jax.jit
    def run(state):
        tokens, targets = WINDOWS[:, :-1], WINDOWS[:, 1:, None]
        whole = nnx.merge(build.graphdef(MEMBER.model), state)
        seen = whole.inspect(tokens, keep=["layers.1.mlp.hidden"])[1]["layers.1.mlp.hidden"]
        logits = whole.inspect(tokens, replace={tap: lambda x: 0 * x for tap in taps})[0]
        return seen, -jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1).mean()

    return run(jax.tree.map(jnp.asarray, build.init_params(MEMBER.model, 6)))


def planted_costs(**changed):
    """Costs of models that do what beliefs and papers say, unless told otherwise."""
    plain = {"random": 0.06, "magnitude": 0.04, "global": 0.04, "wanda": 0.02, "output": 0.04, "re-random": 0.001,
             "permute": 0.02, "zero": 0.01, "least": 1, "first": 0.8, "kept": 0.999} | changed  # fmt: skip
    rows, blocks, draw = [], [], np.random.default_rng(0)
    for seed in range(4):
        for width in (16, 24):
            known = {"run_id": f"{seed} {width}", "width": width, "seed": seed}

            def row(kind, what, where, share, lost, known=known):
                lost *= float(np.exp(0.01 * draw.standard_normal()))
                rows.append(known | {"kind": kind, "what": what, "where": where, "share": share, "nats": 2 * lost,
                                     "kept": 1 - lost, "gain": 2.0, "squares": 1.0, "parameters": 0.2})  # fmt: skip

            for method in changes.METHODS:
                for share in (0.0, 0.5, 0.6, 0.9):
                    lost = plain[method] * (share >= 0.6) + (1 - plain["kept"]) * (share > 0)
                    row("prune", method, "", share, lost if share != 0.5 or method == "magnitude" else lost / 2)
            for how in pruning.CHANGES:
                for share in (paper.SMALL, paper.FIFTH):
                    row("change", how, "", share, plain.get(how, 0.005))
                for i in range(4):
                    cheap = i == plain["least"]
                    lost = plain["first"] if i == 0 else 0.05 if cheap else 0.1
                    row("module", how, f"block {i}", 1.0, lost)
            for i in range(4):
                blocks.append(known | {"where": f"block {i}", "angle": 0.1 if i == 1 else 0.2})
    return pd.DataFrame(rows), pd.DataFrame(blocks)


def verdicts(**changed):
    found = paper.measure(*planted_costs(**changed), 4)
    return {name: verdict(CLAIMS[name], found[name]) for name in CLAIMS}


def test_where_beliefs_and_papers_are_right_all_is_reproduced():
    assert verdicts() == dict.fromkeys(CLAIMS, "reproduced")


@pytest.mark.parametrize(
    ("changed", "claim", "said"),
    [
        ({"random": 0.3}, "prune_random", "not seen at this scale"),
        ({"magnitude": 0.3}, "prune_magnitude", "not seen at this scale"),
        ({"global": 0.3}, "prune_global", "not seen at this scale"),
        ({"wanda": 0.3}, "prune_wanda", "not seen at this scale"),
        ({"re-random": 0.2}, "reinitialised", "not seen at this scale"),
        ({"permute": 0.01}, "second_order", "not seen at this scale"),
        ({"kept": 0.9}, "most_random", "not seen at this scale"),
        ({"kept": 0.9}, "most_wanda", "not seen at this scale"),
        ({"first": 0.05}, "first_block", "not seen at this scale"),
        ({"least": 2}, "angle", "not seen at this scale"),
    ],
)
def test_each_claim_can_fail(changed, claim, said):
    assert verdicts(**changed)[claim] == said


def test_wanda_that_harms_more_than_magnitude_is_not_called_better():
    costs, blocks = planted_costs()
    half = (costs["kind"] == "prune") & (costs["share"] == 0.5)
    worse = 2 * costs.loc[half & (costs["what"] == "magnitude"), "nats"].max()
    costs.loc[half & (costs["what"] == "wanda"), "nats"] = worse
    assert verdict(CLAIMS["wanda_better"], paper.measure(costs, blocks, 4)["wanda_better"]) == "not seen at this scale"


def test_a_change_that_did_no_harm_leaves_ratios_open():
    costs, blocks = planted_costs()
    costs.loc[(costs["kind"] == "change") & (costs["what"] == "zero"), "nats"] = -0.1
    found = paper.measure(costs, blocks, 4)["second_order"]
    assert verdict(CLAIMS["second_order"], found) == "inconclusive"
    assert "no harm" in found.remark


def test_a_seed_of_which_a_size_diverged_leaves_every_claim_open():
    short = [rows[(rows["width"] != 24) | (rows["seed"] != 2)] for rows in planted_costs()]
    for measured in paper.measure(*short, 4).values():
        assert measured.seeds == 3
        assert "1 of 4 seeds have no value" in measured.remark


@pytest.mark.parametrize("method", changes.METHODS)
def test_pruning_sets_that_share_of_the_blocks_weights_to_0_and_keeps_the_others(model, method):
    new = changes.pruned(model, method, 0.75, np.random.default_rng(0))
    assert set(new) == {f"layers.{i}.{kind}.kernel" for i in range(2) for kind in changes.KINDS}
    gone = np.concatenate([(w == 0).ravel() for w in new.values()])
    assert gone.mean() == pytest.approx(0.75, abs=1e-3)
    assert all(((w == 0) | (w == model.trained[name])).all() for name, w in new.items())
    if method != "random":
        some = "layers.0.mlp.up.kernel"
        assert abs(model.trained[some][new[some] == 0]).mean() < abs(model.trained[some]).mean()


def test_wanda_weighs_by_the_norm_of_what_a_matrix_reads(model, inspected):
    name = "layers.1.mlp.down.kernel"
    norm_F = np.linalg.norm(np.asarray(inspected[0]).reshape(-1, 64), axis=0)
    np.testing.assert_allclose(model.inputs[name], norm_F, rtol=1e-5)
    new = changes.pruned(model, "wanda", 0.5, np.random.default_rng(0))[name]
    score_FxD = abs(model.trained[name]) * norm_F[:, None]
    kept = np.where(new != 0, score_FxD, np.inf).min(axis=0)
    assert ((new == 0).sum(axis=0) == 32).all()
    assert (np.where(new == 0, score_FxD, -np.inf).max(axis=0) <= kept).all()


def test_a_block_of_zeros_is_a_block_that_adds_nothing(model, inspected):
    zeros = {name: np.zeros_like(model.trained[name]) for name in changes.modules(model)["block 1"]}
    assert model.loss(zeros) == pytest.approx(float(inspected[1]), rel=1e-5)
    assert model.loss({}) != pytest.approx(float(inspected[1]), rel=1e-4)


def test_the_parts_are_every_parameter_once_by_block_and_table(model):
    parts = changes.modules(model)
    once = [name for words, names in parts.items() if not words.startswith("all") for name in names]
    assert sorted(once) == sorted(name for name in model.trained if not name.startswith("final_norm"))
    assert len(parts["all query"]) == 4  # kernel and bias of two blocks


def test_everything_is_done_once_and_pruning_nothing_changes_nothing(model):
    done = list(changes.interventions(model, (0.0, 0.5), (0.2,)))
    counts = pd.Series([each.kind for each in done]).value_counts().to_dict()
    assert counts == {"prune": 10, "change": 4, "module": 11 * 4, "swap": 1}
    nothing = [each for each in done if each.kind == "prune" and each.share == 0]
    assert all(each.squares == 0 and each.loss == model.loss({}) for each in nothing)
    by_how = {each.what: each.squares for each in done if each.kind == "change"}
    assert by_how["permute"] / by_how["zero"] == pytest.approx(2, rel=0.15)


def test_swapped_blocks_swap_their_parameters(model):
    new = changes.swapped(model, 0)
    assert (new["layers.0.mlp.up.kernel"] == model.trained["layers.1.mlp.up.kernel"]).all()
    assert (new["layers.1.mlp.up.kernel"] == model.trained["layers.0.mlp.up.kernel"]).all()
    assert len(new) == len(changes.modules(model)["block 0"]) * 2


@pytest.mark.slow  # it trains the family's smoke models and changes them in every way
def test_the_command_leaves_claims_summary_and_figure(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "redundancy", "--scale", "smoke")
    assert said.code == 0, said.err
    folder = tmp_path / "results/raw/redundancy/smoke/outcome"
    claims = json.loads((folder / "claims.json").read_text(), parse_constant=str)
    assert [claim["id"] for claim in claims] == list(CLAIMS)
    assert len(pd.read_csv(folder / "summary.csv")) == 4
    assert (folder / "figure.png").stat().st_size > 10_000
