"""Encodings of positions, right and misprinted, and what they are said to do: exact numbers, float64.

    right   at columns 2i and 2i + 1 the sine and the cosine of p / 10000^(2i/D) (Vaswani et al. 2017, section 3.5)
    wrong   in turn the sine and the cosine of p / D^(2c/10000), c the column's own number: a misprint that swaps base
            and width, and gives no sine its cosine
    sine    the sine of p / 10000^(c/D) in every column c: no cosines

Letters: P positions, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

BASE = 10_000.0
KINDS = {"right": "sin and cos of p / 10000^(2i/D)", "sine": "its sines alone", "wrong": "of p / D^(2c/10000)"}


def encoding(kind: str, positions: int, d_model: int) -> numpy.ndarray:
    """One of KINDS, [P, D], for positions from 0."""
    import numpy as np

    column_D = np.arange(d_model)
    frequency_D = {
        "right": BASE ** -(2 * (column_D // 2) / d_model),
        "sine": BASE ** -(column_D / d_model),
        "wrong": float(d_model) ** -(2 * column_D / BASE),
    }[kind]
    angle_PxD = np.arange(positions)[:, None] * frequency_D
    return np.sin(angle_PxD) if kind == "sine" else np.where(column_D % 2 == 0, np.sin(angle_PxD), np.cos(angle_PxD))


def shift_residual(encoding_PxD: numpy.ndarray, shift: int) -> float:
    """How far the best matrix M is from moving every encoding by so many positions: |PE(p) M - PE(p + shift)| by
    |PE(p + shift)|, Frobenius norms over all p. 0: "for any fixed offset k, PE(pos + k) can be represented as a linear
    function of PE(pos)" (Vaswani et al. 2017).
    """
    import numpy as np

    from_QxD, to_QxD = encoding_PxD[:-shift], encoding_PxD[shift:]
    move_DxD = np.linalg.lstsq(from_QxD, to_QxD, rcond=None)[0]
    return float(np.linalg.norm(from_QxD @ move_DxD - to_QxD) / np.linalg.norm(to_QxD))


def nearest(encoding_PxD: numpy.ndarray) -> numpy.ndarray:
    """How many positions away the position with the nearest encoding is (Euclidean distance), [P]."""
    import numpy as np

    square_P = (encoding_PxD**2).sum(axis=1)
    distance_PxP = square_P[:, None] + square_P[None, :] - 2 * encoding_PxD @ encoding_PxD.T
    np.fill_diagonal(distance_PxP, np.inf)
    return np.abs(distance_PxP.argmin(axis=1) - np.arange(len(encoding_PxD)))
