"""What `jaxgpt anatomy` prints, and its page of figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.tables import plain

if TYPE_CHECKING:
    from experiments.inside import Found

WIDE = 8  # a range, largest over smallest, for a logarithmic axis
MOST_NAMED = 9  # layers in a legend; of more the first, the last and some between

STREAM = {  # heading in the terminal: column, format
    "weights": ("parameters", ",d"), "not finite": ("non_finite", ",d"), "moved": ("moved", ".2f"),
    "|x|": ("stream_norm", ".3g"), "growth": ("growth", ".2f"), "cosine": ("cosine", ".2f"),
    "kurtosis": ("kurtosis", ".2f"), "max/median": ("max_median_ratio", ".2f"), "largest": ("largest", ".3g"),
    "massive": ("massive", ",d"), "outlier dims": ("outlier_dims", ",d"),
}  # fmt: skip
BLOCKS = {
    "to first": ("sink", ".3f"), "entropy": ("attention_entropy", ".2f"), "units": ("units", ",d"),
    "never active": ("never_active", ".2%"), "eff. dead": ("effectively_dead", ".2%"), "active": ("active", ".1%"),
    "skipped": ("loss_added", "+.3f"), "±": ("loss_added_sem", ".3f"), "top weight": ("top_weight", ""),
    "score": ("top_weight_score", ".3g"), "x median": ("top_weight_times_median", ".3g"),
}  # fmt: skip
STEPS = {
    "loss": ("loss", ".3f"), "not finite": ("non_finite", ",d"), "moved": ("moved", ".2f"),
    "never active": ("never_active", ".2%"), "eff. dead": ("effectively_dead", ".2%"), "active": ("active", ".1%"),
    "outlier dims": ("outlier_dims", ",d"),
}  # fmt: skip
LEGEND = (
    "moved: |w - w0| / |w0| from the initial parameters; x: the residual stream behind the part; |x|: mean norm over "
    "tokens; growth: |x - before| / |before|; cosine: of x with the stream before the block",
    "kurtosis (of D Gaussian values 3 (D - 1)/(D + 1)) and max/median of |x|: over a token's dimensions, mean over "
    "tokens; largest: |x| on all tokens; massive: values above 100 and 1000 times the median (Sun et al. 2024)",
    "outlier dims: dimensions of what attention reads with |x| >= 6 at 6 % of positions; model: by LLM.int8's "
    "criterion (Dettmers et al. 2022)",
    "to first: mean attention to the first position; entropy: of attention, nats; units: of the MLP; active: share of "
    "(token, unit) pairs above 0",
    "eff. dead: units that never add more than .001 of the stream's norm; skipped: nats per token lost, with its "
    "standard error over windows, if the block adds nothing",
    "top weight: matrix[row, column] with the largest |w| max|input| (score), and how many times the median score of "
    "its matrix that is",
)


# --- the terminal --------------------------------------------------------------------------------------------------


def show(found: Found, console: Console) -> None:
    """The last checkpoint by part and by layer, a line for each checkpoint, and what was not finite or not known."""
    rows: Any = found.rows
    last = rows.iloc[-1]["step"]
    now = rows[rows["step"].isna()] if _none(last) else rows[rows["step"] == last]
    words = "" if _none(last) else f", step {last:,}"
    tokens, windows = int(rows["tokens"].iloc[0]), int(rows["windows"].iloc[0])
    console.print(f"{found.subject.name}{words}: {tokens:,} validation tokens in {windows} windows", soft_wrap=True)
    console.print(_table(now, STREAM, "part", _part))
    console.print(_table(now[now["part"] == "layer"], BLOCKS, "layer", lambda row: str(row["layer"])))
    whole = rows[rows["part"] == "model"]
    if len(whole) > 1:
        console.print(_table(whole, STEPS, "step", lambda row: f"{row['step']:,}"))
    bound = now["never_bound"].dropna()
    lines = [*LEGEND]
    if len(bound):
        lines.append(f"never active: on none of these {tokens:,} tokens, so at 95 % on less than {bound.iloc[0]:.3%} "
                     "of all (the rule of three; more, as tokens of a window are not independent)")  # fmt: skip
    lines += [f"note: {note}" for note in found.notes]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for line in found.audit or ("every parameter of every checkpoint is finite",):
        console.print(line, style="red" if found.audit else None, soft_wrap=True, highlight=False, markup=False)


def _none(value: Any) -> bool:
    import pandas

    return bool(pandas.isna(value))


def _part(row: Any) -> str:
    return f"layer {row['layer']}" if row["part"] == "layer" else str(row["part"])


def _table(rows: Any, columns: dict[str, tuple[str, str]], first: str, name: Callable) -> Table:
    """Columns that hold nothing are left out."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown = {head: what for head, what in columns.items() if rows[what[0]].notna().any()}
    table.add_column(first, no_wrap=True)
    for head, (column, _) in shown.items():
        table.add_column(head, justify="left" if column == "top_weight" else "right", no_wrap=True)
    for _, row in rows.iterrows():
        cells = [_cell(row[column], form) for column, form in shown.values()]
        table.add_row(name(row), *cells)
    return table


def _cell(value: Any, form: str) -> str:
    if _none(value):
        return "–"
    return value if isinstance(value, str) else plain(value.item() if hasattr(value, "item") else value, form)


# --- the page ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """A measure by layer over steps. parts: whose lines; log: the axis; share: of 1, shown in per cent."""

    column: str
    title: str
    label: str
    parts: tuple[str, ...] = ("layer",)
    log: bool = False
    share: bool = False


PANELS = (
    Panel("loss", "Loss of the whole model", "validation loss (nats per token)", ("model",)),
    Panel("loss_added", "What each block is worth", "loss added without it\n(nats per token)"),
    Panel("moved", "How far weights have moved", "|w - w0| / |w0|", ("embedding", "layer", "output")),
    Panel("growth", "What a block adds to the stream", "|added| / |stream|"),
    Panel(
        "kurtosis", "Outlier dimensions: kurtosis", "kurtosis of a token's dimensions", ("embedding", "layer"), log=True
    ),
    Panel(
        "max_median_ratio",
        "Outlier dimensions: max to median",
        "max |x| / median |x|",
        ("embedding", "layer"),
        log=True,
    ),
    Panel("largest", "Largest activation", "largest |x| in the stream", ("embedding", "layer"), log=True),
    Panel("top_weight_times_median", "The weight that counts most", "max |w| max|input| / median", log=True),
    Panel("sink", "Attention sink", "attention to the first position", share=True),
    Panel("attention_entropy", "How widely attention looks", "entropy (nats)"),
    Panel("never_active", "Dead units", "share of the MLP's units", share=True),
    Panel("active", "Active units", "active (token, unit) pairs", share=True),
)


def draw(found: Found, path: Path) -> list[Path]:
    """One page, PNG and SVG: each measure over steps, a line a layer; of one checkpoint, over layers."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis.plots import STYLE, save

    rows: Any = found.rows
    over_steps = len(set(rows["step"].dropna())) > 1
    styles = _styles(rows)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 9.6), layout="constrained")
        axes: Any = figure.subplots(3, 4)
        for panel, ax in zip(PANELS, axes.flat, strict=True):
            ax.set_title(panel.title)
            mine = rows[rows["part"].isin(panel.parts) & rows[panel.column].notna()]
            if not len(mine):
                ax.set_axis_off()
                ax.set_title("")
                ax.text(0.5, 0.5, f"{panel.title}:\ndoes not apply to this model", ha="center", color="0.45",
                        transform=ax.transAxes)  # fmt: skip
                continue
            _over_steps(ax, panel, mine, styles) if over_steps else _over_layers(ax, panel, mine)
            _scale(ax, panel, mine, found.even, found.subject.config.model.d_model)
            ax.set_xlabel("training step" if over_steps else "" if panel.column == "loss" else "layer")
        _legend(figure, styles if over_steps else {}, bool(rows["never_active"].notna().any()))
        tokens, windows = int(rows["tokens"].iloc[0]), int(rows["windows"].iloc[0])
        about = f"{tokens:,} validation tokens in {windows} windows; bands and bars: ± one standard error"
        figure.suptitle(f"Inside {found.subject.name}: {about}", fontsize=12)
        return save(figure, path.with_suffix("") if path.suffix in (".png", ".svg") else path)


def _styles(rows: Any) -> dict[str, tuple[Any, str]]:
    """Colour and marker of each part: layers from light, the first, to dark."""
    from analysis.plots import size_styles

    layers = sorted(int(i) for i in rows["layer"].dropna().unique())
    styles = {f"layer {i}": style for i, style in size_styles(layers).items()}
    return {"embedding": ("tab:orange", "x"), **styles, "output": ("tab:red", "+"), "model": ("black", "")}


def _over_steps(ax: Any, panel: Panel, rows: Any, styles: dict) -> None:
    for name, mine in rows.groupby(rows.apply(_part, axis=1), sort=False):
        colour, marker = styles[name]
        how = {
            "color": colour,
            "marker": marker,
            "ms": 4,
            "lw": 1.3,
            "mec": colour if marker in "x+" else "white",
            "mew": 0.7,
        }
        step_K = mine["step"].astype(float)
        ax.plot(step_K, mine[panel.column].astype(float), **how)
        if panel.column == "never_active":
            ax.plot(step_K, mine["effectively_dead"].astype(float), color=colour, lw=1, ls=(0, (2, 2)))
        if panel.column == "loss_added":
            low, high = (mine[panel.column] + sign * mine["loss_added_sem"] for sign in (-1, 1))
            ax.fill_between(step_K, low.astype(float), high.astype(float), color=colour, alpha=0.2, lw=0)


def _over_layers(ax: Any, panel: Panel, rows: Any) -> None:
    names = [_part(row).removeprefix("layer ") for _, row in rows.iterrows()]
    place_K = list(range(len(rows)))
    sem = rows["loss_added_sem"].astype(float) if panel.column == "loss_added" else None
    ax.errorbar(place_K, rows[panel.column].astype(float), yerr=sem, color="tab:blue", marker="o", ms=4, lw=1.2)
    if panel.column == "never_active":
        ax.plot(place_K, rows["effectively_dead"].astype(float), color="tab:blue", lw=1, ls=(0, (2, 2)))
    every = max(1, -(-len(names) // 8))
    ax.set_xticks(place_K[::every], [{"embedding": "emb.", "output": "out"}.get(n, n) for n in names[::every]])


def _scale(ax: Any, panel: Panel, rows: Any, even: tuple[float, float] | None, width: int) -> None:
    """The y axis, and what a reader compares with, dashed."""
    from matplotlib.ticker import LogLocator, NullFormatter

    from analysis.anatomy import gaussian_kurtosis
    from analysis.plots import short

    ax.set_ylabel(panel.label)
    base = {"kurtosis": (gaussian_kurtosis(width), "Gaussian"), "loss_added": (0.0, "")}.get(panel.column)
    if even is not None and panel.column in ("sink", "attention_entropy"):
        base = (even[panel.column != "sink"], "spread evenly")
    if base is not None:
        ax.axhline(base[0], color="0.4", lw=0.9, ls=(0, (5, 3)), zorder=1)
        ax.annotate(base[1], (0.985, base[0]), xycoords=("axes fraction", "data"), xytext=(0, 2), fontsize=7.5,
                    color="0.35", textcoords="offset points", ha="right", zorder=4,
                    bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1})  # fmt: skip
    if panel.share:
        top = max(ax.get_ylim()[1], 0.01)
        ax.set_ylim(-0.03 * top, 1.03 * top)  # lines at the ends are seen
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %" if value >= 0 else "")
    values = rows[panel.column].astype(float)
    if panel.log and 0 < values.min() < values.max() / WIDE:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: short(value))
        ax.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, styles: dict, units: bool) -> None:
    from matplotlib.lines import Line2D

    layers = [name for name in styles if name.startswith("layer")]
    every = -(-len(layers) // MOST_NAMED) if layers else 1
    named = {*layers[::every], *layers[-1:], "embedding", "output"}
    handles = [
        Line2D([], [], color=colour, marker=marker, ms=4, lw=1.3, label="output" if name == "output" else name)
        for name, (colour, marker) in styles.items() if name in named
    ]  # fmt: skip
    if units:
        handles += [
            Line2D([], [], color="0.3", lw=1.3, label="dead units: never active on these tokens"),
            Line2D([], [], color="0.3", lw=1, ls=(0, (2, 2)), label="dead units: add < .001 of the stream"),
        ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 10))
