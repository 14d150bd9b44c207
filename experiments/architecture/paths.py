"""How far back does a network reach? Gradients and memory against the lag, in a Transformer, an LSTM and an RNN.

In an attention layer any two positions are one step apart; in a recurrent network what lies n positions back has gone
through n steps of the cell. Each step multiplies the gradient by the cell's Jacobian, so that it fades (or explodes)
exponentially, and what a loss says of the distant past is drowned (Hochreiter 1991; Bengio et al. 1994). The LSTM's
memory cell was made against that (Hochreiter & Schmidhuber 1997); attention does without the path (Vaswani et al.
2017; per layer, at n^2 products; decoding n tokens still takes n steps one after the other).

The task (jaxgpt/tasks/latch.py): hold one of 8 symbols through noise until a question mark asks for it. It is trained
in two ways: with lags from 1 to the longest, mixed, where short lags can help long ones; and with the longest alone, as
in Bengio et al. One layer of each kind, of as many weights (about 12 thousand beside the tables), the same data,
batches and steps; the rate of each kind is one of 1e-3, 3e-3 and 1e-2, the best with mixed lags on seed 100 (all three
served the Transformer and the LSTM: 3e-3; the RNN 1e-3). Measured by the lag:

    gradient    |d y_T / d x_t|, the Frobenius norm of the Jacobian of the last output (behind the final norm, at the
                mark) by the symbol's embedding; its logarithm falls by so many nats per position ("slope": least
                squares over the lags), before training and after it with mixed lags
    recall      the share of right answers on held-out sequences; guessing gives 1/8

At the start the RNN's slope is known from mean-field theory: with normed inputs and recurrent weights of variance 1/D,
its pre-activations have variance q = 1 + E tanh^2(sqrt(q) z), z normal, and the squared gradient is multiplied by
chi = E (1 - tanh^2(sqrt(q) z))^2 per step (`mean_field_slope`; the approach is that of Chen et al. 2018): half its
logarithm is -0.4595. Training may move it.

The LSTM here has a forget gate, which that of 1997 has not, and its bias begins at 1 (jaxgpt/build.py): how fast its
gradient falls at the start, and whether it learns from the longest lag alone, hang on that number (a bias of about the
logarithm of the lag remembers for so long: Tallec & Ollivier 2018). A Transformer's gradient at the start is about one
over the number of positions that are read, which is the same for all lags here. Slopes are of lags whose gradients a
float32 holds. A reviewer asked for these lines, and for an open end of the claim on the LSTM's start, after results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, of_those_that_have, spoken
from experiments.registry import Job, Outcome, Paper, check_complete
from jaxgpt.config import ModelConfig, RunConfig, override

if TYPE_CHECKING:
    import numpy
    import pandas

    from jaxgpt.run import Source

BENGIO, LSTM_PAPER, VASWANI = "Bengio et al. 1994", "after Hochreiter & Schmidhuber 1997", "Vaswani et al. 2017"
LEVEL = 0.9
SYMBOLS, NOISE = 8, 8
MIXED, ALONE = "mixed lags", "the longest lag alone"
KINDS = {"transformer": "Transformer", "lstm": "LSTM (forget bias 1)", "rnn": "RNN"}
COLOURS = {"transformer": "#1f5a8f", "lstm": "#2a9d8f", "rnn": "#c0562b"}
MARKERS = {"transformer": "o", "lstm": "D", "rnn": "s"}
THICK = {"transformer": (9, 3.0), "lstm": (6.5, 1.8), "rnn": (5, 1.5)}  # markers and lines: both show where they agree
SMALLEST = 1e-37  # of a gradient in float32: what is below it is lost, and its logarithm would say nothing
FEWEST = 3  # lags with a gradient above that for a slope
SHARE = (0.0, 1.0)


def _claim(id: str, statement: str, source: str, expected: float, margin: float, unit: str = "nats per position",
           exact: bool = False, possible: tuple[float, float] = (-math.inf, math.inf)) -> Claim:  # fmt: skip
    scope = "same_regime" if exact else "toy_analogue"
    return Claim(id, statement, source, expected, margin, unit, scope, LEVEL, 31, possible)


CLAIMS = (
    _claim("rnn_start", "RNN at the start: the gradient falls exponentially with the lag: slope of its logarithm",
           "mean-field theory, after Chen et al. 2018", -0.4595, 0.05, exact=True),
    _claim("transformer_start", "Transformer at the start, texts of one length: the gradient does not fall with the "
           "lag: slope of its logarithm", VASWANI, 0.0, 0.01),
    # From -.1 to .9: that it falls more slowly, or not at all.
    _claim("lstm_start", "LSTM at the start: its gradient falls more slowly than the RNN's: slope by the RNN's, .9 at "
           "most", LSTM_PAPER, 0.4, 0.5, "1"),
    # From -1 to -.05, a factor of 25 over 64 positions: that it falls, not how fast.
    _claim("rnn_trained", "RNN after training: the gradient still falls exponentially: slope of its logarithm", BENGIO,
           -0.525, 0.475),
    _claim("transformer_trained", "Transformer after training, texts of one length: the gradient does not fall with "
           "the lag: slope of its logarithm", VASWANI, 0.0, 0.01),
    *(
        _claim(f"{kind}_{id}", f"{words}, trained on {how}: share of right answers at the longest lag"
               f"{' is that of a guess' if kind == 'rnn' else ''}", source, 1 / SYMBOLS if kind == "rnn" else 1.0, 0.1,
               "1", possible=SHARE)
        for id, how in (("recall", MIXED), ("alone", ALONE))
        for (kind, words), source in zip(KINDS.items(), (VASWANI, LSTM_PAPER, BENGIO), strict=True)
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does. lags: that are measured, up to the longest that is trained. widths, rates: by kind.
    seeds: of each way to train. sequences: of each lag, that gradients are taken on.
    """

    lags: tuple[int, ...]
    widths: Mapping[str, int]
    rates: Mapping[str, float]
    steps: int
    seeds: int
    sequences: int
    settings: Mapping[str, Any]


SIZES = {
    "smoke": Size((1, 2, 4, 8), {"transformer": 8, "lstm": 10, "rnn": 20}, dict.fromkeys(KINDS, 3e-3), 20, 2, 2,
                  {"model.n_heads": 2, "train.batch_size": 8, "train.eval_windows": 32}),
    "laptop": Size((1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64), {"transformer": 32, "lstm": 40, "rnn": 80},
                   {"transformer": 3e-3, "lstm": 3e-3, "rnn": 1e-3}, 2000, 4, 8,
                   {"train.batch_size": 32, "train.eval_windows": 512}),
    "paper": Size((1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000), {"transformer": 256, "lstm": 320, "rnn": 640},
                  {"transformer": 1e-3, "lstm": 1e-3, "rnn": 3e-4}, 50_000, 4, 16,
                  {"train.batch_size": 128, "train.eval_windows": 2048}),
}  # fmt: skip


def configs(size: Size) -> list[RunConfig]:
    """Kinds times seeds, the first half of which is for mixed lags; one layer."""
    return [
        override(RunConfig(), {
            "model.architecture": kind, "model.n_layers": 1, "model.d_model": size.widths[kind],
            "model.context": max(size.lags) + 1, "model.vocab_size": SYMBOLS + NOISE + 1, "train.steps": size.steps,
            "train.seed": seed, "optimizer.learning_rate": size.rates[kind], "optimizer.weight_decay": 0.0,
            **size.settings,
        })
        for kind in KINDS
        for seed in range(2 * size.seeds)
    ]  # fmt: skip


def source(config: RunConfig, size: Size) -> Source:
    """What a run trains on: its seed says which lags."""
    from jaxgpt.tasks import latch

    return latch.source(config, SYMBOLS, size.lags, 1 if config.train.seed < size.seeds else max(size.lags))


# --- gradients -------------------------------------------------------------------------------------------------------


def mean_field_slope() -> float:
    """Of the RNN's logarithmic gradient by the lag, in nats per position, in the limit of many units: ln(chi) / 2."""
    import numpy as np

    z_N, weight_N = np.polynomial.hermite_e.hermegauss(128)
    weight_N = weight_N / weight_N.sum()
    q = 1.0
    for _ in range(200):  # a contraction
        q = 1 + weight_N @ np.tanh(math.sqrt(q) * z_N) ** 2
    return 0.5 * math.log(weight_N @ (1 - np.tanh(math.sqrt(q) * z_N) ** 2) ** 2)


def gradient_norms(model: ModelConfig) -> Any:
    """A compiled function of parameters, sequences [B, T] and places [B]: the Frobenius norm of d y_T / d x_t, t the
    place, [B]; y the final stream, x the embeddings.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxgpt import build

    def one(params: Any, token_T: Any, place: Any) -> Any:
        net = nnx.merge(build.graphdef(model), params)

        def last_D(x_D: Any) -> Any:
            def put(x_1xTxD: Any) -> Any:
                return jnp.where((jnp.arange(x_1xTxD.shape[1]) == place)[None, :, None], x_D, x_1xTxD)

            return net.inspect(token_T[None], keep=["final"], replace={"embedding": put})[1]["final"][0, -1]

        here_D = net.inspect(token_T[None], keep=["embedding"])[1]["embedding"][0, place]
        jacobian_DxD = jax.jacrev(last_D)(here_D)
        # Scaled first: squares of what a float32 still holds may be below what it holds.
        largest = jnp.maximum(jnp.abs(jacobian_DxD).max(), SMALLEST)
        return largest * jnp.linalg.norm(jacobian_DxD / largest)

    def norms(params: Any, token_BxT: Any, place_B: Any) -> Any:
        return jax.lax.map(lambda its: one(params, *its), (token_BxT, place_B))

    return jax.jit(norms)


def slope(lags: Any, norm_SxL: numpy.ndarray) -> numpy.ndarray:
    """By which the logarithm of each row's norms goes per position, least squares over the lags whose norms are above
    SMALLEST, [S]; NaN with fewer than FEWEST of them, and where a norm is not finite.
    """
    import numpy as np

    lag_L = np.asarray(lags)

    def one(norm_L: numpy.ndarray) -> float:
        there_L = norm_L > SMALLEST
        if there_L.sum() < FEWEST or not np.isfinite(norm_L).all():
            return math.nan
        return float(np.polyfit(lag_L[there_L], np.log(norm_L[there_L]), 1)[0])

    return np.asarray([one(norm_L) for norm_L in norm_SxL])


@dataclass(frozen=True)
class Reach:
    """What is measured of a kind: by seed and lag, [S, L]; NaN where the run diverged. start, trained: root mean square
    of the gradient's norm before training and after it with mixed lags. recall, alone: shares of right answers after
    training with mixed lags and with the longest alone.
    """

    params: int
    start: numpy.ndarray
    trained: numpy.ndarray
    recall: numpy.ndarray
    alone: numpy.ndarray


def reaches(runs: Any, size: Size, folder: Path) -> dict[str, Reach]:
    """By kind."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jaxgpt import build, load_model
    from jaxgpt.tasks import latch

    length, count = max(size.lags) + 1, size.sequences
    lag_B = jnp.repeat(jnp.asarray(size.lags), count)
    token_BxT = latch.draw(jax.random.key(latch.HELD_OUT - 1), lag_B, length, SYMBOLS, NOISE).token_BxT
    wanted = {(c.model.architecture, c.train.seed): c for c in configs(size)}
    found = {}
    for kind in KINDS:
        both = runs[runs["model.architecture"] == kind].sort_values("train.seed")
        rows = both[both["train.seed"] < size.seeds]
        model = wanted[kind, 0].model
        norms = gradient_norms(model)

        def root_mean_square(params: Any, norms: Any = norms) -> numpy.ndarray:
            norm_LxW = np.asarray(norms(params, token_BxT, length - 1 - lag_B), float).reshape(-1, count)
            return np.sqrt((norm_LxW**2).mean(axis=1))

        start = [root_mean_square(build.init_params(model, seed)) for seed in rows["train.seed"]]
        trained = [
            root_mean_square(nnx.split(load_model(f"{folder}/{row['run_id']}").model)[1])
            if row["status"] == "done" else np.full(len(size.lags), math.nan)
            for row in rows.to_dict("records")
        ]  # fmt: skip
        recall = both[[f"final_recall_{lag}" for lag in size.lags]].where(both["status"] == "done").to_numpy(float)
        found[kind] = Reach(int(rows["params_total"].iloc[0]), np.asarray(start), np.asarray(trained),
                            recall[: size.seeds], recall[size.seeds :])  # fmt: skip
    return found


# --- what they say -------------------------------------------------------------------------------------------------


def measure(found: dict[str, Reach], size: Size) -> dict[str, Measured]:
    """Each claim's value and its interval over seeds."""
    start = {kind: slope(size.lags, each.start) for kind, each in found.items()}
    trained = {f"{kind}_trained": slope(size.lags, found[kind].trained) for kind in ("transformer", "rnn")}
    recall = {f"{kind}_recall": each.recall[:, -1] for kind, each in found.items()}
    alone = {f"{kind}_alone": each.alone[:, -1] for kind, each in found.items()}
    slopes = trained | {"rnn_start": start["rnn"], "transformer_start": start["transformer"],
                        "lstm_start": start["lstm"] / start["rnn"]}  # fmt: skip
    gone = f"it diverged, or its gradient is below {SMALLEST:g} at all but {FEWEST - 1} lags"
    return {
        **{name: of_those_that_have(value_S, size.seeds, gone, LEVEL) for name, value_S in slopes.items()},
        **{
            name: of_those_that_have(value_S, size.seeds, "it diverged", LEVEL)
            for name, value_S in (recall | alone).items()
        },
    }


# --- to table and figure ---------------------------------------------------------------------------------------------

SUMMARY = ["run_id", "model.architecture", "model.d_model", "train.seed", "status", "params_total", "steps_done",
           "final_loss", "final_loss_sem", "wall_seconds", "code_version"]  # fmt: skip


def run(job: Job) -> Outcome:
    """Trains, takes gradients, draws."""
    from jaxgpt import sweep

    size = SIZES[job.scale]
    wanted = configs(size)
    runs = sweep(wanted, job.raw, setup=lambda config: source(config, size), max_minutes=job.max_minutes)
    check_complete(runs, wanted)
    found = reaches(runs, size, job.raw)
    return Outcome(
        measured=measure(found, size),
        summary=runs.reindex(columns=[*SUMMARY, *(f"final_recall_{lag}" for lag in size.lags)]),
        tables=((f"One layer of each kind, trained on lags from 1 to {max(size.lags)}: by how many nats the logarithm "
                 "of the gradient |d y_T / d x_t| changes per position of lag (slope), and shares of right answers "
                 f"(guessing: {1 / SYMBOLS:.2f}); in the last column trained on lag {max(size.lags)} alone; means over "
                 f"{size.seeds} seeds with {LEVEL:.0%} interval", table(found, size)),),
        figures=tuple(draw(found, size, job.figure)),
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
    )  # fmt: skip


def table(found: dict[str, Reach], size: Size) -> pandas.DataFrame:
    """One line per kind."""
    import pandas

    middle = len(size.lags) // 2
    return pandas.DataFrame(
        {"network": words, "parameters": f"{found[kind].params:,}",
         "slope at the start": spoken(slope(size.lags, found[kind].start), LEVEL, ".3f"),
         "after training": spoken(slope(size.lags, found[kind].trained), LEVEL, ".3f")}
        | {f"right at lag {size.lags[i]}": spoken(found[kind].recall[:, i], LEVEL, ".2f", SHARE)
           for i in (0, middle, -1)}
        | {f"{size.lags[-1]} alone": spoken(found[kind].alone[:, -1], LEVEL, ".2f", SHARE)}
        for kind, words in KINDS.items()
    )  # fmt: skip


def draw(found: dict[str, Reach], size: Size, path_stem: Path) -> list[Path]:
    """Gradient against lag before and after training, and recall against lag; writes PNG and SVG."""
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(12.5, 4.4), layout="constrained")
        panels = figure.subplots(1, 3)
        for axes, when in zip(panels[:2], ("start", "trained"), strict=True):
            for kind in KINDS:
                norm_SxL = np.maximum(getattr(found[kind], when), SMALLEST)
                _line(axes, size.lags, np.exp(np.log(norm_SxL).mean(axis=0)), norm_SxL, kind)
            axes.set_yscale("log")
            axes.set_ylabel("gradient |d y$_T$ / d x$_t$|")
        theory_L = np.exp(np.log(found["rnn"].start[:, 0]).mean() + mean_field_slope() * (np.asarray(size.lags) - 1))
        panels[0].plot(size.lags, theory_L, color="0.25", lw=1.2, ls=(0, (4, 2)), label="RNN, mean-field theory")
        for kind in KINDS:
            _line(panels[2], size.lags, found[kind].recall.mean(axis=0), found[kind].recall, kind)
            alone_S = found[kind].alone[:, -1]
            panels[2].plot([1.07 * max(size.lags)] * len(alone_S), alone_S, MARKERS[kind], ms=6, mfc="none",
                           mec=COLOURS[kind], clip_on=False)  # fmt: skip
        panels[2].plot(
            [], [], "o", mfc="none", mec="0.3", label=f"trained on lag {max(size.lags)} alone, each seed (beside it)"
        )
        panels[2].axhline(1 / SYMBOLS, color="0.4", lw=1.2, ls=":", label="guessing")
        panels[2].set_ylim(0, 1.05)
        panels[2].set_ylabel("share of right answers")
        for axes, title in zip(
            panels, ("Gradient before training", "Gradient after training", "Recall after training"), strict=True
        ):
            axes.set_title(title)
            axes.set_xlabel("lag (positions)")
        handles, names = panels[0].get_legend_handles_labels()
        more, said = panels[2].get_legend_handles_labels()
        figure.legend([*handles, *more[-2:]], [*names, *said[-2:]], loc="outside lower center", ncols=6)
        return plots.save(figure, path_stem)


def _line(axes: Any, lags: Any, mean_L: numpy.ndarray, value_SxL: numpy.ndarray, kind: str) -> None:
    """A mean over seeds, and a band from the lowest to the highest."""
    size, width = THICK[kind]
    axes.plot(lags, mean_L, color=COLOURS[kind], marker=MARKERS[kind], ms=size, mec="white", mew=0.6, lw=width,
              label=KINDS[kind])  # fmt: skip
    axes.fill_between(lags, value_SxL.min(axis=0), value_SxL.max(axis=0), color=COLOURS[kind], alpha=0.18, lw=0)


PAPER = Paper(
    name="paths",
    title="How far back networks reach: gradients and memory against the lag, in a Transformer, an LSTM and an RNN",
    source=f"{VASWANI}; {LSTM_PAPER}; {BENGIO}",
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "about 3 minutes on 2 CPU cores",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
