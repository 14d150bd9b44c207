"""Taking weights away, or changing them, and what that costs: masks, changes, and the gain that is kept.

Letters: I inputs and O outputs of a matrix, as in x W with W [I, O]; N tokens; S sparsities; D width of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from analysis.anatomy import cosine

Change = Literal["rewind", "re-random", "zero", "permute"]
CHANGES: tuple[Change, ...] = ("rewind", "re-random", "zero", "permute")


# --- which weights go ----------------------------------------------------------------------------------------------


def lowest(score: np.ndarray, share: float) -> np.ndarray:
    """True for this share (rounded to a whole number) of the entries of an array, those with the lowest score.

    Equal scores are taken in the order of the array. Raises ValueError for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} is not in [0, 1]")
    taken = np.zeros(score.size, bool)
    taken[np.argsort(score, axis=None, kind="stable")[: round(share * score.size)]] = True
    return taken.reshape(score.shape)


def lowest_of_all(scores: Mapping[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
    """`lowest` of the entries of all arrays together: one may lose all, another none."""
    taken_N = lowest(np.concatenate([score.ravel() for score in scores.values()]), share)
    ends = np.cumsum([score.size for score in scores.values()])[:-1]
    parts = np.split(taken_N, ends)
    return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def lowest_by_output(score_IxO: np.ndarray, share: float) -> np.ndarray:
    """`lowest` within the inputs of each output, so that every output keeps as many weights.

    This is the comparison of Wanda (Sun et al. 2023, "A simple and effective pruning approach for large language
    models"), whose score is `anatomy.weight_scores` with the Euclidean norm of each input over calibration tokens.
    """
    return np.stack([lowest(score_I, share) for score_I in score_IxO.T], axis=1)


# --- what is put in their place ------------------------------------------------------------------------------------


def changed(
    how: Change,
    trained: np.ndarray,
    initial: np.ndarray,
    fresh: np.ndarray,
    mask: np.ndarray,
    draw: np.random.Generator,
) -> np.ndarray:
    """The trained weights with those under the mask changed: set to their own initial values (rewind), to others of
    that distribution (`fresh`: re-random), to 0, or put among themselves in a random order (permute).
    """
    new = trained.copy()
    values = {"rewind": lambda: initial[mask], "re-random": lambda: fresh[mask], "zero": lambda: 0,
              "permute": lambda: draw.permutation(trained[mask])}  # fmt: skip
    new[mask] = values[how]()
    return new


# --- what it costs -------------------------------------------------------------------------------------------------


def retained(loss: np.ndarray | float, initial: float, trained: float) -> np.ndarray:
    """The share of training's gain that is left, (L_init - L) / (L_init - L_0), for losses in nats.

    1 as trained, 0 as before training, less than 0 if worse. Raises ValueError where training gained nothing.
    """
    if not initial > trained:
        raise ValueError(f"the trained loss {trained} is not below the initial one {initial}")
    return (initial - np.asarray(loss)) / (initial - trained)


def tolerated(sparsity_S: np.ndarray, retained_S: np.ndarray, least: float) -> float:
    """The sparsity up to which at least so much is retained, by straight lines between the points; sparsities rise.

    Where the curve comes back above it later, the first crossing counts; the last sparsity, if it never falls below it;
    the first, if it starts below it.
    """
    below = np.flatnonzero(retained_S < least)
    if not len(below):
        return float(sparsity_S[-1])
    at = below[0]
    if at == 0:
        return float(sparsity_S[0])
    left, right = retained_S[at - 1], retained_S[at]
    return float(sparsity_S[at - 1] + (left - least) / (left - right) * (sparsity_S[at] - sparsity_S[at - 1]))


def angular_distance(a_NxD: np.ndarray, b_NxD: np.ndarray) -> float:
    """Mean angle between the vectors of a token at two places, over pi: 0 same direction, .5 orthogonal, 1 opposite
    (the measure of Gromov et al. 2025).
    """
    return float(np.mean(np.arccos(np.clip(cosine(a_NxD, b_NxD), -1, 1))) / np.pi)
