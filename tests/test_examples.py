"""The notebook, run as a reader runs it; tests/test_docs.py runs the other example."""

import re

import pytest
from paths import ROOT

pytestmark = pytest.mark.slow


def test_notebook(tmp_path, monkeypatch):
    """A cell that fails, digits that nobody would recognise, or a picture that is missing."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    notebook = nbformat.read(ROOT / "examples" / "digits.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    text = "".join(output.get("text", "") for output in cells[-1].outputs if output.get("name") == "stdout")
    assert float(re.search(r"distance ([\d.]+)", text)[1]) < 1.5, text  # 0.6 after 500 steps; noise has 40
