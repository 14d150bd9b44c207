"""Training and grading of models that apply bijections: one after the other (`chain`), or two at once (`control`).

Of use to papers on emergence; `schaeffer2023` says what is asked and why.

Letters: R single answers, F prompts, W chains, L answers of a chain, K bijections, V symbols, C symbols of a circle, H
names of a prompt, P worlds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.registry import Job, check_complete
from jaxgpt.config import BadInput, RunConfig, override

if TYPE_CHECKING:
    import numpy
    import pandas

    from jaxgpt.tasks.chains import Chains

CHAIN, CONTROL = "chain", "control"
LENGTHS = (1, 2, 4, 8)
LONGEST = LENGTHS[-1]
CHOICES = 4
# Column, sign that makes larger better, value of a guess among V symbols (32, or in the control circles'), best, name.
METRICS: tuple[tuple[str, float, Any, float, str], ...] = (
    ("exact_8", 1.0, lambda v: 0.0, 1.0, "exact match, 8 answers"),
    ("exact_4", 1.0, lambda v: 0.0, 1.0, "exact match, 4 answers"),
    ("exact_2", 1.0, lambda v: 0.0, 1.0, "exact match, 2 answers"),
    ("sequence", 1.0, lambda v: 0.0, 1.0, "probability of all 8"),
    ("accuracy", 1.0, lambda v: 1 / v, 1.0, "accuracy, 1 answer"),
    ("edit", -1.0, lambda v: 1.0, 0.0, "edit distance of 8"),
    ("hamming", -1.0, lambda v: 1 - 1 / v, 0.0, "Hamming distance of 8"),
    ("probability", 1.0, lambda v: 1 / v, 1.0, "probability"),
    ("brier", -1.0, lambda v: 1 - 1 / v, 0.0, "Brier score"),
    ("choice", 1.0, lambda v: 1 / CHOICES, 1.0, "grade, choice of 4"),
    ("masked", 1.0, lambda v: 1 / CHOICES, 1.0, "probability among 4"),
    ("ce", -1.0, math.log, 0.0, "cross-entropy"),
    ("circle_ce", -1.0, lambda v: math.log(32 / v), 0.0, "cross-entropy of the pair"),
)
DRAWS = 1  # of the random numbers behind chains and choices, beside the seed


@dataclass(frozen=True)
class Family:
    """Models of one kind. bijections: how many there are, K; named: of a prompt. circle: random bijections, or turns of
    circles of so many symbols. zipf: bijection k comes with a probability ~ (k + 1)^-zipf. steps: of the longer
    training. first: the lowest seed. mlps: hidden widths of the MLP that each width of the model comes with, in widths.
    """

    bijections: int
    named: int
    circle: int | None
    zipf: float
    layers: int
    widths: tuple[int, ...]
    steps: int
    batch: int
    rate: float
    first: int = 0
    mlps: tuple[int, ...] = (4,)

    @property
    def sizes(self) -> int:
        """How many sizes of model there are."""
        return len(self.widths) * len(self.mlps)

    @property
    def links(self) -> int:
        """Bijections of a chain at test."""
        return LONGEST if self.named == 1 else self.named


@dataclass(frozen=True)
class Size:
    """What a scale does. chains: W that each model is asked at the end."""

    families: Mapping[str, Family]
    seeds: int
    chains: int


# --- training ------------------------------------------------------------------------------------------------------


def configs(family: Family, seeds: int) -> list[RunConfig]:
    """Lengths of training x widths x hidden widths x seeds, the widest first."""
    from jaxgpt.tasks.chains import SYMBOLS

    return [
        override(RunConfig(), {
            "model.d_model": width, "model.n_layers": family.layers, "model.n_heads": 1,
            "model.d_mlp": None if mlp == 4 else mlp * width,  # the default is 4; said otherwise it is another run
            "model.vocab_size": SYMBOLS + family.bijections, "model.d_output": SYMBOLS,
            "model.context": family.named + 1, "model.positions": "none" if family.named == 1 else "learned",
            "train.batch_size": family.batch, "train.eval_windows": 256, "train.steps": steps,
            "train.eval_every": steps, "train.log_every": max(1, steps // 20), "train.seed": seed,
            "optimizer.learning_rate": family.rate, "optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.25,
            "optimizer.warmup_steps": family.steps // 20, "optimizer.final_fraction": 0.0,
            "optimizer.beta2": 0.99, "optimizer.weight_decay": 0.0,
        })
        for width in reversed(family.widths)
        for mlp in reversed(family.mlps)
        for steps in (family.steps, family.steps // 2)
        for seed in range(family.first, family.first + seeds)
    ]  # fmt: skip


def train(job: Job, size: Size) -> pandas.DataFrame:
    """Runs, with columns family, seed, N (all parameters), longer (of the two trainings). Each seed has its own
    bijections. Raises Unfinished.
    """
    import numpy as np

    from jaxgpt import sweep
    from jaxgpt.tasks import chains

    families = {family.named: family for family in size.families.values()}
    wanted = [config for family in size.families.values() for config in configs(family, size.seeds)]

    def setup(config: RunConfig) -> Any:
        named = config.model.context - 1
        return chains.source(
            config, families[named].links, config.train.seed, families[named].zipf, families[named].circle
        )

    runs = sweep(wanted, job.raw, setup=setup, max_minutes=job.max_minutes)
    check_complete(runs, wanted)
    kinds = np.where(runs["model.context"] == 2, CHAIN, CONTROL)
    longer = runs["train.steps"] == np.asarray([size.families[kind].steps for kind in kinds])
    return runs.copy().assign(family=kinds, seed=runs["train.seed"], N=runs["params_total"], longer=longer)


def without_diverged(runs: Any) -> tuple[pandas.DataFrame, dict[str, int]]:
    """The runs of seeds of which none diverged, and by family how many seeds are left out: the last good checkpoint of
    a run that diverged is no trained model, and a curve over sizes with a hole in it is no other seed's. Raises
    BadInput where fewer than two seeds of a family are left.
    """
    whole = (runs["status"] == "done").groupby([runs["family"], runs["seed"]]).transform("all")
    left = runs[whole]
    lost = {}
    for family, mine in runs.groupby("family"):
        there = left.loc[left["family"] == family, "seed"].nunique()
        lost[str(family)] = mine["seed"].nunique() - there
        if there < 2:
            raise BadInput(f"{lost[str(family)]} of {mine['seed'].nunique()} seeds of the {family} have a run that "
                           "diverged, at least 2 without are needed: lower the rate")  # fmt: skip
    return left, lost


# --- grading -------------------------------------------------------------------------------------------------------


def grade(job: Job, size: Size, runs: Any) -> pandas.DataFrame:
    """One line per run, its scores by all metrics, with columns run_id, family, N, seed, longer and among: how many
    symbols there are to guess among, which in the control are those of a circle. Of the chain the longer training only.
    """
    import numpy as np
    import pandas
    from flax import nnx

    from jaxgpt.tasks import chains
    from jaxgpt.trained import load_model

    lines = []
    for name, family in size.families.items():
        mine = runs[(runs["family"] == name) & (runs["longer"] | (name == CONTROL))]
        after_PxKxV = chains.bijections(family.bijections, family.circle)
        for run in mine.sort_values(["N", "seed"]).to_dict("records"):
            trained, seed = load_model(f"{job.raw}/{run['run_id']}"), int(run["seed"])
            task: Any = chains.source(trained.config, family.links, seed, family.zipf, family.circle).task
            params = nnx.split(trained.model)[1]
            line = {
                **{each: run[each] for each in ("run_id", "family", "longer")}, "N": int(run["N"]), "seed": seed,
                "among": after_PxKxV.shape[-1] if family.circle is None else family.circle,
            }  # fmt: skip
            asked = (task, params, after_PxKxV[seed], np.random.default_rng([DRAWS, seed]))
            lines.append(
                line | (chain_scores(size.chains, family.zipf, *asked) if name == CHAIN else control_scores(*asked))
            )
    return pandas.DataFrame(lines)


def single(logp_RxV: numpy.ndarray, right_R: numpy.ndarray, generator: numpy.random.Generator) -> dict[str, float]:
    """Metrics of R single answers, means: from their log-probabilities in nats and the right symbols."""
    import numpy as np

    from analysis import scores

    logp_RxV = np.asarray(logp_RxV, np.float64)
    others_Rx3 = np.argsort(generator.random(logp_RxV.shape) + (np.eye(logp_RxV.shape[1])[right_R]), axis=1)
    few_Rx4 = np.concatenate([right_R[:, None], others_Rx3[:, : CHOICES - 1]], axis=1)
    few_logp_Rx4, first_R = np.take_along_axis(logp_RxV, few_Rx4, axis=1), np.zeros(len(right_R), int)
    right_logp_R = logp_RxV[np.arange(len(right_R)), right_R]
    return {
        "ce": -float(right_logp_R.mean()),
        "probability": float(np.exp(right_logp_R).mean()),
        "brier": float(scores.brier(np.exp(logp_RxV), right_R).mean()),
        "accuracy": float((logp_RxV.argmax(axis=1) == right_R).mean()),
        "choice": float(scores.choice_grade(few_logp_Rx4, first_R).mean()),
        "masked": float(scores.masked_probability(few_logp_Rx4, first_R).mean()),
    }


def chain_scores(
    count: int, zipf: float, task: Chains, params: Any, after_KxV: numpy.ndarray, generator: numpy.random.Generator
) -> dict[str, float]:
    """Of so many chains of independent bijections, and of as many that iterate one."""
    import numpy as np

    from analysis import scores
    from jaxgpt.tasks import chains

    name_F, symbol_F = (each.ravel() for each in np.indices(after_KxV.shape))  # every fact is asked once
    logp_KxVxV = np.asarray(chains.log_probabilities(task, params, symbol_F, name_F[:, None]), np.float64)
    logp_KxVxV = logp_KxVxV.reshape(*after_KxV.shape, -1)
    answer_KxV = logp_KxVxV.argmax(axis=-1)
    frequency_K = (1.0 + np.arange(len(after_KxV))) ** -zipf
    shape = (count, LONGEST)
    found = {}
    for kind in ("", "iterated_"):
        name_WxL = generator.choice(len(after_KxV), shape, p=frequency_K / frequency_K.sum())
        if kind:
            name_WxL = np.repeat(name_WxL[:, :1], LONGEST, axis=1)
        first_W = generator.integers(after_KxV.shape[1], size=count)
        true_WxL = chains.follow(after_KxV, name_WxL, first_W)
        said_WxL = chains.follow(answer_KxV, name_WxL, first_W)
        before_WxL = np.concatenate([first_W[:, None], true_WxL[:, :-1]], axis=1)
        gap = scores.product_gap((answer_KxV[name_WxL, before_WxL] == true_WxL).astype(float))
        found |= {f"{kind}exact": gap.exact_match, f"{kind}product": gap.product, f"{kind}gap": gap.difference}
        if kind:
            continue
        found |= {f"exact_{n}": float(scores.exact_match(said_WxL[:, :n], true_WxL[:, :n]).mean()) for n in LENGTHS}
        found["edit"] = float(scores.edit_distance(said_WxL, true_WxL).mean()) / LONGEST
        found["hamming"] = float(scores.hamming(said_WxL, true_WxL).mean())
        logp_WLxV, true_WL = logp_KxVxV[name_WxL, before_WxL].reshape(-1, after_KxV.shape[1]), true_WxL.ravel()
        found |= single(logp_WLxV, true_WL, generator)
        right_logp_WxL = logp_WLxV[np.arange(len(true_WL)), true_WL].reshape(shape)
        found["sequence"] = float(scores.right_probability(right_logp_WxL).mean())
        found["closed"] = float(scores.exact_match_of_loss(found["ce"], LONGEST))
    return found


def control_scores(
    task: Chains, params: Any, after_KxV: numpy.ndarray, generator: numpy.random.Generator
) -> dict[str, float]:
    """Of all prompts, in two parts: circle_ce, -log of the probability of all symbols of the right one's circle; and
    the metrics of which of its circle is said, by probabilities among these. Both cross-entropies add up to that of the
    answer among all symbols. Choices among 4 are left out, as circles are no larger.
    """
    import numpy as np

    from jaxgpt.tasks import chains

    grid = np.indices((len(after_KxV),) * task.hops + after_KxV.shape[1:]).reshape(task.hops + 1, -1)
    name_FxH, symbol_F = grid[:-1].T, grid[-1]
    logp_FxV = np.asarray(chains.log_probabilities(task, params, symbol_F, name_FxH), np.float64)
    right_F = chains.follow(after_KxV, name_FxH, symbol_F)[:, -1]
    circle_VxC = np.stack([np.unique(after_V) for after_V in after_KxV.T])  # each turn has a name
    logp_FxC = np.take_along_axis(logp_FxV, circle_VxC[right_F], axis=1)
    circle_logp_F = np.logaddexp.reduce(logp_FxC, axis=1)
    place_F = (circle_VxC[right_F] == right_F[:, None]).argmax(axis=1)
    found = single(logp_FxC - circle_logp_F[:, None], place_F, generator)
    return {"circle_ce": -float(circle_logp_F.mean())} | {
        name: found[name] for name in ("ce", "probability", "brier", "accuracy")
    }
