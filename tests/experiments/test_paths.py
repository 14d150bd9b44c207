"""Paths: the gradient against finite differences, the theory against an integral, and verdicts each way."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.integrate import quad
from scipy.optimize import brentq

from experiments.architecture import paths as paper
from experiments.claims import verdict
from jaxgpt import build
from jaxgpt.config import RunConfig, override, to_dict

CLAIMS = {claim.id: claim for claim in paper.CLAIMS}
SIZE = paper.SIZES["laptop"]
LAGS = np.asarray(SIZE.lags, float)


def model(kind, **settings):
    return override(RunConfig(), {"model.architecture": kind, "model.d_model": 4, "model.n_heads": 2,
                                  "model.n_layers": 1, "model.context": 6, "model.vocab_size": 7,
                                  **settings}).model  # fmt: skip


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rnn", "transformer"])
def test_the_gradient_is_that_of_finite_differences(kind):
    c, place, step = model(kind), 2, 2e-2
    params, token_1xT = build.init_params(c, 1), jnp.asarray([[0, 3, 1, 4, 5, 6]])
    said = float(paper.gradient_norms(c)(params, token_1xT, jnp.asarray([place]))[0])
    net = nnx.merge(build.graphdef(c), jax.tree.map(jnp.asarray, params))

    @jax.jit
    def last_D(move_D):
        put = {"embedding": lambda x_1xTxD: x_1xTxD.at[0, place].add(move_D)}
        return net.inspect(token_1xT, keep=["final"], replace=put)[1]["final"][0, -1]

    moves_DxD = step * np.eye(4, dtype=np.float32)
    slopes = [(np.asarray(last_D(m), float) - np.asarray(last_D(-m), float)) / (2 * step) for m in moves_DxD]
    assert said == pytest.approx(np.linalg.norm(slopes), rel=0.01)


def test_the_theory_is_that_of_an_integral_and_of_the_claim():
    def mean(f):
        return quad(lambda z: f(z) * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi), -12, 12)[0]

    q: float = brentq(lambda q: 1 + mean(lambda z: np.tanh(np.sqrt(q) * z) ** 2) - q, 1, 2)
    chi = mean(lambda z: (1 - np.tanh(np.sqrt(q) * z) ** 2) ** 2)
    assert paper.mean_field_slope() == pytest.approx(0.5 * np.log(chi), abs=1e-6)
    assert CLAIMS["rnn_start"].expected == pytest.approx(paper.mean_field_slope(), abs=1e-3)


def test_a_wide_network_of_numpy_falls_as_theory_says():
    rng, width = np.random.default_rng(0), 400
    across, within = rng.standard_normal((2, width, width)) / np.sqrt(width)
    h, jacobian, norms = np.zeros(width), np.eye(width), []
    for t in range(40):
        h = np.tanh(within @ h + across @ rng.standard_normal(width))
        if t >= 20:
            jacobian = (1 - h**2)[:, None] * within @ jacobian
            norms.append(np.linalg.norm(jacobian))
    assert np.polyfit(np.arange(20), np.log(norms), 1)[0] == pytest.approx(paper.mean_field_slope(), abs=0.03)


def test_a_slope_is_that_of_the_logarithm_and_a_lost_run_has_none():
    norm = np.stack([3 * np.exp(-0.2 * LAGS), np.full(len(LAGS), np.nan), np.ones(len(LAGS))])
    assert paper.slope(LAGS, norm) == pytest.approx([-0.2, np.nan, 0], nan_ok=True)


def test_what_a_float32_does_not_hold_is_left_out_of_a_slope_and_too_few_lags_have_none():
    lags = np.array([1, 50, 100, 150, 200, 1000])
    norm = np.exp(-0.46 * lags)
    held = np.where(norm > paper.SMALLEST, norm, 0.0)  # nothing is left of the last two
    assert (held == 0).tolist() == [False, False, False, False, True, True]
    found = paper.slope(lags, np.stack([held, np.where(lags < 100, held, 0.0)]))
    assert found == pytest.approx([-0.46, np.nan], nan_ok=True)


# --- verdicts ------------------------------------------------------------------------------------------------------


def planted(start, trained, recall, alone):
    """Four seeds of each kind whose gradients fall by so much per position, and who are right so often."""
    scatter_S = np.asarray([-1.0, 1.0, -1.0, 1.0])[:, None]

    def fall(rate):
        return np.exp((rate + 0.002 * scatter_S) * LAGS)

    def share(right):
        return np.clip(right + 0.01 * scatter_S + 0 * LAGS, 0, 1)

    found = {k: paper.Reach(12_000, fall(start[k]), fall(trained[k]), share(recall[k]), share(alone[k]))
             for k in paper.KINDS}  # fmt: skip
    measured = paper.measure(found, SIZE)
    assert set(measured) == set(CLAIMS)
    return measured, {name: verdict(claim, measured[name]) for name, claim in CLAIMS.items()}


TEXTBOOK = {
    "start": {"transformer": 0, "lstm": -0.2, "rnn": -0.46},
    "trained": {"transformer": 0, "lstm": 0, "rnn": -0.3},
    "recall": {"transformer": 1, "lstm": 1, "rnn": 0.125},
    "alone": {"transformer": 1, "lstm": 1, "rnn": 0.125},
}


def test_the_textbook_comes_out_as_the_textbook():
    measured, said = planted(**TEXTBOOK)
    assert set(said.values()) == {"reproduced"}
    assert measured["lstm_start"].value == pytest.approx(0.2 / 0.46, rel=0.01)


def test_a_network_that_remembers_and_a_gradient_that_stays_come_out_so():
    level = dict.fromkeys(paper.KINDS, 0)
    measured, said = planted(level | {"rnn": -0.1, "lstm": -0.2}, level | {"transformer": -0.1},
                             level | {"rnn": 0.9}, level | {"rnn": 0.9})  # fmt: skip
    assert said.pop("rnn_start") == "contradicted"  # exact, not an analogue
    assert said.pop("transformer_start") == "reproduced"
    assert set(said.values()) == {"not seen at this scale"}
    assert measured["rnn_recall"].value == pytest.approx(0.9)


@pytest.mark.parametrize("scale", paper.SIZES)
def test_kinds_have_as_many_weights_and_the_same_of_everything_else(scale):
    size = paper.SIZES[scale]
    configs = paper.configs(size)
    assert len({json.dumps(to_dict(c)) for c in configs}) == len(configs) == 2 * size.seeds * len(paper.KINDS)
    tables = {c.model.architecture: 2 * c.model.vocab_size * c.model.d_model for c in configs}
    weights = {
        c.model.architecture: sum(leaf.size for leaf in jax.tree.leaves(build.abstract_params(c.model)))
        - tables[c.model.architecture]
        for c in configs
        if c.train.seed == 0
    }
    assert max(weights.values()) < 1.1 * min(weights.values())
    assert len({(c.train.steps, c.train.batch_size, c.model.context, c.model.n_layers) for c in configs}) == 1


def test_the_second_half_of_the_seeds_trains_on_the_longest_lag_alone():
    size = paper.SIZES["smoke"]
    shortest = {c.train.seed: paper.source(c, size).numbers["shortest"] for c in paper.configs(size)}
    assert shortest == {0: 1, 1: 1, 2: 8, 3: 8}


@pytest.mark.slow  # it compiles a program for each kind
def test_the_command_leaves_claims_summary_and_figure(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "paths", "--scale", "smoke")
    assert said.code == 0, said.err
    outcome = tmp_path / "results/raw/paths/smoke/outcome"
    assert sorted(path.name for path in outcome.iterdir()) == [
        "claims.json", "figure.png", "figure.svg", "run.json", "summary.csv"]  # fmt: skip
    assert [c["id"] for c in json.loads((outcome / "claims.json").read_text())] == list(CLAIMS)
