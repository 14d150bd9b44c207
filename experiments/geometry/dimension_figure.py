"""Tables and figure of `jaxgpt reproduce dimension`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from experiments.claims import spoken

if TYPE_CHECKING:
    from pathlib import Path

    import pandas

LEVEL = 0.9
NULLS = {"untrained": ("#8a8a8a", "--", "s"), "shuffled": ("#c0562b", ":", "^")}
GAUSSIAN = "#8a4f9e"
COLOURS = {"windows": "#1f5a8f", "tokens": "#2a9d8f"}


def _middle(rows: Any) -> int:
    widths = sorted(rows["width"].unique())
    return widths[len(widths) // 2]


def _over(rows: Any, column: str = "d") -> str:
    return spoken(rows.groupby("seed")[column].mean().to_numpy(), LEVEL, ".1f")


# --- tables --------------------------------------------------------------------------------------------------------


def tables(rows: Any, samples: Any, known: Any) -> tuple[tuple[str, pandas.DataFrame], ...]:
    """(title, frame) of profiles, estimators, sample sizes, training and known clouds."""
    import pandas

    width, seeds = _middle(rows), rows["seed"].nunique()
    over = f"{LEVEL:.0%} intervals over {seeds} seeds"
    return (
        ("d, the intrinsic dimension by TwoNN (maximum likelihood), of clouds of points, by stage. Windows: the mean "
         "over a window's positions. Tokens: each window's last position. Nulls at width "
         f"{width}: the untrained model, tensors shuffled, a Gaussian of the same covariance. {over}",
         pandas.DataFrame(_profile_rows(rows, width))),
        (f"Estimators at width {width}, trained. Different points: what is left without repetitions. Gride k: from "
         "distances to neighbours 2k and k. Participation ratio: linear directions that are filled. Means over seeds",
         pandas.DataFrame(_estimator_rows(rows, width))),
        (f"d at width {width} by the number of points, of the model's cloud and (in brackets) of its Gaussian. A "
         "manifold's would not change. Means over seeds", pandas.DataFrame(_sample_rows(samples))),
        (f"d at width {width} over training. Means over seeds", pandas.DataFrame(_course_rows(rows, width))),
        ("TwoNN on clouds of known dimension (in brackets: Gride at the largest k), without noise and with noise of "
         "1 % of the cloud's size in every coordinate. Means over draws",
         pandas.DataFrame(_known_rows(known))),
    )  # fmt: skip


def _profile_rows(rows: Any, width: int) -> list[dict[str, str]]:
    found = []
    for (view, _, name), here in rows.groupby(["view", "stage", "name"], sort=False):
        trained, middle = here[here["state"] == "trained"], here[here["width"] == width]
        found.append(
            {"cloud": view, "stage": name}
            | {f"width {w}": _over(of) for w, of in trained.groupby("width")}
            | {state: _over(middle[middle["state"] == state]) for state in NULLS}
            | {"Gaussian": _over(middle[middle["state"] == "trained"], "gaussian")}
        )
    return sorted(found, key=lambda row: row["cloud"], reverse=True)


def _estimator_rows(rows: Any, width: int) -> list[dict[str, str]]:
    mine = rows[(rows["state"] == "trained") & (rows["width"] == width)]
    grides = [name for name in rows if name.startswith("gride_") and name != "gride_1"]
    columns = {"d": "TwoNN", "fit": "as published", **{name: name.replace("gride_", "Gride ") for name in grides},
               "participation": "participation ratio"}  # fmt: skip
    found = [
        {"cloud": view, "stage": name, "different points": f"{here['points'].mean():.0f}",
         **{title: f"{here[column].mean():.1f}" for column, title in columns.items()}}
        for (view, _, name), here in mine.groupby(["view", "stage", "name"], sort=False)
    ]  # fmt: skip
    return sorted(found, key=lambda row: row["cloud"], reverse=True)


def _sample_rows(samples: Any) -> list[dict[str, str]]:
    found, sizes = [], sorted(samples["size"].unique())
    for (view, name), here in samples.groupby(["view", "name"], sort=False):
        mean = here.pivot_table(index="size", columns="cloud", values="d").reindex(sizes)
        found.append({"cloud": view, "stage": name} | {
            f"{size} points": f"{of['model']:.1f} ({of['Gaussian']:.1f})" if of.notna().all() else "too few points"
            for size, of in mean.iterrows()})  # fmt: skip
    return found


def _course_rows(rows: Any, width: int) -> list[dict[str, str]]:
    mine = rows[(rows["width"] == width) & (rows["state"] != "shuffled")]
    found = []
    for (view, _, name), here in mine.groupby(["view", "stage", "name"], sort=False):
        mean = here.groupby("step")["d"].mean()
        found.append({"cloud": view, "stage": name} | {f"step {step}": f"{d:.1f}" for step, d in mean.items()})
    return sorted(found, key=lambda row: row["cloud"], reverse=True)


def _known_rows(known: Any) -> list[dict[str, str]]:
    mean = known.groupby(["cloud", "noise", "true"], sort=False)[["d", "gride"]].mean()
    return [
        {"cloud": cloud, "noise": f"{noise:.0%}"} | {
            f"d = {true}": f"{of['d']:.1f} ({of['gride']:.1f})" for (_, _, true), of in here.iterrows()}
        for (cloud, noise), here in mean.groupby(level=["cloud", "noise"], sort=False)
    ]  # fmt: skip


# --- figure --------------------------------------------------------------------------------------------------------


def draw(rows: Any, samples: Any, known: Any, path_stem: Path) -> list[Path]:
    """Profiles of windows and of tokens with nulls, d by the number of points, known clouds; writes PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(15, 4.9), layout="constrained")
        panels = figure.subplots(1, 4)
        for axes, view in zip(panels, COLOURS, strict=False):
            _draw_profile(axes, rows[rows["view"] == view], view)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=len(names))
        _draw_samples(panels[2], samples)
        _draw_known(panels[3], known)
        return plots.save(figure, path_stem)


def _draw_profile(axes: Any, rows: Any, view: str) -> None:
    from analysis import plots

    trained, width = rows[rows["state"] == "trained"], _middle(rows)
    for w, (colour, marker) in plots.size_styles(rows["width"].unique()).items():
        by_run = trained[trained["width"] == w].pivot_table(index="stage", columns="seed", values="d")
        axes.plot(by_run.index, by_run.to_numpy(), color=colour, lw=0.5, alpha=0.5)
        axes.plot(by_run.index, by_run.mean(axis=1), color=colour, lw=1.8, marker=marker, ms=5, label=f"width {w}")
    for state, (colour, line, marker) in NULLS.items():
        mean = rows[(rows["state"] == state) & (rows["width"] == width)].groupby("stage")["d"].mean()
        axes.plot(mean.index, mean, line, color=colour, lw=1.4, marker=marker, ms=4, label=f"{state}, width {width}")
    mean = trained[trained["width"] == width].groupby("stage")["gaussian"].mean()
    axes.plot(mean.index, mean, "-.", color=GAUSSIAN, lw=1.4, marker="x", ms=5, label=f"Gaussian, width {width}")
    last = int(trained["stage"].max())
    axes.set_xticks(range(last + 1), ["embedding", *map(str, range(1, last)), f"{last}, normed"])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("stream after block")
    axes.set_ylabel("d (TwoNN)")
    axes.set_title({"windows": "Windows (means over positions)", "tokens": "Tokens (embedding: a discrete set)"}[view])


def _draw_samples(axes: Any, samples: Any) -> None:
    last = samples["stage"].max()
    for (view, stage, cloud), here in samples.groupby(["view", "stage", "cloud"], sort=False):
        mean, ends = here.groupby("size")["d"].mean(), stage == last
        axes.plot(
            mean.index, mean, "-" if cloud == "model" else "-.", color=COLOURS[view], lw=1.6,
            marker="o" if ends else "s", mfc=COLOURS[view] if cloud == "model" else "white", ms=5,
            label=f"{view}, {'output' if ends else 'middle'}" + (" (Gaussian)" if cloud != "model" else ""),
        )  # fmt: skip
    axes.set_xscale("log")
    sizes = sorted(samples["size"].unique())
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_ylim(0, high + 0.55 * (high - min(low, 0)))
    axes.set_xlabel("points")
    axes.set_ylabel("d (TwoNN)")
    axes.set_title("By the number of points")
    axes.legend(ncols=2, loc="upper left", fontsize=7)


def _draw_known(axes: Any, known: Any) -> None:
    from matplotlib import colormaps

    for i, (cloud, here) in enumerate(known.groupby("cloud", sort=False)):
        for noise, of in here.groupby("noise"):
            mean = of.groupby("true")["d"].mean()
            axes.plot(
                mean.index, mean, "-" if noise == 0 else ":", color=colormaps["tab10"](i), lw=1.3, marker="osD^v"[i],
                ms=4, label=cloud if noise == 0 else None,
            )  # fmt: skip
    ends = [known["true"].min(), known["true"].max()]
    axes.plot(ends, ends, color="0.2", lw=1, ls=(0, (4, 2)), label="true")
    axes.plot([], [], ":", color="0.4", label="with 1 % noise")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted(known["true"].unique())
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set_xlabel("true dimension")
    axes.set_ylabel("d (TwoNN)")
    axes.set_title("Known clouds")
    axes.legend()
