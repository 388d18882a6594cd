"""Networks other than DiT through `convert`: which module reads them, and the config that they get."""

import numpy as np
import pytest
import tiny
from dit_files import held

from dit_jax import recipes, registry
from dit_jax.build import Run
from dit_jax.convert import formats, other_networks
from dit_jax.convert.source import shapes_of
from dit_jax.errors import UserError
from dit_jax.interop import weights


def random_weights(network, fields, process, resolution=8):
    """Weights in our layout, of a network on grey images."""
    c = recipes.digits(process)
    c.model = {**registry.defaults("model", network), "name": network, **fields}
    c.transform.resolution = resolution
    sections = weights.sections_of(tiny.shorten(c).to_dict())
    rng = np.random.default_rng(3)
    tensors = {path: held(rng.standard_normal(shape).astype(np.float32)) for path, shape in shapes_of(sections).items()}
    return formats.Weights(tensors, sections, {})


def assert_equal(read, expected):
    assert read.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(read.tensors[name].load(), tensor.load())
    Run(formats.config_of(read.sections)).task


def test_a_config_in_the_file_is_enough(tmp_path):
    """Catches k-diffusion's config left out of the file, or another process, codec or size than the file has."""
    expected = random_weights("hourglass", tiny.HOURGLASS, "edm")
    formats.write(expected, "official", tmp_path / "hdit.safetensors")
    read = formats.read(formats.Source("official", tmp_path / "hdit.safetensors"))
    assert_equal(read, expected)
    assert read.sections["process"]["name"] == "edm" and read.sections["codec"]["name"] == "pixels"
    assert read.sections["transform"]["resolution"] == 8 and read.sections["transform"]["channels"] == 1
    for flag in ({"heads": 4}, {"num_classes": 10}):
        with pytest.raises(UserError, match=f"--{next(iter(flag))} has no effect on 'hourglass'"):
            formats.read(formats.Source("official", tmp_path / "hdit.safetensors", **flag))


def test_unknown_sizes_need_a_config(tmp_path):
    """Catches a process or resolution that is guessed for unpublished sizes; a folder of diffusers without its config."""
    expected = random_weights("unet", tiny.UNET, "gaussian")
    formats.write(expected, "dit_jax", tmp_path / "ours.safetensors")
    for layout, name in (("official", "unet.pt"), ("diffusers", "unet")):
        formats.write(expected, layout, tmp_path / name)
        known = {"heads": 2, "num_classes": 10} if layout == "official" else {}  # a .pt has no place for them
        with pytest.raises(UserError, match="not published ones"):
            formats.read(formats.Source(layout, tmp_path / name, **known))
        assert_equal(formats.read(formats.Source(layout, tmp_path / name, like=tmp_path / "ours.safetensors")), expected)


def test_published_sizes_get_their_recipe():
    """Catches weights of a paper with another process or autoencoder than the paper's; a recipe for another network."""
    for module in other_networks.NETWORKS:
        for name, published in registry.get("model", module.NETWORK).published.items():
            found = other_networks._recipe(module, {"model": published.fields, "input_side": published.input_shape[0]})
            if name in recipes.PUBLISHED:
                assert found is recipes.PUBLISHED[name]
            else:
                assert found is None, name


def test_a_network_without_a_layout(tmp_path):
    """Catches a trace where a layout has no such network."""
    expected = random_weights("hourglass", tiny.HOURGLASS, "edm")
    with pytest.raises(UserError, match="--to=diffusers has no network 'hourglass'; write --to=dit_jax or official"):
        formats.write(expected, "diffusers", tmp_path / "x")
