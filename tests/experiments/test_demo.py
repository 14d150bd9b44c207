"""The demo from the command to the figure, and whether its verdicts can come out in each way that they should."""

import errno
import io
import json
import math
import xml.etree.ElementTree

import numpy as np
import pandas as pd
import pytest

from analysis.laws import CHINCHILLA
from experiments.claims import VERDICTS, verdict
from experiments.registry import Job, Unfinished, find
from experiments.reproduction import claims_table, number
from experiments.scaling import demo
from jaxgpt import flops, store
from jaxgpt.config import flatten, to_dict
from jaxgpt.launch import plan

# --- from the command to the figure --------------------------------------------------------------------------------


def test_a_reproduction_leaves_its_files_and_ends_with_the_figures_path(smoke):
    assert smoke.said.code == 0, smoke.said.err
    last = smoke.said.out.splitlines()[-1]
    assert (smoke.home / last).samefile(smoke.outcome / "figure.png")
    assert (smoke.outcome / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert xml.etree.ElementTree.parse(smoke.outcome / "figure.svg").getroot().tag.endswith("svg")
    assert sorted(path.name for path in smoke.outcome.iterdir()) == [
        "claims.json", "figure.png", "figure.svg", "run.json", "summary.csv"]  # fmt: skip


def test_the_run_file_says_how_the_numbers_were_made(smoke):
    run = smoke.json(smoke.outcome / "run.json")
    assert run["command"] == "jaxgpt reproduce demo --scale smoke"
    assert run["scale"] == "smoke"
    assert run["code_versions"] == [run["analysis_code_version"]]
    assert run["versions"]["jax"] == [run["analysis_versions"]["jax"]]
    assert run["device"]
    assert len(run["corpus_sha256"]) == 64
    assert run["seconds_training"] > 0
    assert run["seconds_this_call"] > 0


def test_the_summary_has_every_run_with_its_loss(smoke):
    summary = pd.read_csv(smoke.outcome / "summary.csv")
    size = demo.SWEEPS["smoke"]
    assert len(summary) == len(size.models) * len(size.steps)
    rows = store.load(smoke.home / "results/raw/demo/smoke")[0].set_index("run_id")
    assert list(summary["final_loss"]) == list(rows.loc[summary["run_id"], "final_loss"])
    assert summary["final_loss"].between(1, math.log(256) + 1).all()
    assert list(summary["flops_6nd"]) == list(6 * summary["params_total"] * summary["tokens"])
    assert sorted(set(summary["model.d_model"])) == sorted(width for width, _ in size.models)


def test_every_verdict_follows_from_the_numbers_that_stand_beside_it(smoke):
    claims = smoke.json(smoke.outcome / "claims.json")
    assert [c["id"] for c in claims] == [claim.id for claim in find("demo").claims]
    for c in claims:
        low, high = c["expected"] - c["margin"], c["expected"] + c["margin"]
        from_below, from_above = c["interval"]
        if c["remark"] or from_below is None or from_above is None:
            follows = "inconclusive"
        elif from_below >= low and from_above <= high:
            follows = "reproduced"
        elif from_above < low or from_below > high:
            follows = "not seen at this scale"
        else:
            follows = "inconclusive"
        assert c["verdict"] == follows
        assert c["scope"] == "toy_analogue"
        assert c["scale"] == "smoke"
        assert c["seeds"] == 1
        assert c["verdict"].split()[0] in smoke.said.out  # the table may break the line inside a verdict


def test_json_holds_the_same_numbers_as_the_files_and_the_tables(smoke):
    said = smoke.json("smoke.json")
    assert said["claims"] == smoke.json(smoke.outcome / "claims.json")
    assert (said["name"], said["scale"]) == ("demo", "smoke")
    summary = pd.read_csv(smoke.outcome / "summary.csv")
    assert [row["final_loss"] for row in said["summary"]] == list(summary["final_loss"])
    assert [(smoke.home / path).is_file() for path in said["figures"]] == [True, True]
    for row in said["summary"]:  # the printed losses are those of the file
        assert f"{row['final_loss']:.3f} ± {row['final_loss_sem']:.3f}" in smoke.said.out
    for c in said["claims"]:
        assert number(c["measured"]) in smoke.said.out
    assert said["fit"]["parameters"]["alpha"]["value"] == next(
        c["measured"] for c in said["claims"] if c["id"] == "alpha"
    )


@pytest.mark.usefixtures("no_training")
def test_a_second_call_ends_in_seconds_from_what_is_there(smoke, command, monkeypatch):
    monkeypatch.chdir(smoke.home)
    before = {path.name: path.read_bytes() for path in smoke.outcome.iterdir() if path.name != "run.json"}
    again = command("reproduce", "demo", "--scale", "smoke")
    assert again.code == 0, again.err
    assert again.out == smoke.said.out
    assert "12 of them are done already" in again.err
    assert {name: (smoke.outcome / name).read_bytes() for name in before} == before
    assert smoke.json(smoke.outcome / "run.json")["seconds_this_call"] < 20


def test_the_list_counts_the_verdicts_that_came_out(smoke, command, monkeypatch):
    monkeypatch.chdir(smoke.home)
    monkeypatch.setenv("COLUMNS", "200")  # so that no cell is folded
    said = command("list", "--json", "list.json")
    papers = {paper["name"]: paper for paper in smoke.json("list.json")["papers"]}
    verdicts = [c["verdict"] for c in smoke.json(smoke.outcome / "claims.json")]
    assert papers["demo"]["verdicts"] == {"smoke": verdicts}
    assert all(verdict in said.out for verdict in verdicts)
    first = min(verdicts, key=VERDICTS.index)
    assert f"smoke: {verdicts.count(first)} {first}" in said.out


@pytest.mark.usefixtures("no_training")
def test_a_disk_that_is_full_when_the_figure_is_drawn_is_said_in_one_line(smoke, command, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.chdir(smoke.home)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", full)
        said = command("reproduce", "demo", "--scale", "smoke")
    assert said.code == 2
    assert [line for line in said.err.splitlines() if line.startswith("jaxgpt: ")] == [said.err.splitlines()[-1]]
    assert "no space left" in said.err.splitlines()[-1]
    assert command("reproduce", "demo", "--scale", "smoke").code == 0


@pytest.mark.usefixtures("no_training")
def test_without_time_nothing_is_claimed(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "demo", "--scale", "smoke", "--max-minutes", 0)
    assert said.code == 75  # unfinished
    assert said.err.splitlines()[-1] == "time is up: 0 of 12 runs are done; the same command goes on"
    assert not list(tmp_path.rglob("claims.json"))


# --- what a law that is known beforehand gives ---------------------------------------------------------------------

HOFFMANN = {"E": 1.7, "A": 8.0, "B": 6.0, "alpha": 0.34, "beta": 0.28}


def plant(folder, law, *, noise=1e-5, largest=(1.0,), diverged=0):
    """Rows and curves as finished runs leave them, with losses of a known law; the last `diverged` have none.

    noise: scatter of the log loss. largest: factors on the losses of the largest model, in turn.
    """
    draw = np.random.default_rng(0).standard_normal
    runs = plan(demo.configs(demo.SWEEPS["smoke"]), folder)
    widest = max(run.config.model.d_model for run in runs)
    for i, run in enumerate(runs):
        n = flops.parameters(run.config.model)
        loss = float(CHINCHILLA.predict(law, {"N": n.total, "D": run.config.tokens})) * math.exp(noise * draw())
        if run.config.model.d_model == widest:
            loss *= largest[i % len(largest)]
        bad = i >= len(runs) - diverged
        point = {"step": run.config.train.steps, "flops_6nd": 6 * n.total * run.config.tokens}
        store.append_curve(folder, run.id, [point | {"validation_loss": None if bad else loss}])
        row = {"run_id": run.id, "status": "diverged" if bad else "done", "params_total": n.total,
               "params_non_embedding": n.non_embedding, "tokens": run.config.tokens, "flops_6nd": point["flops_6nd"],
               "final_loss": None if bad else loss, "final_loss_sem": None if bad else 0.01,
               "final_bits_per_byte": None if bad else loss / math.log(2), "steps_done": run.config.train.steps,
               "wall_seconds": 2.0, "device": "planted", "corpus_sha256": run.source.identity,
               "code_version": store.code_version()}  # fmt: skip
        store.write_row(folder, row | flatten(to_dict(run.config)))


@pytest.fixture
def measure(tmp_path, request):
    """Runs the demo on planted losses: what it measured, and its verdicts."""
    request.getfixturevalue("no_training")

    def run(law, **how):
        plant(tmp_path, law, **how)
        outcome = demo.run(Job("smoke", tmp_path, tmp_path / "figure"))
        return outcome, {claim.id: verdict(claim, outcome.measured[claim.id]) for claim in demo.CLAIMS}

    return run


def test_where_the_papers_law_holds_the_demo_finds_its_exponents_and_says_reproduced(measure):
    outcome, verdicts = measure(HOFFMANN)
    found = {name: m.value for name, m in outcome.measured.items()}
    assert found == {
        "a": pytest.approx(0.28 / 0.62, abs=0.02),
        "alpha": pytest.approx(0.34, abs=0.02),
        "beta": pytest.approx(0.28, abs=0.02),
        "extrapolation": pytest.approx(0, abs=1e-3),
    }
    for name, m in outcome.measured.items():
        assert m.low <= m.high
        assert m.low <= m.value <= m.high or name == "extrapolation"  # a mean of |errors| is larger in most resamples
    assert verdicts == dict.fromkeys(found, "reproduced")
    assert outcome.seconds_training == 24
    assert outcome.device == "planted"
    assert sorted(path.name for path in outcome.figures) == ["figure.png", "figure.svg"]
    assert all(path.is_file() for path in outcome.figures)


def test_where_another_law_holds_the_demo_says_that_the_papers_is_not_seen(measure):
    outcome, verdicts = measure({"E": 1.0, "A": 2000.0, "B": 40.0, "alpha": 1.2, "beta": 0.5})
    assert outcome.measured["alpha"].value == pytest.approx(1.2, abs=0.05)
    assert outcome.measured["beta"].value == pytest.approx(0.5, abs=0.05)
    assert outcome.measured["a"].value == pytest.approx(0.5 / 1.7, abs=0.02)
    assert verdicts == {"a": "not seen at this scale", "alpha": "not seen at this scale",
                        "beta": "not seen at this scale", "extrapolation": "reproduced"}  # fmt: skip


@pytest.mark.parametrize(("factor", "error"), [((1.1,), 0.1 / 1.1), ((0.9,), 0.1 / 0.9), ((1.1, 0.9), 0.1)])
def test_where_the_largest_model_breaks_the_law_the_extrapolation_is_not_seen(measure, factor, error):
    outcome, verdicts = measure(HOFFMANN, largest=factor)
    assert outcome.measured["extrapolation"].value == pytest.approx(error, abs=8e-3)
    assert verdicts["extrapolation"] == "not seen at this scale"


def test_where_noise_hides_the_law_nothing_is_decided(measure):
    _, verdicts = measure(HOFFMANN, noise=0.2)
    # But that single losses are predicted to 2 % is then plainly not so.
    assert verdicts.pop("extrapolation") != "reproduced"
    assert verdicts == dict.fromkeys(verdicts, "inconclusive")


def test_a_run_that_diverged_is_left_out_of_the_fit(measure):
    outcome, verdicts = measure(HOFFMANN, diverged=1)
    assert len(outcome.summary) == 11
    assert verdicts == dict.fromkeys(verdicts, "reproduced")


@pytest.mark.usefixtures("no_training")
def test_runs_that_are_missing_leave_the_demo_unfinished(tmp_path):
    plant(tmp_path, HOFFMANN)
    for path in sorted((tmp_path / "runs").iterdir())[:2]:
        path.unlink()
    with pytest.raises(Unfinished, match="10 of 12 runs are done"):
        demo.run(Job("smoke", tmp_path, tmp_path / "figure", max_minutes=0))
    assert not (tmp_path / "figure.png").exists()


@pytest.mark.parametrize("scale", demo.SWEEPS)
def test_the_sweep_of_each_scale_is_sizes_times_budgets_up_to_the_most_flops(scale):
    size = demo.SWEEPS[scale]
    configs = demo.configs(size)
    assert len({json.dumps(to_dict(config)) for config in configs}) == len(configs)
    cells = {(flops.parameters(config.model).total, config.tokens) for config in configs}
    assert len(cells) == len(configs)
    assert all(6 * n * tokens <= size.most_flops for n, tokens in cells)
    sizes, tokens = ({cell[i] for cell in cells} for i in (0, 1))
    assert {(n, d) for n in sizes for d in tokens if 6 * n * d <= size.most_flops} == cells
    assert len(sizes) == len(size.models) >= (4 if scale == "smoke" else 5)
    assert all(sum(cell[0] == n for cell in cells) >= 3 for n in sizes)


def test_a_claim_without_a_number_is_shown_with_a_dash():
    from rich.console import Console

    entry = {"statement": "s", "source": "p", "expected": 1.0, "margin": 0.5, "unit": "nats", "measured": None,
             "interval": [None, math.nan], "level": 0.9, "seeds": 1, "verdict": "inconclusive",
             "remark": "why"}  # fmt: skip
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(claims_table([entry]))
    shown = console.export_text()
    assert "90%" not in shown
    assert shown.count("–") == 2  # measured, and its interval
    assert "1 ± 0.5 nats" in shown
    assert "inconclusive: why" in shown
