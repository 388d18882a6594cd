"""compilation_cache.py: on by default, never in the way."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

# A program that takes long enough to be kept, its first argument donated as in training; prints a result to the last bit.
PROGRAM = """
import sys
from dit_jax.runtime import compilation_cache
compilation_cache.use()
import jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)

def step(x, y):
    for _ in range(20):
        x = jnp.tanh(x @ y) + x
    return x, x.sum()

x = jax.random.normal(jax.random.key(0), (32, 32))
x, total = jax.jit(step, donate_argnums=0)(x, x * 0.1)
print(len(hits), float(total).hex(), jax.config.jax_persistent_cache_min_compile_time_secs)
"""


# A user without an entry in passwd.
NOBODY = """
import pwd
def getpwuid(uid): raise KeyError(uid)
pwd.getpwuid = getpwuid
"""


def start(home, **environment):
    """home: None for a user without one."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_")) and key != "HOME"}
    process = subprocess.run(
        [sys.executable, "-c", (NOBODY if home is None else "") + PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=kept | ({} if home is None else {"HOME": str(home)}) | {"JAX_PLATFORMS": "cpu", **environment},
    )
    assert process.returncode == 0, process.stderr
    hits, total, threshold = process.stdout.split()
    return int(hits), total, float(threshold), process.stderr


KEEP_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.mark.slow
def test_second_start_reads_what_the_first_compiled(tmp_path):
    """A cache that is never hit, gives other numbers, or ends the program over a broken entry."""
    hits, total, *_ = start(tmp_path, **KEEP_ALL)
    (folder,) = (tmp_path / ".cache" / "dit_jax" / "xla").iterdir()
    assert hits == 0 and list(folder.glob("jit_step*"))
    assert start(tmp_path, **KEEP_ALL)[:2] == (len(list(folder.glob("*-cache"))), total)
    for entry in folder.iterdir():
        entry.write_bytes(b"garbage")
    hits, again, *_ = start(tmp_path, **KEEP_ALL)
    assert hits == 0 and again == total


def test_small_programs_are_not_kept(tmp_path):
    """A home flooded with tiny programs."""
    hits, _, threshold, _ = start(tmp_path)
    assert hits == 0 and threshold == 1.0  # how many programs take that long depends on the machine


@pytest.mark.parametrize("kind", ["off", "elsewhere", "unwritable", "homeless"])
def test_where_nothing_is_kept(tmp_path, kind):
    """A switch that does nothing; a start that fails because a folder cannot be written."""
    environment = {
        "off": {**KEEP_ALL, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        "elsewhere": {**KEEP_ALL, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "other")},
        "unwritable": KEEP_ALL,
        "homeless": KEEP_ALL,
    }[kind]
    home = tmp_path / "home"
    if kind == "unwritable":
        home.touch()
    hits, _, _, stderr = start(None if kind == "homeless" else home, **environment)
    assert ("compiled programs are not cached" in stderr) == (kind in ("unwritable", "homeless"))
    assert hits == 0 and not [path for path in (home / ".cache").rglob("*") if path.is_file()]
    assert any((tmp_path / "other").glob("jit_step*")) == (kind == "elsewhere")
    assert ("cannot be written" in stderr) == (kind == "unwritable")
    if kind == "unwritable":
        assert len(stderr.splitlines()) == 1
