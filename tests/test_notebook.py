"""The notebook of the demo runs from its first cell to its last, and what it shows is what a run shows."""

import shutil
from pathlib import Path

import pytest


HERE = Path(__file__).parents[1] / "examples" / "demo"
pytestmark = pytest.mark.slow


def outputs(notebook):
    """Of each cell: the kinds, without what libraries print to stderr (which may part what is printed in two)."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            yield {o.output_type for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")}


def text(notebook):
    """What its cells print."""
    return "".join(o.text for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "text" in o)


@pytest.mark.timeout(900)
def test_the_notebook_runs(tmp_path, monkeypatch):
    import nbclient  # `nox -s training` has them
    import nbformat

    stored = nbformat.read(HERE / "notebook.ipynb", as_version=4)
    nbformat.validate(stored)
    folder = tmp_path / "demo"
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a plot is shown
    run = nbformat.read(folder / "notebook.ipynb", as_version=4)
    for cell in run.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(run, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.execute()
    assert list(outputs(run)) == list(outputs(stored))
    learned = "Beautiful is better than ugly."
    assert learned in text(stored)
    assert learned in text(run)
