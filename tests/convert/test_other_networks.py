"""Networks other than DiT through `convert`: which module reads them, and the config that they get."""

import jax
import numpy as np
import pytest
import tiny
from dit_files import held
from ldm_names import ldm_names

from dit_jax import recipes, registry
from dit_jax.build import Run
from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.convert import formats, model_parts, other_networks
from dit_jax.convert.source import shapes_of
from dit_jax.encoders import clip_text
from dit_jax.encoders.t5 import T5Encoder
from dit_jax.errors import UserError
from dit_jax.interop import clip_text as clip_text_layout
from dit_jax.interop import pixart, t5, text_encoders, vae, weights
from dit_jax.interop.tensors import open_safetensors, write_safetensors


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


MMDIT = {"patch_size": 2, "depth": 3, "width": 128, "heads": 2, "context_width": 16, "pooled_width": 16, "table_side": 6}
PIXART = {"patch_size": 2, "depth": 2, "width": 32, "heads": 4, "context_width": 16}


def text_weights(network, fields):
    """Weights in our layout, of a text network on latents of one channel, whose captions a pretrained encoder would read."""
    c = recipes.digits("flow" if network == "mmdit" else "gaussian")
    c.model = {**registry.defaults("model", network), "name": network, **fields, "context_width": 512}
    recipes.text(c, ("clip_b32",), mask=network == "pixart", pooled=network == "mmdit")
    if network == "mmdit":
        c.model.pooled_width = 512
    sections = weights.sections_of(tiny.shorten(c).to_dict())
    rng = np.random.default_rng(3)
    tensors = {path: held(rng.standard_normal(shape).astype(np.float32)) for path, shape in shapes_of(sections).items()}
    return formats.Weights(tensors, sections, {})


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("network", ["mmdit", "pixart"])
def test_text_networks(network, layout, tmp_path):
    """Catches text weights whose config is guessed, a bit that a round trip changes, and a text encoder that is dropped."""
    expected = text_weights(network, MMDIT if network == "mmdit" else PIXART)
    ours, out = tmp_path / "ours.safetensors", tmp_path / ("theirs.safetensors" if layout == "official" else "theirs")
    formats.write(expected, "dit_jax", ours)
    formats.write(formats.read(formats.Source("dit_jax", ours)), layout, out)
    unknown = "give --heads" if (network, layout) == ("pixart", "official") else "not published ones"
    with pytest.raises(UserError, match=unknown):
        formats.read(formats.Source(layout, out))
    read = formats.read(formats.Source(layout, out, like=ours))
    assert_equal(read, expected)
    assert read.sections["conditioner"]["name"] == "text" and list(read.sections["conditioner"]["encoders"]) == ["clip_b32"]
    trained = expected._replace(tensors=dict(expected.tensors) | {"conditioner/bytes/x": held(np.zeros(3, np.float32))})
    with pytest.raises(UserError, match=f"--to={layout} has no place for the text encoder that was trained"):
        formats.write(trained, layout, tmp_path / "other.safetensors")


def test_a_resolution_of_pixart():
    """Catches weights of 512 px that get the config of 256 px, whose network is the same."""
    fields = registry.get("model", "pixart").published["PixArt-alpha@512"].fields
    for side in (32, 64):
        make = other_networks._recipe(pixart, {"model": fields, "input_side": side})
        assert make is recipes.PUBLISHED[f"PixArt-alpha@{8 * side}"]
        assert make().transform.resolution == 8 * side
    assert other_networks._recipe(pixart, {"model": fields, "input_side": 48}) is None


def test_parts_of_a_whole_model(tmp_path, monkeypatch, capsys):
    """Catches parts that are taken as the transformer's or lost unsaid; a VAE that codec.path cannot read; a changed bit."""
    monkeypatch.setitem(clip_text.SIZES, "tiny", clip_text.Size(1, 16, 2, 16, "gelu"))
    codec = KLVAE(block_out_channels=(32,), layers_per_block=1, latent_channels=16, use_quant_conv=False)
    rng = np.random.default_rng(5)

    def random(shapes):
        return {name: held(rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}

    t5_net = T5Encoder(1, 8, 1, 12, 20)
    clip_net = clip_text.CLIPText.of("tiny")
    text = {
        "t5xxl": t5.to_theirs(random(t5.shapes_of(t5_net))),
        "clip_l": clip_text_layout.to_theirs(random(clip_text_layout.shapes_of(clip_net))),
    }
    vae_params = tiny.random_params(jax.eval_shape(codec.init, jax.random.key(0)))
    expected = text_weights("mmdit", MMDIT)
    transformer, _ = other_networks.write(expected, "official")
    whole = dict(transformer) | {f"first_stage_model.{name}": x for name, x in ldm_names(codec, vae_params, tmp_path).items()}
    for part, tensors in text.items():
        whole |= {model_parts.PARTS[part] + name: x for name, x in tensors.items()}
    file, ours = tmp_path / "sd3.safetensors", tmp_path / "ours.safetensors"
    write_safetensors(file, whole, {"format": "pt"})
    formats.write(expected, "dit_jax", ours)
    assert_equal(formats.read(formats.Source("official", file, like=ours)), expected)
    assert "also has vae, clip_l, t5xxl, which are left out; --part=vae writes one" in capsys.readouterr().err
    source = formats.Source("official", file)
    for part, tensors in text.items():
        model_parts.write(source, part, tmp_path / part)
        read = open_safetensors(text_encoders.find(str(tmp_path / part)))[0]
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(read[name].load(), tensor.load())
    model_parts.write(source, "vae", tmp_path / "vae")
    read = vae.read_codec(tmp_path / "vae")
    assert (read.scale, read.shift, read.latent_channels, read.use_quant_conv) == (1.5305, 0.0609, 16, False)
    assert tiny.distance(vae.load_diffusers(tmp_path / "vae", read), vae_params) == 0
    with pytest.raises(UserError, match=r"--part=clip_g: .* has no tensors text_encoders.clip_g.transformer"):
        model_parts.write(source, "clip_g", tmp_path / "g")
