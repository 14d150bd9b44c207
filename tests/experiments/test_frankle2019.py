"""Lottery tickets: planted losses and lines to verdicts, and which weights each arm starts from."""

import json
import math

import numpy as np
import pytest

from experiments.anatomy import frankle2019 as paper
from experiments.claims import verdict

CLAIMS = {claim.id: claim for claim in paper.CLAIMS}
SIZE = paper.SIZES["laptop"]
SEEDS = range(4)
NOISE = np.array([0.002, -0.001, 0.0015, -0.0025])


def planted(ticket=0.0, rewound=-0.01, redrawn=0.2, random=0.3, start=0.0, early=0.0):
    at_end = {paper.TICKET: ticket, paper.REWOUND: rewound, paper.REDRAWN: redrawn, paper.RANDOM: random}
    costs = paper.Costs(
        {(kind, r): cost * r / 5 + NOISE for kind, cost in at_end.items() for r in range(1, 6)},
        {r: 0.5**r for r in range(1, 6)},
    )
    line = np.zeros(3)
    return costs, paper.Valleys(
        dict.fromkeys(SEEDS, (line, start)), dict.fromkeys(SEEDS, (line, early)),
        {(i, j): (line, 0.5) for i in SEEDS for j in SEEDS if i < j},
    )  # fmt: skip


def verdicts(**how):
    measured = paper.measure(*planted(**how), len(SEEDS))
    assert set(measured) == set(CLAIMS)
    return {name: verdict(CLAIMS[name], m) for name, m in measured.items()}


def test_tickets_that_match_and_valleys_of_one_start_bear_out_every_claim():
    assert set(verdicts().values()) == {"reproduced"}


@pytest.mark.parametrize(("how", "missing"), [
    ({"ticket": 0.15, "rewound": 0.15}, {"match"}),
    ({"ticket": 0.25, "redrawn": 0.26, "rewound": 0.2}, {"match", "random"}),
    ({"redrawn": -0.1}, {"redrawn"}),
    ({"rewound": 0.1}, {"rewound"}),
    ({"start": 0.4}, {"start"}),
    ({"early": 0.1}, {"early"}),
])  # fmt: skip
def test_each_claim_can_fail_alone(how, missing):
    assert {name for name, v in verdicts(**how).items() if v == "not seen at this scale"} == missing


def test_a_random_ticket_that_costs_nothing_leaves_shares_open():
    measured = paper.measure(*planted(random=-0.1), len(SEEDS))
    for name in ("random", "redrawn"):
        assert verdict(CLAIMS[name], measured[name]) == "inconclusive"
        assert "nothing to compare with" in measured[name].remark


def trained(kind, seed, round_, ticket, loss=2.0):
    arm = paper.Arm(kind, seed, ticket, seed, SIZE.steps)
    return paper.Trained(arm, round_, 1.0, loss, ticket.start, None)


def test_seeds_are_not_cut_at_0_before_they_are_averaged():
    ahead, behind = (paper.measure(*planted(ticket=x, rewound=0.0), len(SEEDS))["match"] for x in (-0.1, 0.1))
    assert (ahead.value, ahead.low, ahead.high) == (0, 0, 0)
    assert behind.value == pytest.approx(0.06 + NOISE.mean())
    noise_alone = paper.measure(*planted(), len(SEEDS))["match"]
    assert noise_alone.value == max(0, NOISE.mean())
    assert noise_alone.low == 0 < noise_alone.high


def test_what_diverged_has_no_next_round_no_barrier_and_no_verdict():
    from jaxgpt.tasks.tickets import Ticket

    network = paper.network_of(SIZE)
    whole = Ticket(network.init(0), network.whole())
    good, bad = (trained(paper.WHOLE, 0, 0, whole, loss) for loss in (2.0, math.nan))

    def kinds(ticket, rewound):
        return [a.kind for a in paper.pruned_arms(SIZE, 0, {paper.TICKET: ticket, paper.REWOUND: rewound}, whole.start)]

    assert kinds(good, good) == [paper.TICKET, paper.REWOUND, paper.RANDOM, paper.REDRAWN]
    assert kinds(bad, good) == [paper.REWOUND]
    assert kinds(good, bad) == [paper.TICKET, paper.RANDOM, paper.REDRAWN]
    assert kinds(bad, bad) == []
    costs, lines = planted()
    costs.cost[paper.TICKET, 5][1] = math.nan
    line = np.full(3, math.nan)
    measured = paper.measure(costs, paper.Valleys(lines.start, {**lines.early, 2: (line, math.nan)}, lines.apart), 4)
    for name in ("random", "redrawn", "rewound", "early"):
        assert "1 of 4 seeds have no value" in measured[name].remark
    assert "nan" not in str(paper.cost_table(costs))


def test_costs_are_above_the_whole_network_of_the_same_seed():
    from jaxgpt.tasks.tickets import Ticket

    ticket = Ticket({}, {})
    found = [trained(paper.WHOLE, s, 0, ticket, 2.0 + s) for s in range(2)]
    found += [trained(kind, s, 1, ticket, 2.5 + 2 * s) for kind in paper.LOOKS for s in range(2)]
    found.append(trained(paper.AGAIN, 0, 1, ticket, 9.0))
    costs = paper.costs(found)
    np.testing.assert_allclose(costs.cost[paper.TICKET, 1], [0.5, 1.5])
    assert costs.kept == {1: 1.0}


def test_arms_differ_only_in_what_they_are_named_for():
    from jaxgpt.tasks.tickets import Ticket

    network = paper.network_of(SIZE)
    whole = trained(paper.WHOLE, 0, 0, Ticket(network.init(0), network.whole()))
    early = {name: array + 1 for name, array in network.init(0).items()}
    arms = {arm.kind: arm for arm in paper.pruned_arms(SIZE, 0, {paper.TICKET: whole, paper.REWOUND: whole}, early)}
    ticket, random, redrawn, rewound = (arms[k].ticket for k in (paper.TICKET, paper.RANDOM, paper.REDRAWN,
                                                                 paper.REWOUND))  # fmt: skip
    for name, mask in ticket.mask.items():
        np.testing.assert_array_equal(mask, redrawn.mask[name])
        assert mask.sum() == random.mask[name].sum() == mask.size / 2
        assert (mask != random.mask[name]).mean() > 0.4
        np.testing.assert_array_equal(ticket.start[name], random.start[name])
        assert (ticket.start[name] != redrawn.start[name]).all()
        np.testing.assert_array_equal(rewound.start[name], early[name])
    assert {arm.data_seed for arm in arms.values()} == {0}
    assert {kind: arm.steps for kind, arm in arms.items() if arm.steps != SIZE.steps} == {
        paper.REWOUND: SIZE.steps - SIZE.early}  # fmt: skip


def test_tables_say_every_size_and_every_pair_of_trainings():
    costs, valleys = planted()
    assert list(paper.cost_table(costs)["weights kept"]) == ["50.0%", "25.0%", "12.5%", "6.2%", "3.1%"]
    table = paper.valley_table(valleys)
    assert next(iter(table["barrier (nats)"])) == "0.500 (0.500 to 0.500)"
    assert not any("nan" in cell for cell in table.to_numpy().reshape(-1))


@pytest.mark.slow
def test_the_command_runs_from_end_to_end(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "frankle2019", "--scale", "smoke", "--json", "out.json")
    assert said.code == 0, said.err
    claims = json.loads((tmp_path / "results/raw/frankle2019/smoke/outcome/claims.json").read_text())
    assert {claim["id"] for claim in claims} == set(CLAIMS)
    assert all(math.isfinite(claim["measured"]) for claim in claims)
    assert "nan" not in said.out
