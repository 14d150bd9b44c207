"""The papers on whole curves at smoke scale: they share runs, and leave what every reproduction leaves."""

import json
import math

import pytest

from experiments.reproduction import reproduce


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize(
    "name",
    ["tissue2024", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qiu2025", "caballero2023", "mccandlish2018"))],
)
def test_a_smoke_run_measures_every_claim_and_draws(name, results):
    done = reproduce(name, "smoke", results=results)
    written = json.loads((done.folder / "claims.json").read_text())
    assert [c["id"] for c in written] == [c.id for c in done.paper.claims]
    assert all(c["measured"] is not None and math.isfinite(c["measured"]) for c in written)
    assert [path.suffix for path in done.outcome.figures] == [".png", ".svg"]
    assert all(path.stat().st_size > 10_000 for path in done.outcome.figures)
    assert len(done.outcome.summary) == done.outcome.summary["run_id"].nunique()
    assert all(math.isfinite(loss) for loss in done.outcome.summary["final_loss"])
    assert done.outcome.seconds_training > 0
