"""JAX's platforms: what is missing is said in one line, and nothing else starts."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

from dit_jax.errors import UserError
from dit_jax.runtime import platforms


@pytest.mark.parametrize(
    "requested, plugins, text",
    [
        ("cuda", [], r'pip install -U "jax\[cuda13\]"'),
        ("gpu", [], r'pip install -U "jax\[cuda13\]"'),
        ("cuda,cpu", ["xla_rocm7"], "does not support CUDA"),
        ("cuda", ["xla_cuda13"], "no NVIDIA GPU"),
        ("tpu", [], "jax.tpu.|this machine has no TPU"),
    ],
)
def test_a_missing_platform(monkeypatch, requested, plugins, text):
    """Forty lines of frames and a bare AssertionError for a JAX without CUDA."""
    monkeypatch.setattr(platforms, "requested", lambda: requested.split(","))
    monkeypatch.setattr(platforms, "_plugins", lambda: plugins)
    monkeypatch.setattr(platforms, "_has_nvidia", lambda: False)
    monkeypatch.setattr(platforms, "_has_tpu", lambda: False)
    monkeypatch.delenv("JAX_FORCE_TPU_INIT", raising=False)
    with pytest.raises(UserError, match=text) as caught:
        platforms.check()
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_there_is_accepted(monkeypatch):
    """A platform that works and is refused."""
    monkeypatch.setattr(platforms, "_plugins", lambda: ["xla_cuda13"])
    monkeypatch.setattr(platforms, "_has_nvidia", lambda: True)
    for names in ([], ["cpu"], ["cuda"], ["gpu"], ["cuda", "cpu"]):
        monkeypatch.setattr(platforms, "requested", lambda names=names: names)
        platforms.check()


def test_a_gpu_that_is_not_used(monkeypatch):
    """Days on the CPU of a machine with a GPU, because JAX was installed without CUDA; a note where the CPU was asked for."""
    monkeypatch.setattr(platforms, "_has_nvidia", lambda: True)
    monkeypatch.setattr(platforms, "_plugins", list)
    monkeypatch.setattr(platforms, "requested", list)
    note = platforms.unused_gpu()
    assert note and 'pip install -U "jax[cuda13]"' in note and len(note.splitlines()) == 1
    monkeypatch.setattr(platforms, "requested", lambda: ["cpu"])
    assert platforms.unused_gpu() is None
    monkeypatch.setattr(platforms, "requested", list)
    monkeypatch.setattr(platforms, "_plugins", lambda: ["xla_cuda13"])
    assert platforms.unused_gpu() is None


def test_errors_of_jax():
    """JAX's error of a platform that does not start as a stack trace; another error that is hidden."""
    long = "Unable to initialize backend 'cuda': no\ndriver. (you may need to uninstall it, or set JAX_PLATFORMS=cpu to skip)"
    assert platforms.explain(RuntimeError(long)) == (
        "Unable to initialize backend 'cuda': no driver; set JAX_PLATFORMS=cpu to go without it"
    )
    assert platforms.explain(RuntimeError("out of memory")) is None


@pytest.mark.parametrize(
    "plugins, nvidia, chosen", [([], False, "cpu"), (["xla_cuda13"], True, "cuda,cpu"), (["xla_rocm7"], False, None)]
)
def test_platforms_without_a_tpu(monkeypatch, plugins, nvidia, chosen):
    """A GPU that is no longer used because libtpu is left out, or a plugin that we know nothing about."""
    updates = {}
    monkeypatch.setattr(platforms.jax.config, "update", updates.__setitem__)
    monkeypatch.setattr(platforms, "requested", list)
    monkeypatch.setattr(platforms, "_plugins", lambda: plugins)
    monkeypatch.setattr(platforms, "_has_nvidia", lambda: nvidia)
    monkeypatch.setattr(platforms, "_has_tpu", lambda: False)
    monkeypatch.delenv("JAX_FORCE_TPU_INIT", raising=False)
    platforms.leave_out_tpu()
    assert updates.get("jax_platforms") == chosen
    updates.clear()
    monkeypatch.setattr(platforms, "_has_tpu", lambda: True)
    platforms.leave_out_tpu()
    assert not updates


def test_nothing_is_printed_where_libtpu_is_installed():
    """Ten lines of warnings of libtpu, which is there for `plan`, at the start of every verb on a machine without a TPU."""
    pytest.importorskip("libtpu")
    if platforms._has_tpu() or platforms._has_nvidia():
        pytest.skip("the machine has an accelerator")
    code = "from dit_jax.runtime import platforms; platforms.leave_out_tpu(); import jax; print(jax.devices()[0].platform)"
    env = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"} | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert process.stdout.strip() == "cpu" and process.stderr == ""
