"""muP: does the best learning rate stay where it is when the model gets wider?

Two experiments on the same transformer with and without muP (Yang et al. 2022). The coordinate check (their appendix
D.1): after a few steps, how has the size of each activation's change grown with the width? And their figure 1: short
trainings over a grid of widths and rates. At the narrowest width both parametrizations are the same model; the number
of heads is fixed, so that heads grow with the width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, mean_and_interval
from experiments.registry import Job, Outcome, Paper, check_complete
from jaxgpt.config import RunConfig, override, run_id

if TYPE_CHECKING:
    import numpy
    import pandas

    from jaxgpt.run import Source

YANG = "Yang et al. 2022"
LEVEL = 0.9

CLAIMS = (
    Claim("coordinates_mup", "with muP no activation's change depends on the width: exponent of the worst",
          f"{YANG}, figure 5, table 8", 0.0, 0.2, "1", "same_regime", LEVEL),
    Claim("coordinates_standard", "without muP the change of the logits grows with the width: exponent",
          f"{YANG}, figure 5", 1.0, 0.5, "1", "same_regime", LEVEL),
    Claim("rate_mup", "with muP the best rate stays: log2 drift per doubling of the width",
          f"{YANG}, figure 1", 0.0, 0.25, "1", "toy_analogue", LEVEL),
    Claim("rate_standard", "without muP the best rate falls as 1 / width: log2 drift per doubling",
          f"{YANG}, figure 1, table 8", -1.0, 0.5, "1", "toy_analogue", LEVEL),
)  # fmt: skip

PARAMETRIZATIONS = {"standard": "without muP", "mup": "with muP"}
# Of the last block: what attention and MLP add, and the stream that they read.
QUANTITIES = ("logits", "attention.out", "mlp.out", "residual")


@dataclass(frozen=True)
class Size:
    """What a scale does. The first of `widths` and of `check_widths` is the base width of muP.

    rates: log2 of the learning rates. settings: of a run in both experiments.
    """

    widths: tuple[int, ...]
    rates: tuple[int, ...]
    seeds: int
    steps: int
    check_widths: tuple[int, ...]
    check_seeds: int
    settings: dict[str, int]


SIZES = {
    "smoke": Size(
        widths=(8, 16),
        rates=(-8, -5, -2),
        seeds=2,
        steps=8,
        check_widths=(8, 16, 32),
        check_seeds=2,
        settings={"model.n_layers": 1, "model.n_heads": 2, "model.context": 16, "train.batch_size": 2,
                  "train.eval_windows": 8},
    ),
    "laptop": Size(
        widths=(16, 32, 64, 128),
        rates=(-10, -9, -8, -7, -6, -5, -4, -3, -2),
        seeds=4,
        steps=100,
        check_widths=(32, 64, 128, 256, 512),
        check_seeds=4,
        settings={"model.n_layers": 2, "model.n_heads": 4, "model.context": 64, "train.batch_size": 8,
                  "train.eval_windows": 128},
    ),
    "paper": Size(
        widths=(128, 256, 512, 1024, 2048, 4096),
        rates=(-16, -15, -14, -13, -12, -11, -10, -9, -8, -7, -6, -5),
        seeds=3,
        steps=2000,
        check_widths=(128, 256, 512, 1024, 2048, 4096),
        check_seeds=4,
        settings={"model.n_layers": 2, "model.n_heads": 4, "model.context": 256, "train.batch_size": 20,
                  "train.eval_windows": 512},
    ),
}  # fmt: skip
CHECK = {
    "train.steps": 4,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "optimizer.learning_rate": 0.01,
}


# --- the runs ------------------------------------------------------------------------------------------------------


def shapes(widths: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """(parametrization, width) of each model. At the base width both are the same: there it stands once."""
    yield from (("standard", width) for width in widths)
    yield from (("mup", width) for width in widths[1:])


def _config(size: Size, parametrization: str, width: int, base: int, seed: int, settings: dict[str, Any]) -> RunConfig:
    # In the standard parametrization the base width does nothing, and another value would only name another run.
    base_width = {"model.base_width": base} if parametrization == "mup" else {}
    model = {"model.d_model": width, "model.parametrization": parametrization, **base_width}
    return override(RunConfig(), {**model, "train.seed": seed, **size.settings, **settings})


def configs(size: Size) -> list[RunConfig]:
    """The trainings: widths x rates x seeds, without and with muP."""
    return [
        _config(size, kind, width, size.widths[0], seed,
                {"optimizer.learning_rate": 2.0**rate, "train.steps": size.steps})
        for kind, width in shapes(size.widths)
        for rate in size.rates
        for seed in range(size.seeds)
    ]  # fmt: skip


def check_configs(size: Size) -> list[RunConfig]:
    """The runs of the coordinate check: widths x seeds, without and with muP; runs of a shape one after the other."""
    return [
        _config(size, kind, width, size.check_widths[0], seed, CHECK)
        for kind, width in shapes(size.check_widths)
        for seed in range(size.check_seeds)
    ]


def with_base(runs: pandas.DataFrame) -> Any:  # pandas' own types do not follow its columns
    """The table with the runs at the base width, which are made once, standing under both parametrizations."""
    import pandas

    base = runs[runs["model.d_model"] == runs["model.d_model"].min()]
    return pandas.concat([runs, base.assign(**{"model.parametrization": "mup"})], ignore_index=True)


# --- the coordinate check ------------------------------------------------------------------------------------------


def coordinates(size: Size, folder: Path, setup: Any) -> pandas.DataFrame:
    """One row per run: RMS of each quantity at the start (`size_...`) and of its change after the steps (`change_...`).

    Measured in this process, a few steps per run, and kept in `folder`: what is there is not measured again.
    """
    import pandas

    from jaxgpt import store

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for config in check_configs(size):
        source = setup(config)
        path = folder / f"{run_id(config, source.identity)}.json"
        if not path.exists():
            what = {"run_id": path.stem, "code_version": store.code_version()}
            named = {name: getattr(config.model, name) for name in ("d_model", "parametrization")}
            what |= {f"model.{name}": value for name, value in named.items()} | {"train.seed": config.train.seed}
            store.write_json(path, what | _measure(config, source))
        rows.append(store.read_json(path))
    return pandas.DataFrame(rows)


def _measure(config: RunConfig, source: Source) -> dict[str, float]:
    """The sizes of a run's activations on validation windows, before and after its steps."""
    import numpy as np

    from jaxgpt.optimizer import hparams
    from jaxgpt.step import advance, init_state, program

    h, prog, data, seed = hparams(config), program(config, source.task), source.data(), config.train.seed
    # From the text that the runs see: in random bytes a token tells nothing of the next.
    tokens_BxT = np.asarray(data.validation_WxT1[: config.train.batch_size, :-1]).astype(np.int32)
    after, _ = advance(prog, init_state(prog, h, seed), np.int32(config.train.steps), h, data)
    first, last = (_look(config, params, tokens_BxT) for params in (source.task.init(seed), after.params))
    sizes = {f"size_{name}": _rms(first[name]) for name in QUANTITIES}
    return sizes | {f"change_{name}": _rms(last[name] - first[name]) for name in QUANTITIES}


def _look(config: RunConfig, params: Any, tokens_BxT: numpy.ndarray) -> dict[str, numpy.ndarray]:
    """The quantities by name. Not compiled: for one pass of a small model compiling takes longer."""
    import numpy as np
    from flax import nnx

    from jaxgpt import build

    last = f"layers.{config.model.n_layers - 1}."
    model = nnx.merge(build.graphdef(config.model), params)
    logits, seen = model.inspect(tokens_BxT, keep=[last + name for name in QUANTITIES[1:]])
    return {name.removeprefix(last): np.asarray(value, float) for name, value in {"logits": logits, **seen}.items()}


def _rms(x: numpy.ndarray) -> float:
    return math.sqrt((x**2).mean())


# --- what they say -------------------------------------------------------------------------------------------------


def exponents(checks: pandas.DataFrame, kind: str, column: str) -> numpy.ndarray:
    """The power of the width with which a column goes, one for each seed: least squares in the logarithms."""
    import numpy as np

    every = with_base(checks)
    mine = every[every["model.parametrization"] == kind]
    return np.asarray([
        np.polyfit(np.log(rows["model.d_model"]), np.log(rows[column]), 1)[0]
        for _, rows in mine.groupby("train.seed")
    ])  # fmt: skip


def best_rate(log2_rates: numpy.ndarray, losses: numpy.ndarray) -> tuple[float, bool]:
    """log2 of the best rate, and whether the grid holds it, which it does not at an end or where all runs diverged.

    The vertex of the parabola fitted to the lowest loss and two neighbours on each side (single losses scatter, so that
    one neighbour would not do); within one step of the lowest loss, and there itself where the parabola has no lowest
    point. Runs that diverged (NaN) are left out.
    """
    import numpy as np

    if not np.isfinite(losses).any():
        return math.nan, False
    i = int(np.nanargmin(losses))
    x, held = float(log2_rates[i]), 0 < i < len(losses) - 1
    around = slice(max(i - 2, 0), i + 3)
    there = np.isfinite(losses[around])
    if not held or there.sum() < 3:
        return x, held
    curvature, slope, _ = np.polyfit(log2_rates[around][there] - x, losses[around][there], 2)
    if curvature <= 0:
        return x, held
    low, high = log2_rates[i - 1] - x, log2_rates[i + 1] - x
    return x + float(np.clip(-slope / (2 * curvature), low, high)), held


def best_rates(runs: pandas.DataFrame) -> Any:
    """One row per parametrization, width and seed: log2 of the best rate, whether the grid holds it, lowest loss."""
    import numpy as np
    import pandas

    rows, every = [], with_base(runs)
    by = ["model.parametrization", "model.d_model", "train.seed"]
    for key, group in every.sort_values("optimizer.learning_rate").groupby(by):
        losses = group["final_loss"].to_numpy(float)
        best, held = best_rate(np.log2(group["optimizer.learning_rate"].to_numpy(float)), losses)
        rows.append([*key, best, held, np.nanmin(losses) if np.isfinite(losses).any() else math.nan])
    return pandas.DataFrame(rows, columns=["kind", "width", "seed", "best", "held", "loss"])


def measure(runs: pandas.DataFrame, checks: pandas.DataFrame) -> dict[str, Measured]:
    """Each claim's value and interval over seeds."""
    import numpy as np

    changes = {name: exponents(checks, "mup", f"change_{name}") for name in QUANTITIES}
    worst = max(changes.values(), key=lambda slopes_S: abs(slopes_S.mean()))
    grown = exponents(checks, "standard", "change_logits")
    found = {
        "coordinates_mup": Measured(*mean_and_interval(worst), len(worst)),
        "coordinates_standard": Measured(*mean_and_interval(grown), len(grown)),
    }
    best = best_rates(runs)
    for kind, words in PARAMETRIZATIONS.items():
        mine = best[best["kind"] == kind]
        drift_S = np.asarray([
            np.polyfit(np.log2(rows["width"]), rows["best"], 1)[0] for _, rows in mine.groupby("seed")
        ])  # fmt: skip
        outside = sorted(set(mine.loc[~mine["held"], "width"]))
        remark = f"{words} the best rate at width {', '.join(map(str, outside))} is not inside the grid"
        found[f"rate_{kind}"] = Measured(*mean_and_interval(drift_S), len(drift_S), remark if outside else "")
    return found


# --- from the runs to the figure -----------------------------------------------------------------------------------

SUMMARY = [
    *("run_id", "model.parametrization", "model.d_model", "optimizer.learning_rate", "train.seed", "status"),
    *("final_loss", "final_loss_sem", "wall_seconds", "code_version"),
    *(f"{what}_{name}" for what in ("size", "change") for name in QUANTITIES),
]


def run(job: Job) -> Outcome:
    """Trains, checks coordinates, draws."""
    import pandas

    from jaxgpt import sweep
    from jaxgpt.tasks import text

    size, setup = SIZES[job.scale], text.reader()
    wanted = configs(size)
    runs = sweep(wanted, job.raw, setup=setup, max_minutes=job.max_minutes)
    check_complete(runs, wanted)
    checks = coordinates(size, job.raw / "coordinates", setup)
    return Outcome(
        measured=measure(runs, checks),
        summary=pandas.concat([runs, checks], ignore_index=True).reindex(columns=SUMMARY),
        tables=(
            (f"Exponent of the change after {CHECK['train.steps']} steps, in the width: mean over seeds, {LEVEL:.0%} "
             "interval", _exponent_table(checks)),
            ("Best learning rate, and the loss there (nats per byte): means over seeds", _rate_table(runs)),
        ),
        figures=tuple(draw(runs, checks, job.figure)),
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0],
    )  # fmt: skip


def _exponent_table(checks: pandas.DataFrame) -> pandas.DataFrame:
    import pandas

    def cell(kind: str, name: str) -> str:
        value, low, high = mean_and_interval(exponents(checks, kind, f"change_{name}"))
        return f"{value:.2f} ({low:.2f} to {high:.2f})"

    return pandas.DataFrame(
        {"quantity": name, **{words: cell(kind, name) for kind, words in PARAMETRIZATIONS.items()}}
        for name in QUANTITIES
    )


def _rate_table(runs: pandas.DataFrame) -> pandas.DataFrame:
    import pandas

    best = best_rates(runs)

    def cell(kind: str, width: int) -> str:
        mine = best[(best["kind"] == kind) & (best["width"] == width)]
        return f"2^{mine['best'].mean():.2f}, {mine['loss'].mean():.3f}"

    return pandas.DataFrame(
        {"width": width, **{words: cell(kind, width) for kind, words in PARAMETRIZATIONS.items()}}
        for width in sorted(set(best["width"]))
    )


# --- the figure ----------------------------------------------------------------------------------------------------

LOOKS = {"standard": ("#c2571a", (0, (4, 1.5))), "mup": ("#1f5a8f", "-")}
POINT = {"ms": 5.5, "mec": "white", "mew": 0.6}


def draw(runs: pandas.DataFrame, checks: pandas.DataFrame, path_stem: Path) -> list[Path]:
    """The coordinate check, and loss against rate for each width without and with muP; writes PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(12.5, 4.6), layout="constrained")
        check, *panels = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
        _draw_check(check, with_base(checks))
        _draw_rates(panels, with_base(runs))
        return plots.save(figure, path_stem)


def _draw_check(axes: Any, checks: Any) -> None:
    """Mean over seeds of the size of each change; colours tell the parametrizations apart, markers the quantities."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, NullLocator

    means = checks.groupby(["model.parametrization", "model.d_model"]).mean(numeric_only=True)
    markers = dict(zip(QUANTITIES, "osD^", strict=True))
    for kind, (colour, dashes) in LOOKS.items():
        rows = means.xs(kind)
        for name, marker in markers.items():
            axes.plot(rows.index, rows[f"change_{name}"], color=colour, ls=dashes, marker=marker, lw=1.3, **POINT)
    widths = sorted(set(checks["model.d_model"]))
    start = 1.5 * means[[f"change_{name}" for name in QUANTITIES]].loc["standard"].loc[widths[0]].max()
    guide = [start, start * widths[-1] / widths[0]]
    axes.plot([widths[0], widths[-1]], guide, color="0.6", lw=1, ls=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(widths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("width (d_model)")
    axes.set_ylabel("RMS of the change")
    axes.set_title(f"What {CHECK['train.steps']} steps change in the last block")
    handles = [Line2D([], [], color=colour, ls=dashes, lw=1.3) for colour, dashes in LOOKS.values()]
    handles.append(Line2D([], [], color="0.6", lw=1, ls=":"))
    handles += [Line2D([], [], color="0.3", ls="", marker=marker, **POINT) for marker in markers.values()]
    names = [*PARAMETRIZATIONS.values(), "as the width", *QUANTITIES]
    axes.figure.legend(handles, names, loc="outside lower left", ncols=4, handlelength=2.4)


def _draw_rates(panels: list, runs: Any) -> None:
    """Mean loss over seeds; a ring around each width's lowest point."""
    from matplotlib.lines import Line2D

    from analysis import plots

    styles = plots.size_styles(runs["model.d_model"].unique())
    by = ["model.parametrization", "model.d_model", "optimizer.learning_rate"]
    means = runs.groupby(by, as_index=False)["final_loss"].mean()
    lows = means.groupby(by[:2])["final_loss"].min()
    # What lies much higher tells nothing of where the best is.
    bottom, top = lows.min(), lows.max() + max(lows.max() - lows.min(), 0.5)
    for axes, (kind, words) in zip(panels, PARAMETRIZATIONS.items(), strict=True):
        for width, (colour, marker) in styles.items():
            mine = means[(means["model.parametrization"] == kind) & (means["model.d_model"] == width)]
            rates, losses = mine["optimizer.learning_rate"].to_numpy(), mine["final_loss"].to_numpy()
            axes.plot(rates, losses, color=colour, marker=marker, lw=1.3, **POINT)
            best = losses.argmin()
            axes.plot(rates[best], losses[best], marker="o", ms=12, mfc="none", mec=colour, mew=1.3)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom - 0.08 * (top - bottom), top)
        axes.set_xlabel("learning rate")
        axes.set_title(f"Loss against rate {words}")
    panels[0].set_ylabel("validation loss (nats per byte)")
    handles = [Line2D([], [], color=colour, marker=marker, lw=1.3, **POINT) for colour, marker in styles.values()]
    handles.append(Line2D([], [], color="0.3", ls="", marker="o", ms=10, mfc="none", mew=1.3))
    names = [*(f"width {width}" for width in styles), "lowest"]
    panels[0].figure.legend(handles, names, loc="outside lower right", ncols=5, handlelength=2.4)


PAPER = Paper(
    name="mup",
    title="muP: the best learning rate of a narrow model is that of a wide one",
    source=YANG,
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "about 14 minutes on 2 CPU cores",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
