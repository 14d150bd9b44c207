"""Code lengths against closed forms, the arithmetic coder there and back, planted verdicts, and the command."""

import gzip
import json
import math

import numpy as np
import pandas as pd
import pytest

from experiments import coder
from experiments.claims import verdict
from experiments.scaling import deletang2024 as paper

SIZE = paper.SIZES["laptop"]


# --- the coder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_code_decodes_to_its_message_and_is_as_long_as_the_probabilities_say(seed):
    rng = np.random.default_rng(seed)
    tables = [coder.frequencies(p_V) for p_V in rng.dirichlet(np.full(7, 0.2), 300)]
    message = [int(rng.choice(7, p=counts_V / coder.TOTAL)) for counts_V in tables]
    code = coder.encode(message, tables)
    assert coder.decode(code, len(message), lambda seen: tables[len(seen)]) == message
    ideal = -sum(math.log2(counts_V[s] / coder.TOTAL) for s, counts_V in zip(message, tables, strict=True))
    assert ideal <= 8 * len(code) <= ideal + 2 + 8  # two bits say where in the interval, a byte is filled


def test_the_least_likely_symbols_can_be_coded():
    counts_V = coder.frequencies(np.array([1.0, 0.0, 0.0]))
    assert counts_V.tolist() == [coder.TOTAL - 2, 1, 1]
    message = [1, 2, 0, 2, 2, 1]
    code = coder.encode(message, [counts_V] * 6)
    assert coder.decode(code, 6, lambda _: counts_V) == message


def test_a_message_of_nothing_is_a_code_of_at_most_a_byte():
    code = coder.encode([], [])
    assert len(code) <= 1
    assert coder.decode(code, 0, lambda _: np.ones(2)) == []


def bigram(p_VxV):
    """A model that knows the last byte only, as `coder.probabilities` gives one."""
    return lambda tokens_BxT: np.log(p_VxV)[tokens_BxT]


@pytest.mark.parametrize("context", [16, 30, 63, 100])
def test_a_chunk_costs_eight_bits_and_each_further_byte_once_whatever_the_windows(context):
    rng = np.random.default_rng(0)
    p_VxV, chunk_n = rng.dirichlet(np.ones(256), 256), rng.integers(256, size=64)
    by_hand = 8 - np.log2(p_VxV[chunk_n[:-1], chunk_n[1:]]).sum()
    assert coder.model_bits(bigram(p_VxV), chunk_n, context) == pytest.approx(by_hand, rel=1e-12)


def test_coding_with_a_model_takes_hardly_more_than_its_log_loss():
    rng = np.random.default_rng(1)
    excess = coder.coded(bigram(rng.dirichlet(np.ones(256), 256)), rng.integers(256, size=(4, 64)))
    assert 0 <= excess < 11 / 256


def test_a_model_that_decodes_otherwise_than_it_coded_is_found_out():
    rng = np.random.default_rng(1)
    p_VxV, calls = rng.dirichlet(np.ones(256), 256), []

    def fickle(tokens_BxT):
        calls.append(1)
        return bigram(p_VxV if len(calls) <= 2 else p_VxV[::-1])(tokens_BxT)

    with pytest.raises(RuntimeError, match="does not decode"):
        coder.coded(fickle, rng.integers(256, size=(2, 16)))


def test_the_online_code_adds_up_the_losses_and_wants_all_of_them():
    curve = pd.DataFrame({"step": [1, 2], "train_loss": [math.log(256), math.log(2)]})
    assert coder.online(curve, batch=3, context=4) == pytest.approx([3 * (8 + 32), 3 * (8 + 4)])
    with pytest.raises(ValueError, match="lacks steps"):
        coder.online(curve.iloc[1:], 3, 4)


def test_classical_lengths_are_those_of_what_decompresses_again():
    text = b"to be or not to be, that is the question. " * 20
    bits = {name: of(text) for name, of in coder.classical().items()}
    assert gzip.decompress(gzip.compress(text, 9, mtime=0)) == text
    assert bits["gzip"] == 8 * len(gzip.compress(text, 9, mtime=0))
    assert bits["xz"] < bits["gzip"] < 8 * len(text)


# --- the text and the verdicts -------------------------------------------------------------------------------------


def test_each_window_is_read_once_in_an_order_of_the_seeds_own():
    configs = paper.configs(paper.SIZES["smoke"])
    first, second = (paper.windows_once()(c) for c in configs[:2])
    steps = configs[0].train.steps
    read = [np.concatenate([b for b, _ in zip(s.stream(i, 0, 0), range(steps), strict=False)])
            for i, s in enumerate((first, second))]  # fmt: skip
    text_n = paper.training_text(configs[0])
    windows = text_n[: len(text_n) // 33 * 33].reshape(-1, 33)
    assert len(read[0]) <= len(windows) < len(read[0]) + 4
    everything = {w.tobytes() for w in windows}
    for batch in read:
        assert {w.astype(np.uint8).tobytes() for w in batch} <= everything
    assert not np.array_equal(read[0], read[1])
    again = next(first.stream(0, 0, 3))  # going on in the middle gives the same batches
    np.testing.assert_array_equal(again, read[0][12:16])


def planted(rates, *, parameters=(20_000, 60_000), online=(2.0, 1.8)):
    """Lengths of two model sizes with these rates in chunks; xz takes 3 bits in chunks, 1.6 as a stream."""
    rng = np.random.default_rng(0)
    chunk_K = rng.normal(0, 0.2, 50)
    rows = [{"width": i, "seed": seed, "parameters": parameters[i], "online": online[i] + rng.normal(0, 0.01),
             "chunks": rate * (1 + chunk_K / 3) + rng.normal(0, 0.01)} for i, rate in enumerate(rates)
            for seed in range(3)]  # fmt: skip
    chunks = {name: rate + chunk_K for name, rate in {"gzip": 2.9, "bzip2": 3.2, "xz": 3.0}.items()}
    training = dict.fromkeys(chunks, 1.6)
    return paper.Lengths(chunks, training, pd.DataFrame(rows), training, np.full(6, 0.01), 10**6, pd.DataFrame())


def said(lengths):
    found = paper.measure(lengths, SIZE)
    return found, {claim.id: verdict(claim, found[claim.id]) for claim in paper.CLAIMS}


def test_strong_models_beat_all_and_sending_them_costs_what_it_costs():
    found, verdicts = said(planted((2.0, 1.4), online=(1.3, 1.2)))
    for claim in ("raw_gzip", "raw_xz", "raw_stream", "online", "coder"):
        assert verdicts[claim] == "reproduced", claim
    assert found["adjusted"].value == pytest.approx((2.0 + 16 * 0.02) / 3.0, abs=0.02)  # the small one is the best
    assert verdicts["adjusted"] == "not seen at this scale"
    assert found["turn"].value == pytest.approx((1.4 + 0.96) / (2.0 + 0.32), abs=0.02)


def test_models_of_many_bytes_win_only_without_them():
    _, verdicts = said(planted((2.5, 2.4), parameters=(60_000, 90_000)))
    assert verdicts["raw_gzip"] == verdicts["raw_xz"] == "reproduced"
    assert verdicts["adjusted"] == verdicts["turn"] == "reproduced"
    assert verdicts["raw_stream"] == verdicts["online"] == "not seen at this scale"


def test_the_interval_holds_what_seeds_and_what_chunks_leave_open():
    found = paper.with_chunks(lambda i, w: 1 + 0.1 * i + float(np.average(np.arange(5), weights=w)), 3, 5, SIZE)
    alone = paper.with_chunks(lambda i, w: 1 + 0.1 * i + float(w.sum()), 3, 5, SIZE)
    assert found.value == pytest.approx(3.1)
    assert found.high - found.low > alone.high - alone.low > 0


@pytest.mark.slow
def test_the_command_leaves_claims_summary_and_figure(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = command("reproduce", "deletang2024", "--scale", "smoke", "--json", "out.json")
    assert ran.code == 0, ran.err
    outcome = tmp_path / "results/raw/deletang2024/smoke/outcome"
    assert {"claims.json", "figure.png", "figure.svg", "run.json", "summary.csv"} == {p.name for p in outcome.iterdir()}
    claims = json.loads((outcome / "claims.json").read_text())
    assert [c["id"] for c in claims] == [c.id for c in paper.CLAIMS]
    assert all(math.isfinite(c["measured"]) for c in claims)
    assert len(pd.read_csv(outcome / "summary.csv")) == len(paper.configs(paper.SIZES["smoke"]))
