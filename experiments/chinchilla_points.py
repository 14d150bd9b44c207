"""The points of Hoffmann et al. 2022 that Besiroglu et al. 2024 read off a figure, and two published laws of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

FILE = "svg_extracted_data.csv"
KEPT = 3.44699  # Besiroglu et al. 2024 leave out the five points with a higher loss
HUBER_DELTA = 1e-3  # of both papers

# Hoffmann et al. 2022, appendix D.3, with the digits that the paper's TeX source has.
HOFFMANN = {"E": 1.6934, "A": 406.4, "B": 410.7, "alpha": 0.3392, "beta": 0.2849}
BESIROGLU = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}


def points() -> pandas.DataFrame:
    """The 240 points: N (all parameters), D = C / (6 N) tokens, C (FLOPs), loss (nats per token).

    From the folder JAXGPT_DATA or the publisher. Raises BadInput where neither has the file.
    """
    import pandas

    from jaxgpt.datafiles import fetch

    table = pandas.read_csv(fetch(FILE))
    table = table.loc[table["loss"] < KEPT].reset_index(drop=True)
    n, c = table["Model Size"], table["Training FLOP"]
    return pandas.DataFrame({"N": n, "D": c / (6 * n), "C": c, "loss": table["loss"]})
