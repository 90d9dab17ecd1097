"""tests/mutants.py: every guard in its list still stands in the source, so that the list cannot rot."""
import ast

import pytest

from tests.mutants import MUTANTS, ROOT, breaks


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_once_and_is_python(mutant):
    ast.parse(breaks(mutant))
    assert mutant.tests and all((ROOT / test).is_file() for test in mutant.tests)


def test_the_list():
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names)) and len(names) >= 40
