"""Kaplan et al. 2020: power laws without a floor, and what their exponents owe to how N and C are counted.

On text nobody knows the lowest possible loss, so a floor in the law can be neither confirmed nor refuted. On Markov
chains it is known exactly (jaxgpt/tasks/markov.py): there models of many sizes are trained, laws with and without a
floor fitted, and both held against the entropy. Each seed is a chain of its own. The exponents by convention come from
the shared IsoFLOP sweep on text (isoflop.py), and 6 N D is compared with what XLA counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, mean_and_interval
from experiments.registry import Job, Outcome, Paper, check_complete
from experiments.scaling import isoflop
from experiments.scaling.isoflop import LEVEL, Table
from jaxgpt import flops
from jaxgpt.config import RunConfig, override

if TYPE_CHECKING:
    import numpy

    from analysis.fit import Fit

KAPLAN = "Kaplan et al. 2020"


def _claim(id: str, row: int, statement: str, source: str, expected: float, margin: float, unit: str = "1") -> Claim:
    return Claim(id, statement, source, expected, margin, unit, "toy_analogue", LEVEL, row)


CLAIMS = (
    _claim("floor", 1, "Markov chains: the floor of L(N) = E + A / N^alpha is their entropy: E minus entropy", "ours",
           0.0, 0.03, "nats per token"),
    # A weight of .95 is what one calls strong evidence: 19 to 1.
    _claim("choice", 1, "Markov chains: weight of the law with a floor against the one without, by AICc", "ours",
           1.0, 0.05),
    _claim("held_out", 1, "Markov chains: error of predicted log loss at larger sizes, with a floor over without",
           "ours", 0.0, 0.5),
    _claim("crossing", 1, "Markov chains: the law without a floor promises less than the entropy within 100 times the "
           "largest size: log10 of the factor", "ours", 0.0, 2.0),
    # Half of what is expected: so the order of magnitude is claimed.
    _claim("alpha_N", 1, "text, N without embeddings, no floor: loss falls with size as N^-alpha",
           f"{KAPLAN}, eq. 1.1", 0.076, 0.038),
    _claim("alpha_D", 1, "text, N without embeddings, no floor: loss falls with data as D^-alpha",
           f"{KAPLAN}, eq. 1.2", 0.095, 0.0475),
    _claim("alpha_C", 1, "text, N without embeddings, no floor: the best loss falls as C^-alpha, C allocated best",
           f"{KAPLAN}, eq. 1.3 (C_min)", 0.050, 0.025),
    _claim("size", 4, "text, N without embeddings: compute-optimal size grows as C^a", f"{KAPLAN}, section 1.2", 0.73,
           0.1),
    _claim("gap", 4, "text: leaving the embeddings out of N raises a: change, the gap to Hoffmann et al. 2022",
           "Pearce & Song 2024, abstract", 0.23, 0.115),
    _claim("six_nd", 4, "FLOPs that XLA counts over 6 N D, N all parameters, in the models of the sweep",
           f"{KAPLAN}, section 2.1", 1.0, 0.1),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale trains on Markov chains. widths: of the models; the last `held` are predicted from the others.

    rate: learning rate at width 1, which goes as width^-1/2. counted: widths of the IsoFLOP sweep that XLA counts.
    """

    widths: tuple[int, ...]
    chains: int
    order: int
    concentration: float
    settings: dict[str, Any]
    counted: tuple[int, ...]
    held: int = 3
    rate: float = 0.1
    starts: int = 100


SIZES = {
    "smoke": Size(
        widths=(2, 4, 6, 8, 12, 16), chains=2, order=1, concentration=4.0, counted=(8,), held=1, starts=20,
        settings={"model.n_layers": 1, "model.n_heads": 1, "model.vocab_size": 8, "model.context": 8,
                  "train.batch_size": 8, "train.steps": 40, "train.eval_windows": 64},
    ),
    "laptop": Size(
        widths=(4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32), chains=3, order=1, concentration=4.0, counted=(12, 24, 64),
        settings={"model.n_layers": 2, "model.n_heads": 1, "model.vocab_size": 64, "model.context": 16,
                  "train.batch_size": 64, "train.steps": 1500, "train.eval_windows": 8192},
    ),
    "paper": Size(
        widths=(8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256), chains=4, order=3, concentration=4.0,
        counted=(48, 128, 256),
        settings={"model.n_layers": 4, "model.n_heads": 4, "model.vocab_size": 64, "model.context": 128,
                  "train.batch_size": 128, "train.steps": 20_000, "train.eval_windows": 8192},
    ),
}  # fmt: skip


def configs(size: Size) -> list[RunConfig]:
    """The runs on Markov chains: widths x chains, each from its own initial parameters."""
    steps = size.settings["train.steps"]
    return [
        override(RunConfig(), {
            **size.settings, "model.d_model": width, "train.seed": seed,
            "optimizer.learning_rate": size.rate / width**0.5,
            "optimizer.final_fraction": 0.0, "train.eval_every": steps, "train.log_every": steps,
        })
        for width in size.widths
        for seed in range(size.chains)
    ]  # fmt: skip


def train(job: Job, size: Size) -> Table:
    """The runs on Markov chains. Raises Unfinished."""
    from jaxgpt import sweep
    from jaxgpt.tasks import markov

    wanted = configs(size)

    def setup(config: RunConfig) -> Any:
        return markov.source(config, size.order, size.concentration, size.chains)

    runs = sweep(wanted, job.raw, setup=setup, max_minutes=job.max_minutes)
    check_complete(runs, wanted)
    return named(runs[runs["status"] == "done"])


def named(runs: Table) -> Table:
    """Columns N (without embeddings), loss, seed."""
    return runs.assign(
        N=runs["params_non_embedding"].astype(float), loss=runs["final_loss"].astype(float), seed=runs["train.seed"]
    )


def entropies(size: Size) -> list[float]:
    """The lowest possible loss on each chain, in windows as long as the models': exact."""
    from jaxgpt.tasks import markov

    vocabulary, context = size.settings["model.vocab_size"], size.settings["model.context"]
    return [
        markov.floor(markov.chain(seed, vocabulary, size.order, size.concentration), context)
        for seed in range(size.chains)
    ]


# --- with and without a floor --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """One chain: its runs (N, loss), small models first, its entropy, and the two laws fitted to all of them."""

    n_M: numpy.ndarray
    loss_M: numpy.ndarray
    entropy: float
    floor: Fit
    plain: Fit
    weight: float  # Akaike's, of the law with a floor
    error_ratio: float  # root mean square errors of log loss at the held-out sizes, with a floor over without

    @property
    def crossing(self) -> float:
        """log10 of how many times the largest size the law without a floor reaches the entropy at."""
        size = self.plain.best["Nc"] * self.entropy ** (-1 / self.plain.best["alphaN"])
        return math.log10(size / self.n_M[-1])


def both_laws() -> tuple[Any, Any]:
    """Kaplan's L(N) and the same with a floor, both in N."""
    from analysis.laws import KAPLAN_N, SATURATING

    terms = (("E", {}), ("A", {"N": "alpha"}))
    return replace(SATURATING, name="floor", formula="L(N) = E + A / N^alpha", variables=("N",), terms=terms), KAPLAN_N


def world(runs: Table, entropy: float, size: Size) -> World:
    """What the runs on one chain say."""
    import numpy as np

    from analysis.choice import aicc
    from analysis.fit import fit

    runs = runs.sort_values("N")
    n_M, loss_M = runs["N"].to_numpy(), runs["loss"].to_numpy()

    def fits(count: int) -> list[Fit]:
        how = {"objective": "squared_log", "starts": size.starts, "bootstraps": 0}
        return [fit(law, {"N": n_M[:count]}, loss_M[:count], **how) for law in both_laws()]

    def error(fitted: Fit) -> float:
        held = slice(-size.held, None)
        return float(np.sqrt(np.mean(np.log(fitted.law.predict(fitted.best, {"N": n_M[held]}) / loss_M[held]) ** 2)))

    floor, plain = fits(len(n_M))
    floor_below, plain_below = map(error, fits(len(n_M) - size.held))
    difference = aicc(floor) - aicc(plain)
    weight = 1 / (1 + math.exp(min(700.0, difference / 2)))
    return World(n_M, loss_M, entropy, floor, plain, weight, floor_below / plain_below)


def of_worlds(worlds: list[World]) -> dict[str, Measured]:
    """Claims about the floor: means over chains, each with models of its own, with Student's t."""
    each = {
        "floor": [w.floor.best["E"] - w.entropy for w in worlds],
        "choice": [w.weight for w in worlds],
        "held_out": [w.error_ratio for w in worlds],
        "crossing": [w.crossing for w in worlds],
    }
    return {name: Measured(*mean_and_interval(values, LEVEL), len(worlds)) for name, values in each.items()}


# --- exponents by convention ---------------------------------------------------------------------------------------

THEIRS, ALL, EXACT = "without embeddings, 6 N D", "all parameters, 6 N D", "all parameters, exact C"
CONVENTIONS = {ALL: "params_total", THEIRS: "params_non_embedding", EXACT: "params_total"}
QUANTITIES = {"alphaN": "loss in N", "alphaD": "loss in D", "alphaC": "best loss in C", "a": "best N in C"}
PRINTED = {"alphaN": 0.076, "alphaD": 0.095, "alphaC": 0.050, "a": 0.73}
FEWEST = 3  # budgets that a slope is drawn through
LOST = 0.2  # more bootstraps without all minima, and the others are too good a choice


def exponents(runs: Table, size: isoflop.Size) -> dict[str, dict[str, Measured]]:
    """By convention and quantity. runs: of the rule's rate, all seeds."""
    laws = {column: in_size_and_data(runs, size, column) for column in set(CONVENTIONS.values())}
    found = {}
    for name, column in CONVENTIONS.items():
        n = runs[column].astype(float)
        per_token = runs["flops_exact"] / runs["tokens"] if name == EXACT else 6.0 * n
        level = isoflop.at_equal_compute(runs.assign(N=n, per_token=per_token), len(size.budgets))
        found[name] = laws[column] | in_compute(level, size.bootstraps, runs["train.seed"].nunique())
    return found


def in_size_and_data(runs: Table, size: isoflop.Size, counted: str) -> dict[str, Measured]:
    """alphaN and alphaD of Kaplan's L(N, D). Trunks are resampled whole."""
    from analysis.fit import fit
    from analysis.laws import KAPLAN_ND

    table = {"N": runs[counted].astype(float), "D": runs["D"].astype(float)}
    law = fit(KAPLAN_ND, table, runs["loss"], objective="squared_log", groups=runs["trunk"].to_numpy(),
              starts=size.starts, bootstraps=size.bootstraps, level=LEVEL)  # fmt: skip
    return {
        name: Measured(law.best[name], *law.parameters[name].interval, runs["train.seed"].nunique(),
                       law.parameters[name].remark)
        for name in ("alphaN", "alphaD")
    }  # fmt: skip


def in_compute(level: Table, bootstraps: int, seeds: int) -> dict[str, Measured]:
    """alphaC of the best loss ~ C^-alphaC and a of the best size ~ C^a: the minima of parabolas through losses at equal
    compute, of trunks, which are resampled whole. Budgets without a minimum do not count, and neither do resamples that
    lose one of the others.
    """
    import numpy as np

    trunks, trunk_M = np.unique(level["trunk"].to_numpy(), return_inverse=True)
    log_M = np.log(level[["C", "N", "loss"]].to_numpy(float))
    rows = [np.flatnonzero(level["budget"].to_numpy() == k) for k in np.unique(level["budget"])]
    ones_M = np.ones(len(level))
    rows = [mine for mine in rows if np.isfinite(_minimum(log_M[mine], ones_M[mine])).all()]
    if len(rows) < FEWEST:
        remark = f"{len(rows)} budgets have their lowest loss inside the range of sizes; {FEWEST} are needed"
        return dict.fromkeys(("alphaC", "a"), Measured(math.nan, math.nan, math.nan, seeds, remark))

    def slopes(count_M: numpy.ndarray) -> numpy.ndarray:
        log_c_K, log_loss_K, log_n_K = np.array([_minimum(log_M[mine], count_M[mine]) for mine in rows]).T
        if np.isnan(log_n_K).any():
            return np.full(2, math.nan)
        return np.polyfit(log_c_K, np.stack([log_loss_K, log_n_K], axis=1), 1)[0] * (-1, 1)

    drawn_BxR = np.random.default_rng(0).multinomial(len(trunks), np.full(len(trunks), 1 / len(trunks)), bootstraps)
    sample_Bx2 = np.array([slopes(drawn_R[trunk_M].astype(float)) for drawn_R in drawn_BxR])
    kept_Bx2 = sample_Bx2[np.isfinite(sample_Bx2[:, 0])]
    lost = 1 - len(kept_Bx2) / bootstraps
    remark = f"{lost:.0%} of the bootstraps lose a budget's minimum" if lost > LOST else ""
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low_2, high_2 = np.quantile(kept_Bx2, ends, axis=0) if len(kept_Bx2) else np.full((2, 2), math.nan)
    value_2 = slopes(ones_M)
    return {
        name: Measured(float(value_2[i]), float(low_2[i]), float(high_2[i]), seeds, remark)
        for i, name in enumerate(("alphaC", "a"))
    }


def _minimum(log_M: numpy.ndarray, count_M: numpy.ndarray) -> tuple[float, float, float]:
    """log C, lowest log loss and best log N of a budget's points, columns C, N, loss; NaN without a minimum inside."""
    import numpy as np

    from analysis.approaches import parabola_minimum
    from analysis.fit import FitError

    log_c_M, log_n_M, log_loss_M = log_M.T
    try:
        best = parabola_minimum(log_n_M, log_loss_M, count_M)
    except FitError:
        return float(log_c_M[0]), math.nan, math.nan
    parabola = np.polyfit(log_n_M - best, log_loss_M, 2, w=np.sqrt(count_M))
    return float(log_c_M[0]), float(parabola[-1]), best


def of_conventions(found: Mapping[str, Mapping[str, Measured]]) -> dict[str, Measured]:
    """Claims about exponents. The two ways of counting look at the same runs; their errors are taken as independent,
    which makes the interval of the gap rather too wide.
    """
    theirs, ours = found[THEIRS], found[ALL]
    a, b = theirs["a"], ours["a"]
    low = a.value - b.value - math.hypot(a.value - a.low, b.high - b.value)
    high = a.value - b.value + math.hypot(a.high - a.value, b.value - b.low)
    return {
        "alpha_N": theirs["alphaN"], "alpha_D": theirs["alphaD"], "alpha_C": theirs["alphaC"], "size": a,
        "gap": Measured(a.value - b.value, low, high, a.seeds, a.remark or b.remark),
    }  # fmt: skip


# --- 6 N D ---------------------------------------------------------------------------------------------------------


def counts(size: isoflop.Size, widths: tuple[int, ...]) -> Table:
    """FLOPs per token of models of the sweep: 6 N by both conventions, exact (causal and dense), and XLA's."""
    import pandas

    rows = []
    for width in widths:
        first = next(first for w, first, _ in size.models if w == width)
        model = isoflop.config(size, width, first, 0, isoflop.rate(width)).model
        n, tokens = flops.parameters(model), model.context
        rows.append({
            "width": width, "context": tokens, "all": 6.0 * n.total, "without": 6.0 * n.non_embedding,
            "causal": flops.flops_exact(model, 1.0, attention="causal"), "dense": flops.flops_exact(model, 1.0),
            "xla": flops.xla_flops(model, 1) / tokens,
        })  # fmt: skip
    return pandas.DataFrame(rows)


def of_counts(table: Table) -> Measured:
    """XLA's count over 6 N D: the mean over models, and from the smallest to the largest. It has no seeds."""
    ratio = table["xla"] / table["all"]
    return Measured(float(ratio.mean()), float(ratio.min()), float(ratio.max()), 1)


# --- from the runs to the figure -----------------------------------------------------------------------------------

SUMMARY = [
    *("run_id", "model.d_model", "params_total", "params_non_embedding", "tokens", "train.seed", "status"),
    *("final_loss", "final_loss_sem", "wall_seconds", "code_version"),
]


def run(job: Job) -> Outcome:
    """Trains on chains and on text, fits, draws."""
    import pandas

    from analysis.floors import draw

    size, shared, began = SIZES[job.scale], isoflop.SIZES[job.scale], time.monotonic()
    runs = train(job, size)
    left = None if job.max_minutes is None else max(0.0, job.max_minutes - (time.monotonic() - began) / 60)
    text = isoflop.train(replace(job, max_minutes=left), isoflop.grid(shared, seeds=range(shared.seeds)))
    worlds = [
        world(runs[runs["seed"] == seed], entropy, size) for seed, entropy in enumerate(entropies(size))
    ]  # fmt: skip
    found, counted = exponents(text, shared), counts(shared, size.counted)
    summary = pandas.concat([runs.reindex(columns=SUMMARY).assign(source="Markov chain"),
                             text.reindex(columns=SUMMARY).assign(source="text")], ignore_index=True)  # fmt: skip
    return Outcome(
        measured=of_worlds(worlds) | of_conventions(found) | {"six_nd": of_counts(counted)},
        summary=summary,
        tables=(
            (f"L(N) on Markov chains, {len(worlds[0].n_M)} sizes each", world_table(worlds)),
            (f"Exponents on text by convention, {LEVEL:.0%} interval", exponent_table(found)),
            ("FLOPs per token over 6 N, N all parameters", count_table(counted)),
        ),
        figures=tuple(draw(worlds, found, counted, QUANTITIES, PRINTED, KAPLAN, job.figure)),
        numbers={"chains": [{"entropy": w.entropy, "E": w.floor.best["E"], "weight": w.weight} for w in worlds],
                 "exponents": {name: {q: [m.value, m.low, m.high] for q, m in one.items()}
                               for name, one in found.items()}},
        seconds_training=sum(runs["wall_seconds"]) + sum(text["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=text["corpus_sha256"].iloc[0],
    )  # fmt: skip


def world_table(worlds: list[World]) -> Table:
    """One line per chain."""
    import pandas

    return pandas.DataFrame(
        {"chain": str(i), "entropy": f"{w.entropy:.4f}", "E": f"{w.floor.best['E']:.4f}",
         "alpha": f"{w.floor.best['alpha']:.3g}", "alpha without a floor": f"{w.plain.best['alphaN']:.3g}",
         "weight of the floor": f"{w.weight:.4g}", "held-out error, with / without": f"{w.error_ratio:.3g}",
         "lowest loss": f"{w.loss_M.min():.4f}"}
        for i, w in enumerate(worlds)
    )  # fmt: skip


def exponent_table(found: Mapping[str, Mapping[str, Measured]]) -> Table:
    """One line per quantity, a column per convention."""
    import pandas

    def cell(m: Measured) -> str:
        return f"{m.value:.3f} ({m.low:.3f} to {m.high:.3f})" if math.isfinite(m.value) else m.remark

    return pandas.DataFrame(
        {"exponent of": words} | {name: cell(one[key]) for name, one in found.items()}
        | {KAPLAN: f"{PRINTED[key]:g}"}
        for key, words in QUANTITIES.items()
    )  # fmt: skip


def count_table(counted: Table) -> Table:
    """Every count over 6 N."""
    import pandas

    names = {"without": "6 N, no embeddings", "causal": "exact, causal", "dense": "exact, dense", "xla": "XLA"}
    return pandas.DataFrame(
        {"width": f"{row['width']:.0f}", "T / d": f"{row['context'] / row['width']:.3g}"}
        | {words: f"{row[name] / row['all']:.3f}" for name, words in names.items()}
        for _, row in counted.iterrows()
    )


PAPER = Paper(
    name="kaplan2020",
    title="Power laws of the loss: the floor where it is known, and exponents by how N and C are counted",
    source=KAPLAN,
    claims=CLAIMS,
    takes={
        "smoke": "a quarter of a minute",
        "laptop": "about 4 minutes on 2 CPU cores, and the shared sweep",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
