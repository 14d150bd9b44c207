"""What models say to many prompts at once, and how likely they find given answers: outputs, which others score.

    for saved in checkpoints(["results/raw/sweep"]):        # every step that each run has kept
        model = saved.load().model
        said = greedy(model, prompts, most, ends=ends)      # token ids, at most so many for each
        found = likelihoods(model, prompts, answers)        # log-probability of each token of each answer

Prompts of unequal length are filled up on their right to a few lengths, and rows to a power of two: one program per
model shape and filled size serves all tasks and checkpoints. What stands behind a prompt is never seen: each row has
positions and a cache of its own. So a prompt gets the same tokens in any company, and the same log-probabilities up to
rounding.

Letters as in model.py; N: prompts, L: tokens said, of an answer or to it.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxgpt import checkpoint, store, trained
from jaxgpt.config import BadInput, ModelConfig, RunConfig
from jaxgpt.sample import NOT_FINITE
from jaxgpt.tokenizer import Tokenizer, kept

SHORTEST = 16  # length to which prompts are filled up at least
MOST_ROWS = 256
MOST_NUMBERS = 2**27  # of the largest array that a batch makes: logits or attention weights
KINDS = 3  # named of what runs learned that are left out
ENDED = -2  # in place of a token: the row has ended

Ids = Sequence[int] | np.ndarray


# --- which checkpoints ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A model on disk: a run at a step, or a folder of Hugging Face weights (then `step` is null).

    place: what `trained.load_model` takes. digest: 12 hex digits that change when the weights do.
    """

    place: str
    name: str
    config: RunConfig
    tokenizer: Tokenizer
    step: int | None
    digest: str

    def load(self, ema: bool = False) -> trained.Trained:
        """The model. Raises checkpoint.Damaged, and BadInput as `trained.load_model` does."""
        return trained.load_model(self.place, ema=ema, step=self.step)


def checkpoints(
    patterns: Sequence[str],
    root: Path | str = trained.RAW,
    last: bool = False,
    say: Callable[[str], None] = store.log.warning,
) -> list[Saved]:
    """The checkpoints that patterns name, each once: of every run all kept steps, or with `last` the newest.

    A pattern is the beginning of a run's id, with wildcards if need be (3f2a, *), in sweeps below `root` or, as
    FOLDER/ID, below a folder; a sweep's folder, or one of sweeps; or a folder of Hugging Face weights; folders may have
    wildcards too. `say` is given a line for each run that has no checkpoint yet, and one for all that wildcards fit but
    that did not learn to continue text. Raises BadInput for a pattern that nothing fits, and for such a run where no
    wildcard found it.
    """
    found: dict[tuple[Path, int | None], Saved] = {}  # one place may be named in several ways
    others: dict[tuple[Path, str], str] = {}  # what runs learned that continue no text
    for pattern in patterns:
        is_path = "/" in pattern or Path(pattern).is_dir()  # "*" means runs, not what lies around here
        folders = [Path(path) for path in sorted(glob.glob(pattern)) if is_path and Path(path).is_dir()]
        published = [folder for folder in folders if (folder / "config.json").is_file()]
        runs = _runs(pattern, [folder for folder in folders if folder not in published], Path(root))
        if not published and not runs:
            sweeps = ", ".join(map(str, trained.sweeps(root))) or "none"
            raise BadInput(f"runs={pattern} fits no run and no folder of weights; sweeps below {root}: {sweeps}")
        learned = {run: _other(*trained.config_of(*run)) for run in runs}
        mine = {run: what for run, what in learned.items() if what}
        if mine and not glob.has_magic(pattern):
            ((folder, run_id), what), *_ = mine.items()
            raise BadInput(f"run={run_id} in {folder} did not learn to continue text but {what}; leave it out")
        others |= {(folder.resolve(), run_id): what for (folder, run_id), what in mine.items()}
        fit = [run for run in runs if run not in mine]
        for saved in (*map(_published, published), *(one for run in fit for one in _steps(*run, last, say))):
            found.setdefault((Path(saved.place).resolve(), saved.step), saved)
    if others:
        many = Counter(others.values()).most_common()
        kinds = [f"{what} ({count})" for what, count in many[:KINDS]]
        kinds += [f"others ({sum(count for _, count in many[KINDS:])})"] * (len(many) > KINDS)
        line = f"{len(others)} run{'s' * (len(others) > 1)} did not learn to continue text but {'; '.join(kinds)}"
        if not found:
            raise BadInput(f"runs={' '.join(patterns)}: {line}")
        say(f"left out: {line}")
    if not found:
        raise BadInput(f"runs={' '.join(patterns)}: none of these runs has a checkpoint yet")
    return list(found.values())


def _runs(pattern: str, folders: Sequence[Path], root: Path) -> list[tuple[Path, str]]:
    """(sweep folder, id) of the runs in these folders, and of those whose id fits the end of a pattern."""
    runs = [
        (sweep, name)
        for folder in folders
        if folder.name not in store.FOLDERS
        for sweep in trained.sweeps(folder)
        for name in sorted(store.planned(sweep) or (path.stem for path in (sweep / "runs").glob("[!.]*.json")))
    ]
    where, _, name = pattern.rpartition("/")
    above = [Path(path) for path in sorted(glob.glob(where))] if where else [root]
    ids, sweeps = f"{name}*" if name else "", dict.fromkeys(s for folder in above for s in trained.sweeps(folder))
    runs += [(sweep, each) for sweep in sweeps for each in sorted(store.planned(sweep)) if fnmatch.fnmatch(each, ids)]
    return list(dict.fromkeys(runs))


def _other(config: RunConfig, identity: str) -> str:
    """What a run learned; nothing for one that learned to continue text."""
    sha256, _, _ = identity.partition("+")
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        return identity or "something unknown"
    return "" if config.model.causal else "to read it in both directions (model.causal=false)"


def _steps(folder: Path, run_id: str, last: bool, say: Callable[[str], None]) -> Iterator[Saved]:
    config, identity = trained.config_of(folder, run_id)
    steps = checkpoint.steps(folder / "checkpoints" / run_id)
    if not steps:
        say(f"run {run_id} in {folder} has no checkpoint yet and is left out")
        return
    tokenizer = kept(folder, identity)
    for step in steps[-1:] if last else steps:
        manifest = folder / "checkpoints" / run_id / f"step_{step:08d}" / "manifest.json"
        digest = hashlib.sha256(manifest.read_bytes() if manifest.exists() else b"").hexdigest()[:12]
        yield Saved(f"{folder}/{run_id}", run_id, config, tokenizer, step, digest)


def _published(folder: Path) -> Saved:
    """A folder of Hugging Face weights; its digest is of names, sizes and times, not of gigabytes."""
    from jaxgpt import families, huggingface

    _, model = families.read_config(folder / huggingface.CONFIG, {})
    about = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())
    digest = hashlib.sha256(repr(about).encode()).hexdigest()[:12]
    tokenizer = huggingface.load_tokenizer(folder)
    return Saved(str(folder), folder.resolve().name, RunConfig(model=model), tokenizer, None, digest)


# --- what a model says ---------------------------------------------------------------------------------------------


def check_lengths(c: ModelConfig, prompts: Sequence[Ids], more: Sequence[int], what: str) -> None:
    """Raises BadInput if a prompt with so many more tokens is longer than the context, and says which; or empty."""
    for number, (prompt, extra) in enumerate(zip(prompts, more, strict=True), start=1):
        if not len(prompt):
            raise BadInput(f"{what}: prompt {number} is empty; it must hold a token")
        if len(prompt) + extra > c.context:
            raise BadInput(
                f"{what}: prompt {number} has {len(prompt)} tokens and its answer {extra}, together more than "
                f"model.context={c.context}"
            )


def greedy(
    model: Any,
    prompts: Sequence[Ids],
    most: Sequence[int],
    *,
    ends: Collection[int] = (),
    vocabulary: int | None = None,
) -> list[np.ndarray]:
    """The likeliest continuation of each of N prompts, one token after the other: ids [L], int32.

    A row ends with the first token of `ends`, which it holds, or after most[n] tokens. `vocabulary`: only ids below it
    are said. Equal to `sample.generate` at temperature 0, whatever else is asked. Raises BadInput for prompts that do
    not fit into the context, and for logits that are not finite.
    """
    c = model.config
    check_lengths(c, prompts, [n - 1 for n in most], "greedy")
    graphdef, params = nnx.split(model)
    end_V = np.zeros(c.vocab_size, bool)
    end_V[list(ends)] = True
    limits = end_V, np.int32(c.vocab_size if vocabulary is None else min(vocabulary, c.vocab_size))
    longest, said = max(most, default=1), [np.zeros(0, np.int32)] * len(prompts)
    for batch in _batches(c, prompts):
        most_B = np.asarray([most[n] for n in batch.rows], np.int32)
        said_BxL = _continue(graphdef, params, batch.ids_BxT, batch.length_B, most_B, limits, longest=longest)
        for n, said_L in zip(batch.rows, np.asarray(said_BxL), strict=True):
            said[n] = said_L[said_L != ENDED]
    if any(NOT_FINITE in said_L for said_L in said):
        raise _diverged()
    return said


class Likelihood(NamedTuple):
    """Of each token of an answer, given the prompt and the answer's tokens before it."""

    logp_L: np.ndarray  # float32, nats
    likeliest_L: np.ndarray  # bool: no other token is likelier, and none of lower id as likely


def likelihoods(
    model: Any, prompts: Sequence[Ids], answers: Sequence[Ids], *, vocabulary: int | None = None
) -> list[Likelihood]:
    """How likely each of N answers is behind its prompt, by one forward pass of all its tokens.

    `vocabulary`: the likeliest token is sought among the ids below it. Raises as `greedy` does.
    """
    c = model.config
    check_lengths(c, prompts, [len(answer) for answer in answers], "likelihoods")
    graphdef, params = nnx.split(model)
    width = np.int32(c.vocab_size if vocabulary is None else min(vocabulary, c.vocab_size))
    texts = [np.concatenate([prompt, answer]) for prompt, answer in zip(prompts, answers, strict=True)]
    found = [Likelihood(np.zeros(0, np.float32), np.zeros(0, bool))] * len(texts)
    for batch in _batches(c, texts):
        logp_BxT1, likeliest_BxT1 = map(np.asarray, _score(graphdef, params, batch.ids_BxT, width))
        for n, logp_T1, likeliest_T1 in zip(batch.rows, logp_BxT1, likeliest_BxT1, strict=True):
            places = slice(len(prompts[n]) - 1, len(texts[n]) - 1)
            found[n] = Likelihood(logp_T1[places], likeliest_T1[places])
    if not all(np.isfinite(one.logp_L).all() for one in found):
        raise _diverged()
    return found


def _diverged() -> BadInput:
    return BadInput("the logits are not finite; has the model diverged?")


class Batch(NamedTuple):
    """Token ids filled up with 0, how many count in each row, and which text each row is; the last may come often."""

    ids_BxT: np.ndarray
    length_B: np.ndarray
    rows: list[int]


def _batches(c: ModelConfig, texts: Sequence[Ids]) -> Iterator[Batch]:
    """All texts, those of one filled length together."""
    by_length: dict[int, list[int]] = {}
    for n, text in enumerate(texts):
        filled = max(SHORTEST, 2 ** (len(text) - 1).bit_length())
        by_length.setdefault(max(len(text), min(filled, c.context)), []).append(n)
    for length, mine in sorted(by_length.items()):
        per_row = length * max(c.vocab_size, c.n_heads * length)
        rows = 2 ** (min(MOST_ROWS, max(1, MOST_NUMBERS // per_row)).bit_length() - 1)
        rows = min(rows, 2 ** (len(mine) - 1).bit_length())
        for start in range(0, len(mine), rows):
            chosen = mine[start : start + rows]
            chosen += chosen[-1:] * (rows - len(chosen))
            ids_BxT = np.zeros((rows, length), np.int32)
            for row, n in enumerate(chosen):
                ids_BxT[row, : len(texts[n])] = texts[n]
            yield Batch(ids_BxT, np.asarray([len(texts[n]) for n in chosen], np.int32), chosen)


@partial(jax.jit, static_argnums=0)
def _score(graphdef: nnx.GraphDef, params: nnx.State, ids_BxT: Array, width: Array) -> tuple[Array, Array]:
    """Of each token but the first: its log-probability, and whether it is the likeliest. Both [B, T - 1]."""
    logits_BxTxV = nnx.merge(graphdef, params)(ids_BxT)[:, :-1]
    logits_BxTxV = logits_BxTxV.astype(jnp.promote_types(logits_BxTxV.dtype, jnp.float32))
    target_BxT = ids_BxT[:, 1:]
    logp_BxT = jnp.take_along_axis(jax.nn.log_softmax(logits_BxTxV), target_BxT[..., None], axis=-1)[..., 0]
    return logp_BxT, _likeliest(logits_BxTxV, width) == target_BxT


def _likeliest(logits: Array, width: Array) -> Array:
    """The first of the largest logits below `width`, over the last axis; NOT_FINITE where there is none."""
    allowed = jnp.where(jnp.arange(logits.shape[-1]) < width, logits, -jnp.inf)
    return jnp.where(jnp.isfinite(logits.max(axis=-1)), allowed.argmax(axis=-1), NOT_FINITE).astype(jnp.int32)


@partial(jax.jit, static_argnums=0, static_argnames="longest")
def _continue(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    prompt_BxT: Array,
    length_B: Array,
    most_B: Array,
    limits: tuple[Array, Array],
    *,
    longest: int,
) -> Array:
    """What each row says, [B, longest], ENDED behind its end."""
    end_V, width = limits

    def read(params: nnx.State, prompt_T: Array, length: Array) -> tuple[Array, Any]:
        return _read(nnx.merge(graphdef, params), prompt_T, length, longest)

    def go_on(params: nnx.State, token: Array, cache: Any) -> tuple[Array, Any]:
        logits_1x1xV, cache = nnx.merge(graphdef, params).decode(token[None, None], cache)
        return logits_1x1xV[0, 0], cache

    def turn(state: tuple) -> tuple:
        made, token_B, ended_B, said_BxL, cache = state
        said_BxL = said_BxL.at[:, made].set(jnp.where(ended_B, ENDED, token_B))
        ended_B |= end_V[token_B] | (token_B == NOT_FINITE) | (made + 1 >= most_B)
        logits_BxV, cache = jax.vmap(go_on, in_axes=(None, 0, 0))(params, token_B, cache)
        return made + 1, _likeliest(logits_BxV, width), ended_B, said_BxL, cache

    logits_BxV, cache = jax.vmap(read, in_axes=(None, 0, 0))(params, prompt_BxT, length_B)
    said_BxL = jnp.full((len(prompt_BxT), longest), ENDED, jnp.int32)
    first = jnp.int32(0), _likeliest(logits_BxV, width), most_B < 1, said_BxL, cache
    return jax.lax.while_loop(lambda state: ~state[2].all(), turn, first)[3]


def _read(model: Any, prompt_T: Array, length: Array, longest: int) -> tuple[Array, Any]:
    """The logits [V] behind the first `length` tokens of a prompt, and the cache that has seen these."""
    c = model.config
    cache = model.empty_cache(1, min(len(prompt_T) + longest, max(c.context, len(prompt_T))))
    if c.architecture == "transformer":
        logits_1xTxV, cache = model.decode(prompt_T[None], cache)
        # What was read behind the prompt lies behind the cache's length: hidden until it is overwritten.
        return logits_1xTxV[0, length - 1], cache._replace(length=length)

    # A carry remembers all that it was shown.
    def step(before: tuple[Array, Any], now: tuple[Array, Array]) -> tuple[tuple[Array, Any], None]:
        token, place = now
        logits_1x1xV, cache = model.decode(token[None, None], before[1])
        return jax.tree.map(
            lambda new, old: jnp.where(place < length, new, old), (logits_1x1xV[0, 0], cache), before
        ), None

    logits_V = jnp.zeros(c.vocab_size, jax.eval_shape(model.decode, prompt_T[None], cache)[0].dtype)
    return jax.lax.scan(step, (logits_V, cache), (prompt_T, jnp.arange(len(prompt_T))))[0]
