"""Bits of different programs, compared once more in the code that XLA makes for users.

conftest.py has XLA make plainer code, which rounds differently, and perhaps alike where that of users does not.
"""

import os
import subprocess
import sys
from pathlib import Path

CASES = (
    "test_population.py::test_a_transformer_in_a_population_is_bit_for_bit_the_transformer_alone",
    "test_model.py::test_replacing_intermediates_by_their_own_values_changes_no_bit",
    "test_decode.py::test_cached_outputs_equal_those_of_a_full_pass_in_one_go_and_in_pieces[as Llama]",
    "test_blockwise.py::test_values_and_gradients_are_those_of_the_definition[192]",
)


def test_the_same_holds_with_all_that_xla_does_to_make_code_fast():
    """In a process of its own: XLA reads its flags when it starts."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(f"tests/{case}" for case in CASES)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " skipped" not in done.stdout
