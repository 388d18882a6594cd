"""runtime/versions.py: one record of versions, commit and device, under the keys that files already have."""

import subprocess

import jax
import jaxlib
import numpy as np
import PIL
import pytest

import dit_jax
from dit_jax.errors import UserError
from dit_jax.runtime import versions


def test_versions_are_those_of_the_imported_modules():
    """Files written before hold jax.__version__; a record that says it otherwise refuses to go on with them."""
    modules = {"jax": jax, "jaxlib": jaxlib, "numpy": np, "pillow": PIL, "dit_jax": dit_jax}
    assert {name: versions.version(name) for name in modules} == {name: module.__version__ for name, module in modules.items()}
    assert versions.version("no-such-package") == "not installed"


def test_keys_and_their_order():
    """A digest of a record that changes because a key moved: a cache or a snapshot that is begun again."""
    assert list(versions.versions("numpy", "jax")) == ["dit_jax", "numpy", "jax"]
    assert list(versions.arithmetic()) == ["device", "matmul_precision"]
    found = versions.provenance()
    assert list(found) == ["versions", "commit", "device", "num_devices"]
    assert list(found["versions"]) == ["dit_jax", "jax", "jaxlib", "numpy"]
    assert found["device"] == jax.devices()[0].device_kind and found["num_devices"] == jax.device_count()
    assert "jax " + jax.__version__ in versions.one_line() and f"commit {found['commit'] or 'unknown'}" in versions.one_line()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A function git(*args) in a repository; this package is now its folder `package`."""

    def git(*args) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x"]
        return subprocess.run(["git", *identity, *args], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    monkeypatch.setattr(dit_jax, "__file__", str(tmp_path / "package" / "__init__.py"))
    git("init", "--quiet")
    return git


def test_commit(checkout, tmp_path):
    """The commit of a repository around an installed package; changed code that passes for a commit's."""
    assert versions.commit() is None  # not tracked
    checkout("add", ".")
    checkout("commit", "--quiet", "--message=x")
    head = checkout("rev-parse", "HEAD").strip()
    (tmp_path / "package" / "notes.txt").touch()
    assert versions.commit() == head
    (tmp_path / "package" / "__init__.py").write_text("x = 1\n")
    assert versions.commit() == f"{head}+changes"


def test_commit_without_git(monkeypatch):
    """A training that does not start in a container without git."""
    monkeypatch.setenv("PATH", "")
    assert versions.commit() is None and "commit unknown" in versions.one_line()


def test_other_numeric_settings(monkeypatch):
    """A setting of JAX that changes the numbers of a run and is not compared; a run of an earlier version that is refused."""
    stored = versions.numeric_settings()
    assert set(stored) == {*versions.RANDOM, versions.PRECISION}
    versions.check_numeric_settings(stored, "the run")
    versions.check_numeric_settings({}, "a run of an earlier version")
    for name in stored:
        monkeypatch.setattr(versions, "numeric_settings", lambda name=name: stored | {name: "other"})
        with pytest.raises(UserError, match=rf"{name}: {stored[name]!r} -> 'other' .*{name.upper()}"):
            versions.check_numeric_settings(stored, "the run")
