"""Names and constructors: what user code registers beside the package's own."""

import subprocess
import sys
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from paths import ROOT
from user_files import forgetful as forgetful
from user_files import write

import dit_jax
from dit_jax import build, registry
from dit_jax.errors import UserError
from dit_jax.evaluate import extractors
from dit_jax.runtime.user_code import load_file

pytestmark = pytest.mark.usefixtures("forgetful")


@dataclass(frozen=True)
class Steps:
    size: int
    num_steps: int = 7
    floor: float | None = None


def load(path, text):
    return load_file(write(path, text), "--import")


def test_a_registered_constructor_is_built():
    """A registration that no config reaches, or that is taken for the package's own."""
    dit_jax.register("sampler", "steps", Steps)
    assert build.construct("sampler", {"name": "steps", "size": 2}) == Steps(2)
    assert "steps" in registry.names("sampler")
    assert registry.origin("sampler", "steps") == __file__ and registry.origin("sampler", "ddim") is None


def test_defaults_are_the_fields_of_a_config():
    """Fields that are lost because they have no value yet, that no config sets, or whose value no JSON holds."""
    dit_jax.register("sampler", "steps", Steps)
    assert registry.defaults("sampler", "steps") == {"num_steps": 7, "floor": None}
    assert set(registry.parameters("sampler", "steps")) == {"size", "num_steps", "floor"}
    model = registry.defaults("model", "dit")
    assert model["dtype"] == "float32" and model["unroll"] is None
    assert not {"out_channels", "parent", "name"} & set(registry.parameters("model", "dit"))
    assert set(registry.defaults("task", "diffusion")) == {"cond_dropout", "masks", "self_conditioning"}


def test_names_are_not_taken_twice(tmp_path):
    """A user's sampler that silently replaces another one; or a config that cannot be loaded twice."""
    text = "import dit_jax\nclass Mine: pass\ndit_jax.register('sampler', 'mine', Mine)\n"
    first, again = load(tmp_path / "a.py", text), load(tmp_path / "a.py", text)
    assert first.Mine is not again.Mine and registry.get("sampler", "mine") is again.Mine
    with pytest.raises(UserError, match=r"a\.py and by .*b\.py; rename one"):
        load(tmp_path / "b.py", text)
    with pytest.raises(UserError, match="sampler 'ddim' is registered twice"):
        dit_jax.register("sampler", "ddim", Steps)
    with pytest.raises(UserError, match="section 'samplers' does not exist; register in one of task, model"):
        dit_jax.register("samplers", "mine", Steps)


def test_unknown_names_say_what_helps():
    """A user of somebody's run folder who is told no more than that the name is unknown."""
    with pytest.raises(UserError, match=r"network 'my_net' is not registered; choose one of .*dit.*, or add --import=<file.py>"):
        registry.get("model", "my_net")
    registry.record_import("model", "my_net", "my_net.py")
    with pytest.raises(UserError, match=r"network 'my_net' is not registered; add --import=my_net.py$"):
        registry.get("model", "my_net")


@dataclass(frozen=True)
class Means:
    name: str = "means"

    def recipe(self):
        return {}

    def __call__(self, params, images):
        return {"features": jax.numpy.asarray(images, "float32").mean((1, 2)) + params.get("shift", 0.0)}


def test_an_extractor_of_the_user(tmp_path):
    """Scores in features that are not the package's: with weights, whose hash is recorded, and without."""
    dit_jax.register("metric", "means", Means)
    dit_jax.register("metric", "shifted", lambda weights: (Means("shifted"), {"shift": np.load(weights)}))
    assert extractors.load("means").weights_sha256 is None
    with pytest.raises(UserError, match="'means' have no weights"):
        extractors.load("means", "weights.npy")
    with pytest.raises(UserError, match="features 'shifted' need weights"):
        extractors.load("shifted")
    np.save(tmp_path / "weights.npy", np.float32(2))
    loaded = extractors.load("shifted", str(tmp_path / "weights.npy"))
    images = np.ones((3, 4, 4, 1), np.uint8)
    np.testing.assert_array_equal(loaded.extractor(loaded.params, images)["features"], np.full((3, 1), 3.0))
    assert len(loaded.weights_sha256) == 64


def test_register_imports_nothing_heavy():
    """A config file that takes seconds to import JAX before the processes of a run have found each other."""
    code = "import sys, dit_jax; dit_jax.register; print(*{'jax', 'flax', 'ml_collections'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not found.stdout.strip()
