"""`jaxgpt anatomy`: what is inside a run's checkpoints, as a tidy table with a line per layer and checkpoint.

The measures are those of analysis/anatomy.py, taken on validation windows of the run's own text (inside_measures.py).
inside_page.py prints and draws. Letters as in jaxgpt/model.py; W windows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, TextColumn

from experiments import flags, inside_measures
from experiments.interrupt import ending_at_once
from jaxgpt.config import BadInput, RunConfig

if TYPE_CHECKING:
    import numpy
    import pandas
    from flax import nnx

    from jaxgpt.evaluate import Saved
    from jaxgpt.tokenizer import Tokenizer

TOKENS = 8192  # that are looked at unless --windows says how many windows


@dataclass(frozen=True)
class Subject:
    """What is looked at. place: for trained.load_model; steps: those that are looked at, null of a folder of weights.
    tokenizer: of the text; sha256: of the text that it learned, '' where that is not known."""

    name: str
    place: str
    config: RunConfig
    tokenizer: Tokenizer
    steps: tuple[int | None, ...]
    sha256: str


@dataclass(frozen=True)
class Found:
    """rows: inside_measures.COLUMNS, a line per part and step. audit: a line for each parameter that holds values which
    are not finite. notes: what was left out, and why. even: `analysis.anatomy.even_attention` of the windows, where it
    applies."""

    subject: Subject
    rows: pandas.DataFrame
    audit: tuple[str, ...]
    notes: tuple[str, ...]
    even: tuple[float, float] | None


def anatomy(asked: flags.Anatomy, console: Console) -> None:
    """`jaxgpt anatomy`. Raises BadInput, one line each, before anything is computed."""
    if asked.csv is not None and asked.csv.suffix != ".csv":
        raise BadInput(f"--csv={asked.csv} is not allowed; its name must end in .csv")
    if asked.windows is not None and asked.windows < 1:
        raise BadInput(f"--windows {asked.windows} is not allowed; it must be at least 1")
    with ending_at_once():
        from experiments import inside_page
        from jaxgpt import launch, store
    launch.use_compilation_cache()
    say = Console(stderr=True, highlight=False)
    subject = find(asked.run, asked.results, asked.steps, lambda line: say.print(line, soft_wrap=True, markup=False))
    found = look(subject, asked.windows, asked.corpus, say)
    if asked.csv is not None:
        store.write_bytes(asked.csv, found.rows.to_csv(index=False, lineterminator="\n").encode())
    if asked.json is not None:
        store.write_json(asked.json, {
            "run": subject.name, "columns": inside_measures.COLUMNS, "notes": found.notes, "audit": found.audit,
            "even_attention": None if found.even is None else dict(zip(("sink", "entropy"), found.even, strict=True)),
            "rows": [{k: _json(v) for k, v in row.items()} for row in found.rows.to_dict("records")],
        })  # fmt: skip
    figures = [] if asked.figure is None else inside_page.draw(found, asked.figure)
    inside_page.show(found, console)
    for path in filter(None, (asked.csv, *figures)):
        console.print(str(path), soft_wrap=True, highlight=False)


def _json(value: Any) -> Any:
    """A cell as JSON knows it: null for what is not known or not finite."""
    import pandas

    if pandas.isna(value) or value in (math.inf, -math.inf):
        return None
    return value.item() if hasattr(value, "item") else value


# --- which checkpoints, and which text -----------------------------------------------------------------------------


def find(run: str, root: Path, wanted: str, say: Callable[[str], None]) -> Subject:
    """A run, or a folder of weights, and the steps that `--steps` means. Raises BadInput for what is not there, and for
    a model that did not learn to continue text.
    """
    from jaxgpt import trained
    from jaxgpt.evaluate import checkpoints

    published = (Path(run) / "config.json").is_file()
    if published:
        place = run
    else:
        folder, run_id = trained.find(run, root, say)
        place = f"{folder}/{run_id}"
    # A run's beginning is read here as by every other command; the id in full has no wildcards that could fit others.
    saved = checkpoints((place,), root, say=say)
    first = saved[0]
    if not first.config.model.n_layers:
        raise BadInput(f"run={run} has model.n_layers=0: there is no layer to look into")
    if first.config.model.d_input is not None or first.config.model.d_output is not None:
        raise BadInput(f"run={run} reads or writes vectors (model.d_input, model.d_output); only models of text do")
    sha256 = "" if published else trained.config_of(folder, run_id)[1].partition("+")[0]
    steps = _steps(wanted, run, saved)
    return Subject(first.name, place, first.config, first.tokenizer, steps, sha256)


def _steps(wanted: str, run: str, saved: list[Saved]) -> tuple[int | None, ...]:
    kept = [one.step for one in saved]
    steps = [step for step in kept if step is not None]
    if not steps and wanted not in ("all", "last"):
        raise BadInput(f"--steps {wanted} is not for run={run}: a folder of weights has no steps; leave it out")
    if wanted == "last":
        return (kept[-1],)
    if wanted == "all":
        return (0, *steps) if steps else (None,)
    words = [word.strip() for word in wanted.split(",")]
    if not all(word.isdecimal() for word in words):
        raise BadInput(f"--steps {wanted} is not allowed; it must be all, last, or steps such as 0,{steps[-1]}")
    numbers = dict.fromkeys(int(word) for word in words)
    for step in numbers:
        if step not in (0, *steps):
            raise BadInput(
                f"--steps {step} of run={run} was not kept; there are 0 (the initial parameters), "
                f"{', '.join(map(str, steps))}; train.keep_every keeps more"
            )
    return tuple(sorted(numbers))


def _windows(subject: Subject, windows: int | None, text: str | None) -> tuple[numpy.ndarray, list[str]]:
    """Windows of held-out text, [W, T + 1] int32, evenly over it, and what is to be said of it."""
    import numpy as np

    from jaxgpt import corpus

    d, length = subject.config.data, subject.config.model.context + 1
    name = text if text is not None else d.corpus
    try:
        read = corpus.load(name, d.validation_fraction, length - 1)
    except BadInput as error:
        raise BadInput(str(error).replace("data.corpus=", "--corpus ") if text is not None else
                       f"{error}; --corpus FILE looks at another text") from None  # fmt: skip
    notes = []
    if subject.sha256 and text is None and read.sha256 != subject.sha256:
        notes.append(f"the text of {name} is not the one that the run learned any more: what is held out of it now may "
                     "have been trained on")  # fmt: skip
    tokens = read.validation
    if subject.tokenizer.json:
        tokens = subject.tokenizer.encode(tokens.tobytes())
    most = len(tokens) // length
    if not most:
        raise BadInput(
            f"the held-out text of {name} has {len(tokens)} tokens; model.context={length - 1} needs {length}"
        )
    if windows is not None and windows > most:
        raise BadInput(f"--windows {windows} is more than the held-out text of {name} has: {most} of {length} tokens")
    count = min(most, max(4, TOKENS // (length - 1))) if windows is None else windows
    starts_W = np.linspace(0, len(tokens) - length, count).astype(np.int64)
    window_WxT1 = np.asarray(tokens[starts_W[:, None] + np.arange(length)]).astype(np.int32)
    if window_WxT1.max() >= subject.config.model.vocab_size:
        raise BadInput(f"run={subject.name}: its tokenizer has ids beyond model.vocab_size="
                       f"{subject.config.model.vocab_size}")  # fmt: skip
    return window_WxT1, notes


# --- the look -------------------------------------------------------------------------------------------------------


def look(subject: Subject, windows: int | None, text: str | None, say: Console) -> Found:
    """Every step of the subject looked at. Raises BadInput as `_windows`."""
    from analysis.anatomy import even_attention
    from jaxgpt import build
    from jaxgpt.checkpoint import Damaged

    c, rows, audit = subject.config.model, [], []
    window_WxT1, notes = _windows(subject, windows, text)
    started = None if subject.steps[0] is None else build.init_params(c, subject.config.train.seed)
    initial = None if started is None else inside_measures.parameters(started)
    with _Shown(subject, say) as shown:
        for step in subject.steps:
            try:
                state = _state(subject, step)
            except Damaged as error:
                notes.append(f"{error}; it is left out")
                shown.done(step, None)
                continue
            leaves = inside_measures.parameters(state)
            found = inside_measures.measure(c, state, window_WxT1, separator(subject))
            at = "" if step is None else f"step {step:,}: "
            audit += [f"{at}{line}" for line in inside_measures.not_finite(leaves)]
            rows += inside_measures.table(c, step, leaves, initial, found, window_WxT1.size - len(window_WxT1))
            shown.done(step, float(found["loss"]))
    if not rows:
        raise BadInput(f"run={subject.name} has no checkpoint that is whole: {notes[-1]}")
    frame = inside_measures.tidy(subject.name, len(window_WxT1), rows)
    even = None
    if frame["sink"].notna().to_numpy().any():
        if separator(subject) is None:
            even = even_attention(c.context)
        else:
            notes.append("data.document_mask: queries see their own document alone, so that sink is smaller than where "
                         "all see the window's first position, and there is no line of even attention")  # fmt: skip
    return Found(subject, frame, tuple(audit), tuple(notes + inside_measures.missing(c, initial is None)), even)


def separator(subject: Subject) -> int | None:
    """The token that opens a document, where documents see themselves alone."""
    return subject.tokenizer.separator if subject.config.data.document_mask else None


def _state(subject: Subject, step: int | None) -> nnx.State:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxgpt import build
    from jaxgpt.trained import load_model

    if step == 0:
        return jax.tree.map(jnp.asarray, build.init_params(subject.config.model, subject.config.train.seed))
    return nnx.split(load_model(subject.place, step=step).model)[1]


class _Shown:
    """A line for each checkpoint on stderr, and a live bar where there is a terminal. A context manager."""

    def __init__(self, subject: Subject, console: Console):
        self.console, self.total, self.made, self.began = console, len(subject.steps), 0, time.monotonic()
        text = TextColumn("{task.percentage:3.0f} %  {task.fields[state]}")
        self.bars = Progress(text, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> _Shown:
        self.bar = self.bars.add_task("", total=self.total, state="compiling")
        self.bars.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.bars.stop()

    def done(self, step: int | None, loss: float | None) -> None:
        """Another checkpoint was looked at, or is damaged: then it has no loss."""
        from jaxgpt.progress import duration

        self.made += 1
        left = duration((time.monotonic() - self.began) * (self.total - self.made) / self.made)
        state = f"checkpoint {self.made}/{self.total}{'' if step is None else f'  step {step:,}'}"
        state += "  damaged" if loss is None else f"  loss {loss:.3f}"
        self.console.print(f"{state}  {left} left" if self.made < self.total else state, soft_wrap=True)
        self.bars.update(self.bar, completed=self.made, state=f"{left} left")
