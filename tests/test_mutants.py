"""The faults on purpose of mutants.yaml can all be put into today's code. (`python -m tests.mutants` tries them.)"""

import importlib.util

import pytest
import yaml

from common import ROOT

MUTANTS = yaml.safe_load((ROOT / "tests" / "mutants.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def changed():
    spec = importlib.util.spec_from_file_location("mutant_site", ROOT / "tests" / "mutant_site" / "sitecustomize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.changed


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["name"])
def test_a_fault_stands_where_it_is_said_to_and_is_still_code(mutant, changed):
    module, function = mutant["where"].split(":")
    path = module.replace(".", "/")
    places = (ROOT / f"{path}.py", ROOT / path / "__init__.py", ROOT / "Lab2" / f"{path}.py")
    source = next(place for place in places if place.is_file()).read_text(encoding="utf-8")
    faulty = changed(source, function, mutant["old"], mutant["new"])
    assert faulty != source and compile(faulty, module, "exec")
    assert (ROOT / mutant["tests"].split()[0]).exists()


def test_names_are_unique():
    assert len({mutant["name"] for mutant in MUTANTS}) == len(MUTANTS)
