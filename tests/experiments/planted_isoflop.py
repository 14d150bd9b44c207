"""Losses of a known law for the runs of the IsoFLOP sweep, as finished runs would leave them."""

from dataclasses import replace

import numpy as np
import pandas as pd

from experiments.scaling import isoflop
from jaxgpt import flops
from jaxgpt.config import flatten, run_id, to_dict

UNDECAYED = 1.04  # before its decay a run's loss is so many times that of a training that ends there
DESIGN = replace(isoflop.SIZES["laptop"], starts=10, bootstraps=10)
# Hoffmann et al.'s exponents, a = .28 / .62, with optima between DESIGN's sizes.
HOFFMANN = {"E": 1.0, "A": 15.0, "B": 22.0, "alpha": 0.34, "beta": 0.28}
PRINTED = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}  # of the published points


def chinchilla(parameters, counted="total"):
    """The law as a function of a config and the tokens of its training."""

    def loss(config, tokens):
        n = getattr(flops.parameters(config.model), counted)
        p = parameters
        return p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * tokens ** -p["beta"]

    return loss


def plant(configs, loss, *, noise=0.0, seed=0):
    """(runs, curves) with losses loss(config, tokens) times exp(noise x a number that is the trunk's own)."""
    rows, points, own, draw = [], [], {}, np.random.default_rng(seed).standard_normal
    for config in dict.fromkeys(configs):
        o, t, name = config.optimizer, config.train, run_id(config, "planted")
        trunk = (config.model.d_model, t.seed, o.learning_rate, o.warmup_steps)
        luck = np.exp(noise * own.setdefault(trunk, draw()))
        counts, per_step = flops.parameters(config.model), t.batch_size * config.model.context
        decays = o.final_fraction < 1
        rows.append({
            "run_id": name, "status": "done", "params_total": counts.total,
            "params_non_embedding": counts.non_embedding, "tokens": config.tokens,
            "flops_6nd": flops.flops_6nd(counts.total, config.tokens),
            "flops_exact": flops.flops_exact(config.model, config.tokens, attention="causal"),
            "final_loss": luck * loss(config, config.tokens) * (1 if decays else UNDECAYED), "final_loss_sem": 0.01,
            "wall_seconds": 2.0, "device": "planted", "corpus_sha256": "0" * 64, "code_version": "planted",
        } | flatten(to_dict(config)))  # fmt: skip
        points += [
            {"run_id": name, "step": step, "validation_loss": luck * UNDECAYED * loss(config, step * per_step)}
            for step in range(t.eval_every, t.steps + 1, t.eval_every)
        ]
    return pd.DataFrame(rows), pd.DataFrame(points)


def published_points(parameters):
    """240 points of a law, at sizes and compute as theirs."""
    draw = np.random.default_rng(1)
    n, c = 10 ** draw.uniform(7.7, 10.2, 240), 10 ** draw.uniform(18.5, 21.5, 240)
    p, d = parameters, c / (6 * n)
    loss = p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"]
    return pd.DataFrame({"N": n, "D": d, "C": c, "loss": loss * np.exp(1e-4 * draw.standard_normal(240))})
