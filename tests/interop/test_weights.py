"""Our weights file: parameters and all that sampling must know."""

import jax
import numpy as np
import pytest
from dit_files import arrays, same_bits, tiny_weights
from safetensors.numpy import load_file, save_file

from dit_jax.convert import formats
from dit_jax.errors import UserError
from dit_jax.interop import weights


@pytest.fixture
def path(tmp_path):
    weights.write(tmp_path / "x.safetensors", tiny_weights())
    return tmp_path / "x.safetensors"


def test_everything_comes_back(path):
    """A section lost on the way through the header."""
    found = weights.read(path)
    assert same_bits(found, tiny_weights())
    assert (found.sections, found.origin) == (tiny_weights().sections, {"from": "a test"})


def test_parameters_load_into_the_network_the_header_describes(path):
    """A tree in another structure or order than the network's."""
    tree = formats.network_params(formats.config_of(weights.read(path).sections))
    params = weights.load(path, tree)
    assert jax.tree.structure(params) == jax.tree.structure(tree)
    np.testing.assert_array_equal(params["blocks"]["mlp"]["in"]["kernel"], arrays(tiny_weights())["blocks/mlp/in/kernel"])


def test_the_codecs_path_stays_behind():
    """A path of one machine carried to another."""
    sections = weights.sections_of({"codec": {"name": "kl_vae", "path": "/home/me/vae"}, "data": {"path": "/data"}})
    assert sections == {"codec": {"name": "kl_vae", "path": ""}}


def test_a_published_codec_is_named(path):
    """Official weights that need --codec_path although everybody can get the codec that they were trained with."""
    assert weights.read(path).sections["codec"]["path"] == "sd-vae-ft-mse"


def test_a_file_of_another_kind_is_refused(path, tmp_path):
    """Foreign tensors sampled from under our names, or a parameter left at its initial value."""
    tensors = load_file(path)
    save_file(tensors, tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no header of dit_jax.*convert --from"):
        weights.read(tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        weights.read(tmp_path / "absent.safetensors")
    (tmp_path / "x.pt").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"dit_jax\.convert"):
        weights.read(tmp_path / "x.pt")

    found = weights.read(path)
    del found.tensors["blocks/mlp/in/bias"]
    weights.write(path, found)
    tree = formats.network_params(formats.config_of(found.sections))
    with pytest.raises(UserError, match="missing blocks/mlp/in/bias"):
        weights.load(path, tree)
