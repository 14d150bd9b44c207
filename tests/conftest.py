"""What several test modules share: a compilation cache of the session's own, and the smallest run on text."""

import os
import shutil
import tempfile

import hypothesis
import numpy as np
import pytest

from jaxgpt import RunConfig, override

# Set before JAX is imported, and inherited by the processes that tests start. A fresh folder: what a user's cache
# holds must not decide whether a test passes. The processes of `make test` share that of the one that started them.
WORKER = "PYTEST_XDIST_WORKER" in os.environ
CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"] if WORKER else tempfile.mkdtemp(prefix="jaxgpt-test-cache-")
os.environ |= {
    "JAX_NUM_CPU_DEVICES": "2",  # sweeps have two lanes, whatever machine this is
    "JAX_COMPILATION_CACHE_DIR": CACHE,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
# Tests compile for far longer than they compute, so XLA is asked for the plainest code; their processes inherit that.
# `XLA_FLAGS= pytest ...` runs them on the code that users run, as `make test-slow` does, whose models compute for long.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

# How long one example takes says how loaded the machine is, and whether something had to be compiled.
hypothesis.settings.register_profile("jaxgpt", deadline=None)
hypothesis.settings.load_profile("jaxgpt")


def pytest_unconfigure():
    if not WORKER:
        shutil.rmtree(CACHE, ignore_errors=True)


# Files that take longest, most of it waiting for processes that they start: begun first, none of them is left to one
# core alone at the end.
FIRST = ("test_hosts", "test_launchers", "test_parallel", "test_launch", "test_optimised")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


LETTERS = 8


@pytest.fixture(scope="session")
def random_text(tmp_path_factory):
    """A file of 20,000 letters drawn uniformly from LETTERS: no model can predict it better than ln LETTERS nats."""
    path = tmp_path_factory.mktemp("corpus") / "letters.txt"
    path.write_bytes((97 + np.random.default_rng(0).integers(0, LETTERS, 20_000)).astype(np.uint8).tobytes())
    return path


@pytest.fixture(scope="session")
def tiny(random_text):
    """The smallest run on text. Tests change what does not split the compiled program, so that it is compiled once."""
    return override(
        RunConfig(),
        {
            "data.corpus": str(random_text),
            "model.d_model": 8,
            "model.n_layers": 1,
            "model.n_heads": 1,
            "model.context": 8,
            "train.batch_size": 4,
            "train.eval_windows": 10,
            "train.steps": 60,
            "train.log_every": 4,
            "train.eval_every": 15,
            "train.checkpoint_every": 10,
            "optimizer.learning_rate": 0.03,
        },
    )
