"""`jaxgpt evaluate`: rows of scores over runs and steps, made once each, and what is no task is said in a line."""

import json
import signal

import jax
import numpy as np
import pandas as pd
import pytest

from experiments import evaluation
from jaxgpt import evaluate as outputs
from jaxgpt import store
from jaxgpt.config import ModelConfig, RunConfig
from jaxgpt.evaluate import Likelihood
from jaxgpt.tasks.prompts import ask
from jaxgpt.tokenizer import BYTES, Tokenizer
from jaxgpt.trained import Trained, load_model


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def raw(command, tmp_path_factory):
    """`s`: the smallest run, with all of its four checkpoints; not to be written to."""
    raw = tmp_path_factory.mktemp("raw")
    corpus = raw / "text.txt"
    corpus.write_text("".join(f"the quick brown fox {i} jumps over the lazy dog\n" for i in range(400)))
    words = ["model.d_model=8", "model.n_layers=1", "model.n_heads=1", "model.context=8", "train.batch_size=2",
             "train.steps=4", "train.keep_every=1", "train.eval_every=2", "train.eval_windows=4",
             "train.seed=1", f"data.corpus={corpus}"]  # fmt: skip
    assert command("train", *words, "--out", raw / "s").code == 0
    return raw


def read(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def choices(path):
    entries = [
        {"prompt": "3+4=", "choices": ["7", "12", "8"], "right": 0},
        {"prompt": "", "choices": ["1+", "="], "right": 1},
        {"prompt": "1+1=", "choices": ["3", "2"], "right": 1},
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return entries


def test_there_is_a_row_for_every_kept_step_of_every_run_with_its_scales(command, raw, here):
    said = command("evaluate", "--runs", raw / "s", "--task", "addition-1", "--count", 8, "--out", "t.csv",
                   "--json", "t.json")  # fmt: skip
    assert said.code == 0, said.err
    table, runs = pd.read_csv(here / "t.csv"), store.load_runs(raw / "s")
    assert table["step"].tolist() == [1, 2, 3, 4]
    last = table[table["step"] == 4].set_index("run_id")
    for row in runs.to_dict("records"):
        mine = last.loc[row["run_id"]]
        for name, named in (("params_total",) * 2, ("params_non_embedding",) * 2, ("tokens",) * 2, ("flops_6nd",) * 2,
                            ("flops_exact",) * 2, ("loss", "final_loss"), ("seed", "train.seed")):  # fmt: skip
            assert mine[name] == row[named]
    assert table.loc[table["step"] == 2, "tokens"].tolist() == [2 * 2 * 8]
    assert table.loc[table["step"] % 2 == 1, "loss"].isna().all()  # no validation was made there
    assert (set(table["n"]), set(table["chance"]), set(table["task"])) == ({8}, {0.0}, {"addition-1"})
    assert {row["exact_match"] for row in read(here / "t.json")} == set(table["exact_match"])
    assert "addition-1: 8 examples" in said.out
    for name in ("hamming", "token_accuracy", "token_log_likelihood", "right_probability"):
        assert f"{name}: " in said.out  # as --score takes them
    assert " ".join(said.out.split()).count("loss –: no validation was made at that step; runs with") == 1
    assert "row 4/4" in said.err
    grown = command("emergence", "t.csv", "--task", "task", "--scale", "tokens", "--score", "exact_match", "--chance",
                    "chance", "--n", "n", "--seed", "seed", "--resamples", 20)  # fmt: skip
    assert grown.code == 0, grown.err


def test_rows_that_are_there_are_not_made_again_and_a_stopped_command_goes_on(command, raw, here, monkeypatch):
    words = ("evaluate", "--runs", raw / "s", "--count", 8, "--task", "addition-1")
    whole = command(*words, "--out", "whole.csv")
    append, made = evaluation.append, []

    def stopped_after_three(path, row):
        append(path, row)
        made.append(row)
        if len(made) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(evaluation, "append", stopped_after_three)
    stopped = command(*words, "--out", "t.csv")
    assert (stopped.code, len(made)) == (130, 3)
    assert "stopped: 3 of 4 rows were made; the same command goes on" in stopped.err
    with open(here / "t.csv", "a") as file:
        file.write("addition-1,torn")
    assert command(*words, "--out", "t.csv").out.replace("t.csv", "whole.csv") == whole.out
    assert len(made) == 4
    assert (here / "t.csv").read_text() == (here / "whole.csv").read_text()
    again = command(*words, "subtraction-1", "--last", "--out", "t.csv")
    assert (again.code, len(made)) == (0, 5)
    assert "2 rows wanted, 1 there already" in again.err
    assert command(*words, "--out", "t.csv", "--max-minutes", 0).code == 0
    assert command(*words[:3], "--task", "subtraction-1", "--max-minutes", 0).code == 75


def test_a_task_that_is_given_twice_is_evaluated_once(command, raw, here):
    choices(here / "mine.jsonl")
    said = command("evaluate", "--runs", "*", "--results", raw, "--last", "--out", "t.csv",
                   "--task", "mine.jsonl", "./mine.jsonl", here / "mine.jsonl")  # fmt: skip
    assert (said.code, len(pd.read_csv(here / "t.csv"))) == (0, 1)
    assert "1 row wanted, 0 there already" in said.err
    assert "loss –" not in said.out  # the last step has one
    assert "hamming" not in said.out  # of made answers only


def test_published_weights_have_the_scores_of_their_run_and_no_training_scales(command, raw, here):
    pytest.importorskip("safetensors", reason="needs safetensors: pip install 'jaxgpt[hf]'")
    run_id = min(store.planned(raw / "s"))
    assert command("export-hf", run_id, "weights", "--results", raw).code == 0
    said = command("evaluate", "--runs", "weights", run_id, "--results", raw, "--last", "--task", "addition-1",
                   "--count", 8, "--out", "t.csv", "--json", "t.json")  # fmt: skip
    assert said.code == 0, said.err
    published, own = read(here / "t.json")
    assert (published["run_id"], own["run_id"]) == ("weights", run_id)
    assert [published[name] for name in ("step", "tokens", "flops_6nd", "flops_exact", "loss", "seed")] == [None] * 6
    for name in ("n", *evaluation.MADE, *evaluation.LIKELY):
        assert published[name] == pytest.approx(own[name], abs=1e-5)


def test_choices_are_scored_as_each_alone(command, raw, here):
    entries, forward = choices(here / "mine.jsonl"), jax.jit(lambda model, ids_BxT: model(ids_BxT))
    said = command("evaluate", "--runs", "*", "--results", raw, "--last", "--task", "mine.jsonl", "--out", "t.csv")
    assert said.code == 0, said.err
    for row in pd.read_csv(here / "t.csv").to_dict("records"):
        model, grade, briers = load_model(row["run_id"], raw).model, [], []
        for entry in entries:
            logp = []
            for choice in entry["choices"]:
                prompt, answer = list(entry["prompt"].encode()) or [0], list(choice.encode())
                ids = np.pad([*prompt, *answer], (0, 8 - len(prompt) - len(answer)))
                logits_TxV = np.asarray(forward(model, ids[None])[0], np.float64)
                logp_TxV = logits_TxV - np.log(np.exp(logits_TxV).sum(axis=1, keepdims=True))
                logp.append(sum(logp_TxV[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))
            p = np.exp(logp) / np.exp(logp).sum()
            grade.append(np.argmax(logp) == entry["right"])
            briers.append(((p - np.eye(len(p))[entry["right"]]) ** 2).sum())
        assert row["choice_grade"] == pytest.approx(np.mean(grade))
        assert row["brier"] == pytest.approx(np.mean(briers), abs=1e-5)
        assert row["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
        assert np.isnan(row["exact_match"])


def test_an_answer_that_is_spelled_in_other_tokens_than_the_tokenizers_is_right(monkeypatch):
    # Tokens: 0 the separator, 1 "12", 2 "1", 3 "2", 4 the line's end; the tokenizer spells 12 as one.
    pairs = Tokenizer("", 0, (b"\0", b"12", b"1", b"2", b"\n"), None)
    questions = evaluation.Questions(ask("addition-1", 3), [np.array([2])] * 3, [[np.array([1])]] * 3)
    asked = []

    def greedy(_model, _prompts, most, **_):
        asked.extend(most)
        return [np.array(said) for said in ([2, 3, 4], [1, 4], [2, 2, 2])]

    monkeypatch.setattr(outputs, "greedy", greedy)
    likely = Likelihood(np.log(np.full(1, 0.5, np.float32)), np.ones(1, bool))
    monkeypatch.setattr(outputs, "likelihoods", lambda *_, **__: [likely] * 3)
    for context, most in ((8, 3), (2, 2)):  # the bytes of 12 and one more; what fits behind the prompt
        asked.clear()
        trained = Trained(None, RunConfig(model=ModelConfig(context=context)), pairs, 0)
        found = evaluation._made(questions, trained)
        assert asked == [most] * 3
        # The third says something else, of which two tokens count.
        assert (found["exact_match"], found["edit_distance"], found["hamming"]) == pytest.approx((2 / 3, 2 / 3, 1 / 3))


def test_rows_are_shown_by_size_then_seed_then_step():
    rows = [{"params_total": n, "seed": seed, "run_id": run_id, "step": step}
            for n, seed, run_id, step in ((9, 0, "c", 1), (5, None, "w", None), (5, 1, "a", 1), (5, 0, "b", 2),
                                          (5, 1, "a", 2), (5, 0, "b", 1))]  # fmt: skip
    shown = [(row["run_id"], row["step"]) for row in sorted(rows, key=evaluation._place)]
    assert shown == [("w", None), ("b", 1), ("b", 2), ("a", 1), ("a", 2), ("c", 1)]


def test_scores_of_what_is_said_are_as_by_hand(monkeypatch, here):
    (here / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": "?", "answer": a}) + "\n" for a in ("12", "12", "345", "6"))
    )
    # Right; it goes on; one letter is left out; the document ends too early.
    said = [b"12\n", b"123", b"35\n", b"\0"]
    half = [
        Likelihood(np.log(np.full(len(a), 0.5, np.float32)), np.arange(len(a)) == 0) for a in ("12", "12", "345", "6")
    ]
    monkeypatch.setattr(
        outputs, "greedy", lambda *_, **__: [np.frombuffer(line, np.uint8).astype(np.int32) for line in said]
    )
    monkeypatch.setattr(outputs, "likelihoods", lambda *_, **__: half)
    found = evaluation._made(evaluation._questions(ask("a.jsonl"), BYTES), Trained(None, RunConfig(), BYTES, 0))
    expected = {
        "exact_match": 1 / 4,
        "edit_distance": (0 + 1 + 1 + 1) / 4,
        "hamming": (0 + 0 + 2 / 3 + 1) / 4,
        "token_accuracy": (1 / 2 + 1 / 2 + 1 / 3 + 1) / 4,
        "right_probability": (1 / 4 + 1 / 4 + 1 / 8 + 1 / 2) / 4,
        "log_likelihood": 2 * np.log(0.5),
        "token_log_likelihood": np.log(0.5),
        "answer_tokens": 2,
    }
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--runs zz* --task addition-1", "runs=zz* fits no run and no folder of weights; sweeps below"),
        ("--runs * --task additon-1", "task=additon-1 is not a task; did you mean addition-1?"),
        ("--runs * --task torn.jsonl", "task=torn.jsonl, line 2, lacks answer; it has prompt"),
        ("--runs * --task reversal-9", "prompt 1 has 19 tokens and its answer 9, together more than model.context=8"),
        ("--runs * --task addition-1 --out other.csv", "--out other.csv holds another table than this command writes"),
        ("--runs * --task addition-1 --out t.parquet", "--out=t.parquet is not allowed; the table is a CSV file"),
        ("--runs * --task q.jsonl d/q.jsonl", "task=q.jsonl and task=d/q.jsonl are different tasks of one name, q;"),
        ("--runs * --task addition-1 --out nowhere/t.csv", "--out=nowhere/t.csv is not allowed; there is no folder"),
        ("--runs * --task addition-1 --key 1 --out mine.csv", "--out mine.csv has rows of another task addition-1"),
        ("--runs *", "--task"),
        ("--task addition-1", "--runs"),
    ],
)
def test_bad_input_is_said_in_one_line_and_nothing_is_written(command, raw, here, words, says):
    (here / "torn.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    (here / "other.csv").write_text("a,b\n1,2\n")
    row = dict.fromkeys(evaluation.COLUMNS) | {"task": "addition-1", "definition": "x", "n": 3}
    evaluation.append(here / "mine.csv", row)
    (here / "d").mkdir()
    for path, answer in (("q.jsonl", "a"), ("d/q.jsonl", "b")):
        (here / path).write_text(json.dumps({"prompt": "?", "answer": answer}))
    before = {path: path.read_bytes() for path in here.rglob("*.*")}
    said = command("evaluate", *words.split(), "--results", raw)
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1), said.err
    assert says in said.err
    assert {path: path.read_bytes() for path in here.rglob("*.*")} == before
    assert not (raw / "evaluation.csv").exists()
