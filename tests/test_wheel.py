"""What is installed: packages, configs by name, and a wheel in an empty folder."""

import configparser
import json
import os
import shutil
import subprocess
import sys

import pytest
from paths import ROOT


def packages():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser["options"]["packages"].split()


def test_every_package_is_installed():
    """A new package, or a new folder of configs, that exists in the repository and is missing in the wheel."""
    folders = {path.parent for path in (ROOT / "dit_jax").rglob("*.py")}
    configs = {path.parent for path in (ROOT / "configs").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    names |= {".".join(("dit_jax_configs", *folder.relative_to(ROOT / "configs").parts)) for folder in configs}
    assert set(packages()) == names and len(packages()) == len(names)


TINY = ("num_steps=2", "batch_size=8", "model.depth=1", "model.width=32", "preview.every_steps=0", "sampler.num_steps=2")


@pytest.mark.slow
def test_a_wheel_in_an_empty_folder(tmp_path):
    """An installed package that finds no configs, or lacks a file that only the repository has."""
    source, site, here = (tmp_path / name for name in ("source", "site", "here"))
    here.mkdir()
    for name in ("dit_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", site, wheel], check=True)

    def verb(name, *args):
        env = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        command = [sys.executable, "-m", f"dit_jax.{name}", *args]
        process = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    where = subprocess.run(
        [sys.executable, "-c", "import dit_jax; print(dit_jax.__file__)"],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.strip().startswith(str(site))
    fields = [f"--config.{text}" for text in (*TINY, "evaluation.num_images=8", "evaluation.batch_size=8")]
    assert verb("main", *fields, "--config", "digits:process=flow", "--workdir=run")["step"] == 2
    assert verb("sample", "--workdir=run", "--num_samples=4", "--num_steps=2", "--out=x.npz")["num_samples"] == 4
    assert len(verb("sweep", "--sweep=digits", "--list")["runs"]) == 12
    assert sorted(path.name for path in here.iterdir()) == ["run", "x.npz", "x.png"]
