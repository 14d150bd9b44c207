"""What is a lottery ticket, and does the initialisation decide in which valley a network ends?

The lottery ticket hypothesis (Frankle & Carbin 2019) says: a dense network holds, at its start, a sparse subnetwork
that reaches the loss of the whole in about as many steps when it is trained alone from its own initial weights. It is
found by iterative magnitude pruning: train, cut the smallest half of the weights that are left in each matrix, put the
others back where they started ("rewind"), again and again. It is often told as if initialisations were tickets to
better or worse valleys of the loss. That is another question, asked by straight lines between trained networks.

Tickets are held against three others of the same number of weights in each matrix:

    random      the same initial weights, other weights cut: the mask shuffled within each matrix
    redrawn     the same mask, initial weights of another seed
    rewound     a ticket put back to an early step instead of to the start (Frankle et al. 2020), with masks of its own;
                for the steps that are left it has a new optimizer and a whole schedule, warm-up too (theirs goes on
                in the schedule from there)

Valleys: the whole network is trained again from the same start with the data in another order, and twice from its early
step, with two orders (and again a new optimizer and schedule, unlike theirs); the barrier on the straight line between
two trained networks says whether they lie in one valley (Frankle et al. 2020 call the network stable from then on).
Beside it, the barrier between two initialisations.

The network is small: it reads 8 bytes of text and predicts the next, with two hidden layers (jaxgpt/tasks/tickets.py),
whose matrices are pruned. It sees new text at each step and is not much larger than it need be, unlike networks that
know their images by heart; whether tickets match the whole then is what the command asks. All runs of a seed see
the data in one order, but for those that are to have another. The rate is the best of 1e-3, 3e-3 and 1e-2 for the
whole network of seed 100.

A loss counts as equal within .02 nats. This, the sizes of tickets and the half of the second claim are ours.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, from_0, mean_and_interval, of_those_that_have, spoken
from experiments.registry import Job, Outcome, Paper, check_complete
from jaxgpt.config import BadInput, RunConfig, override

if TYPE_CHECKING:
    import numpy
    import pandas

    from jaxgpt.tasks.tickets import Network, Ticket

FRANKLE, LATER = "Frankle & Carbin 2019", "Frankle et al. 2020"
LEVEL = 0.9
EQUAL = 0.02  # nats
HALF = 0.5  # of the weights that are left, kept in each round
MATCHING = 3  # rounds after which a ticket is held against the whole: an eighth of the weights
TICKET, REWOUND, RANDOM, REDRAWN = "ticket", "rewound", "random", "redrawn"
WHOLE, AGAIN, EARLY, EARLY_AGAIN = "whole", "other order", "from early", "from early, other order"
ELSEWHERE = 10_000  # added to a seed: other initial weights, another order of the data

CLAIMS = (
    Claim("match", "a ticket of an eighth of the weights reaches the loss of the whole: by how much it falls short, 0 "
          "if it does not", FRANKLE, 0.0, EQUAL, "nats", "toy_analogue", LEVEL, row=86, possible=(0.0, math.inf)),
    Claim("random", "the smallest ticket costs less than half of what a random one of its size costs: share of it",
          f"after {FRANKLE}", 0.0, 0.5, "1", "toy_analogue", LEVEL, row=86, possible=(0.0, math.inf)),
    Claim("redrawn", "its initial weights matter, not only its mask: drawn anew, they lose a part of its lead over "
          "a random ticket, between 0 and all of it", f"after {FRANKLE}", 0.5, 0.5, "share of the lead",
          "toy_analogue", LEVEL, row=86),
    Claim("rewound", "put back to an early step, with optimizer and schedule begun anew, it is at least as good as put "
          "back to the start: by how much it falls short, 0 if it does not", f"after {LATER}", 0.0, EQUAL, "nats",
          "toy_analogue", LEVEL, row=86, possible=(0.0, math.inf)),
    Claim("start", "the initialisation decides the valley: barrier between two trainings from one start, over that "
          "between two starts", "as commonly said of lottery tickets", 0.0, 0.1, "1", "toy_analogue", LEVEL, row=86,
          possible=(0.0, math.inf)),
    Claim("early", "an early step does: barrier between two trainings from there, with the optimizer and the schedule "
          "begun anew", f"after {LATER}", 0.0, EQUAL, "nats",
          "toy_analogue", LEVEL, row=86, possible=(0.0, math.inf)),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does. widths: bytes that are read, of a byte's vector, of the hidden layers. early: the step that
    some are put back to. windows: of held-out text.
    """

    widths: tuple[int, int, int, int]
    rounds: int
    seeds: int
    steps: int
    early: int
    batch: int
    windows: int
    points: int = 11


SIZES = {
    "smoke": Size((4, 4, 16, 8), rounds=3, seeds=3, steps=40, early=4, batch=16, windows=256, points=5),
    "laptop": Size((8, 16, 128, 64), rounds=5, seeds=4, steps=2000, early=100, batch=128, windows=8192),
    "paper": Size((16, 32, 1024, 512), rounds=8, seeds=8, steps=50_000, early=1000, batch=512, windows=65_536),
}


@dataclass(frozen=True)
class Arm:
    """One training: what it is, of which seed, from which weights on, in which order it sees the data."""

    kind: str
    seed: int
    ticket: Ticket
    data_seed: int
    steps: int


def config(size: Size, arm: Arm, number: int) -> RunConfig:
    """Adam without decay of the weights, its rate falling on a cosine. number: of its ticket in the sweep."""
    return override(RunConfig(), {
        "model.n_heads": 1, "model.context": size.widths[0], "train.batch_size": size.batch, "train.steps": arm.steps,
        "train.seed": number, "train.data_seed": arm.data_seed, "train.eval_windows": size.windows,
        "train.log_every": arm.steps, "train.eval_every": arm.steps,
        "train.keep_every": size.early if arm.kind == WHOLE else None,
        "optimizer.learning_rate": 1e-2, "optimizer.weight_decay": 0.0,
    })  # fmt: skip


# --- training ------------------------------------------------------------------------------------------------------

Weights = Mapping[str, Any]


@dataclass(frozen=True)
class Trained:
    """A training's end: its loss (NaN if it diverged), the weights, and for the whole networks those of the early step.
    round: how often was pruned before; kept: share of the weights in the pruned matrices.
    """

    arm: Arm
    round: int
    kept: float
    loss: float
    weights: Weights
    early: Weights | None


def train_arms(job: Job, size: Size, round_: int, arms: Sequence[Arm], began: float) -> tuple[Any, list[Trained]]:
    """The runs of a round, as a table and with their weights. Raises Unfinished."""
    import numpy as np

    from jaxgpt import checkpoint, sweep
    from jaxgpt.tasks import tickets

    wanted = [config(size, arm, number) for number, arm in enumerate(arms)]
    setup = tickets.source(network_of(size), [arm.ticket for arm in arms])
    runs = sweep(wanted, job.raw, setup=setup, max_minutes=job.minutes_left(began))
    check_complete(runs, wanted)
    found = []
    for arm, row in zip(arms, runs.to_dict("records"), strict=True):
        folder = job.raw / "checkpoints" / row["run_id"]
        state = checkpoint.restore_latest(folder)
        assert state is not None, f"{row['run_id']} is done and has no checkpoint"
        early = checkpoint.restore(folder, None, size.early)[0]["params"] if arm.kind == WHOLE else None
        kept = sum(m.sum() for m in arm.ticket.mask.values()) / sum(m.size for m in arm.ticket.mask.values())
        loss = row["final_loss"] if row["status"] == "done" else np.nan
        found.append(Trained(arm, round_, float(kept), float(loss), tickets.trained(state[0]["params"], arm.ticket),
                             None if early is None else tickets.trained(early, arm.ticket)))  # fmt: skip
    columns = {"kind": [t.arm.kind for t in found], "round": round_, "kept": [t.kept for t in found]}
    return runs.assign(**columns, seed=[t.arm.seed for t in found]), found


def network_of(size: Size) -> Network:
    """The network of a scale."""
    from jaxgpt.tasks.tickets import Network

    return Network(*size.widths)


def whole_arms(size: Size, seeds: Sequence[int]) -> list[Arm]:
    """The whole networks."""
    from jaxgpt.tasks.tickets import Ticket

    network = network_of(size)
    return [Arm(WHOLE, seed, Ticket(network.init(seed), network.whole()), seed, size.steps) for seed in seeds]


def pruned_arms(size: Size, seed: int, by_kind: Mapping[str, Trained], early: Weights) -> list[Arm]:
    """The next round of a seed, given the last ticket and the last rewound one (the whole network at first). One that
    diverged has no next: the sizes of its weights say nothing.
    """
    import numpy as np

    from jaxgpt.tasks import tickets

    network, later = network_of(size), size.steps - size.early
    last, rewound = by_kind[TICKET], by_kind[REWOUND]
    arms = []
    if not math.isnan(last.loss):
        mask = tickets.pruned(last.weights, last.arm.ticket.mask, HALF)
        anywhere = tickets.shuffled(mask, np.random.default_rng([6, seed, last.round]))
        start = network.init(seed)
        arms += [
            Arm(TICKET, seed, tickets.Ticket(start, mask), seed, size.steps),
            Arm(RANDOM, seed, tickets.Ticket(start, anywhere), seed, size.steps),
            Arm(REDRAWN, seed, tickets.Ticket(network.init(seed + ELSEWHERE), mask), seed, size.steps),
        ]
    if not math.isnan(rewound.loss):
        other = tickets.pruned(rewound.weights, rewound.arm.ticket.mask, HALF)
        # Second, where it always was: its place in the list is its number in the sweep.
        arms.insert(min(1, len(arms)), Arm(REWOUND, seed, tickets.Ticket(early, other), seed, later))
    return arms


def twin_arms(size: Size, seed: int, early: Weights) -> list[Arm]:
    """The whole network of a seed again: from its start in another order, from its early step in two orders."""
    from jaxgpt.tasks.tickets import Ticket

    network, later = network_of(size), size.steps - size.early
    start, from_early = Ticket(network.init(seed), network.whole()), Ticket(early, network.whole())
    return [
        Arm(AGAIN, seed, start, seed + ELSEWHERE, size.steps),
        Arm(EARLY, seed, from_early, seed, later),
        Arm(EARLY_AGAIN, seed, from_early, seed + ELSEWHERE, later),
    ]


def train(job: Job, size: Size) -> tuple[Any, list[Trained]]:
    """All runs, a round after the other: what is pruned next was trained before."""
    import pandas

    began, seeds = time.monotonic(), range(size.seeds)
    runs, found = train_arms(job, size, 0, whole_arms(size, seeds), began)
    lost = [t.arm.seed for t in found if math.isnan(t.loss)]
    if lost:
        raise BadInput(f"the whole network of seed {lost[0]} diverged, of which there are no tickets; lower the rate")
    tables, earlier = [runs], {t.arm.seed: t for t in found}
    last = {seed: {TICKET: whole, REWOUND: whole} for seed, whole in earlier.items()}
    for round_ in range(1, size.rounds + 1):
        arms = [arm for seed in seeds for arm in pruned_arms(size, seed, last[seed], earlier[seed].early or {})]
        if not arms:
            break
        if round_ == 1:
            arms += [arm for seed in seeds for arm in twin_arms(size, seed, earlier[seed].early or {})]
        runs, new = train_arms(job, size, round_, arms, began)
        for t in new:
            last[t.arm.seed][t.arm.kind] = t
        tables.append(runs)
        found += new
    return pandas.concat(tables, ignore_index=True), found


# --- what they say -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Loss above that of the whole network of the same seed, by kind and round, [S], NaN where it, or one that it comes
    from, diverged; the share kept, by round.
    """

    cost: Mapping[tuple[str, int], numpy.ndarray]
    kept: Mapping[int, float]


def costs(found: Sequence[Trained]) -> Costs:
    """Of all tickets."""
    import numpy as np

    loss = {(t.arm.kind, t.round, t.arm.seed): t.loss for t in found}
    seeds = sorted({seed for _, _, seed in loss})
    rounds = sorted({t.round for t in found if t.round})
    return Costs(
        {(kind, r): np.asarray([loss.get((kind, r, s), math.nan) - loss[WHOLE, 0, s] for s in seeds])
         for kind in (TICKET, REWOUND, RANDOM, REDRAWN) for r in rounds},
        {t.round: t.kept for t in found if t.arm.kind in (TICKET, REWOUND)},
    )  # fmt: skip


@dataclass(frozen=True)
class Valleys:
    """The loss on straight lines [P] and their barriers. start, early: by seed; apart: by pair of seeds."""

    start: Mapping[int, tuple[numpy.ndarray, float]]
    early: Mapping[int, tuple[numpy.ndarray, float]]
    apart: Mapping[tuple[int, int], tuple[numpy.ndarray, float]]


def valleys(found: Sequence[Trained], size: Size, window_WxT1: numpy.ndarray) -> Valleys:
    """Of the whole networks and their twins."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from analysis import matching
    from jaxgpt.tasks import tickets

    loss = jax.jit(lambda weights: tickets.losses(weights, jnp.asarray(window_WxT1)).mean())
    kinds = (WHOLE, AGAIN, EARLY, EARLY_AGAIN)
    by = {(t.arm.kind, t.arm.seed): t for t in found if t.arm.kind in kinds}
    share_P = np.linspace(0, 1, size.points)

    def line(a: Trained, b: Trained) -> tuple[numpy.ndarray, float]:
        if math.isnan(a.loss) or math.isnan(b.loss):
            return np.full(len(share_P), math.nan), math.nan
        loss_P = np.asarray([float(loss(matching.between(a.weights, b.weights, float(s)))) for s in share_P])
        return loss_P, matching.barrier(loss_P, share_P)

    seeds = range(size.seeds)
    return Valleys(
        {s: line(by[WHOLE, s], by[AGAIN, s]) for s in seeds},
        {s: line(by[EARLY, s], by[EARLY_AGAIN, s]) for s in seeds},
        {(i, j): line(by[WHOLE, i], by[WHOLE, j]) for i, j in itertools.combinations(seeds, 2)},
    )


def measure(c: Costs, v: Valleys, seeds: int) -> dict[str, Measured]:
    """Each claim's value and interval over seeds. Of what may fall short or be ahead, the mean and its interval are cut
    at 0, and not the seeds: a mean of cut ones would be above 0 where there is only noise.
    """
    import numpy as np

    from analysis import matching

    last = max(c.kept)
    ticket_S, random_S, redrawn_S = (c.cost[kind, last] for kind in (TICKET, RANDOM, REDRAWN))
    lead_S = random_S - ticket_S
    apart_S = matching.per_seed({pair: barrier for pair, (_, barrier) in v.apart.items()})
    values = {
        "match": c.cost[TICKET, min(MATCHING, last)],
        # Where a random ticket costs nothing, or leads, there is nothing to have a share of.
        "random": np.where(random_S > 0, ticket_S / random_S, np.nan),
        "redrawn": np.where(lead_S > 0, (redrawn_S - ticket_S) / lead_S, np.nan),
        "rewound": c.cost[REWOUND, last] - ticket_S,
        "start": np.asarray([barrier for _, barrier in v.start.values()]) / np.mean(apart_S),
        "early": np.asarray([barrier for _, barrier in v.early.values()]),
    }
    why = "nothing to compare with, or a training diverged"
    measured = {name: of_those_that_have(value_S, seeds, why, LEVEL) for name, value_S in values.items()}
    return measured | {name: from_0(measured[name]) for name in ("match", "random", "rewound")}


def cost_table(c: Costs) -> pandas.DataFrame:
    """One line per share of the weights that is kept: the cost of each kind of ticket."""
    import pandas

    return pandas.DataFrame(
        {"weights kept": f"{kept:.1%}"} | {kind: _said(c.cost[kind, r]) for kind in (TICKET, REWOUND, REDRAWN, RANDOM)}
        for r, kept in c.kept.items()
    )  # fmt: skip


def _said(value_S: Any, possible: tuple[float, float] = (-math.inf, math.inf)) -> str:
    """Of the seeds in which it did not diverge."""
    there = [value for value in value_S if not math.isnan(value)]
    return spoken(there, LEVEL, ".3f", possible) if there else "diverged"


def valley_table(v: Valleys) -> pandas.DataFrame:
    """One line per kind of two trainings: the barrier between them."""
    import pandas

    from analysis import matching

    apart_S = matching.per_seed({pair: barrier for pair, (_, barrier) in v.apart.items()})
    lines = (("two initialisations", apart_S), ("one start, two orders of the data", [b for _, b in v.start.values()]),
             ("one early step, two orders", [b for _, b in v.early.values()]))  # fmt: skip
    return pandas.DataFrame(
        {"two trainings from": name, "barrier (nats)": _said(value_S, (0.0, math.inf))} for name, value_S in lines
    )


SUMMARY = [*("run_id", "kind", "round", "kept", "seed", "status", "final_loss", "final_loss_sem", "train.steps"),
           *("train.data_seed", "wall_seconds", "code_version")]  # fmt: skip


def run(job: Job) -> Outcome:
    """Trains, prunes, measures, draws."""
    from jaxgpt.tasks import text

    size = SIZES[job.scale]
    runs, found = train(job, size)
    c = costs(found)
    v = valleys(found, size, text.reader()(config(size, found[0].arm, 0)).data().validation_WxT1)
    whole_S = [t.loss for t in found if t.arm.kind == WHOLE]
    return Outcome(
        measured=measure(c, v, size.seeds),
        summary=runs.reindex(columns=SUMMARY),
        tables=(
            (f"Loss in nats per byte above that of the whole network ({sum(whole_S) / len(whole_S):.3f}), {size.seeds} "
             f"seeds with {LEVEL:.0%} interval; kept of the weights of the hidden matrices", cost_table(c)),
            (f"How far the loss rises on the straight line between two whole networks, {size.seeds} seeds with "
             f"{LEVEL:.0%} interval; early: step {size.early:,} of {size.steps:,}", valley_table(v)),
        ),
        figures=tuple(draw(c, v, size, job.figure)),
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0].split(",")[0],
    )  # fmt: skip


# --- the figure ----------------------------------------------------------------------------------------------------

LOOKS = {TICKET: ("#1f5a8f", "o", "ticket"), REWOUND: ("#5aa9c8", "D", "ticket rewound to an early step"),
         REDRAWN: ("#c8641e", "s", "its mask, other initial weights"),
         RANDOM: ("0.45", "^", "its initial weights, random mask")}  # fmt: skip


def draw(c: Costs, v: Valleys, size: Size, path_stem: Path) -> list[Path]:
    """What tickets cost against what is kept; the loss on lines between whole networks."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(10.0, 4.3), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
        _draw_costs(left, c)
        _draw_valleys(right, v, size)
        return plots.save(figure, path_stem)


def _draw_costs(axes: Any, c: Costs) -> None:
    import numpy as np

    kept_K = np.asarray(list(c.kept.values()))
    for place, (kind, (colour, marker, name)) in enumerate(LOOKS.items()):
        there = [cost_S[np.isfinite(cost_S)] for cost_S in (c.cost[kind, r] for r in c.kept)]
        each = np.asarray([mean_and_interval(x_S, LEVEL) if len(x_S) > 1 else (math.nan,) * 3 for x_S in there]).T
        # Side by side, so that intervals do not hide each other.
        axes.errorbar(kept_K * 1.035 ** (place - 1.5), each[0], yerr=np.abs(each[1:] - each[0]), color=colour,
                      marker=marker, ms=5.5, mec="white", mew=0.6, lw=1.3, capsize=2, label=name)  # fmt: skip
    axes.axhline(0, color="black", lw=1, ls=(0, (4, 2)), zorder=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(kept_K, [f"{kept:.4g}" for kept in 100 * kept_K])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.set_xlabel("weights kept in the hidden matrices (%)")
    axes.set_ylabel("loss above the whole network's (nats)")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.35 * (high - low))
    axes.set_title("Subnetworks of one size, trained alone")
    axes.legend(loc="upper left")


def _draw_valleys(axes: Any, v: Valleys, size: Size) -> None:
    import numpy as np

    share_P = np.linspace(0, 1, size.points)
    for lines, colour, name in ((v.apart, "0.55", "two initialisations"), (v.start, "#c8641e", "one start, two orders"),
                                (v.early, "#1f5a8f", f"from step {size.early:,} of one, two orders")):  # fmt: skip
        for number, (loss_P, _) in enumerate(lines.values()):
            above_P = loss_P - (1 - share_P) * loss_P[0] - share_P * loss_P[-1]
            axes.plot(share_P, above_P, color=colour, lw=1.2, label=name if number == 0 else None)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.3 * (high - low))
    axes.set_xlabel("place on the straight line between two trained networks")
    axes.set_ylabel("loss above the ends' (nats)")
    axes.set_title("Barriers between whole networks (a line per pair)")
    axes.legend(loc="upper left")


PAPER = Paper(
    name="frankle2019",
    title="Lottery tickets: sparse subnetworks that train alone, and what they are mistaken for",
    source=f"{FRANKLE}; {LATER}",
    claims=CLAIMS,
    takes={
        "smoke": "a quarter of a minute",
        "laptop": "about a minute on 2 CPU cores",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
