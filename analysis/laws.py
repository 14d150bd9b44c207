"""Scaling laws: functional forms with named parameters, bounds and sources.

Every law here is a sum of power laws, L = sum_k c_k * prod_v v^(-exponent), so one declaration of its terms gives
predictions and exact first and second derivatives. Add a law by adding a constant such as `CHINCHILLA`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

SMALLEST_SHARE, LARGEST_SHARE = 1e-5, 1e2


@dataclass(frozen=True)
class Parameter:
    """One parameter of a law. A coefficient's bounds and start box are shares of the typical loss.

    The share is what the coefficient's term contributes at the centre of the table (the geometric means of the
    variables, and of the loss), so bounds and starts mean the same in any units.
    """

    name: str
    unit: str
    kind: str  # "coefficient" (positive, fitted as a logarithm) or "exponent"
    bounds: tuple[float, float]
    start: tuple[float, float]
    span: float  # an interval whose ends differ by more than this factor leaves the parameter not identified


def coefficient(name: str, unit: str, span: float) -> Parameter:
    """A positive factor in front of a term, with the usual bounds."""
    return Parameter(name, unit, "coefficient", (SMALLEST_SHARE, LARGEST_SHARE), (0.01, 1.0), span)


def exponent(name: str) -> Parameter:
    """A power that a variable is raised to, with the usual bounds."""
    return Parameter(name, "1", "exponent", (1e-3, 3.0), (0.02, 1.5), 3.0)


@dataclass(frozen=True)
class Law:
    """A sum of power laws in the `variables`.

    `terms` lists (coefficient, {variable: exponent}); `derived` are shares in [0, 1] that follow from the parameters.
    Inside the fit a law has coordinates theta: the logarithms of
    the coefficients' shares and the plain exponents, with log variables and log loss measured from the table's
    `centre` (V+1 numbers: mean log of each variable, then of the loss); this keeps the least-squares problem well
    conditioned although log A and alpha are almost collinear in raw units.
    """

    name: str
    formula: str
    citation: str
    variables: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    terms: tuple[tuple[str, Mapping[str, str]], ...]
    derived: Mapping[str, Callable[[Mapping], np.ndarray]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    def predict(self, parameters: Mapping, table: Mapping) -> np.ndarray:
        """Loss in nats per token, for parameters and variables that broadcast against each other."""
        logs = {v: np.log(np.asarray(table[v], dtype=np.float64)) for v in self.variables}
        terms = [
            np.exp(np.log(parameters[c]) - sum(np.asarray(parameters[e]) * logs[v] for v, e in powers.items()))
            for c, powers in self.terms
        ]
        return np.asarray(sum(terms))

    def natural(self, theta_Sxp: np.ndarray, centre: np.ndarray) -> dict[str, np.ndarray]:
        """Parameters in the law's own units, each of shape (S,), from the fit's coordinates."""
        at = {name: theta_Sxp[:, i] for i, name in enumerate(self.names)}
        middle = dict(zip(self.variables, centre, strict=False))
        scaled = {
            c: np.exp(at[c] + centre[-1] + sum(at[e] * middle[v] for v, e in powers.items()))
            for c, powers in self.terms
        }
        return {**at, **scaled}

    def internal(self, parameters: Mapping, centre: np.ndarray) -> np.ndarray:
        """The fit's coordinates (S, p) of parameters in the law's own units, each of shape (S,)."""
        at = {name: np.asarray(parameters[name], dtype=np.float64) for name in self.names}
        middle = dict(zip(self.variables, centre, strict=False))
        logs = {
            c: np.log(at[c]) - centre[-1] - sum(at[e] * middle[v] for v, e in powers.items())
            for c, powers in self.terms
        }
        return np.stack(np.broadcast_arrays(*({**at, **logs}[name] for name in self.names)), axis=-1)

    def design(self, logs_VxM: np.ndarray) -> np.ndarray:
        """(K, M, p): the logarithm of term k at point m is design[k, m] @ theta."""
        design_KxMxp = np.zeros((len(self.terms), logs_VxM.shape[1], len(self.names)))
        for k, (c, powers) in enumerate(self.terms):
            design_KxMxp[k, :, self.names.index(c)] = 1.0
            for variable, power in powers.items():
                design_KxMxp[k, :, self.names.index(power)] -= logs_VxM[self.variables.index(variable)]
        return design_KxMxp


def log_loss(theta_Sxp: np.ndarray, design_KxMxp: np.ndarray):
    """Log loss (S, M), its gradient (S, M, p), and the terms' shares of the loss (K, S, M)."""
    logs_KxSxM = theta_Sxp @ design_KxMxp.transpose(0, 2, 1)
    top_SxM = logs_KxSxM.max(axis=0)
    share_KxSxM = np.exp(logs_KxSxM - top_SxM)
    total_SxM = share_KxSxM.sum(axis=0)
    share_KxSxM /= total_SxM
    gradient_MxSxp = share_KxSxM.transpose(2, 1, 0) @ design_KxMxp.transpose(1, 0, 2)
    return top_SxM + np.log(total_SxM), gradient_MxSxp.transpose(1, 0, 2), share_KxSxM


def exponents(parameters: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """(a, b): N_opt grows as C^a and D_opt as C^b; Hoffmann et al. 2022, eq. 4."""
    alpha, beta = np.asarray(parameters["alpha"]), np.asarray(parameters["beta"])
    return beta / (alpha + beta), alpha / (alpha + beta)


def frontier(parameters: Mapping, flops) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D (tokens) and loss (nats per token) that are compute-optimal under the Chinchilla law.

    Minimises L(N, D) subject to `flops` = 6 N D; closed form of Hoffmann et al. 2022, eq. 4. Parameters and `flops`
    broadcast against each other.
    """
    a, b = exponents(parameters)
    alpha, beta = np.asarray(parameters["alpha"]), np.asarray(parameters["beta"])
    log_g = (np.log(alpha * parameters["A"]) - np.log(beta * parameters["B"])) / (alpha + beta)
    log_nd = np.log(np.asarray(flops, dtype=np.float64) / 6)
    log_n, log_d = a * log_nd + log_g, b * log_nd - log_g
    # The loss is taken from the logarithms: with both exponents near zero N or D is beyond any float, the loss is not.
    of_n = np.exp(np.log(parameters["A"]) - alpha * log_n)
    of_d = np.exp(np.log(parameters["B"]) - beta * log_d)
    with np.errstate(over="ignore"):
        return np.exp(log_n), np.exp(log_d), parameters["E"] + of_n + of_d


CHINCHILLA = Law(
    name="chinchilla",
    formula="L(N, D) = E + A / N^alpha + B / D^beta",
    citation="Hoffmann et al. 2022, eq. 2 (arXiv:2203.15556)",
    variables=("N", "D"),
    parameters=(
        coefficient("E", "nats per token", span=3),
        coefficient("A", "nats per token x parameters^alpha", span=10),
        coefficient("B", "nats per token x tokens^beta", span=10),
        exponent("alpha"),
        exponent("beta"),
    ),
    terms=(("E", {}), ("A", {"N": "alpha"}), ("B", {"D": "beta"})),
    derived={"a": lambda p: exponents(p)[0], "b": lambda p: exponents(p)[1]},
)
