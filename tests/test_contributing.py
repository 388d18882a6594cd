"""CONTRIBUTING.md as a stranger follows it: its files are written, its commands are run."""

import re
import shlex

import jax
import mixture
import numpy as np
import pytest
from paths import ROOT
from user_files import forgetful as forgetful
from verbs import run_verbs

from dit_jax import registry
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.runtime.user_code import load_file

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FILES = {found[2]: found[1] for found in re.finditer(r"```python\n(# (\w+\.py)\n.*?)```", TEXT, re.DOTALL)}
COMMANDS = [shlex.split(line)[2:] for line in TEXT.replace("\\\n", " ").splitlines() if line.startswith("python -m dit_jax.")]
SHORT = {
    "dit_jax.main": [
        "--config.model.depth=1",
        "--config.model.width=16",
        "--config.num_steps=2",
        "--config.batch_size=8",
        "--config.preview.every_steps=0",
        "--config.evaluation.num_images=0",
    ],
    "dit_jax.sample": ["--num_samples=3", "--num_steps=2"],
}


def test_the_files_are_short():
    """An example that grows until nobody reads it."""
    lengths = {name: sum(map(bool, text.splitlines())) for name, text in FILES.items()}
    assert set(lengths) == {"midpoint.py", "arrays.py", "mixer.py"}
    assert lengths["midpoint.py"] <= 30 and max(lengths.values()) <= 40, lengths


@pytest.mark.slow
def test_the_commands_run(tmp_path):
    """An interface that changed and left its guide behind: a stranger's first file fails."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "my.npz", images=rng.integers(0, 256, (24, 8, 8, 1), np.uint8), labels=np.arange(24) % 10)
    assert [verb for verb, *_ in COMMANDS] == ["dit_jax.main", "dit_jax.sample"]
    calls = [[verb.removeprefix("dit_jax."), *args, *SHORT[verb]] for verb, *args in COMMANDS]
    for status, _, stderr in run_verbs(tmp_path, calls):
        assert status == 0, stderr
    with np.load(tmp_path / "mine.npz") as samples:
        assert samples["arr_0"].shape == (3, 8, 8, 1) and samples["arr_0"].std() > 0


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("process", [Flow(), Gaussian(variance="fixed_small")])
def test_the_sampler_has_order_two(tmp_path, process):
    """An example that runs and draws from another distribution."""
    (tmp_path / "midpoint.py").write_text(FILES["midpoint.py"])
    load_file(tmp_path / "midpoint.py", "--import")
    noise = np.random.default_rng(0).normal(size=(16, 1, 1, 2))
    denoise, solution = (
        (mixture.flow_denoise(process), mixture.flow_solution(process, noise))
        if process.continuous
        else (mixture.gaussian_denoise(process), mixture.gaussian_solution(process, noise))
    )

    def error(num_steps):
        sampler = registry.get("sampler", "midpoint")(num_steps)
        with jax.enable_x64(True):
            return np.abs(np.asarray(jax.jit(lambda x: sampler(process, denoise, x, None))(noise)) - solution).mean()

    assert np.log2(error(20) / error(40)) == pytest.approx(2, abs=0.3)
