"""The structure of the package: who may import whom, and names."""

import ast
import importlib
import pkgutil
import subprocess
import sys

import pytest
from paths import ROOT

PACKAGE = ROOT / "dit_jax"
# Groups of modules, lowest first. A module imports from its own group and from those before it.
LAYERS = (
    ("parallel", "storage", "runtime", "errors", "registry", "pixels", ""),
    ("models", "encoders", "codecs", "diffusion", "data", "metrics", "programs"),
    ("tasks", "interop"),
    ("build", "recipes", "config_file", "config_reference"),
    ("sample", "evaluate", "encode", "prepare", "convert", "pipeline"),
    ("training",),
    ("sweep", "plan", "benchmark", "demo", "report", "session"),
    ("__main__", "main"),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
NEIGHBOURS = LAYERS[1]  # they do not import one another, but for these
SHARED = {("codecs", "models.attention"), ("codecs", "models.layers"), ("encoders", "models.layers")}
SHARED |= {
    ("encoders", "models.attention"),
    ("metrics", "models.layers"),
    ("metrics", "models.attention"),
    ("metrics", "encoders"),
}


def modules():
    """{name below dit_jax: its source}."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").rstrip(".")] = path.read_text()
    return found


SOURCES = modules()


def imports_of(name):
    """Modules below dit_jax that a module imports, also inside of its functions."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dit_jax":
            base = node.module.removeprefix("dit_jax").lstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                found.add(full if full in SOURCES else base)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("dit_jax").lstrip(".") for alias in node.names if alias.name.startswith("dit_jax")}
    return found - {name}


def group(name):
    return "__main__" if name.endswith("__main__") else name.split(".")[0]


EDGES = [(name, other) for name in SOURCES for other in sorted(imports_of(name))]


def test_every_module_has_a_layer():
    """A new package that stands outside of the layers."""
    assert not {group(name) for name in SOURCES} - LAYER_OF.keys()


@pytest.mark.parametrize("name", sorted({group(name) for name in SOURCES}))
def test_no_arrow_points_up(name):
    """A module that imports from a layer above its own."""
    up = [f"{a} -> {b}" for a, b in EDGES if group(a) == name and LAYER_OF[group(b)] > LAYER_OF[group(a)]]
    assert not up, "\n".join(up)


def test_neighbours_do_not_import_one_another():
    """Models, codecs, diffusion, data, metrics and programs that know of each other."""
    wrong = []
    for a, b in EDGES:
        one, other = group(a), group(b)
        if one != other and {one, other} <= set(NEIGHBOURS) and not {(one, b), (one, other)} & SHARED:
            wrong.append(f"{a} -> {b}")
    assert not wrong, "\n".join(wrong)


def test_no_circle():
    """Two modules that need one another."""
    graph = {name: imports_of(name) for name in SOURCES}
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        for other in sorted(graph[name]):
            if circle := visit(other):
                return circle
        path.pop()
        done.add(name)
        return None

    for name in sorted(graph):
        circle = visit(name)
        assert not circle, " -> ".join(circle)


def test_flags_live_in_main_modules():
    """Library code that defines flags when it is imported: two verbs could not be imported in one process."""
    code = "; ".join(
        ["import sys; sys.argv = ['x']", "from absl import flags", "before = set(flags.FLAGS)"]
        + [f"import {m.name}" for m in pkgutil.iter_modules([str(PACKAGE)], "dit_jax.") if m.ispkg]
        + [
            f"import dit_jax.{name}"
            for name in SOURCES
            if name and "__main__" not in name and name != "main" and name != "sweep.x"
        ]
        + ["print(sorted(set(flags.FLAGS) - before))"]
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**_environment(), "JAX_PLATFORMS": "cpu"}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    own = [name for name in ast.literal_eval(run.stdout.splitlines()[-1]) if name in _flags_of_verbs()]
    assert not own


def _environment():
    import os

    return os.environ | {"PYTHONPATH": str(ROOT)}


def _flags_of_verbs():
    """Names of all flags that some verb defines."""
    import re

    sources = [source for name, source in SOURCES.items() if name.endswith("__main__") or name == "main"]
    return {found for source in sources for found in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)} | {"config", "import"}


ENDINGS = ("s", "ing", "ation", "or", "er", "ion", "ed", "e")


def test_no_two_modules_differ_by_an_ending():
    """`sweep` and `sweeping`: names that nobody can tell apart."""
    names = sorted({part for name in SOURCES for part in name.split(".") if part} - {"__main__"})
    clashes = []
    for a in names:
        for b in names:
            if f"{b}.{a}" in SOURCES or f"{a}.{b}" in SOURCES:  # a protocol in the package of its implementations
                continue
            if a < b and b.startswith(a.rstrip("e")) and len(a) > 3 and b[len(a.rstrip("e")) :] in ENDINGS:
                clashes.append(f"{a}, {b}")
    assert clashes == [], clashes


def test_public_api_survives_the_import_of_every_package():
    """A function of the package that an import of a subpackage of the same name replaces."""
    import dit_jax

    packages = {m.name for m in pkgutil.iter_modules([str(PACKAGE)])}
    for name in packages - {"__main__"}:
        importlib.import_module(f"dit_jax.{name}")
    assert not set(dit_jax.__all__) & packages
    for name in dit_jax.__all__:
        assert getattr(dit_jax, name) is not None
