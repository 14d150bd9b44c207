"""The house keeps its shape: which package may import which, how long a file may be, and what stays cheap to start."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jaxgpt", "analysis", "experiments")
MOST_LINES = 500


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


def in_packages():
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for package in PACKAGES for path in files(package)]


def imports(source):
    """Top-level names of the modules that a file imports anywhere: in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which package they reach"
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            text = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(text, ast.Constant):
                found.add(text.value.partition(".")[0])
    return found


def package_imports(package):
    return set().union(*(imports(path.read_text()) for path in files(package)))


# --- arrows --------------------------------------------------------------------------------------------------------


def test_imports_are_found_wherever_they_stand():
    assert imports("import a.b as x, c\nfrom d.e import f") == {"a", "c", "d"}
    assert imports("def f():\n from g import h") == {"g"}
    assert imports("if TYPE_CHECKING:\n import i.j") == {"i"}
    assert imports("import_module(f'k.{name}')\nimportlib.import_module('l.m')") == {"k", "l"}


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_is_there_and_has_files(package):
    assert files(package)


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("jaxgpt", {"experiments", "analysis"}),  # the library
        ("analysis", {"experiments", "jaxgpt"}),  # tables in, numbers and pictures out
    ],
)
def test_arrows_run_one_way(package, never):
    assert not package_imports(package) & never


def test_experiments_stand_on_both():
    assert {"jaxgpt", "analysis"} <= package_imports("experiments")


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_imports_the_tests(package):
    assert not package_imports(package) & {"tests", "conftest", "pytest", "hypothesis"}


# --- what is cheap stays cheap -------------------------------------------------------------------------------------

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "pandas", "matplotlib", "scipy"}
LIGHT_CALLS = """
import contextlib, io, json, sys
loaded = {}

def look(name):
    loaded[name] = sorted({module.partition(".")[0] for module in sys.modules})

import jaxgpt
look("import jaxgpt")
from experiments.cli import main
look("import experiments.cli")
for words in (["--help"], ["sweep", "--help"], ["list"], ["report"], ["train", "nonsense"], ["reproduce", "nonsense"],
              ["fit", "nonsense", "nowhere.csv"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main(words)
    look(" ".join(words))
import pandas
look("import pandas")
print(json.dumps(loaded))
"""


def test_help_and_list_and_bad_input_import_nothing_heavy(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT_CALLS], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    loaded = json.loads(done.stdout)
    assert "pandas" in loaded.pop("import pandas")  # else this test would see nothing
    assert len(loaded) == 9
    assert {call: found for call, modules in loaded.items() if (found := HEAVY.intersection(modules))} == {}
    assert list(tmp_path.iterdir()) == []


# --- one can read it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", in_packages())
def test_a_file_is_at_most_500_lines(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def undocumented(tree):
    """Public functions and classes at the top of a module without a docstring."""
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]


def test_a_missing_docstring_is_seen():
    source = "def f():\n return 1\nclass C:\n x = 1\ndef _g(): ...\ndef h():\n 'says'"
    assert undocumented(ast.parse(source)) == ["f", "C"]


@pytest.mark.parametrize("path", in_packages())
def test_every_module_and_every_public_function_and_class_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert undocumented(tree) == []
    assert not tree.body or ast.get_docstring(tree)
