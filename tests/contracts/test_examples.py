"""Every method's docstring holds an example, and it runs."""

from __future__ import annotations

import doctest
import importlib

import pytest

from attacks import ATTACKS
from attacks.base import Attack
from defenses import DEFENSES
from defenses.base import Defense


@pytest.mark.parametrize("method", [*ATTACKS, *DEFENSES], ids=lambda method: method.name)
def test_the_example_of_a_method_runs(method: type[Attack] | type[Defense]) -> None:
    module = importlib.import_module(method.__module__)
    (found,) = doctest.DocTestFinder(recurse=False).find(method, method.__name__, module=module)
    assert method.__name__ in "".join(example.source for example in found.examples), "no example constructs the method"
    assert doctest.DocTestRunner().run(found).failed == 0
