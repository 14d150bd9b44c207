"""Cooldowns from one trunk against cosines: verdicts in worlds that are known, and the command at smoke scale."""

import json

import numpy as np
import pandas as pd
import pytest

from experiments.claims import verdict
from experiments.scaling import hagele2024 as paper
from jaxgpt import population
from jaxgpt.prefix import branch_point

SIZE = paper.SIZES["laptop"]


def world(*, apart=0.0, gap=0.1, closed=1.0, scatter=0.01, own=0.001):
    """Runs and curves. Losses scatter by `scatter` between seeds, the same under both schedules but for `own`. WSD ends
    `apart` above the cosine; the trunk stands `gap` above it, of which cooldowns close the share `closed`.
    """
    rng, rows, points = np.random.default_rng(0), [], []
    of_seed = {seed: scatter * rng.standard_normal() for seed in range(SIZE.seeds)}
    for config in paper.configs(SIZE):
        schedule, steps, seed = config.optimizer.schedule, config.train.steps, config.train.seed
        cosine = 1.5 + 20 / steps**0.5 + of_seed[seed]
        loss = cosine + (apart + gap * (1 - closed) if schedule == "wsd" else 0) + own * rng.standard_normal()
        name = f"{schedule} {steps} {seed}"
        rows.append({"run_id": name, "optimizer.schedule": schedule, "train.steps": steps, "train.seed": seed,
                     "final_loss": loss, "tokens": steps * 1024,
                     "shared_steps": branch_point(config) * (schedule == "wsd" and steps < 4000)})  # fmt: skip
        points += [{"run_id": name, "step": n, "validation_loss": 1.5 + 20 / n**0.5 + of_seed[seed] + gap}
                   for n in range(100, steps + 1, 100)]  # fmt: skip
    return pd.DataFrame(rows), pd.DataFrame(points)


def verdicts(**how):
    found = paper.measure(*world(**how))
    return found, {claim.id: verdict(claim, found[claim.id]) for claim in paper.CLAIMS}


def test_where_both_schedules_end_alike_and_the_trunk_stands_above_all_is_reproduced():
    found, said = verdicts()
    assert said == {"match": "reproduced", "closed": "reproduced"}
    assert found["closed"].value == pytest.approx(1, abs=0.02)
    assert found["match"].seeds == SIZE.seeds


def test_where_wsd_ends_higher_by_more_than_seeds_scatter_it_is_not_seen():
    found, said = verdicts(apart=0.03)
    assert said["match"] == "not seen at this scale"
    scatter = paper.losses(world(apart=0.03)[0])["cosine"].std().mean()
    assert found["match"].value == pytest.approx(0.03 / scatter, rel=0.2)


def test_differences_of_opposite_sign_at_short_and_long_lengths_are_no_match():
    runs, curves = world()
    long = runs["train.steps"] > sorted(set(runs["train.steps"]))[1]
    shift = np.where(long, 0.03, -0.03) * (runs["optimizer.schedule"] == "wsd")  # three times the scatter of seeds
    found = paper.measure(runs.assign(final_loss=runs["final_loss"] + shift), curves)["match"]
    assert found.low < -1 < 1 < found.high
    assert verdict(paper.CLAIMS[0], found) != "reproduced"


def test_where_cooldowns_close_half_of_the_gap_it_is_not_seen_and_without_a_gap_nothing_is_decided():
    found, said = verdicts(closed=0.5)
    assert found["closed"].value == pytest.approx(0.5, abs=0.02)
    assert said["closed"] == "not seen at this scale"
    found, said = verdicts(gap=0.0)
    assert said["closed"] == "inconclusive"
    assert "not worse than the cosine" in found["closed"].remark


def test_where_seeds_disagree_nothing_is_decided():
    _, said = verdicts(own=0.2, scatter=0.0)
    assert said == {"match": "inconclusive", "closed": "inconclusive"}


def test_the_gap_is_measured_only_where_the_trunk_is_at_its_peak():
    assert list(paper.without_cooldown(*world()).columns) == [500, 1000, 2000]


@pytest.mark.parametrize("scale", paper.SIZES)
def test_the_trunk_passes_every_branch_point_and_is_validated_at_every_length(scale):
    size = paper.SIZES[scale]
    configs = paper.configs(size)
    assert len(configs) == 2 * len(size.lengths) * size.seeds
    assert {branch_point(c) for c in configs if c.optimizer.schedule == "cosine"} == {0}
    parts = {c.train.steps: branch_point(c) for c in configs if c.optimizer.schedule == "wsd"}
    assert parts == {steps: round(0.8 * steps) for steps in size.lengths}
    assert not any(steps % size.eval_every for steps in size.lengths)
    assert {c.warmup_steps for c in configs} == {size.settings["optimizer.warmup_steps"]}


@pytest.mark.slow
def test_at_smoke_scale_the_command_trains_the_common_beginning_once_and_leaves_a_figure(
    command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    steps, advance = [], population.advance

    def counted(prog, mode, states_R, n_R, *rest):
        steps.append(int(n_R.sum()))
        return advance(prog, mode, states_R, n_R, *rest)

    monkeypatch.setattr(population, "advance", counted)
    said = command("reproduce", "hagele2024", "--scale", "smoke", "--json", "smoke.json")
    assert said.code == 0, said.err
    found = json.loads((tmp_path / "smoke.json").read_text())
    assert found["steps_trained"] == {"cosine": 2 * (20 + 40), "wsd": 2 * (40 + 4)}
    assert sum(steps) == sum(found["steps_trained"].values())
    assert {claim["id"] for claim in found["claims"]} == {"match", "closed"}
    assert all((tmp_path / path).stat().st_size > 10_000 for path in found["figures"])
    assert "WSD saves 27% of the steps" in said.out
