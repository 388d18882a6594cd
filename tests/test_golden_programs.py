"""Compiled programs against golden/programs.json, which golden/make_programs.py wrote."""

import json
import os

import pytest
from make_programs import FILE, PROGRAMS, numbers, versions

TOLERANCE = 0.01

GOLDEN = json.loads(FILE.read_text())


def same_compiler(name: str):
    """Skips the test with another compiler; fails it where DIT_JAX_REQUIRE_GOLDEN=1 asks for this one."""
    packages = ("jax", "jaxlib") if PROGRAMS[name][0].startswith("cpu") else ("jax", "jaxlib", "libtpu")
    wanted, found = ({package: v[package] for package in packages} for v in (GOLDEN["versions"], versions()))
    if found == wanted:
        return
    texts = [
        " and ".join(
            f"{package} {version or '(none)'}" for package, version in v.items() if package != "jaxlib" or version != v["jax"]
        )
        for v in (wanted, found)
    ]
    message = f"golden programs were recorded with {texts[0]}; installed are {texts[1]}"
    if os.environ.get("DIT_JAX_REQUIRE_GOLDEN") == "1":
        pytest.fail(f"{message}. Install the former, or record the programs again with golden/make_programs.py")
    pytest.skip(message)


def drifts(golden, found, path: str = "") -> list[str]:
    """A line for each number that is off by more than the tolerance, and for each that is missing or new."""
    if isinstance(golden, dict) and isinstance(found, dict):
        return [line for key in {**golden, **found} for line in drifts(golden.get(key), found.get(key), f"{path} {key}")]
    numeric = isinstance(golden, (int, float)) and isinstance(found, (int, float)) and not isinstance(golden, bool)
    if golden == found or (numeric and abs(found - golden) <= TOLERANCE * abs(golden)):
        return []
    change = f" ({found / golden - 1:+.1%})" if numeric and golden else ""
    return [f"{path.strip()}: was {golden}, is {found}{change}"]


def test_every_program_is_recorded():
    """A program that was added to the table and not to the file."""
    assert set(GOLDEN["programs"]) == set(PROGRAMS)


# CI compiles two networks for simulated devices, in one process, and a small one for a TPU; .ci/nightly the others.
SIMULATED = "simulated devices"
GROUPS = {SIMULATED: ["digits, cpu:8, data=2 fsdp=2 tensor=2", "autoencoder, cpu:8, fsdp=4"]}
GROUPS |= {name: [name] for name in PROGRAMS if name not in GROUPS[SIMULATED]}
SLOW = (SIMULATED, "digits, v5e:2x2, data=2 tensor=2")


@pytest.mark.parametrize(
    "group", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else pytest.mark.exhaustive) for x in GROUPS]
)
def test_programs(group):
    """A refactoring that changed the program: another remat policy or sharding, a copy, a cast, a collective, a larger buffer."""
    names = GROUPS[group]
    for name in names:
        same_compiler(name)
    lines = [f"{name}: {line}" for name, found in numbers(names).items() for line in drifts(GOLDEN["programs"][name], found)]
    assert not lines, "programs differ from golden/programs.json:\n" + "\n".join(lines)
