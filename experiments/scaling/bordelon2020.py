"""Does the error of kernel regression fall with the number of samples as the kernel's spectrum says?

Kernel regression without noise on functions whose power in the kernel's eigenmodes is planted (Bordelon, Canatar &
Pehlevan 2020): eigenvalues k^-b, power of the target k^-a. The error then falls as P^-min(a - 1, 2 b) in the number of
samples P, and at finite P as a self-consistent equation says. Measured errors are fitted as any scaling law is, and
held against both. The eigenfunctions' values are independent Gaussians, for which that equation is meant.

Letters: K modes that are computed, P samples, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, mean_and_interval
from experiments.registry import Job, Outcome, Paper

if TYPE_CHECKING:
    import numpy

    from analysis.fit import Fit

BORDELON = "Bordelon et al. 2020"
LEVEL = 0.9


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues k^-b of the kernel and power k^-a of the target, k = 1, 2, ...; both exponents above 1."""

    name: str
    b: float
    a: float

    @property
    def exponent(self) -> float:
        """The error's, as P grows: what is not learnt of the target, or how slowly the kernel learns the rest."""
        return min(self.a - 1, 2 * self.b)


SPECTRA = (
    Spectrum("rough", b=1.5, a=1.5),
    Spectrum("middle", b=1.5, a=2.0),
    Spectrum("smooth", b=2.0, a=3.0),
    Spectrum("saturated", b=1.2, a=4.0),
)


def _claims() -> Iterator[Claim]:
    for s in SPECTRA:
        yield Claim(s.name, f"eigenvalues k^-{s.b:g}, target's power k^-{s.a:g}: the error falls as P^-min(a-1, 2b)",
                    f"{BORDELON}; Spigler et al. 2020", s.exponent, 0.1 * s.exponent, "1", "same_regime",
                    LEVEL, row=5)  # fmt: skip
    yield Claim("theory", "measured error over that of the self-consistent equation: mean over spectra and P",
                BORDELON, 1.0, 0.05, "1", "same_regime", LEVEL, row=5)  # fmt: skip


CLAIMS = tuple(_claims())


@dataclass(frozen=True)
class Size:
    """What a scale does."""

    samples: tuple[int, ...]
    modes: int
    seeds: int
    bootstraps: int = 1000


SIZES = {
    "smoke": Size((16, 23, 32, 45, 64), modes=256, seeds=3, bootstraps=100),
    "laptop": Size((32, 45, 64, 91, 128, 181, 256, 362, 512), modes=2048, seeds=20),
    "paper": Size((64, 128, 256, 512, 1024, 2048, 4096), modes=16384, seeds=50),
}

# --- theory and measurement ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Modes:
    """The first K modes, and the sums over all others. These fluctuate so fast that they act as a ridge on the kernel
    and as noise on the target.
    """

    eigenvalue_K: numpy.ndarray
    power_K: numpy.ndarray
    ridge: float
    noise: float


def modes(spectrum: Spectrum, count: int) -> Modes:
    """A spectrum's modes."""
    import numpy as np
    from scipy.special import zeta

    k_K = np.arange(1, count + 1.0)
    rest = (float(zeta(power, count + 1)) for power in (spectrum.b, spectrum.a))
    return Modes(k_K**-spectrum.b, k_K**-spectrum.a, *rest)


def theory(m: Modes, samples: int) -> float:
    """The expected error of new data: the self-consistent equation, with ridge and noise (Bordelon et al. 2020).

    kappa = ridge + sum_k kappa l_k / (kappa + P l_k) is solved by bisection in log kappa; then
    error = (noise + sum_k power_k (kappa / (kappa + P l_k))^2) / (1 - sum_k P l_k^2 / (kappa + P l_k)^2).
    """
    import numpy as np
    from scipy.optimize import brentq

    l_K = m.eigenvalue_K

    def short(log_kappa: float) -> float:
        kappa = math.exp(log_kappa)
        return (m.ridge / kappa) + float((l_K / (kappa + samples * l_K)).sum()) - 1

    most = math.log(m.ridge + l_K.sum())
    kappa = math.exp(float(brentq(short, most - 60, most + 1e-9, xtol=1e-13)))  # pyright: ignore[reportArgumentType]
    left_K = kappa / (kappa + samples * l_K)
    spread = samples * float(((l_K * left_K / kappa) ** 2).sum())
    return float((m.noise + (m.power_K * np.square(left_K)).sum()) / (1 - spread))


def error(m: Modes, samples: int, rng: numpy.random.Generator) -> float:
    """The error of new data of one regression on P samples: the distance of the learnt function's coefficients from
    the target's, of random sign, and what the modes that are not computed add.
    """
    import numpy as np

    values_PxK = rng.standard_normal((samples, len(m.eigenvalue_K)))
    target_K = rng.choice([-1.0, 1.0], len(m.power_K)) * np.sqrt(m.power_K)
    y_P = values_PxK @ target_K + math.sqrt(m.noise) * rng.standard_normal(samples)
    kernel_PxP = (values_PxK * m.eigenvalue_K) @ values_PxK.T + m.ridge * np.eye(samples)
    learnt_K = m.eigenvalue_K * (values_PxK.T @ np.linalg.solve(kernel_PxP, y_P))
    return float(((learnt_K - target_K) ** 2).sum() + m.noise)


def errors(size: Size) -> Any:  # pandas' own types do not follow its columns
    """One row per spectrum, P and seed: the error, and theory's."""
    import numpy as np
    import pandas

    rows = []
    for i, spectrum in enumerate(SPECTRA):
        m = modes(spectrum, size.modes)
        for samples in size.samples:
            expected = theory(m, samples)
            rows += [
                {"spectrum": spectrum.name, "b": spectrum.b, "a": spectrum.a, "samples": samples, "seed": seed,
                 "error": error(m, samples, np.random.default_rng([i, samples, seed])), "theory": expected}
                for seed in range(size.seeds)
            ]  # fmt: skip
    return pandas.DataFrame(rows)


# --- what they say -------------------------------------------------------------------------------------------------


def fits(table: Any, size: Size) -> dict[str, Fit]:
    """A power law of each spectrum's errors. Every error comes from samples of its own, so that all are independent."""
    from analysis.fit import fit
    from analysis.laws import KAPLAN_D

    return {
        name: fit(
            KAPLAN_D, {"D": rows["samples"].to_numpy(float)}, rows["error"].to_numpy(float),
            objective="squared_log", starts=20, bootstraps=size.bootstraps, level=LEVEL,
        )
        for name, rows in table.groupby("spectrum")
    }  # fmt: skip


def theory_exponent(table: Any, name: str) -> float:
    """What the same fit makes of theory's errors at the same P: how far from the limit these are."""
    from analysis.fit import fit
    from analysis.laws import KAPLAN_D

    rows = table[table["spectrum"] == name].groupby("samples")["theory"].first()
    return fit(KAPLAN_D, {"D": rows.index.to_numpy(float)}, rows.to_numpy(float), starts=20, bootstraps=0).best[
        "alphaD"
    ]


def measure(table: Any, fitted: dict[str, Fit]) -> dict[str, Measured]:
    """Each claim's value and interval."""
    seeds = table["seed"].nunique()
    found = {
        name: Measured(e.value, *e.interval, seeds, e.remark)
        for name, f in fitted.items()
        if (e := f.parameters["alphaD"])
    }
    ratio_S = (table["error"] / table["theory"]).groupby(table["seed"]).mean().to_numpy()
    return found | {"theory": Measured(*mean_and_interval(ratio_S, LEVEL), seeds)}


def run(job: Job) -> Outcome:
    """Regresses, fits, draws."""
    import pandas

    from jaxgpt import store

    size = SIZES[job.scale]
    table = errors(size).assign(code_version=store.code_version())
    fitted = fits(table, size)
    measured = measure(table, fitted)
    lines = pandas.DataFrame(
        {"eigenvalues": f"k^-{s.b:g}", "target's power": f"k^-{s.a:g}", "min(a-1, 2b)": f"{s.exponent:g}",
         "measured": f"{measured[s.name].value:.3f} ({measured[s.name].low:.3f} to {measured[s.name].high:.3f})",
         "self-consistent equation, same P": f"{theory_exponent(table, s.name):.3f}"}
        for s in SPECTRA
    )  # fmt: skip
    title = f"Exponent of the error for P = {size.samples[0]} to {size.samples[-1]}, {size.seeds} seeds"
    return Outcome(
        measured=measured,
        summary=table,
        tables=((title, lines),),
        figures=tuple(draw(table, fitted, job.figure)),
        numbers={"exponents": lines.to_dict("records")},
        device="CPU (NumPy)",
    )


def draw(table: Any, fitted: dict[str, Fit], path_stem: Path) -> list[Path]:
    """Errors against P with theory's curve, and fitted against analytic exponents."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(9.5, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        for spectrum, (colour, marker) in zip(SPECTRA, plots.size_styles(range(len(SPECTRA))).values(), strict=True):
            _draw_errors(left, table[table["spectrum"] == spectrum.name], spectrum, colour, marker)
            _draw_exponent(right, fitted[spectrum.name], spectrum, colour, marker)
        left.set_xscale("log", base=2)
        left.set_yscale("log")
        left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        left.set_xlabel("samples P")
        left.set_ylabel("squared error of new data")
        left.set_title("Points: mean over seeds. Lines: self-consistent equation")
        left.legend(loc="lower left")
        most = 1.1 * max(s.exponent for s in SPECTRA)
        right.plot([0, most], [0, most], color="black", lw=1, ls=(0, (4, 2)), zorder=1)
        right.set_xlabel("min(a - 1, 2 b)")
        right.set_ylabel("fitted exponent")
        right.set_title(f"Exponents, with {LEVEL:.0%} intervals")
        return plots.save(figure, path_stem)


def _draw_errors(axes: Any, rows: Any, spectrum: Spectrum, colour: Any, marker: str) -> None:
    by_samples = rows.groupby("samples")
    means, theories = by_samples["error"].mean(), by_samples["theory"].first()
    axes.plot(theories.index, theories, color=colour, lw=1.3)
    axes.plot(means.index, means, color=colour, ls="", marker=marker, ms=5.5, mec="white", mew=0.6,
              label=f"a = {spectrum.a:g}, b = {spectrum.b:g}")  # fmt: skip


def _draw_exponent(axes: Any, fitted: Fit, spectrum: Spectrum, colour: Any, marker: str) -> None:
    e = fitted.parameters["alphaD"]
    bars = [[e.value - e.interval[0]], [e.interval[1] - e.value]]
    axes.errorbar([spectrum.exponent], [e.value], yerr=bars, color=colour, fmt=marker, ms=6.5, mec="white", mew=0.6,
                  ecolor="0.2", elinewidth=1.2, capsize=2)  # fmt: skip


PAPER = Paper(
    name="bordelon2020",
    title="Kernel regression learns as its spectrum says: error against samples",
    source=BORDELON,
    claims=CLAIMS,
    takes={
        "smoke": "seconds",
        "laptop": "about half a minute on 2 CPU cores",
        "paper": "hours on a large CPU; not yet run",
    },
    run=run,
)
