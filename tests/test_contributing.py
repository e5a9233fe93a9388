"""CONTRIBUTING.md, followed to the letter in a copy of the repository."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = ("pallas_kernels", "layers", "zoo", "experiments", "tests")


@pytest.fixture
def repository(tmp_path):
    for name in SOURCES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def insert(path, name, line):
    """`line` as the last entry of the dict called `name`."""
    source = path.read_text()
    start = re.search(rf"^{name}\b.*{{$", source, re.M).end()
    end = source.index("\n}\n", start) + 1
    path.write_text(source[:end] + line + source[end:])


def run(repository, *command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_three_steps_make_a_layer(repository):
    layer, entry, row = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    (repository / "layers" / "ema.py").write_text(layer)
    insert(repository / "zoo" / "registry.py", "LAYERS", entry)
    insert(repository / "tests" / "rows.py", "ROWS", row)
    tests = run(repository, "pytest", "-p", "no:cacheprovider", "tests/test_conformance.py", "-k", "ema]")
    passed = int(re.search(r"(\d+) passed", tests)[1])
    assert passed >= 20
    assert "EMA: an exponential" in run(repository, "experiments.cli", "list").replace("\n", " ")
    run(repository, "pytest", "-p", "no:cacheprovider", "tests/test_house.py", "-k", "not readme")
    run(repository, "experiments.readme")
    assert "| [`ema`](layers/ema.py) | EMA: an exponential" in (repository / "README.md").read_text()
