"""The notebook, run as a reader runs it; tests/test_docs.py runs the other example."""

import re

import pytest
from paths import ROOT
from verbs import quick_environment

pytestmark = pytest.mark.slow


SHORT = (("num_steps = 500", "num_steps = 10"), ("00000500", "00000010"), ("num_samples=500", "num_samples=50"))


@pytest.mark.parametrize("short", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["short", "whole"])
def test_notebook(tmp_path, monkeypatch, short):
    """A cell that fails, or a picture that is missing; of the whole one, digits that nobody would recognise."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name, value in quick_environment().items() if short else (("JAX_PLATFORMS", "cpu"), ("PYTHONPATH", str(ROOT))):
        monkeypatch.setenv(name, value)
    if not short:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    notebook = nbformat.read(ROOT / "examples" / "digits.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if short:
        source = "\n".join(cell.source for cell in cells)
        assert all(long in source for long, _ in SHORT)
        for cell in cells:
            for long, few in SHORT:
                cell.source = cell.source.replace(long, few)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    text = "".join(output.get("text", "") for output in cells[-1].outputs if output.get("name") == "stdout")
    distance = float(re.search(r"distance ([\d.]+)", text)[1])
    assert short or distance < 1.5, text  # 0.6 after 500 steps; noise has 40
