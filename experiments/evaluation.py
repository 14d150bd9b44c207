"""`jaxgpt evaluate`: what checkpoints answer, under several metrics, as rows of a table that `jaxgpt emergence` takes.

A row is a task on a checkpoint. It is appended as soon as it is there, and a row that is there is not made again: by
the digests of checkpoint and task, so that other weights or other examples count as new.

An answer that a model makes is an exact match if the line says it and ends behind it. Likelihoods, and accuracies of
tokens under them, are of the answer's own tokens, whatever follows: a model that would go on may find it likely.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from experiments.flags import Evaluate
from experiments.interrupt import PREEMPTED, ending_at_once
from experiments.tables import is_number, plain
from jaxgpt.config import BadInput
from jaxgpt.tasks.prompts import Asked, ask

if TYPE_CHECKING:
    from jaxgpt.evaluate import Likelihood, Saved
    from jaxgpt.tokenizer import Tokenizer
    from jaxgpt.trained import Trained

VERSION = 2  # raised when the same checkpoint and task come to have other numbers
KEY = ("run_id", "checkpoint", "definition", "ema")
NOTHING = -1  # in place of a token: the row has ended
MADE = ("exact_match", "edit_distance", "hamming", "token_accuracy")  # of answers that a model makes
CHOSEN = ("choice_grade", "masked_probability", "brier")  # of those that it chooses
LIKELY = ("right_probability", "log_likelihood", "token_log_likelihood")
SHOWN = (*MADE, *CHOSEN, "right_probability", "token_log_likelihood")  # of the scores
COLUMNS = (
    *("task", "run_id", "step", "params_total", "params_non_embedding", "tokens", "flops_6nd", "flops_exact", "loss"),
    *("seed", "n", "chance", *MADE, *CHOSEN, *LIKELY, "commonest_answer", "answer_tokens", "shots", *KEY[1:], "place"),
)
WORDS = ("task", "run_id", "checkpoint", "definition", "place")
WHOLE = ("step", "params_total", "params_non_embedding", "tokens", "seed", "n", "shots", "ema")
LEGEND = (  # of the names that need one
    ("exact_match", "the line is the answer and ends there"),
    ("edit_distance", "tokens to change, of at most one more than the answer has"),
    ("hamming", "share of wrong places"),
    ("token_accuracy", "share of right tokens, each behind the right ones"),
    ("masked_probability", "of the right one among the choices"),
    ("right_probability", "of the whole right answer, whatever follows"),
    ("token_log_likelihood", "of the right answer, whatever follows, nats per token"),
)


def evaluate(flags: Evaluate, console: Console) -> int:
    """`jaxgpt evaluate`. Exit code 75 when --max-minutes ended before all rows were there."""
    out = flags.out or flags.results / "evaluation.csv"
    if out.suffix != ".csv":
        raise BadInput(f"--out={out} is not allowed; the table is a CSV file, and its name must end in .csv")
    asked = _asked(flags)
    with ending_at_once():
        from jaxgpt import launch
        from jaxgpt.evaluate import checkpoints
    say = Console(stderr=True, highlight=False)
    found = checkpoints(flags.runs, flags.results, flags.last, lambda line: say.print(line, soft_wrap=True))
    questions = {}
    for saved in found:
        for task in asked:
            key = (saved.tokenizer, task.definition)
            questions[key] = questions.get(key) or _questions(task, saved.tokenizer)
            _check(saved, questions[key])
    rows = read(out)
    _check_definitions(rows, asked, out)
    # The same weights may lie in two folders.
    wanted = list({_identity(saved, task, flags.ema): (saved, task) for saved in found for task in asked}.values())
    have = {_key(row): row for row in rows}
    to_do = [one for one in wanted if _identity(*one, flags.ema) not in have]
    many = f"{len(wanted)} row{'s' * (len(wanted) != 1)} wanted"
    say.print(f"{many}, {len(wanted) - len(to_do)} there already; the table is {out}", soft_wrap=True)
    launch.use_compilation_cache()
    with launch.stopping(flags.max_minutes) as stop, _Shown(to_do, say) as shown:
        for saved, group in itertools.groupby(to_do, key=lambda one: one[0]):
            if stop():
                break
            trained = _load(saved, flags.ema, say)
            for _, task in group:
                if stop() or trained is None:
                    break
                try:
                    row = _row(saved, questions[saved.tokenizer, task.definition], trained, flags.ema)
                except BadInput as error:  # a model that has diverged
                    say.print(f"{_name(saved)} is left out: {error}", soft_wrap=True)
                    break
                append(out, row)
                have[_key(row)] = row
                shown.done(saved, task, row)
    if stop.signum:
        raise launch.Interrupted(stop.signum, f"stopped: {shown.made} of {len(to_do)} rows were made")
    done = [have[key] for one in wanted if (key := _identity(*one, flags.ema)) in have]
    show(done, console)
    console.print(f"rows: {out}", soft_wrap=True)
    if flags.json is not None:
        from jaxgpt import store

        store.write_json(flags.json, done)
    return PREEMPTED if stop() and len(done) < len(wanted) else 0


def _asked(flags: Evaluate) -> list[Asked]:
    """The tasks, each once. Raises BadInput for two of one name, which the table could not tell apart."""
    found: dict[str, tuple[str, Asked]] = {}
    for task in flags.task:
        asked = ask(task, flags.count, flags.shots, flags.key)
        before, first = found.setdefault(asked.name, (task, asked))
        if first.definition != asked.definition:
            raise BadInput(
                f"task={before} and task={task} are different tasks of one name, {asked.name}; rename a file"
            )
    return [asked for _, asked in found.values()]


def _load(saved: Saved, ema: bool, say: Console) -> Trained | None:
    """The model, or None for a checkpoint that is damaged, which is said."""
    from jaxgpt.checkpoint import Damaged

    try:
        return saved.load(ema)
    except Damaged as error:
        say.print(f"{error}; it is left out", soft_wrap=True)
        return None


# --- questions -----------------------------------------------------------------------------------------------------


class Questions(NamedTuple):
    """A task in tokens. answers: of each example the right one, or all its choices one after the other."""

    task: Asked
    prompts: list[np.ndarray]
    answers: list[list[np.ndarray]]


def _questions(task: Asked, tokenizer: Tokenizer) -> Questions:
    def ids(text: str) -> np.ndarray:
        return tokenizer.encode(text.encode())

    return Questions(
        task,
        # Between documents stands the separator: what follows it is how one begins.
        [ids(each.prompt or "\0") for each in task.examples],
        [[ids(text) for text in (each.choices or (each.answer,))] for each in task.examples],
    )


def _check(saved: Saved, questions: Questions) -> None:
    from jaxgpt.evaluate import check_lengths

    longest = [max(map(len, answers)) for answers in questions.answers]
    check_lengths(saved.config.model, questions.prompts, longest, f"task={questions.task.name}, run={saved.name}")


# --- answers and their scores --------------------------------------------------------------------------------------


def _row(saved: Saved, questions: Questions, trained: Trained, ema: bool) -> dict[str, Any]:
    task = questions.task
    found = (_chosen if task.has_choices else _made)(questions, trained)
    values = _about(saved) | {name: float(value) for name, value in found.items()} | {
        "task": task.name, "n": len(task.examples), "chance": task.chance, "commonest_answer": task.commonest,
        "shots": task.shots, **dict(zip(KEY, _identity(saved, task, ema), strict=True)),
    }  # fmt: skip
    return {name: values.get(name) for name in COLUMNS}


def _about(saved: Saved) -> dict[str, Any]:
    """The scales of a checkpoint. Of weights from elsewhere nobody knows the training."""
    from jaxgpt import flops, store

    c, t = saved.config.model, saved.config.train
    n = flops.parameters(c)
    about = {"run_id": saved.name, "place": saved.place, "params_total": n.total,
             "params_non_embedding": n.non_embedding}  # fmt: skip
    if saved.step is None:
        return about
    tokens = saved.step * t.batch_size * c.context
    folder, _, run_id = saved.place.rpartition("/")
    losses = {point["step"]: point.get("validation_loss") for point in store.read_curve(folder, run_id)}
    return about | {
        "step": saved.step,
        "tokens": tokens,
        "flops_6nd": flops.flops_6nd(n.total, tokens),
        "flops_exact": flops.flops_exact(c, tokens, attention="causal"),
        "loss": losses.get(saved.step),  # where no validation was made, there is none
        "seed": t.seed,
    }


def _made(questions: Questions, trained: Trained) -> dict[str, Any]:
    """Scores of answers that the model makes, greedily, until its line ends."""
    from analysis import scores
    from jaxgpt.evaluate import greedy, likelihoods

    tokenizer, rights = trained.tokenizer, [answer for (answer,) in questions.answers]
    ends = [i for i, spelled in enumerate(tokenizer.spelled) if b"\n" in spelled or i == tokenizer.separator]
    # Who spells the answer byte by byte may, and has one token more: the end of the line, or what makes it wrong.
    texts, context = [tokenizer.decode(right) for right in rights], trained.config.model.context
    most = [min(len(text) + 1, context - len(prompt) + 1)
            for text, prompt in zip(texts, questions.prompts, strict=True)]  # fmt: skip
    said = greedy(trained.model, questions.prompts, most, ends=ends, vocabulary=tokenizer.vocab_size)
    lines = [_line(tokenizer, tokens, ends) for tokens in said]
    likely = likelihoods(trained.model, questions.prompts, rights, vocabulary=tokenizer.vocab_size)
    # In bytes first, as the same text may be said in other tokens.
    spelled = [right if line.text == text else line.tokens
               for line, text, right in zip(lines, texts, rights, strict=True)]  # fmt: skip
    cut = [_filled(tokens, len(right)) for tokens, right in zip(spelled, rights, strict=True)]
    longest = max(map(len, rights)) + 1
    found = {
        "exact_match": [line.ended and line.text == text for line, text in zip(lines, texts, strict=True)],
        "edit_distance": scores.edit_distance(
            np.stack(
                [_filled(tokens[: len(right) + 1], longest) for tokens, right in zip(spelled, rights, strict=True)]
            ),
            np.stack([_filled(right, longest) for right in rights]),
            pad=NOTHING,
        ),
        "hamming": [scores.hamming(a[None], b[None].astype(int)) for a, b in zip(cut, rights, strict=True)],
        "token_accuracy": [one.likeliest_L.mean() for one in likely],
        "answer_tokens": [len(right) for right in rights],
    }
    return {name: np.mean(values) for name, values in found.items()} | _likely(likely)


def _chosen(questions: Questions, trained: Trained) -> dict[str, Any]:
    """Scores of answers that the model chooses: the likeliest of the given ones, as a whole."""
    from analysis import scores
    from jaxgpt.evaluate import likelihoods

    pairs = [(prompt, answer) for prompt, answers in zip(questions.prompts, questions.answers, strict=True)
             for answer in answers]  # fmt: skip
    all_likely = iter(likelihoods(trained.model, *zip(*pairs, strict=True), vocabulary=trained.tokenizer.vocab_size))
    found: dict[str, list[Any]] = {name: [] for name in (*CHOSEN, "answer_tokens")}
    of_right = []
    for example, answers in zip(questions.task.examples, questions.answers, strict=True):
        likely, right = list(itertools.islice(all_likely, len(answers))), example.choices.index(example.answer)
        of_right.append(likely[right])
        logp_1xC = np.array([[one.logp_L.sum(dtype=np.float64) for one in likely]])
        weight_1xC = np.exp(logp_1xC - logp_1xC.max())
        right_1 = np.array([right])
        found["choice_grade"].append(scores.choice_grade(logp_1xC, right_1))
        found["masked_probability"].append(scores.masked_probability(logp_1xC, right_1))
        found["brier"].append(scores.brier(weight_1xC / weight_1xC.sum(), right_1))
        found["answer_tokens"].append(len(answers[right]))
    return {name: np.mean(values) for name, values in found.items()} | _likely(of_right)


def _likely(of_right: Sequence[Likelihood]) -> dict[str, Any]:
    """Scores of how likely the right answers are."""
    from analysis import scores

    by_name = {
        "right_probability": scores.right_probability,
        "log_likelihood": scores.sequence_log_likelihood,
        "token_log_likelihood": scores.token_log_likelihood,
    }
    return {name: np.mean([score(one.logp_L[None]) for one in of_right]) for name, score in by_name.items()}


class Line(NamedTuple):
    """What was said until the line ended, as tokens and as bytes, and whether it ended."""

    tokens: np.ndarray
    text: bytes
    ended: bool


def _line(tokenizer: Tokenizer, said: np.ndarray, ends: Sequence[int]) -> Line:
    text = re.split(rb"[\n\0]", tokenizer.decode(said))[0]
    ended = bool(len(said)) and int(said[-1]) in ends
    # A token that ends the line may hold some of it as well.
    whole = ended and len(tokenizer.decode(said[:-1])) == len(text)
    return Line(said[:-1] if whole else said, text, ended)


def _filled(tokens: np.ndarray, length: int) -> np.ndarray:
    """The first `length` tokens, int64, NOTHING behind their end."""
    filled = np.full(length, NOTHING)
    filled[: min(len(tokens), length)] = tokens[:length]
    return filled


# --- the table on disk ---------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a table that this command began; [] without a file. A torn last line counts as never written.

    Raises BadInput for a table of other columns.
    """
    if not path.exists():
        return []
    text = path.read_bytes().decode(errors="replace")
    lines = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
    if not lines:
        return []
    if tuple(lines[0]) != COLUMNS or any(len(line) != len(COLUMNS) for line in lines):
        raise BadInput(f"--out {path} holds another table than this command writes; name a new file")
    return [dict(zip(COLUMNS, map(_value, COLUMNS, line), strict=True)) for line in lines[1:]]


def _value(column: str, text: str) -> Any:
    if column in WORDS:
        return text
    return None if not text else float(text) if column not in WHOLE else int(text)


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a row, on disk when it returns; of a new file the header first. Raises StoreError."""
    from jaxgpt.store import store_error

    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            if whole < size:
                file.truncate(whole)
            if not whole:
                writer.writerow(COLUMNS)
            writer.writerow(["" if row[name] is None else row[name] for name in COLUMNS])
            file.write(written.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise store_error(path, error) from error


def _identity(saved: Saved, task: Asked, ema: bool) -> tuple[Any, ...]:
    """What makes a row, in the order of KEY."""
    return saved.name, saved.digest, f"{task.definition}.{VERSION}", int(ema)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _check_definitions(rows: Sequence[dict[str, Any]], asked: Sequence[Asked], path: Path) -> None:
    """Raises BadInput where one name would stand for two tasks in one table."""
    known = {row["task"]: row["definition"] for row in rows}
    for task in asked:
        definition = f"{task.definition}.{VERSION}"
        if known.setdefault(task.name, definition) != definition:
            raise BadInput(
                f"--out {path} has rows of another task {task.name}: other examples, --count, --shots or --key; name "
                "a new file"
            )


# --- for people ----------------------------------------------------------------------------------------------------


class _Shown:
    """A line for each row on stderr, and a live bar where there is a terminal. A context manager."""

    def __init__(self, to_do: Sequence[tuple[Saved, Asked]], console: Console):
        self.console, self.total, self.made, self.began = console, len(to_do), 0, time.monotonic()
        self.at = self.began
        # A larger model takes longer for the same questions.
        self.work = [_size(saved) * len(task.examples) for saved, task in to_do]
        text = TextColumn("{task.percentage:3.0f} %  {task.fields[state]}")
        self.bars = Progress(text, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> _Shown:
        self.bar = self.bars.add_task("", total=sum(self.work), state="compiling")
        self.bars.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.bars.stop()

    def done(self, saved: Saved, task: Asked, row: dict[str, Any]) -> None:
        """Another row is on disk."""
        from jaxgpt.progress import duration

        self.made, now = self.made + 1, time.monotonic()
        part = sum(self.work[: self.made])
        left = duration((now - self.began) * (sum(self.work) - part) / part)
        name = "choice_grade" if task.has_choices else "exact_match"
        score = f"{name.replace('_', ' ')} {row[name]:.3f}, log-likelihood {row['log_likelihood']:.3f}"
        state = f"row {self.made}/{self.total}  {_name(saved)}  {task.name}: {score}  ({now - self.at:.1f} s)"
        self.at = now
        self.console.print(f"{state}  {left} left" if self.made < self.total else state, soft_wrap=True, markup=False)
        self.bars.update(self.bar, completed=part, state=f"row {self.made + 1}/{self.total}  {left} left")


def _size(saved: Saved) -> int:
    from jaxgpt import flops

    return flops.parameters(saved.config.model).total


def _name(saved: Saved) -> str:
    return f"weights {saved.name}" if saved.step is None else f"run {saved.name} step {saved.step:,}"


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Sorts rows; runs that differ in something else stay apart, and weights from elsewhere come first."""
    seed, step = (-1 if row[name] is None else row[name] for name in ("seed", "step"))
    return row["params_total"], seed, row["run_id"], step


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The rows as tables, one for each task: by size, then by seed, then by step."""
    from analysis.plots import short

    shown: set[str] = set()
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = sorted((row for row in rows if row["task"] == task), key=_place)
        names = [name for name in SHOWN if is_number(mine[0][name])]
        n, chance = mine[0]["n"], mine[0]["chance"]
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0, title_justify="left",
                      title=f"{task}: {n} example{'s' * (n > 1)}, chance {chance:.3g}")  # fmt: skip
        for name in ("run", "seed", "N", "step", "D", "loss", *names):
            # As in the file, but over lines: they are long.
            header = name.replace("_", "_\n")
            table.add_column(header, justify="left" if name == "run" else "right", overflow="fold")
        for row in mine:
            about = (plain(row["seed"], "d"), short(row["params_total"]), plain(row["step"], ",d"),
                     short(row["tokens"]) if row["tokens"] else "–", plain(row["loss"], ".3f"))  # fmt: skip
            table.add_row(row["run_id"], *about, *(f"{row[name]:.3f}" for name in names))
        console.print(table)
        shown.update(names)
    if not rows:
        return
    words = "; ".join(f"{name}: {means}" for name, means in LEGEND if name in shown)
    console.print(f"N: params_total; D: tokens, of training; loss: validation, nats per token; {words}")
    if any(row["step"] is not None and not is_number(row["loss"]) for row in rows):
        console.print("loss –: no validation was made at that step; runs with train.eval_every = train.keep_every make "
                      "one at each kept step")  # fmt: skip
