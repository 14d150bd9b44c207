"""Random features: theory and training against independent computations, and whether verdicts can come out each way."""

import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.claims import verdict
from experiments.registry import Job
from experiments.scaling import paquette2024 as paper
from jaxgpt import population
from jaxgpt.config import override, to_dict
from jaxgpt.optimizer import hparams
from jaxgpt.step import init_state, program
from jaxgpt.tasks import features

CLAIMS = {claim.id: claim for claim in paper.CLAIMS}

# --- theory ----------------------------------------------------------------------------------------------------------


def asymptotic_loss(alpha, beta, log_d, log_compute):
    """The sum of powers that the loss tends to, up to constants (Paquette et al. 2024, sections 2 and 3)."""
    log_rate = np.minimum(0, 2 * alpha - 1) * log_d  # what is stable where the features' length grows with d
    log_t = log_compute - log_d + log_rate
    terms = [
        -(1 + beta / alpha - 1 / (2 * alpha)) * log_t,
        -(2 * alpha + min(0, 2 * beta - 1)) * log_d,
        log_rate - (2 - 1 / (2 * alpha)) * log_t,
    ]
    if 2 * alpha > 1 and 2 * beta > 1:
        terms.append(-log_d - (1 - 1 / (2 * alpha)) * log_t)
    return np.logaddexp.reduce(terms)


@pytest.mark.parametrize(
    ("phase", "alpha", "beta"),
    [*((p.name, p.alpha, p.beta) for p in paper.PHASES), ("Ia", 1.2, 0.3), ("II", 1.5, 0.8), ("III", 0.6, 2.0)],
)
def test_the_exponents_minimise_the_asymptotic_loss_at_fixed_compute(phase, alpha, beta):
    log_d = np.linspace(0, 200, 200_001)
    found = []
    for log_compute in (300.0, 340.0):
        loss = asymptotic_loss(alpha, beta, log_d, log_compute)
        found.append((loss.min(), log_d[loss.argmin()]))
    (loss_1, size_1), (loss_2, size_2) = found
    said, x, y = paper.theory(alpha, beta)
    assert said == phase
    assert (loss_1 - loss_2) / 40 == pytest.approx(x, abs=1e-3)
    assert (size_2 - size_1) / 40 == pytest.approx(y, abs=1e-3)


def test_a_phase_whose_exponents_are_not_written_down_is_refused():
    with pytest.raises(ValueError, match=r"alpha=0.2, beta=0.4"):
        paper.theory(0.2, 0.4)


# --- the expected loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "batch"), [(0.3, 1), (0.5, 4)])
def test_the_expected_loss_is_that_of_the_recursion_of_the_whole_covariance(rate, batch):
    alpha, beta, w = 0.75, 0.6, features.mixtures(40, 6, 0)
    j = np.arange(1, 41.0)
    covariance, weight, wide = np.diag(j ** (-2 * alpha)), j**-beta, w.astype(float)
    k = wide.T @ covariance @ wide
    best = np.linalg.solve(k, wide.T @ covariance @ weight)
    rest = wide @ best - weight
    least, errors, losses = rest @ covariance @ rest, np.outer(best, best), []
    for _ in range(50):
        loss = least + np.trace(k @ errors)
        losses.append(loss)
        noise = (k @ errors @ k + k * loss) / batch
        errors = errors - rate * (k @ errors + errors @ k) + rate**2 * (k @ errors @ k + noise)
    assert features.expected_loss(w, alpha, beta, rate, batch, np.arange(50)) == pytest.approx(losses, rel=1e-10)


def test_training_has_the_expected_loss():
    d, v, runs = 6, 24, 2000
    phase = paper.PHASES[1]
    config = override(paper.configs(paper.SIZES["smoke"], phase)[0], {"model.d_model": d})
    config = override(config, {"optimizer.learning_rate": 0.2 / features.trace(phase.alpha, v)})
    source = features.source(config, phase.alpha, phase.beta, v, 2)
    prog, numbers = program(config, source.task), {**source.numbers, "draw": 1.0}
    h = [hparams(config)._replace(data_seed=np.uint32(seed)) for seed in range(runs)]
    state = jax.tree.map(np.asarray, init_state(prog, h[0], 0))
    states, data = population.stack([state], runs), source.data()
    numbers_r = {name: np.full(runs, x, np.float32) for name, x in numbers.items()}
    steps, rate = (0, 3, 30, 100), config.optimizer.learning_rate
    exact = features.expected_loss(features.mixtures(v, d, 1), phase.alpha, phase.beta, rate, 1, np.asarray(steps))
    for done, until, expected in zip((0, *steps), steps, exact, strict=False):
        n = np.full(runs, until - done, np.int32)
        states, _ = population.advance(prog, "vmap", states, n, population.stack(h, runs), numbers_r, data)
        every = np.ones(runs, bool)
        loss = np.asarray(population.evaluate(source.task, "vmap", states.params, numbers_r, data, every))[:, 0]
        sem = float(loss.std()) / math.sqrt(runs)
        assert loss.mean() == pytest.approx(expected, abs=4 * sem + 1e-6)
        assert sem < 0.03 * expected
    assert exact[-1] < exact[0] / 3


# --- from losses to verdicts -----------------------------------------------------------------------------------------


def planted(phase, *, loss=None, size=None, scatter=0.0, draws=6, seed=0, tilt=0.0):
    """Losses whose logarithm is a parabola in log d at each budget; best loss and size are powers of the budget.

    tilt: by how much the draws differ in their exponents.
    """
    sizes = paper.SIZES["laptop"].sizes
    x, y = (given or said for given, said in zip((loss, size), phase.theory, strict=True))
    budget, rng = paper.budgets(phase, sizes, 0.6), np.random.default_rng(seed)
    tilt_s = tilt * np.linspace(-1, 1, draws)[:, None, None]
    log_budget = np.log(budget / budget[-1])
    from_best = np.log(sizes)[:, None] - np.log(sizes[-1] / 4) - (y + tilt_s) * log_budget
    log_loss = 0.1 * from_best**2 - (x + tilt_s) * log_budget
    noise = scatter * rng.standard_normal((draws, len(sizes), len(budget)))
    return paper.Grid(np.asarray(sizes), budget, np.exp(log_loss + noise), 2)


def verdicts(**how):
    found = paper.measure({p.name: planted(p, **how) for p in paper.PHASES}, np.asarray([0.99, 1.0, 1.01]), 100)
    return found, {name: verdict(CLAIMS[name], m) for name, m in found.items()}


def test_where_theory_holds_the_fits_find_its_exponents_and_all_is_reproduced():
    found, said = verdicts(scatter=1e-3)
    assert set(found) == set(CLAIMS)
    for phase in paper.PHASES:
        for key, exponent in zip(("loss", "size"), phase.theory, strict=True):
            assert found[f"{key}_{phase.name}"].value == pytest.approx(exponent, abs=0.01)
    assert said == dict.fromkeys(CLAIMS, "reproduced")


def test_where_other_exponents_hold_theory_is_not_seen():
    found, said = verdicts(loss=1.1, size=0.75, scatter=1e-3)
    assert found["loss_Ia"].value == pytest.approx(1.1, abs=0.01)
    assert found["size_Ia"].value == pytest.approx(0.75, abs=0.01)
    assert said.pop("exact") == "reproduced"
    assert set(said.values()) == {"not seen at this scale"}


def test_where_draws_disagree_nothing_is_decided():
    _, said = verdicts(tilt=0.4)
    assert said.pop("exact") == "reproduced"
    assert set(said.values()) == {"inconclusive"}


def test_the_fit_engine_and_the_closed_form_of_the_resamples_agree():
    best = paper.frontier(planted(paper.PHASES[2], scatter=0.1))
    assert best.exponents() == pytest.approx(best.slopes(), abs=1e-7)


def test_the_interval_holds_the_exponent_as_often_as_it_says():
    phase, held = paper.PHASES[2], 0
    for seed in range(20):
        each = paper.resampled(planted(phase, scatter=0.05, draws=10, seed=seed), 60)
        low, high = np.quantile(each[:, 1], [0.05, 0.95])
        held += low <= phase.theory[1] <= high
    assert held >= 14  # 90 % of 20 is 18; ten draws give a little less
    # Nor is it so wide that it would hold anything.
    assert high - low < 0.1


def test_training_that_misses_its_expectation_contradicts():
    found = paper.measure({}, np.asarray([1.2, 1.21, 1.19]), 100)
    assert verdict(CLAIMS["exact"], found["exact"]) == "contradicted"


def test_a_best_size_near_the_ends_or_beside_a_run_that_has_ended_is_left_out():
    phase = paper.PHASES[0]
    grid = planted(phase)
    ends = paper.Grid(grid.sizes_D[:6], grid.budget_G, grid.loss_SxDxG[:, :6], 2)
    every, short = paper.frontier(grid), paper.frontier(ends)
    assert 0 < len(short.budget_K) < len(every.budget_K)
    assert short.size_K.max() <= grid.sizes_D[4]
    ended = grid.loss_SxDxG.copy()
    ended[:, 5, :] = np.nan  # the size itself and all that need it as a neighbour
    left = paper.frontier(replace(grid, loss_SxDxG=ended))
    assert len(left.budget_K) < len(every.budget_K)
    assert not ((left.size_K > grid.sizes_D[4]) & (left.size_K < grid.sizes_D[6])).any()
    lost = replace(grid, loss_SxDxG=grid.loss_SxDxG * np.nan)
    found = paper.measure({phase.name: lost}, np.ones(3), 20)
    assert verdict(CLAIMS["loss_Ia"], found["loss_Ia"]) == "inconclusive"
    assert found["loss_Ia"].remark.endswith("fewer than 4 budgets")


@pytest.mark.parametrize("scale", paper.SIZES)
def test_the_runs_are_sizes_times_rates_times_draws_and_phases_share_their_programs(scale):
    size, programs = paper.SIZES[scale], set()
    for phase in paper.PHASES:
        configs = paper.configs(size, phase)
        assert len({json.dumps(to_dict(c)) for c in configs}) == len(configs)
        assert len(configs) == len(size.sizes) * sum(draws for _, draws in size.rates)
        programs |= {
            program(c, features.source(c, phase.alpha, phase.beta, 4 * c.model.d_model, 1).task) for c in configs
        }
        for rate, _ in size.rates:
            step = paper.learning_rate(phase, size.sizes[-1], rate)
            (longest,) = {c.train.steps for c in configs if c.optimizer.learning_rate == step}
            assert longest == pytest.approx(paper.top(phase, size.sizes, rate) / size.sizes[-1], abs=1)
    assert len(programs) == len(size.sizes)


# --- from the command to the figure ----------------------------------------------------------------------------------


def test_trained_curves_stand_in_the_grid_at_the_budgets_that_they_reached(tmp_path, monkeypatch):
    phase, size = paper.PHASES[2], paper.Size((8, 11), ((0.2, 2),), 11, (), 0, window=1, evaluations=12)
    monkeypatch.setattr(paper, "PHASES", (phase,))
    runs, curves = paper.train(Job("smoke", tmp_path, tmp_path / "figure"), size)
    grid = paper.measured_grid(runs, curves, phase, size, 0.2)
    assert list(runs["d"]) == [8, 8, 11, 11]
    assert list(runs["draw"]) == [0, 1, 0, 1]
    assert np.isfinite(grid.loss_SxDxG[:, :, -1]).all()  # the largest budget is the end of every run that reaches it
    assert grid.loss_SxDxG[1, 0, -1] == pytest.approx(runs["final_loss"][1], rel=0.1)
    assert np.isnan(grid.loss_SxDxG[:, :, 0]).all()  # less than the first evaluation
    ratio = paper.final_ratios(runs, size)
    exact = [
        paper.expected(phase, d, 0.2, 1, np.asarray([s]))[0]
        for d, s in zip((8, 11), runs["steps_done"][1::2], strict=True)
    ]
    assert ratio[1] == pytest.approx(np.mean(runs["final_loss"][1::2] / exact))


@pytest.fixture(scope="module")
def done(tmp_path_factory, command):
    """The smoke reproduction in a folder of its own: what it said, and its outcome's folder."""
    home = tmp_path_factory.mktemp("paquette2024")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return command("reproduce", "paquette2024", "--scale", "smoke"), home / "results/raw/paquette2024/smoke/outcome"


@pytest.mark.slow  # it compiles a program for each size, and draws eight panels
def test_the_command_leaves_claims_summary_and_figure(done):
    said, outcome = done
    assert said.code == 0, said.err
    assert sorted(path.name for path in outcome.iterdir()) == [
        "claims.json", "figure.png", "figure.svg", "run.json", "summary.csv"]  # fmt: skip
    claims = json.loads((outcome / "claims.json").read_text())
    assert [c["id"] for c in claims] == list(CLAIMS)
    # Few and short runs scatter by tens of percent, but a rate that is off by a factor would be seen.
    assert 0.7 < claims[-1]["measured"] < 1.4
    assert json.loads((outcome / "run.json").read_text())["versions"]["jax"]
