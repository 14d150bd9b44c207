"""Language models as compressors (Delétang et al. 2024), against gzip, bzip2 and xz.

Byte-level transformers of several sizes read a part of the corpus once, in disjoint windows. Then they code held-out
text in chunks of 2048 bytes, as the paper does; classical compressors code the same chunks, and the text as one stream,
where they see what is far back and the models do not. A receiver of the code needs the model too: with its bytes,
2 per parameter as in the paper, the rate is called adjusted. What is learnt online needs none: sender and receiver
train the same model on what has been sent, so the losses of one pass, each before its batch is trained on, add up to
the length of a code of the training text itself (prequential coding; Blier & Ollivier 2018).

Letters: K chunks, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, mean_and_interval
from experiments.registry import Job, Outcome, Paper, check_complete
from jaxgpt.config import RunConfig, override

if TYPE_CHECKING:
    import numpy

SOURCE = "Delétang et al. 2024"
LEVEL = 0.9
CHUNK = 2048  # bytes, as in the paper
BYTES_PER_PARAMETER = 2
Table = Any  # pandas' own types do not follow its columns


def _claim(id: str, statement: str, source: str, expected: float, margin: float, unit: str = "1") -> Claim:
    return Claim(id, statement, source, expected, margin, unit, "toy_analogue", LEVEL, 10)


# A ratio below 1 is claimed as 0.5 +- 0.5, above 1 as 1.5 +- 0.5.
CLAIMS = (
    _claim("raw_gzip", "chunks of held-out text, model not counted: largest model's bits over gzip's below 1",
           f"{SOURCE}, table 1", 0.5, 0.5),
    _claim("raw_xz", "chunks of held-out text, model not counted: largest model's bits over xz's (LZMA2) below 1",
           f"{SOURCE}, table 1", 0.5, 0.5),
    _claim("raw_stream", "the same against xz that codes the text as one stream: below 1", f"{SOURCE}, table 1",
           0.5, 0.5),
    _claim("adjusted", "with the model's bytes, spread over the held-out text: the best size's bits over those of xz "
           "in chunks above 1", f"{SOURCE}, section 3.2", 1.5, 0.5),
    _claim("turn", "with the model's bytes a larger model is worse: largest over smallest above 1",
           f"{SOURCE}, section 3.4", 1.5, 0.5),
    _claim("online", "the training text, coded online by the best size: bits over xz's of the same text below 1",
           "ours", 0.5, 0.5),
    _claim("coder", "an arithmetic coder, decoded again: bits per byte beyond the model's log loss", f"{SOURCE}, "
           "section 2", 0.0, 0.05, "bits per byte"),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does. widths: of the models. tokens: of training text, read once. chunks: of held-out text that are
    coded, evenly spaced. coded: of so many the first `context` bytes are
    put into an arithmetic code.
    """

    widths: tuple[int, ...]
    tokens: int
    seeds: int
    chunks: int
    coded: int
    settings: dict[str, Any]
    rate: float = 0.05  # learning rate at width 1; it goes as width^-1/2
    bootstraps: int = 1000


SIZES = {
    "smoke": Size(
        widths=(4, 8), tokens=2**12, seeds=2, chunks=4, coded=4, bootstraps=100,
        settings={"model.n_layers": 1, "model.n_heads": 2, "model.context": 32, "train.batch_size": 4,
                  "train.eval_windows": 32},
    ),
    "laptop": Size(
        widths=(16, 32, 48), tokens=2**21, seeds=3, chunks=48, coded=4,
        settings={"model.n_layers": 3, "model.n_heads": 2, "model.context": 128, "train.batch_size": 16,
                  "train.eval_windows": 128},
    ),
    # Needs a corpus of more than 10^8 bytes, as theirs: data.corpus is the user's.
    "paper": Size(
        widths=(64, 128, 256), tokens=2**26, seeds=3, chunks=512, coded=4,
        settings={"model.n_layers": 4, "model.n_heads": 8, "model.context": 2047, "train.batch_size": 32,
                  "train.eval_windows": 512},
    ),
}  # fmt: skip

# --- the runs ------------------------------------------------------------------------------------------------------


def configs(size: Size) -> list[RunConfig]:
    """The runs: widths x seeds, each one pass. Every step is in the curve: its loss is a part of the code."""
    per_step = size.settings["train.batch_size"] * (size.settings["model.context"] + 1)
    return [
        override(RunConfig(), {
            **size.settings, "model.d_model": width, "train.seed": seed, "train.steps": size.tokens // per_step,
            "data.training_tokens": size.tokens, "optimizer.learning_rate": size.rate / width**0.5,
            "optimizer.final_fraction": 0.0, "train.log_every": 1,
        })
        for width in size.widths
        for seed in range(size.seeds)
    ]  # fmt: skip


def training_text(config: RunConfig) -> numpy.ndarray:
    """The bytes that are read: whole documents in random order, the first `data.training_tokens` bytes of them."""
    import numpy as np

    from jaxgpt.tasks import text

    return np.asarray(text.reader()(config).data().train_n)[: config.data.training_tokens]


def windows_once() -> Callable[[RunConfig], Any]:
    """For `sweep`: the text cut into windows of context + 1 bytes, each read once, in an order by the run's seed."""
    import numpy as np

    from jaxgpt.tasks import text

    reader, text_of = text.reader(), cache(training_text)

    def source(config: RunConfig) -> Any:
        length, batch = config.model.context + 1, config.train.batch_size

        def batches(data_seed: int, retry: int, step: int, rows: slice | None = None) -> Iterator[numpy.ndarray]:
            bytes_n = text_of(replace(config, train=RunConfig().train, model=replace(config.model, d_model=64)))
            windows_WxT1 = bytes_n[: len(bytes_n) // length * length].reshape(-1, length)
            order_W = np.random.default_rng([data_seed, retry]).permutation(len(windows_WxT1))
            while True:
                at = order_W[np.arange(step * batch, (step + 1) * batch) % len(order_W)]
                yield windows_WxT1[at][rows or slice(None)].astype(np.int32)
                step += 1

        base = reader(config)
        return replace(base, stream=batches, identity=f"{base.identity}, each window once")

    return source


def train(job: Job, size: Size) -> tuple[Table, Table]:
    """Runs and curves. Raises Unfinished."""
    from jaxgpt import load, sweep

    wanted = configs(size)
    runs = sweep(wanted, job.raw, setup=windows_once(), max_minutes=job.max_minutes)
    check_complete(runs, wanted)
    curves = load(job.raw)[1]
    return runs[runs["status"] == "done"], curves[curves["run_id"].isin(runs["run_id"])]


# --- code lengths --------------------------------------------------------------------------------------------------


def chunks_of(text_n: numpy.ndarray, count: int) -> numpy.ndarray:
    """(K, CHUNK) bytes, evenly spaced over the text, without overlap."""
    import numpy as np

    count = min(count, len(text_n) // CHUNK)
    starts_K = np.linspace(0, len(text_n) - CHUNK, count).astype(int)
    return text_n[starts_K[:, None] + np.arange(CHUNK)]


@dataclass(frozen=True)
class Lengths:
    """All in bits per byte. chunks: by classical compressor (K,); stream: of the held-out text as a whole.

    models: width, seed, parameters, chunks (K,), online (of the training text). training: classical, of that text.
    coder: what arithmetic codes take beyond the log loss, one number per run. held_out: bytes of the held-out text.
    grown: bytes, and by name the rate of the training text up to there.
    """

    chunks: dict[str, numpy.ndarray]
    stream: dict[str, float]
    models: Table
    training: dict[str, float]
    coder: numpy.ndarray
    held_out: int
    grown: Table

    def adjusted(self) -> numpy.ndarray:
        """Rate of each model on the held-out text with its own bytes."""
        raw = self.models["chunks"].map(lambda rate_K: rate_K.mean()).to_numpy()
        return raw + 8 * BYTES_PER_PARAMETER * self.models["parameters"].to_numpy() / self.held_out


def measure_lengths(runs: Table, curves: Table, size: Size, folder: Path) -> Lengths:
    """Codes everything."""
    import numpy as np
    import pandas

    from experiments.coder import classical, coded, model_bits, online, probabilities
    from jaxgpt import corpus, load_model

    one = configs(size)[0]
    context, batch = one.model.context, one.train.batch_size
    held_out_n = corpus.load(one.data.corpus, one.data.validation_fraction, context).validation
    chunks_KxN, tools = chunks_of(held_out_n, size.chunks), classical()
    rows, coder, by_run = [], [], dict(list(curves.groupby("run_id")))
    for run in runs.itertuples():
        log_p = probabilities(load_model(str(run.run_id), folder).model)
        rate_K = np.array([model_bits(log_p, chunk_n, context) for chunk_n in chunks_KxN]) / CHUNK
        coder.append(coded(log_p, chunks_KxN[: size.coded, :context].astype(int)))
        bits = online(by_run[run.run_id].sort_values("step"), batch, context)
        rows.append({"width": run.d_model, "seed": run.seed, "parameters": run.params_total, "chunks": rate_K,
                     "steps": bits, "online": bits.sum() / (len(bits) * batch * (context + 1))})  # fmt: skip
    models = pandas.DataFrame(rows)
    text = training_text(one)[: one.train.steps * batch * (context + 1)].tobytes()
    return Lengths(
        chunks={name: np.array([bits(c.tobytes()) for c in chunks_KxN]) / CHUNK for name, bits in tools.items()},
        stream={name: bits(held_out_n.tobytes()) / len(held_out_n) for name, bits in tools.items()},
        models=models,
        training={name: bits(text) / len(text) for name, bits in tools.items()},
        coder=np.array(coder),
        held_out=len(held_out_n),
        grown=grown(text, models, tools),
    )


def grown(text: bytes, models: Table, tools: dict[str, Callable[[bytes], int]]) -> Table:
    """Rates of the first bytes of the training text, of twice as many, and so on: each compressor's on that much alone,
    the online code's mean over seeds.
    """
    import numpy as np
    import pandas

    steps = len(models["steps"].iloc[0])
    per_step, rows = len(text) / steps, []
    for n in sorted({max(1, steps // 2**i) for i in range(7)}):
        size = round(n * per_step)
        row = {"bytes": size} | {name: bits(text[:size]) / size for name, bits in tools.items()}
        for width, mine in models.groupby("width"):
            row[str(width)] = float(np.mean([bits_[:n].sum() / size for bits_ in mine["steps"]]))
        rows.append(row)
    return pandas.DataFrame(rows)


# --- what they say -------------------------------------------------------------------------------------------------


def with_chunks(ratio: Callable[[int, numpy.ndarray], float], seeds: int, chunks: int, size: Size) -> Measured:
    """A ratio's mean over seeds; its interval adds Student's t over seeds and a bootstrap over chunks in quadrature.

    ratio: of a seed's number and of the chunks' weights (K,).
    """
    import numpy as np

    def each(weight_K: numpy.ndarray) -> list[float]:
        return [ratio(i, weight_K) for i in range(seeds)]

    value, low, high = mean_and_interval(each(np.ones(chunks)), LEVEL)
    drawn_BxK = np.random.default_rng(0).multinomial(chunks, np.full(chunks, 1 / chunks), size=size.bootstraps)
    sample_B = [np.mean(each(drawn_K)) for drawn_K in drawn_BxK]
    least, most = np.quantile(sample_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Measured(
        value,
        value - math.hypot(value - low, max(0.0, value - least)),
        value + math.hypot(high - value, max(0.0, most - value)),
        seeds,
    )


def measure(found: Lengths, size: Size) -> dict[str, Measured]:
    """Each claim's value and interval."""
    import numpy as np

    models = found.models.assign(adjusted=found.adjusted())
    means = models.groupby("width")["adjusted"].mean()
    widths = {"largest": means.index.max(), "smallest": means.index.min(), "best": means.idxmin()}
    rates = {name: np.stack(models[models["width"] == w].sort_values("seed")["chunks"]) for name, w in widths.items()}
    sent = {name: 8 * BYTES_PER_PARAMETER * models.loc[models["width"] == w, "parameters"].iloc[0] / found.held_out
            for name, w in widths.items()}  # fmt: skip
    seeds, chunks = rates["best"].shape

    def mean(rate_K: numpy.ndarray, weight_K: numpy.ndarray) -> float:
        return float(np.average(rate_K, weights=weight_K))

    def over(ratio: Callable) -> Measured:
        return with_chunks(ratio, seeds, chunks, size)

    largest, smallest, best, tools = rates["largest"], rates["smallest"], rates["best"], found.chunks
    least = models.groupby("width")["online"].mean().idxmin()
    coded_online = models.loc[models["width"] == least, "online"].to_numpy() / found.training["xz"]
    excess = found.coder
    return {
        "raw_gzip": over(lambda i, w: mean(largest[i], w) / mean(tools["gzip"], w)),
        "raw_xz": over(lambda i, w: mean(largest[i], w) / mean(tools["xz"], w)),
        "raw_stream": over(lambda i, w: mean(largest[i], w) / found.stream["xz"]),
        "adjusted": over(lambda i, w: (mean(best[i], w) + sent["best"]) / mean(tools["xz"], w)),
        "turn": over(lambda i, w: (mean(largest[i], w) + sent["largest"]) / (mean(smallest[i], w) + sent["smallest"])),
        "online": Measured(*mean_and_interval(coded_online, LEVEL), seeds),
        "coder": Measured(float(excess.mean()), float(excess.min()), float(excess.max()), seeds),
    }


# --- from the runs to the figure -----------------------------------------------------------------------------------

SUMMARY = [
    *("run_id", "model.d_model", "params_total", "tokens", "train.seed", "status", "final_loss", "final_loss_sem"),
    *("wall_seconds", "code_version"),
]


def run(job: Job) -> Outcome:
    """Trains, codes, draws."""
    size = SIZES[job.scale]
    runs, curves = train(job, size)
    named = runs.rename(columns={"model.d_model": "d_model", "train.seed": "seed"})
    found = measure_lengths(named, curves, size, job.raw)
    return Outcome(
        measured=measure(found, size),
        summary=runs.reindex(columns=SUMMARY),
        tables=(("Bits per byte, models: mean of the seeds", rate_table(found)),),
        figures=tuple(draw(found, job.figure)),
        numbers={"stream": found.stream, "training": found.training,
                 "chunks": {name: float(rate_K.mean()) for name, rate_K in found.chunks.items()}},
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0].partition(",")[0],
    )  # fmt: skip


def rate_table(found: Lengths) -> Table:
    """One line per compressor: held-out text in chunks, with the model, as one stream; the training text."""
    import pandas

    from analysis.plots import short

    rows = [
        {"compressor": name, "chunks": f"{rate_K.mean():.3f}", "with model": f"{rate_K.mean():.3f}",
         "one stream": f"{found.stream[name]:.3f}", "training text": f"{found.training[name]:.3f}"}
        for name, rate_K in found.chunks.items()
    ]  # fmt: skip
    models = found.models.assign(adjusted=found.adjusted(), raw=found.models["chunks"].map(lambda r: r.mean()))
    for n, mine in models.groupby("parameters"):
        rows.append({"compressor": f"model, N = {short(n)}", "chunks": f"{mine['raw'].mean():.3f}",
                     "with model": f"{mine['adjusted'].mean():.3f}", "one stream": "–",
                     "training text": f"{mine['online'].mean():.3f} (online)"})  # fmt: skip
    return pandas.DataFrame(rows)


def draw(found: Lengths, path_stem: Path) -> list[Path]:
    """Rates against model size; what the model's bytes weigh in longer texts; online code. Writes PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(11.5, 4.3), layout="constrained")
        rates, spread, once = figure.subplots(1, 3)
        _draw_rates(rates, found)
        _draw_spread(spread, found)
        _draw_online(once, found)
        return plots.save(figure, path_stem)


TOOLS = {
    "gzip": ("#4a7c3a", (0, (1, 1.5))),
    "bzip2": ("#7a4a8c", (0, (6, 1.5, 1, 1.5))),
    "xz": ("#c2571a", (0, (4, 1.5))),
}


def _draw_rates(axes: Any, found: Lengths) -> None:
    models = found.models.assign(adjusted=found.adjusted(), raw=found.models["chunks"].map(lambda r: r.mean()))
    means = models.groupby("parameters")[["raw", "adjusted"]].mean()
    for column, words, colour, marker in (
        ("raw", "model", "#1f5a8f", "o"),
        ("adjusted", "model and its bytes", "0.25", "s"),
    ):
        axes.plot(means.index, means[column], color=colour, lw=1.2)
        axes.plot(models["parameters"], models[column], ls="", marker=marker, ms=5, mec="white", mew=0.5, color=colour,
                  label=words)  # fmt: skip
    for name, (colour, dashes) in TOOLS.items():
        axes.axhline(found.chunks[name].mean(), color=colour, lw=1.2, ls=dashes, label=f"{name}, in chunks")
    axes.axhline(found.stream["xz"], color=TOOLS["xz"][0], lw=1.2, label="xz, one stream")
    _counts(axes)
    axes.set_ylim(0)
    axes.set_xlabel("parameters N")
    axes.set_ylabel("bits per byte")
    axes.set_title("Held-out text")
    axes.legend(loc="lower left", ncols=2)


def _draw_spread(axes: Any, found: Lengths) -> None:
    import numpy as np

    from analysis import plots

    bytes_G = np.geomspace(found.held_out / 30, found.held_out * 1000, 100)
    models = found.models.assign(raw=found.models["chunks"].map(lambda r: r.mean()))
    means = models.groupby("parameters")["raw"].mean()
    for n, (colour, _) in plots.size_styles(means.index).items():
        axes.plot(
            bytes_G,
            means[n] + 8 * BYTES_PER_PARAMETER * n / bytes_G,
            color=colour,
            lw=1.6,
            label=f"N = {plots.short(n)}",
        )
    colour, dashes = TOOLS["xz"]
    axes.axhline(found.chunks["xz"].mean(), color=colour, lw=1.2, ls=dashes, label="xz, in chunks")
    axes.axvline(found.held_out, color="0.6", lw=1)
    axes.annotate("held-out text", (found.held_out, 0.02), xycoords=("data", "axes fraction"), xytext=(3, 0),
                  textcoords="offset points", fontsize=8, color="0.35")  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(0, 8)
    axes.set_xlabel("bytes of text that the model is sent with")
    axes.set_ylabel("bits per byte, model included")
    axes.set_title("A model pays off in long texts")
    axes.legend(loc="upper right")


def _draw_online(axes: Any, found: Lengths) -> None:
    from analysis import plots

    n_of = found.models.groupby("width")["parameters"].first()
    for n, (colour, marker) in plots.size_styles(n_of).items():
        width = n_of.index[n_of == n][0]
        axes.plot(found.grown["bytes"], found.grown[str(width)], color=colour, marker=marker, ms=5, mec="white",
                  mew=0.5, lw=1.2, label=f"model learning, N = {plots.short(n)}")  # fmt: skip
    for name, (colour, dashes) in TOOLS.items():
        axes.plot(found.grown["bytes"], found.grown[name], color=colour, lw=1.2, ls=dashes, label=name)
    _counts(axes)
    axes.set_ylim(0)
    axes.set_xlabel("bytes of training text coded")
    axes.set_ylabel("bits per byte so far")
    axes.set_title("Online code: no model is sent")
    axes.legend(loc="upper right")


def _counts(axes: Any) -> None:
    from analysis.plots import short

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))


PAPER = Paper(
    name="deletang2024",
    title="Language models as compressors, with and without the bytes of the model",
    source=SOURCE,
    claims=CLAIMS,
    takes={
        "smoke": "a quarter of a minute",
        "laptop": "about 4 minutes on 2 CPU cores",
        "paper": "for a GPU and a corpus of 10^8 bytes; not yet run",
    },
    run=run,
)
