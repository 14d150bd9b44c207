"""Many prompts at once: what is said, and how likely answers are, is as for each prompt alone."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt import build, checkpoint, evaluate, override, store
from jaxgpt.config import BadInput, ModelConfig, RunConfig, to_dict
from jaxgpt.evaluate import checkpoints, greedy, likelihoods
from jaxgpt.sample import generate

V, END = 11, 4


def lively(**changes):
    """A model whose next tokens are neither certain nor all alike."""
    settings = {"d_model": 12, "n_layers": 1, "n_heads": 3, "context": 24, "vocab_size": V, "positions": "learned"}
    c = ModelConfig(**{**settings, **changes})
    rng = np.random.default_rng(3)
    state = jax.tree.map(lambda p: jnp.asarray(0.6 * rng.standard_normal(p.shape), p.dtype), build.abstract_params(c))
    return nnx.merge(build.graphdef(c), state)


RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, V, length) for length in (3, 1, 16, 9, 20)]
ANSWERS = [RNG.integers(0, V, length) for length in (4, 1, 8, 2, 4)]
MODELS = {"learned positions": lively(), "lstm": lively(architecture="lstm")}
alone = jax.jit(lambda model, ids_1xT: model(ids_1xT)[0])


def logits_of(model, ids):
    """Logits [T, V] of one text by itself, in a pass of one shape for all: what stands later changes nothing."""
    return np.asarray(alone(model, np.pad(ids, (0, 24 - len(ids)), constant_values=7)[None]), np.float64)[: len(ids)]


def said_alone(model, prompt, most):
    """The likeliest continuation by full passes, one for each token; ids below V - 1."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most and END not in ids[len(prompt) :]:
        ids.append(int(logits_of(model, np.asarray(ids))[-1, : V - 1].argmax()))
    return ids[len(prompt) :]


MOST = [7, 5, 5, 1, 4]


@pytest.mark.parametrize(("kind", "count"), [("learned positions", 5), ("lstm", 4)])
def test_prompts_of_any_length_are_continued_as_each_alone(kind, count):
    model = MODELS[kind]
    said = greedy(model, PROMPTS[:count], MOST[:count], ends={END}, vocabulary=V - 1)
    expected = [said_alone(model, *one) for one in zip(PROMPTS[:count], MOST, strict=False)]
    assert [found.tolist() for found in said] == expected
    assert len({tuple(found) for found in said}) > 1


def test_it_is_what_generate_says_at_temperature_0():
    model = MODELS["learned positions"]
    found = greedy(model, PROMPTS, MOST)[0]
    assert found.tolist() == list(generate(model, PROMPTS[0], max_tokens=7, temperature=0))


@pytest.mark.parametrize("kind", MODELS)
def test_the_likelihood_of_an_answer_is_that_of_a_pass_over_it_alone(kind):
    model = MODELS[kind]
    for prompt, answer, found in zip(PROMPTS, ANSWERS, likelihoods(model, PROMPTS, ANSWERS), strict=True):
        logits_LxV = logits_of(model, np.concatenate([prompt, answer]))[len(prompt) - 1 : -1]
        logp_LxV = logits_LxV - np.log(np.exp(logits_LxV).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(found.logp_L, logp_LxV[np.arange(len(answer)), answer], atol=2e-5)
        assert found.likeliest_L.tolist() == (logits_LxV.argmax(axis=1) == answer).tolist()


def test_what_the_model_says_is_what_it_finds_likeliest():
    model = MODELS["learned positions"]
    said = greedy(model, PROMPTS, MOST)
    assert all(one.likeliest_L.all() for one in likelihoods(model, PROMPTS, said))


def test_prompts_of_one_filled_length_share_a_program():
    model = MODELS["learned positions"]
    greedy(model, PROMPTS, MOST)
    before = evaluate._continue._cache_size()
    for seed in range(3):
        lengths = np.random.default_rng(seed).integers(1, 16, 4)
        greedy(model, [np.arange(length) % V for length in lengths], [7, 2, 3, 4])
    assert evaluate._continue._cache_size() == before


def test_what_does_not_fit_the_context_is_refused():
    model = MODELS["learned positions"]
    for action, words in ((greedy, ([PROMPTS[4]], [6])), (likelihoods, ([PROMPTS[4]], [np.arange(5)]))):
        with pytest.raises(
            BadInput, match=r"prompt 1 has 20 tokens and its answer 5, together more than model.context"
        ):
            action(model, *words)
    with pytest.raises(BadInput, match="prompt 1 is empty"):
        greedy(model, [[]], [1])
    assert greedy(model, [], []) == likelihoods(model, [], []) == []


def test_a_diverged_model_is_said_to_be_one():
    graphdef, state = nnx.split(MODELS["learned positions"])
    broken = nnx.merge(graphdef, jax.tree.map(lambda p: p * jnp.nan, state))
    for action, words in ((greedy, (PROMPTS, MOST)), (likelihoods, (PROMPTS, ANSWERS))):
        with pytest.raises(BadInput, match="not finite; has the model diverged"):
            action(broken, *words)


# --- which checkpoints ---------------------------------------------------------------------------------------------


IDS, TEXT = ("abc111", "abd222"), "0" * 64
CONFIG = RunConfig(model=ModelConfig(d_model=8, n_layers=1, n_heads=1, context=8))


def plan(folder, config=CONFIG, identity=TEXT):
    """A sweep's folder with two runs that have not begun."""
    store.prepare(folder)
    runs = {run_id: {"config": to_dict(config), "identity": identity} for run_id in IDS}
    store.write_json(folder / "sweep.json", {"runs": runs})
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Below it `a/sweep` with two runs of two checkpoints each; not to be written to."""
    root = tmp_path_factory.mktemp("raw")
    folder = plan(root / "a" / "sweep")
    for number, run_id in enumerate(IDS):
        for step in (1, 2):
            params = build.init_params(CONFIG.model, seed=10 * number + step)
            checkpoint.save(folder / "checkpoints" / run_id, step, {"params": params}, {"step": step})
    return root


@pytest.mark.parametrize(
    "pattern", ["{root}/a", "{root}/a/sweep", "{root}/a/sweep/", "{root}/*", "{root}/*/sweep/?*", "*", "ab"]
)
def test_every_kept_step_of_every_run_is_found_by_folder_id_or_wildcards(root, pattern):
    found = checkpoints([pattern.format(root=root)], root)
    assert [(saved.name, saved.step) for saved in found] == [(run_id, step) for run_id in IDS for step in (1, 2)]
    assert len({saved.digest for saved in found}) == 4


def test_each_checkpoint_is_found_once_and_only_the_newest_if_that_is_asked(root):
    both = checkpoints(["abd", f"{root}/a/sweep/abc", f"{root}/*"], root, last=True)
    assert [(saved.name, saved.step) for saved in both] == [("abd222", 2), ("abc111", 2)]


def test_a_run_that_is_named_by_a_relative_path_too_is_found_once(root, monkeypatch):
    monkeypatch.chdir(root)
    found = checkpoints([f"{root}/a", "a/sweep/", "./a/../a/sweep/abc", "ab"], ".", last=True)
    assert [(saved.name, saved.step) for saved in found] == [("abc111", 2), ("abd222", 2)]


def test_a_checkpoint_is_loaded_as_it_stood_at_its_step(root):
    for saved, seed in zip(checkpoints(["*"], root), (1, 2, 11, 12), strict=True):
        loaded = saved.load()
        assert (loaded.step, loaded.config) == (saved.step, CONFIG)
        expected = build.init_params(CONFIG.model, seed)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded.model), expected)


def test_a_damaged_checkpoint_is_not_replaced_by_another_one(root, tmp_path):
    shutil.copytree(root, tmp_path / "s")
    (manifest,) = tmp_path.glob("**/abc111/step_00000001/manifest.json")
    manifest.write_bytes(manifest.read_bytes()[:-10])
    saved = checkpoints(["abc"], tmp_path)[0]
    with pytest.raises(checkpoint.Damaged, match="step_00000001 of abc111 is damaged"):
        saved.load()


def test_patterns_that_fit_nothing_and_runs_that_continue_no_text_are_refused(root, tmp_path):
    with pytest.raises(BadInput, match=rf"runs=zz\* fits no run and no folder of weights; sweeps below {root}: "):
        checkpoints(["zz*"], root)
    said = []
    with pytest.raises(BadInput, match="none of these runs has a checkpoint yet"):
        checkpoints([str(plan(tmp_path / "new"))], root, say=said.append)
    assert [line.split(" has no checkpoint")[0] for line in said] == [f"run {i} in {tmp_path}/new" for i in IDS]
    both_ways = override(CONFIG, {"model.causal": False})
    for name, change, says in (("line", {"identity": "line, version 1"}, "to continue text but line, version 1"),
                               ("masked", {"config": both_ways}, "to read it in both directions")):  # fmt: skip
        with pytest.raises(BadInput, match=says):
            checkpoints([str(plan(tmp_path / name, **change))], root)
    plan(tmp_path / "line2", identity="line, version 1")
    with pytest.raises(BadInput, match=r": 4 runs did not learn to continue text but line, version 1 \(4\)$"):
        checkpoints([f"{tmp_path}/line*"], root)


def test_wildcards_leave_out_in_one_line_what_continues_no_text_and_a_run_that_is_named_is_refused(root, tmp_path):
    shutil.copytree(root, tmp_path / "raw")
    for number, count in enumerate((1, 1, 1, 2)):  # sweeps that learned the same
        for copy in range(count):
            plan(tmp_path / "raw" / f"other{number}{copy}", identity=f"chains {number}")
    said = []
    found = checkpoints(["*", f"{tmp_path}/raw/other*/*"], tmp_path / "raw", say=said.append)
    assert [saved.place for saved in found] == [f"{tmp_path}/raw/a/sweep/{run_id}" for run_id in IDS for _ in (1, 2)]
    assert said == ["left out: 10 runs did not learn to continue text but chains 3 (4); chains 0 (2); chains 1 (2); "
                    "others (2)"]  # fmt: skip
    for pattern in ("abc111", f"{tmp_path}/raw/other00/abc1", f"{tmp_path}/raw/other00"):
        with pytest.raises(BadInput, match=r"run=abc111 in .*/other00 did not learn to continue text but chains 0; l"):
            checkpoints([pattern, "*"], tmp_path / "raw")
