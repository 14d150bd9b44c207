"""Parameters and tables of every law, to be planted and found again."""

import numpy as np

_N, _D = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e12, 6)))
_GRID, _X = {"N": _N, "D": _D}, np.geomspace(10, 1e7, 60)
_REPEATED = {"N": np.tile(_N, 2), "D": np.tile(_D, 2), "U": np.concatenate([_D, np.minimum(_D, 1e10) / 3])}

PLANTED: dict[str, tuple[dict[str, float], dict[str, np.ndarray]]] = {
    "kaplan_n": ({"Nc": 8.8e13, "alphaN": 0.076}, {"N": _X}),
    "kaplan_d": ({"Dc": 5.4e13, "alphaD": 0.095}, {"D": _X}),
    "kaplan_c": ({"Cc": 1.6e7, "alphaC": 0.057}, {"C": _X}),
    "kaplan_nd": ({"Nc": 6.4e13, "Dc": 1.8e13, "alphaN": 0.076, "alphaD": 0.103}, _GRID),
    "power": ({"A": 12.0, "alpha": 0.09}, {"x": _X}),
    "saturating": ({"E": 1.5, "A": 30.0, "alpha": 0.4}, {"x": _X}),
    "chinchilla": ({"E": 1.7, "A": 400.0, "B": 420.0, "alpha": 0.34, "beta": 0.28}, _GRID),
    "chinchilla_equal": ({"E": 1.7, "A": 400.0, "B": 700.0, "alpha": 0.3}, _GRID),
    "overtraining": ({"E": 1.7, "a": 200.0, "b": 300.0, "eta": 0.16}, {"C": 6 * _N * _D, "M": _D / _N}),
    "data_constrained": (
        {"E": 1.7, "A": 400.0, "B": 700.0, "alpha": 0.34, "beta": 0.31, "RD": 15.0, "RN": 5.0},
        _REPEATED,
    ),
    "bnsl_1": ({"a": 0.5, "b": 3.0, "c0": 0.1, "c1": 0.4, "d1": 1e4, "f1": 0.3}, {"x": _X}),
    "bnsl_2": (
        {"a": 0.5, "b": 3.0, "c0": 0.1, "c1": 0.5, "c2": -0.4, "d1": 1e3, "d2": 1e5, "f1": 0.3, "f2": 0.4},
        {"x": _X},
    ),
    "bnsl_3": (
        {"a": 0.3, "b": 3.0, "c0": 0.1}
        | {"c1": 0.5, "c2": -0.45, "c3": 0.5, "d1": 1e3, "d2": 2e4, "d3": 3e5, "f1": 0.2, "f2": 0.3, "f3": 0.2},
        {"x": _X},
    ),
}
