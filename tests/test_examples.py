"""The examples, run as a reader runs them."""

import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest
from paths import ROOT
from verbs import environment

import dit_jax
from dit_jax import config_file

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


def test_one_dimensional(tmp_path):
    """A network and a data set of other shapes than images, registered from outside, that cannot be trained or drawn from."""
    file = ROOT / "examples" / "one_dimensional.py"
    command = [sys.executable, file, f"--workdir={tmp_path / 'run'}", "--num_steps=60"]
    process = subprocess.run(command, cwd=ROOT, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "run" / "waves.png").stat().st_size > 10_000
    spec = importlib.util.spec_from_file_location("one_dimensional", file)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    samples = dit_jax.load(tmp_path / "run")(num_samples=3, num_steps=4)
    assert samples.images.shape == (3, 64, 1, 1) and samples.images.std() > 10
    assert config_file.read(str(file)).model.name == "signal_transformer"
    waves = example.Waves(count=30)
    assert np.abs(waves.images.astype(int) - 127.5).max() <= 101 and set(waves.labels) == {0, 1, 2}
