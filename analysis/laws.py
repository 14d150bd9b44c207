"""Scaling laws: functional forms with named parameters, bounds, units and sources.

A law is a sum of power laws, declared by its `terms`, or any other `curve`, written once for NumPy and JAX. Add one by
adding a constant such as `CHINCHILLA` (`tests/analysis/test_laws.py` adds one of each kind).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

SMALLEST_SHARE, LARGEST_SHARE = 1e-5, 1e2


@dataclass(frozen=True)
class Parameter:
    """One parameter of a law: its unit, and the bounds and the box of starts, in the measure of its kind.

    kind           coordinate in the fit                      bounds and start are
    coefficient    log of its term's share                    shares of the typical loss
    scale          the same; the term is (scale / v)^exponent shares of the typical loss
    positive       logarithm                                  plain
    place          log of the ratio to the centre of `of`     parts of the table's range of log `of`: 0 least, 1 most
    exponent       itself, positive                           plain
    slope          itself, of either sign                     plain

    A share is what the term contributes at the centre of the table (the geometric means of the variables, and of the
    loss), so bounds and starts mean the same in any units. An interval whose ends differ by more than the factor
    `span` leaves the parameter not identified; of a slope, by more than the number `span`.
    """

    name: str
    unit: str
    kind: Literal["coefficient", "scale", "positive", "place", "exponent", "slope"]
    bounds: tuple[float, float]
    start: tuple[float, float]
    span: float
    of: str = ""


def coefficient(name: str, unit: str, span: float = 10) -> Parameter:
    """A positive factor in front of a term, with the usual bounds."""
    return Parameter(name, unit, "coefficient", (SMALLEST_SHARE, LARGEST_SHARE), (0.01, 1.0), span)


def scale(name: str, unit: str, span: float = 10) -> Parameter:
    """The constant Nc of a term (Nc / N)^exponent, with the usual bounds."""
    return Parameter(name, unit, "scale", (SMALLEST_SHARE, LARGEST_SHARE), (0.01, 1.0), span)


def exponent(name: str) -> Parameter:
    """A power that a variable is raised to, with the usual bounds."""
    return Parameter(name, "1", "exponent", (1e-3, 3.0), (0.02, 1.5), 3.0)


Terms = tuple[tuple[str, Mapping[str, str]], ...]
Curve = Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any], Any], Any]


@dataclass(frozen=True, eq=False)  # a law is itself: it can be a key although it holds mappings
class Law:
    """A law of the loss in the `variables`.

    `terms` lists (coefficient or scale, {variable: exponent}); "-eta" is the negative of the parameter eta. The law is
    their sum, each variable to the power of minus its exponent, unless it has a `curve`: then the terms only say in
    what coordinates their coefficients are fitted. `derived` are shares in [0, 1] that follow from the parameters.
    `exchangeable` are groups of parameters that can change places, such as the breaks of a broken law: they are
    reported in the order of their first members. `least_points`: what the law asks of a table, beside 2 more points
    than parameters.

    Inside the fit a law has coordinates theta (see `Parameter`), with log variables and log loss measured from the
    table's `centre` (V+1 numbers: mean log of each variable, then of the loss); this keeps the least-squares problem
    well conditioned although log A and alpha are almost collinear in raw units. `curve` gives the centred log loss
    from (coordinates by name, centred log variables by name, the centre's log variables by name, NumPy or jax.numpy).
    """

    name: str
    formula: str
    citation: str
    variables: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    terms: Terms
    derived: Mapping[str, Callable[[Mapping], np.ndarray]] = field(default_factory=dict)
    curve: Curve | None = None
    exchangeable: tuple[tuple[str, ...], ...] = ()
    least_points: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    def predict(self, parameters: Mapping, table: Mapping) -> np.ndarray:
        """Loss in nats per token, for parameters and variables that broadcast against each other."""
        origin = np.zeros(len(self.variables) + 1)
        logs = {v: np.log(np.asarray(table[v], dtype=np.float64)) for v in self.variables}
        at = self._coordinates(parameters, origin)
        return np.exp(self.log_loss(at, logs, dict.fromkeys(self.variables, 0.0)))

    def log_loss(self, at: Mapping, logs: Mapping, middle: Mapping, xp: Any = np) -> Any:
        """Centred log loss from coordinates and centred log variables by name, which broadcast; `xp`: NumPy or JAX."""
        if self.curve is not None:
            return self.curve(at, logs, middle, xp)
        terms = xp.stack(xp.broadcast_arrays(*(at[c] - _power(at, powers, logs) for c, powers in self.terms)))
        top = terms.max(axis=0)
        return top + xp.log(xp.exp(terms - top).sum(axis=0))

    def natural(self, theta_Sxp: np.ndarray, centre: np.ndarray) -> dict[str, np.ndarray]:
        """Parameters in the law's own units, each of shape (S,), from the fit's coordinates; a scale may be inf."""
        at = {name: theta_Sxp[:, i] for i, name in enumerate(self.names)}
        middle, found = dict(zip(self.variables, centre, strict=False)), dict(at)
        with np.errstate(over="ignore"):
            for p in self.parameters:
                if p.kind == "positive":
                    found[p.name] = np.exp(at[p.name])
                elif p.kind == "place":
                    found[p.name] = np.exp(at[p.name] + middle[p.of])
            for name, powers in self.terms:
                log_S = at[name] + centre[-1] + _power(at, powers, middle)
                found[name] = np.exp(log_S / at[next(iter(powers.values()))] if self._is_scale(name) else log_S)
        return found

    def internal(self, parameters: Mapping, centre: np.ndarray) -> np.ndarray:
        """The fit's coordinates (S, p) of parameters in the law's own units, each of shape (S,)."""
        at = self._coordinates(parameters, centre)
        return np.stack(np.broadcast_arrays(*(at[name] for name in self.names)), axis=-1)

    def _coordinates(self, parameters: Mapping, centre: np.ndarray) -> dict[str, np.ndarray]:
        at = {name: np.asarray(parameters[name], dtype=np.float64) for name in self.names}
        middle = dict(zip(self.variables, centre, strict=False))
        for p in self.parameters:
            if p.kind == "positive":
                at[p.name] = np.log(at[p.name])
            elif p.kind == "place":
                at[p.name] = np.log(at[p.name]) - middle[p.of]
        logs = {}
        for name, powers in self.terms:
            times = at[next(iter(powers.values()))] if self._is_scale(name) else 1.0
            logs[name] = times * np.log(at[name]) - centre[-1] - _power(at, powers, middle)
        return at | logs

    def _is_scale(self, name: str) -> bool:
        return self.parameters[self.names.index(name)].kind == "scale"

    def box(self, which: Literal["bounds", "start"], logs_VxM: np.ndarray) -> np.ndarray:
        """(p, 2) in the fit's coordinates, for a table of these centred log variables."""
        box = []
        for p in self.parameters:
            ends = np.array(getattr(p, which), dtype=np.float64)
            if p.kind == "place":
                logs_M = logs_VxM[self.variables.index(p.of)]
                ends = logs_M.min() + ends * np.ptp(logs_M)
            elif p.kind in ("coefficient", "scale", "positive"):
                ends = np.log(ends)
            box.append(ends)
        return np.stack(box)

    def ordered(self, theta_Sxp: np.ndarray) -> np.ndarray:
        """The same laws, with exchangeable groups of parameters in the order of their first members."""
        if not self.exchangeable:
            return theta_Sxp
        columns_GxP = np.array([[self.names.index(name) for name in group] for group in self.exchangeable])
        rank_SxG = theta_Sxp[:, columns_GxP[:, 0]].argsort(axis=1)
        sorted_Sxp = theta_Sxp.copy()
        sorted_Sxp[:, columns_GxP] = np.take_along_axis(theta_Sxp[:, columns_GxP], rank_SxG[:, :, None], axis=1)
        return sorted_Sxp

    def design(self, logs_VxM: np.ndarray) -> np.ndarray:
        """(K, M, p): the logarithm of term k at point m is design[k, m] @ theta."""
        design_KxMxp = np.zeros((len(self.terms), logs_VxM.shape[1], len(self.names)))
        for k, (c, powers) in enumerate(self.terms):
            design_KxMxp[k, :, self.names.index(c)] = 1.0
            for variable, power in powers.items():
                sign = 1.0 if power.startswith("-") else -1.0
                design_KxMxp[k, :, self.names.index(power.removeprefix("-"))] += (
                    sign * logs_VxM[self.variables.index(variable)]
                )
        return design_KxMxp


def _power(at: Mapping, powers: Mapping[str, str], logs: Mapping) -> Any:
    """Sum of exponent times log variable."""
    return sum((-at[e.removeprefix("-")] if e.startswith("-") else at[e]) * logs[v] for v, e in powers.items())


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


# --- Kaplan et al. 2020 -------------------------------------------------------------------------------------------


def _kaplan(variable: str, unit: str, equation: str) -> Law:
    constant, power = f"{variable}c", f"alpha{variable}"
    return Law(
        name=f"kaplan_{variable.lower()}",
        formula=f"L({variable}) = ({constant} / {variable})^{power}",
        citation=f"Kaplan et al. 2020, eq. {equation} (arXiv:2001.08361)",
        variables=(variable,),
        parameters=(scale(constant, unit), exponent(power)),
        terms=((constant, {variable: power}),),
    )


def _kaplan_nd(at: Mapping, logs: Mapping, _middle: Mapping, xp: Any) -> Any:
    of_n = at["Nc"] - at["alphaN"] * logs["N"]
    of_d = at["Dc"] - at["alphaD"] * logs["D"]
    return at["alphaD"] * xp.logaddexp(of_n / at["alphaD"], of_d / at["alphaD"])


KAPLAN_N = _kaplan("N", "parameters", "1.1")
KAPLAN_D = _kaplan("D", "tokens", "1.2")
KAPLAN_C = _kaplan("C", "FLOPs", "1.3")
KAPLAN_ND = Law(
    name="kaplan_nd",
    formula="L(N, D) = ((Nc / N)^(alphaN / alphaD) + Dc / D)^alphaD",
    citation="Kaplan et al. 2020, eq. 1.5 (arXiv:2001.08361)",
    variables=("N", "D"),
    parameters=(scale("Nc", "parameters"), scale("Dc", "tokens"), exponent("alphaN"), exponent("alphaD")),
    terms=(("Nc", {"N": "alphaN"}), ("Dc", {"D": "alphaD"})),
    curve=_kaplan_nd,
)

# --- sums of power laws -------------------------------------------------------------------------------------------

POWER = Law(
    name="power",
    formula="L(x) = A / x^alpha",
    citation="Hestness et al. 2017, section 3 (arXiv:1712.00409)",
    variables=("x",),
    parameters=(coefficient("A", "nats per token x x^alpha"), exponent("alpha")),
    terms=(("A", {"x": "alpha"}),),
)
SATURATING = Law(
    name="saturating",
    formula="L(x) = E + A / x^alpha",
    citation="Henighan et al. 2020, eq. 1.1 (arXiv:2010.14701)",
    variables=("x",),
    parameters=(coefficient("E", "nats per token", 3), coefficient("A", "nats per token x x^alpha"), exponent("alpha")),
    terms=(("E", {}), ("A", {"x": "alpha"})),
)
CHINCHILLA = Law(
    name="chinchilla",
    formula="L(N, D) = E + A / N^alpha + B / D^beta",
    citation="Hoffmann et al. 2022, eq. 2 (arXiv:2203.15556)",
    variables=("N", "D"),
    parameters=(
        coefficient("E", "nats per token", 3),
        coefficient("A", "nats per token x parameters^alpha"),
        coefficient("B", "nats per token x tokens^beta"),
        exponent("alpha"),
        exponent("beta"),
    ),
    terms=(("E", {}), ("A", {"N": "alpha"}), ("B", {"D": "beta"})),
    derived={"a": lambda p: exponents(p)[0], "b": lambda p: exponents(p)[1]},
)
CHINCHILLA_EQUAL = Law(
    name="chinchilla_equal",
    formula="L(N, D) = E + A / N^alpha + B / D^alpha",
    citation="Hoffmann et al. 2022, eq. 2 with alpha = beta (arXiv:2203.15556)",
    variables=("N", "D"),
    parameters=(
        coefficient("E", "nats per token", 3),
        coefficient("A", "nats per token x parameters^alpha"),
        coefficient("B", "nats per token x tokens^alpha"),
        exponent("alpha"),
    ),
    terms=(("E", {}), ("A", {"N": "alpha"}), ("B", {"D": "alpha"})),
)
OVERTRAINING = Law(
    name="overtraining",
    formula="L(C, M) = E + (a M^eta + b / M^eta) / C^eta, where M = D / N",
    citation="Gadre et al. 2024 (arXiv:2403.08540)",
    variables=("C", "M"),
    parameters=(
        coefficient("E", "nats per token", 3),
        coefficient("a", "nats per token x (FLOPs parameters / tokens)^eta"),
        coefficient("b", "nats per token x (FLOPs tokens / parameters)^eta"),
        exponent("eta"),
    ),
    terms=(("E", {}), ("a", {"C": "eta", "M": "-eta"}), ("b", {"C": "eta", "M": "eta"})),
)

# --- data that repeats --------------------------------------------------------------------------------------------


def effective(log_all: Any, log_unique: Any, log_decay: Any, xp: Any = np) -> Any:
    """log of D' = U (1 + R* (1 - exp(-R / R*))), R = D / U - 1: what D tokens, U of them distinct, are worth.

    Of the logarithms of D, U and R*, which broadcast; `xp`: NumPy or JAX. Muennighoff et al. 2023, eq. 5.
    """
    repetitions = xp.expm1(xp.minimum(log_all - log_unique, 50.0))
    return log_unique + xp.log1p(-xp.exp(log_decay) * xp.expm1(-repetitions * xp.exp(-log_decay)))


def _repeated(at: Mapping, logs: Mapping, middle: Mapping, xp: Any) -> Any:
    """Chinchilla's law of the effective N' and D'; in logarithms, as N' = N and D' = D where nothing is in excess."""

    gap = middle["D"] - middle["U"]
    unique = xp.minimum(logs["U"] - gap, logs["D"])  # log U_D from D's centre
    # N that is compute-optimal for U_D tokens: alpha A / N^alpha = beta B / D^beta
    log_ratio = xp.log(at["alpha"]) + at["A"] - xp.log(at["beta"]) - at["B"]
    base = xp.minimum((log_ratio + at["beta"] * unique) / at["alpha"], logs["N"])
    log_n, log_d = effective(logs["N"], base, at["RN"], xp), effective(logs["D"], unique, at["RD"], xp)
    of_n, of_d = at["A"] - at["alpha"] * log_n, at["B"] - at["beta"] * log_d
    return xp.logaddexp(at["E"], xp.logaddexp(of_n, of_d))


DATA_CONSTRAINED = Law(
    name="data_constrained",
    formula="L(N, D, U) = E + A / N'^alpha + B / D'^beta, D' = U' (1 + RD (1 - exp(-(D / U' - 1) / RD))), U' = "
    "min(U, D), and N' likewise from N, RN and the N that is compute-optimal for U' tokens",
    citation="Muennighoff et al. 2023 (arXiv:2305.16264)",
    variables=("N", "D", "U"),
    parameters=(
        *CHINCHILLA.parameters,
        Parameter("RD", "repetitions", "positive", (1e-2, 1e4), (1.0, 100.0), 10),
        Parameter("RN", "repetitions", "positive", (1e-2, 1e4), (1.0, 100.0), 10),
    ),
    terms=CHINCHILLA.terms,
    derived=CHINCHILLA.derived,
    curve=_repeated,
)

# --- broken laws --------------------------------------------------------------------------------------------------


def _broken(breaks: int) -> Law:
    every = range(1, breaks + 1)

    def curve(at: Mapping, logs: Mapping, _middle: Mapping, xp: Any) -> Any:
        log_power = at["b"] - at["c0"] * logs["x"]
        for i in every:
            sharp = xp.exp(-at[f"f{i}"])
            log_power = log_power - at[f"c{i}"] / sharp * xp.logaddexp(0.0, (logs["x"] - at[f"d{i}"]) * sharp)
        return xp.logaddexp(at["a"], log_power)

    def slope(name: str, least: float, most: float) -> Parameter:
        return Parameter(name, "1", "slope", (-3.0, 3.0), (least, most), 0.5)

    product = " ".join(f"(1 + (x / d{i})^(1 / f{i}))^(-c{i} f{i})" for i in every)
    return Law(
        name=f"bnsl_{breaks}",
        formula=f"y(x) = a + b x^-c0 {product}",
        citation="Caballero et al. 2023, eq. 1 (arXiv:2210.14891)",
        variables=("x",),
        parameters=(
            coefficient("a", "nats per token", 3),
            # its share leaves the breaks out, which may be many orders of magnitude at the centre
            Parameter("b", "nats per token x x^c0", "coefficient", (1e-12, 1e12), (0.01, 1.0), 10),
            slope("c0", 0.0, 1.0),
            *(slope(f"c{i}", -1.0, 1.0) for i in every),
            *(Parameter(f"d{i}", "as x", "place", (0.0, 1.0), (0.05, 0.95), 3, of="x") for i in every),
            *(Parameter(f"f{i}", "1", "positive", (1e-2, 10.0), (0.05, 2.0), 10) for i in every),
        ),
        terms=(("a", {}), ("b", {"x": "c0"})),
        curve=curve,
        exchangeable=tuple((f"d{i}", f"c{i}", f"f{i}") for i in every) if breaks > 1 else (),
        least_points=30,
    )


BNSL_1, BNSL_2, BNSL_3 = _broken(1), _broken(2), _broken(3)

LAWS = {
    law.name: law
    for law in (
        *(KAPLAN_N, KAPLAN_D, KAPLAN_C, KAPLAN_ND, POWER, SATURATING, CHINCHILLA, CHINCHILLA_EQUAL, OVERTRAINING),
        *(DATA_CONSTRAINED, BNSL_1, BNSL_2, BNSL_3),
    )
}
