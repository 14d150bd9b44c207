"""Are feed-forward layers memories, with keys that know patterns and values that say what comes next?

The MLP of a block, f(x W_in) W_out, can be read as a memory with soft look-up (Geva et al. 2021): each hidden unit has
a key (its column of W_in), opens as far as the input fits the key, and then adds its value (its row of W_out) to the
stream. If that is more than a way of speaking, then

- keys know patterns: the inputs that open a unit most, its triggers, have something in common. The paper let people
  read the 25 strongest triggers of each key, found patterns in all that were looked at, and shallow ones (how the
  text ends) mostly in the lower layers. Here, counted by machine: the share of a unit's 25 strongest triggers that
  have their last token, or their last two or three, in common (a token is a byte, but at `--scale paper`). Compared
  with the same model before training: a random projection of the last token's embedding opens for some tokens more
  than for others too, so that coherence alone proves no memory. The table has as many places drawn at random besides.
- values say what comes next: the token that a value promotes most, projected to the vocabulary, is the one that came
  behind the key's strongest trigger. In the paper that is rare (a few percent) but in the upper layers far above
  chance. Here chance is exact: the mean over all ways to deal values out among the keys of the layer anew.
- they do something: the loss without the MLP of a layer, and with its values dealt out among its keys anew. If it
  matters which value stands behind which key, a wrong one is worse than none.

The models are the shared family's, trained already (experiments/anatomy/family.py), on held-out text; nothing was
tuned. Claims are about the widest models; the table has all. The paper's model had 16 layers and 247 million
parameters and read words, so that patterns of meaning can hardly be seen here, and bytes agree more often than words.

Changed after a review, when results on these seeds were known: `coherent` compared with random places, and an untrained
model reproduced it too; it now compares with the untrained model. Its expected value is not read off the results:
people found patterns in most of a key's triggers, of which an untrained model explains an unknown part; what is left
must be more than one trigger of 25, and is at most about three quarters of them.
"Knowledge distillation", as these memories are called now and then, is something else: a small model that learns from
a large one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, of_those_that_have, spoken
from experiments.registry import Job, Outcome, Paper

if TYPE_CHECKING:
    import numpy
    import pandas

    from experiments.anatomy.family import Member

GEVA = "Geva et al. 2021"
LEVEL = 0.9
LENGTHS = (1, 2, 3)  # of the endings that triggers may share, tokens
UNTRAINED, TRAINED = "before training", "trained"


def _claim(id: str, statement: str, expected: float, margin: float, unit: str = "1", source: str = GEVA,
           possible: tuple[float, float] = (-1.0, 1.0)) -> Claim:  # fmt: skip
    return Claim(id, statement, source, expected, margin, unit, "toy_analogue", LEVEL, 43, possible)


OURS, NATS = f"ours, after {GEVA}", (-float("inf"), float("inf"))
CLAIMS = (
    # Clearly more than the untrained model's: by more than one trigger of 25, up to three quarters of them.
    _claim("coherent", "training makes a unit's strongest triggers alike: share with the commonest last token, above "
           "the untrained model's", 0.4, 0.35, source=OURS),
    _claim("learnt", "training makes longer patterns: share of triggers with the commonest last three tokens, above "
           "the untrained model's", 0.3, 0.25, source=OURS),
    _claim("shallow", "shallow patterns are in lower layers: share with the commonest last token, first minus last "
           "layer", 0.3, 0.25),
    # The paper: some percent of a vocabulary of words; here, from one percent to half of the units.
    _claim("agrees", "values say what follows their keys: agreement in the last layer, above luck", 0.25, 0.24),
    _claim("untrained", "before training they do not: agreement in the last layer, above luck", 0.0, 0.01, source=OURS),
    _claim("rises", "they do more so in upper layers: agreement above luck, last minus first layer", 0.25, 0.24),
    _claim("needed", "each memory is needed: loss without the MLP of the layer that matters least, minus the model's",
           2.5, 2.45, "nats", OURS, NATS),
    _claim("paired", "a wrong value is worse than none: loss with a layer's values dealt anew, minus that without its "
           "MLP; mean of the layers", 2.0, 1.98, "nats", OURS, NATS),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does. triggers: of each unit."""

    triggers: int


SIZES = {"smoke": Size(5), "laptop": Size(25), "paper": Size(25)}


# --- what one model's memories do ------------------------------------------------------------------------------------


def memories(member: Member, step: int, window_WxT1: numpy.ndarray, open_to: Any) -> list[dict[str, Any]]:
    """One row per layer of a member at a step: coherence of triggers, that of random places, agreement and luck.

    open_to: of `opener`. Only units whose triggers all open them count; `open` is their share.
    """
    import jax
    import numpy as np
    from flax import nnx

    from analysis import memories as measures
    from experiments.anatomy import family
    from jaxgpt import build

    state = family.params(member, step)
    model = nnx.merge(build.graphdef(member.model), state)
    token_WxT = window_WxT1[:, :-1]
    ending = {length: measures.endings(token_WxT, length) for length in LENGTHS}
    scale_D, unembed_DxV = np.asarray(model.final_norm.scale[...]), np.asarray(model.unembed.kernel[...])
    draw, rows = np.random.default_rng(member.seed), []
    for layer, (value_FxK, place_FxK) in enumerate(jax.tree.map(np.asarray, open_to(state, token_WxT))):
        open_F = value_FxK[:, -1] > 0
        place_FxK = place_FxK[open_F]
        # Places that a trigger can have, and the same number of them.
        random_FxK = draw.choice(np.flatnonzero(ending[max(LENGTHS)] >= 0), place_FxK.shape)
        value_FxD = np.asarray(model.layers[layer].mlp.down.kernel[...])[open_F]
        promoted_F = measures.promoted(value_FxD, scale_D, unembed_DxV)
        agrees, luck = measures.agreement(promoted_F, window_WxT1[:, 1:].reshape(-1)[place_FxK[:, 0]])
        row = {"width": member.width, "seed": member.seed, "model": TRAINED if step else UNTRAINED, "layer": layer + 1,
               "open": float(open_F.mean()), "agrees": agrees, "luck": luck}  # fmt: skip
        for length in LENGTHS:
            row |= {f"coherence_{length}": _mean(measures.coherence(ending[length], place_FxK)),
                    f"random_{length}": _mean(measures.coherence(ending[length], random_FxK))}  # fmt: skip
        rows.append(row)
    return rows


def _mean(values: numpy.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def opener(member: Member, count: int) -> Any:
    """A compiled function of parameters and tokens [W, T]: each layer's strongest activations and their places."""
    import jax
    from flax import nnx

    from analysis.memories import triggers
    from jaxgpt import build

    names = [f"layers.{layer}.mlp.hidden" for layer in range(member.model.n_layers)]

    def of(state: nnx.State, token_WxT: Any) -> list[tuple[Any, Any]]:
        def hidden(token_T: Any) -> list[Any]:
            kept = nnx.merge(build.graphdef(member.model), state).inspect(token_T[None], keep=names)[1]
            return [kept[name][0] for name in names]

        each = jax.lax.map(hidden, token_WxT, batch_size=8)
        return [triggers(hidden_WxTxF, count, max(LENGTHS) - 1) for hidden_WxTxF in each]

    return jax.jit(of)


def costs(member: Member, window_WxT1: numpy.ndarray) -> list[dict[str, float]]:
    """By layer: what the trained member loses, nats per token, without the MLP (`removed`), and with its values dealt
    out among its keys anew (`dealt`).
    """
    import numpy as np

    from experiments.anatomy import family

    loss, state = family.losses(member.model), family.params(member)
    before = float(loss(state, window_WxT1).mean())
    draw, rows = np.random.default_rng(member.seed), []
    for layer in range(member.model.n_layers):
        ways = {"removed": lambda leaf: 0 * leaf,
                "dealt": lambda leaf: draw.permutation(np.asarray(leaf)) if leaf.ndim == 2 else leaf}  # fmt: skip
        rows.append({
            name: float(loss(_edited(state, f"layers.{layer}.mlp.down.", way), window_WxT1).mean()) - before
            for name, way in ways.items()
        })  # fmt: skip
    return rows


def _edited(state: Any, prefix: str, change: Any) -> Any:
    """The parameters with those whose name begins so changed."""
    import jax
    import jax.numpy as jnp

    from jaxgpt.build import param_name

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(change(leaf)) if param_name(path).startswith(prefix) else leaf, state
    )


# --- from the family to the claims -----------------------------------------------------------------------------------


def run(job: Job) -> Outcome:
    """Reads the family, finds triggers, edits, draws."""
    import pandas

    from experiments.anatomy import family

    runs, members = family.train(job)
    window_WxT1, size = family.held_out(job.scale), SIZES[job.scale]
    rows, kept = [], {}
    for member in members:
        if member.width not in kept:  # members of a width share the program
            kept = {member.width: opener(member, size.triggers)}
        for step in (0, member.steps[-1]):
            found = memories(member, step, window_WxT1, kept[member.width])
            rows += [row | cost for row, cost in zip(found, costs(member, window_WxT1), strict=True)] if step else found
    table = pandas.DataFrame(rows)
    seeds = family.SIZES[job.scale].seeds
    named: Any = runs[["run_id", "model.d_model", "train.seed", "code_version"]]
    where = f"means over {seeds} seeds with {LEVEL:.0%} interval"
    return Outcome(
        measured=measure(table, seeds),
        summary=table.merge(
            named.rename(columns={"model.d_model": "width", "train.seed": "seed"}), on=["width", "seed"]
        ),
        tables=(
            (f"Keys: share of a unit's {size.triggers} strongest triggers that end alike (random: of as many places "
             f"drawn at random); {where}", _key_table(table)),
            ("Values: units whose value promotes the token behind their strongest trigger (luck: values dealt out "
             f"among the keys anew), and what it costs to take the MLP away, or to deal its values out anew; {where}",
             _value_table(table)),
        ),
        figures=tuple(draw(table, job.figure)),
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0],
    )  # fmt: skip


def measure(table: Any, seeds: int) -> dict[str, Measured]:
    """Each claim's value and its interval over seeds, of the widest models."""
    wide = table[table["width"] == table["width"].max()]
    trained, untrained = (wide[wide["model"] == model] for model in (TRAINED, UNTRAINED))
    last = int(wide["layer"].max())

    def by_seed(rows: Any, column: str, layer: int | None = None) -> Any:
        rows = rows if layer is None else rows[rows["layer"] == layer]
        return rows.groupby("seed")[column].mean()

    def above_luck(rows: Any, layer: int) -> Any:
        return by_seed(rows, "agrees", layer) - by_seed(rows, "luck", layer)

    values = {
        "coherent": by_seed(trained, "coherence_1") - by_seed(untrained, "coherence_1"),
        "learnt": by_seed(trained, "coherence_3") - by_seed(untrained, "coherence_3"),
        "shallow": by_seed(trained, "coherence_1", 1) - by_seed(trained, "coherence_1", last),
        "agrees": above_luck(trained, last),
        "untrained": above_luck(untrained, last),
        "rises": above_luck(trained, last) - above_luck(trained, 1),
        "needed": trained.groupby("seed")["removed"].min(),
        "paired": by_seed(trained, "dealt") - by_seed(trained, "removed"),
    }
    why = "the run was not done, or no unit is open"
    return {name: of_those_that_have(values_S, seeds, why, LEVEL) for name, values_S in values.items()}


def _key_table(table: Any) -> pandas.DataFrame:
    import pandas

    lines = []
    for (width, layer, model), rows in table.groupby(["width", "layer", "model"], sort=True):
        line = {"width": width, "layer": layer, "model": model, "units open": f"{rows['open'].mean():.0%}"}
        for length in LENGTHS:
            line["same last token" if length == 1 else f"last {length}"] = spoken(
                rows[f"coherence_{length}"], LEVEL, ".2f", (0, 1)
            )
            line["random" if length == 1 else f"random, {length}"] = f"{rows[f'random_{length}'].mean():.2f}"
        lines.append(line)
    return pandas.DataFrame(lines)


def _value_table(table: Any) -> pandas.DataFrame:
    import pandas

    lines = []
    for (width, layer), rows in table.groupby(["width", "layer"]):
        trained, untrained = (rows[rows["model"] == model] for model in (TRAINED, UNTRAINED))
        lines.append({
            "width": width, "layer": layer, "agree": spoken(trained["agrees"], LEVEL, ".1%", (0, 1)),
            "luck": f"{trained['luck'].mean():.1%}", UNTRAINED: spoken(untrained["agrees"], LEVEL, ".1%", (0, 1)),
            "luck then": f"{untrained['luck'].mean():.1%}",
            "cost without the MLP (nats)": spoken(trained["removed"], LEVEL, ".2f"),
            "values dealt anew (nats)": spoken(trained["dealt"], LEVEL, ".2f"),
        })  # fmt: skip
    return pandas.DataFrame(lines)


# --- the figure ------------------------------------------------------------------------------------------------------


def draw(table: Any, path_stem: Path) -> list[Path]:
    """Coherence, agreement and cost by layer, of the widest models; writes PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    from analysis import plots

    wide = table[table["width"] == table["width"].max()]
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        trained, untrained = (wide[wide["model"] == model] for model in (TRAINED, UNTRAINED))
        for length, (colour, marker) in plots.size_styles(LENGTHS).items():
            words = f"last {length} tokens" if length > 1 else "last token"
            _line(left, trained, f"coherence_{length}", colour, marker, words)
            _line(left, untrained, f"coherence_{length}", colour, marker, None, ls=(0, (4, 2)), hollow=True)
            _line(left, trained, f"random_{length}", colour, "", None, ls=(0, (1, 2)))
        left.plot([], [], color="0.4", ls=(0, (4, 2)), label=UNTRAINED)
        left.plot([], [], color="0.4", ls=(0, (1, 2)), label="random places")
        left.set_ylim(0, 1)
        _axes(left, wide, "share of strongest triggers that end alike", "Keys: what opens a unit")
        _line(middle, trained, "agrees", "#1f5a8f", "o", "trained")
        _line(middle, trained, "luck", "#1f5a8f", "", "luck: values dealt anew", ls=(0, (1, 2)))
        _line(middle, untrained, "agrees", "#c0562b", "s", UNTRAINED, ls=(0, (4, 2)), hollow=True)
        middle.set_ylim(0, 1.3 * middle.get_ylim()[1])  # room for the legend
        middle.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _axes(middle, wide, "units whose value promotes the next token", "Values: what a unit says", "upper left")
        _line(right, trained, "removed", "#1f5a8f", "o", "without the MLP")
        _line(right, trained, "dealt", "#c0562b", "s", "its values dealt anew", ls=(0, (4, 2)))
        right.set_ylim(bottom=min(0, right.get_ylim()[0]))
        _axes(right, wide, "loss above the model's (nats per token)", "What they are worth")
        return plots.save(figure, path_stem)


def _line(axes: Any, rows: Any, column: str, colour: Any, marker: str, label: str | None, ls: Any = "-",
          hollow: bool = False) -> None:  # fmt: skip
    """Mean over seeds, and a small point for each."""
    by_layer = rows.groupby("layer")[column].mean()
    axes.plot(by_layer.index, by_layer, color=colour, ls=ls, lw=1.6, label=label, marker=marker or None, ms=6,
              mfc="white" if hollow else colour, mec=colour if hollow else "white", mew=0.8)  # fmt: skip
    if marker:
        axes.plot(rows["layer"], rows[column], marker, color=colour, ms=2.5, alpha=0.5, mew=0, ls="")


def _axes(axes: Any, wide: Any, label: str, title: str, legend: str = "best") -> None:
    layers = sorted(wide["layer"].unique())
    axes.set_xticks(layers)
    axes.set_xlim(layers[0] - 0.3, layers[-1] + 0.3)
    axes.set_xlabel(f"layer (width {wide['width'].iloc[0]}; small points: seeds)")
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.legend(loc=legend)


PAPER = Paper(
    name="geva2021",
    title="Feed-forward layers as key-value memories: what opens a unit, and what it says then",
    source=GEVA,
    claims=CLAIMS,
    takes={
        "smoke": "a quarter of a minute",
        "laptop": "a minute on 2 CPU cores, plus 5, once, for the models that 8 commands share",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
