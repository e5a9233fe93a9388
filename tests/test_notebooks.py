"""The notebooks run from top to bottom, on small settings."""

import os
import pathlib
import tempfile

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = pathlib.Path(__file__).parent.parent / "experiments" / "notebooks"


@pytest.mark.deep
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.ipynb")))
def test_it_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_SMALL", "1")
    # The kernel is a process of its own: it shall not have this one's many fake devices.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=os.environ | {"PYTHONPATH": str(FOLDER.parent.parent)})
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert outputs
    assert not [out for out in outputs if out.output_type == "error"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_it_is_valid_and_carries_no_paths_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    text = path.read_text()
    for place in (FOLDER.parent.parent, pathlib.Path.home(), tempfile.gettempdir(), "site-packages"):
        assert str(place) not in text
