"""The floors of the house: each imports only floors below it, and the registry tells the truth."""

import ast
import pathlib

import pytest

from experiments import readme
from zoo import registry

ROOT = pathlib.Path(__file__).parent.parent
# What layers share stands beside them.
SHARED = {"__init__", "checks", "common", "fields", "heads", "memories", "routing", "state_spaces"}
FLOORS = ("pallas_kernels", "layers", "zoo", "experiments")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_down(floor):
    above = FLOORS[FLOORS.index(floor) + 1 :]
    for path in (ROOT / floor).rglob("*.py"):
        assert not set(above) & set(imports(path)), path


def test_every_layer_file_is_registered_with_a_row():
    from rows import ROWS

    files = {p.stem for p in (ROOT / "layers").glob("*.py")} - SHARED
    assert files == {entry.module for entry in registry.LAYERS.values()}
    assert files == {type(cfg).__module__.rsplit(".", 1)[-1] for cfg in ROWS.values()}


@pytest.mark.parametrize("name", registry.LAYERS)
def test_layers_have_the_contract_and_nothing_else(name):
    cfg = registry.config(name, 16)
    module = registry.module(cfg)
    own = {
        n
        for n, value in vars(module).items()
        if not n.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    functions = {n for n in own if callable(getattr(module, n))}
    assert functions == {"Config", "State", "init", "init_state", "apply", "step"}
    assert registry.summary(name)


def test_readme_table_is_that_of_the_registry():
    text = (ROOT / "README.md").read_text()
    assert readme.updated(text) == text, "run `python -m experiments.readme`"


def test_wrong_names_say_what_is_right():
    with pytest.raises(ValueError, match=r"unknown layer 'mambo' \(did you mean 'mamba'\?\)"):
        registry.config("mambo", 16)
    with pytest.raises(ValueError, match=r"head.*choose from .*heads"):
        registry.config("attention", 16, head=2)
    with pytest.raises(ValueError, match="not a layer config"):
        registry.module(object())
