"""Repeated data: what are 2, 4, ... 64 epochs of a small text worth, in tokens of fresh text?

One model, trained on two parts of the corpus for many epochs and on the whole corpus for less than one, at equal
numbers of tokens. An epoch is as many tokens as the text has: windows are drawn anew each time, so that one epoch has
seen 63 % of the text, parts of it twice, and the longest run on "fresh" text has repeated some of it as well; theirs
are passes over the text. WSD runs of one text and seed share a trunk. The law is that of Muennighoff et al. 2023, eqs.
5 and 6, for one N, so that its term in N is part of the floor E: L = E + B / D'^beta with the effective data D' = U + U
R* (1 - exp(-R / R*)), U unique tokens and R = D / U - 1 repetitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, mean_and_interval
from experiments.registry import Job, Outcome, Paper, check_complete
from jaxgpt.config import RunConfig, override

if TYPE_CHECKING:
    from pathlib import Path

    import numpy

    from analysis.fit import Fit
    from analysis.laws import Law

SOURCE = "Muennighoff et al. 2023"
LEVEL = 0.9
FEW, MANY, MOST = 4, 16, 64  # epochs that the claims speak of

CLAIMS = (
    Claim("four_epochs", "4 epochs of repeated text are as good as fresh text: relative excess of the loss",
          f"{SOURCE}, abstract", 0.0, 0.01, "1", "toy_analogue", LEVEL, 9),
    Claim("half_life", "repetitions after which the worth of repeating has fallen to 1/e: R*",
          f"{SOURCE}, section 5", 15.4, 10.0, "epochs", "toy_analogue", LEVEL, 9),
    # Their law with R* = 15.4 takes D' from 10.6 U to 16.1 U between 16 and 64 epochs, 30 % of fresh text's log 4.
    Claim("late_epochs", "from 16 to 64 epochs the loss still falls: log of the effective data gained, share of log 4",
          f"{SOURCE}, eq. 5 with R* = 15.4", 0.30, 0.30, "1", "toy_analogue", LEVEL, 9),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does. unique: tokens of each part of the text. epochs: of each part; their product is at most
    `most_tokens`, which the whole text holds.
    """

    unique: tuple[int, ...]
    epochs: tuple[int, ...]
    most_tokens: int
    seeds: int
    settings: dict[str, Any]
    starts: int = 300
    bootstraps: int = 1000

    def tokens(self, unique: int) -> list[int]:
        """How many tokens are trained on with so many unique ones."""
        return [unique * e for e in self.epochs if unique * e <= self.most_tokens]

    def fresh(self) -> list[int]:
        """How many tokens are trained on with the whole text."""
        return sorted({tokens for unique in self.unique for tokens in self.tokens(unique)})


SCHEDULE = {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 20}
SIZES = {
    "smoke": Size(
        unique=(2**10,),
        epochs=(1, 4, 16, 64),
        most_tokens=2**16,
        seeds=2,
        settings={"model.d_model": 16, "model.n_layers": 1, "model.n_heads": 2, "model.context": 16,
                  "train.batch_size": 4, "train.eval_windows": 32, "optimizer.warmup_steps": 2},
        starts=30,
        bootstraps=50,
    ),
    "laptop": Size(
        unique=(2**16, 2**18),
        epochs=(1, 2, 4, 8, 16, 32, 64),
        most_tokens=2**23,
        seeds=3,
        settings={"model.d_model": 32, "model.n_layers": 3, "model.n_heads": 2, "model.context": 128,
                  "train.batch_size": 8, "train.eval_windows": 256, "optimizer.learning_rate": 0.5 / 32},
    ),
    "paper": Size(
        unique=(2**15, 2**17, 2**19),
        epochs=(1, 2, 4, 8, 16, 32, 64),
        most_tokens=2**23,
        seeds=5,
        settings={"model.d_model": 128, "model.n_layers": 4, "model.n_heads": 4, "model.context": 128,
                  "train.batch_size": 8, "train.eval_windows": 1024, "optimizer.learning_rate": 0.5 / 128},
    ),
}  # fmt: skip


def configs(size: Size) -> list[RunConfig]:
    """The runs: each part of the text, then the whole, for each number of tokens and seed."""
    per_step = size.settings["train.batch_size"] * size.settings["model.context"]
    texts = [*((unique, size.tokens(unique)) for unique in size.unique), (None, size.fresh())]
    return [
        override(
            RunConfig(),
            {**SCHEDULE, **size.settings, "data.training_tokens": unique, "train.steps": tokens // per_step,
             "train.seed": seed},
        )
        for unique, each in texts
        for tokens in each
        for seed in range(size.seeds)
    ]  # fmt: skip


# --- what they say -------------------------------------------------------------------------------------------------


def named(runs: Any) -> Any:
    """Columns D, U (unique tokens: D itself for fresh text), epochs, loss, seed, text (a label)."""
    unique = runs["data.training_tokens"].astype(float)
    tokens = runs["tokens"].astype(float)
    return runs.assign(
        D=tokens, U=unique.fillna(tokens), epochs=(tokens / unique).fillna(1.0), loss=runs["final_loss"].astype(float),
        seed=runs["train.seed"], text=unique.map(lambda u: "fresh" if u != u else f"{int(u)}"),
    )  # fmt: skip


def worth(fresh_D: numpy.ndarray, fresh_loss: numpy.ndarray, loss: numpy.ndarray) -> numpy.ndarray:
    """log of the fresh tokens that give this loss: interpolated between the runs on fresh text, in the logarithms.

    fresh_D ascending; losses in nats per token. Beyond the runs the outermost segment goes on.
    """
    import numpy as np

    # Noise may make a longer run the worse one; the curve that is read backwards must fall.
    x, y = np.log(fresh_D), np.minimum.accumulate(np.log(fresh_loss)) - 1e-12 * np.arange(len(fresh_D))
    wanted = np.log(loss)
    i = np.clip(np.searchsorted(-y, -wanted) - 1, 0, len(x) - 2)
    return x[i] + (wanted - y[i]) / (y[i + 1] - y[i]) * (x[i + 1] - x[i])


def per_seed(table: Any) -> Any:
    """For each seed and part of the text: `four_epochs`, and `late_epochs` where it was trained so long."""
    import numpy as np
    import pandas

    rows = []
    for seed, mine in table.groupby("seed"):
        fresh = mine[mine["text"] == "fresh"].sort_values("D")
        at = dict(zip(fresh["D"], fresh["loss"], strict=True))
        for text, part in mine[mine["text"] != "fresh"].groupby("text"):
            loss = dict(zip(part["epochs"], part["loss"], strict=True))
            tokens = dict(zip(part["epochs"], part["D"], strict=True))
            row: dict[str, Any] = {"seed": seed, "text": text, "four_epochs": loss[FEW] / at[tokens[FEW]] - 1}
            if MOST in loss:
                wanted = np.array([loss[MANY], loss[MOST]])
                late = worth(fresh["D"].to_numpy(), fresh["loss"].to_numpy(), wanted)
                row["late_epochs"] = (late[1] - late[0]) / np.log(MOST / MANY)
            rows.append(row)
    return pandas.DataFrame(rows)


def law() -> Law:
    """The law of the effective data at one N, in D and U."""
    from analysis.laws import CHINCHILLA, DATA_CONSTRAINED, Law, effective

    def curve(at: Any, logs: Any, middle: Any, xp: Any) -> Any:
        unique = xp.minimum(logs["U"] + middle["U"] - middle["D"], logs["D"])
        return xp.logaddexp(at["E"], at["B"] - at["beta"] * effective(logs["D"], unique, at["RD"], xp))

    of_data = {p.name: p for p in DATA_CONSTRAINED.parameters}
    return Law(
        name="repeated_data",
        formula="L(D, U) = E + B / D'^beta",
        citation=f"{SOURCE}, eqs. 5 and 6 at one N",
        variables=("D", "U"),
        parameters=tuple(of_data[name] for name in ("E", "B", "beta", "RD")),
        terms=tuple(term for term in CHINCHILLA.terms if term[0] in "EB"),
        curve=curve,
    )


def falling(table: Any) -> Any:
    """The runs that a law in which no token does harm can describe: of each part of the text those up to the number of
    epochs with the lowest mean loss.
    """
    means = table.groupby(["text", "D"])["loss"].mean()
    last = {text: means[text].idxmin() for text in set(table["text"])}
    kept = [text == "fresh" or d <= last[text] for text, d in zip(table["text"], table["D"], strict=True)]
    return table[kept]


def fitted(table: Any, size: Size) -> Fit:
    """The law of the runs that `falling` leaves. Runs of one text and seed share a trunk, and are drawn together."""
    from analysis.fit import fit

    kept = falling(table)
    variables = {name: kept[name].to_numpy() for name in ("D", "U")}
    trunks = (kept["text"] + " " + kept["seed"].astype(str)).to_numpy()
    return fit(law(), variables, kept["loss"].to_numpy(), objective="squared_log", groups=trunks,
               starts=size.starts, bootstraps=size.bootstraps, level=LEVEL)  # fmt: skip


def measure(table: Any, fit: Fit, seeds: int) -> dict[str, Measured]:
    """Each claim's value and interval; over seeds, each the mean over the parts of the text."""
    by_seed = per_seed(table).groupby("seed")[["four_epochs", "late_epochs"]].mean()
    half_life = fit.parameters["RD"]
    return {
        **{name: Measured(*mean_and_interval(by_seed[name].to_numpy(), LEVEL), seeds) for name in by_seed},
        "half_life": Measured(half_life.value, *half_life.interval, seeds, half_life.remark),
    }


# --- from the runs to the figure -----------------------------------------------------------------------------------

SUMMARY = [
    *("run_id", "data.training_tokens", "tokens", "train.seed", "params_total", "status", "final_loss"),
    *("final_loss_sem", "best_loss", "wall_seconds", "code_version"),
]


def run(job: Job) -> Outcome:
    """Trains, fits, draws."""
    import pandas

    from analysis.fit import to_json
    from jaxgpt import sweep

    size = SIZES[job.scale]
    wanted = configs(size)
    runs = sweep(wanted, job.raw, max_minutes=job.max_minutes)
    check_complete(runs, wanted)
    table = named(runs[runs["status"] == "done"])
    fit = fitted(table, size)
    means = table.pivot_table(index="text", columns="D", values="loss")
    means.columns = [f"D = {int(tokens):,}" for tokens in means.columns]
    losses = means.map(lambda loss: "–" if pandas.isna(loss) else f"{loss:.3f}")
    losses.insert(0, "unique tokens", list(losses.index))
    parameters = pandas.DataFrame(
        {"parameter": name, "value": f"{e.value:.4g}", "interval": f"{e.interval[0]:.4g} to {e.interval[1]:.4g}",
         "identified": e.remark or "yes"}
        for name, e in fit.parameters.items()
    )  # fmt: skip
    return Outcome(
        measured=measure(table, fit, size.seeds),
        summary=runs.reindex(columns=SUMMARY),
        tables=((f"Validation loss in nats per byte, mean of {size.seeds} seeds", losses),
                (f"{fit.law.formula}, on {fit.points} runs up to each text's lowest loss", parameters)),
        figures=tuple(draw(table, fit, job.figure)),
        numbers={"fit": to_json(fit)},
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0],
    )  # fmt: skip


def draw(table: Any, fit: Fit, path_stem: Path) -> list[Path]:
    """Loss against tokens for each text, and what the tokens are worth in fresh ones; writes PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(10.5, 4.6), layout="constrained")
        losses, effective = figure.subplots(1, 2)
        _draw_losses(losses, table, fit)
        _draw_worth(effective, table, fit)
        return plots.save(figure, path_stem)


COLOURS, MARKERS = ("0.25", "#c2571a", "#1f5a8f", "#4a7c3a"), "osD^"


def _texts(table: Any) -> list[tuple[str, str, str, str, Any]]:
    """(text, words, colour, marker, its means by D) of each, fresh text first."""
    from analysis.plots import short

    names = ["fresh", *sorted(set(table["text"]) - {"fresh"}, key=int)]
    words = ["fresh text", *(f"{short(float(name))} unique tokens" for name in names[1:])]
    means = [
        table[table["text"] == name].groupby("D", as_index=False)[["U", "epochs", "loss"]].mean() for name in names
    ]
    return list(zip(names, words, COLOURS, MARKERS, means, strict=False))


def _draw_losses(axes: Any, table: Any, fit: Fit) -> None:
    import numpy as np

    for name, words, colour, marker, means in _texts(table):
        points = table[table["text"] == name]
        axes.plot(points["D"], points["loss"], ls="", marker=marker, ms=4.5, mec="white", mew=0.5, color=colour)
        tokens_G = np.geomspace(means["D"].min(), means["D"].max(), 60)
        unique = tokens_G if name == "fresh" else means["U"].iloc[0]
        line = fit.law.predict(fit.best, {"D": tokens_G, "U": unique})
        axes.plot(tokens_G, line, color=colour, lw=1.2, label=words, ls="-" if name == "fresh" else (0, (4, 1.5)))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.set_xlabel("training tokens D")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.set_title("Loss against tokens; lines: the fitted law")
    axes.legend(loc="lower left")


def _draw_worth(axes: Any, table: Any, fit: Fit) -> None:
    """Effective data over unique data against epochs: measured, the fitted law, and the law with the published R*."""
    import numpy as np

    from analysis.laws import effective

    (_, _, _, _, fresh), *parts = _texts(table)
    most = max(means["epochs"].max() for *_, means in parts)
    epochs_G = np.geomspace(1, most, 100)
    for r_star, words, dashes in (
        (fit.best["RD"], f"our fit, R* = {fit.best['RD']:.1f}", "-"),
        (15.4, "theirs, R* = 15.4", (0, (1, 1.5))),
    ):
        line = np.exp(effective(np.log(epochs_G), 0.0, np.log(r_star)))
        axes.plot(epochs_G, line, color="0.25", lw=1.2, ls=dashes, label=words)
    axes.plot(epochs_G, epochs_G, color="0.7", lw=1, label="as good as fresh text")
    for _, words, colour, marker, means in parts:
        at = worth(fresh["D"].to_numpy(), fresh["loss"].to_numpy(), means["loss"].to_numpy())
        axes.plot(means["epochs"], np.exp(at) / means["U"], ls="", marker=marker, ms=6, mec="white", mew=0.6,
                  color=colour, label=words)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_ylim(0.5, 1.3 * most)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("epochs D / U")
    axes.set_ylabel("fresh tokens of equal loss, over U")
    axes.set_title("What repeated text is worth")
    axes.legend(loc="upper left")


def _short(value: float) -> str:
    from analysis.plots import short

    return short(value)


PAPER = Paper(
    name="muennighoff2023",
    title="Repeated data: 4 epochs are almost as good as fresh text, 64 are not",
    source=SOURCE,
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "about 6 minutes on 2 CPU cores",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
