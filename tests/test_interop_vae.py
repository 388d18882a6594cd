"""Weights of diffusers' AutoencoderKL in and out."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from vae_oracle import LAYOUTS, TINY, diffusers_vae

from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.errors import UserError
from dit_jax.interop.vae import WEIGHTS_NAME, load_diffusers, save_diffusers


@pytest.fixture
def codec():
    return KLVAE(**TINY)


@pytest.fixture
def folder(codec, tmp_path):
    """A folder as diffusers would write it, from random parameters of the codec."""
    params = jax.tree.map(
        lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32),
        jax.eval_shape(codec.init, jax.random.key(0)),
    )
    save_diffusers(tmp_path / "vae", codec, params)
    return tmp_path / "vae"


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_diffusers_folder_survives_the_round_trip_bit_for_bit(layout, tmp_path):
    """A tensor lost, transposed wrongly or cast, a name diffusers does not know, or a config it reads otherwise."""
    diffusers = pytest.importorskip("diffusers")
    codec = KLVAE(**LAYOUTS[layout])
    original = diffusers_vae(codec)
    original.save_pretrained(tmp_path / "theirs")
    params = load_diffusers(tmp_path / "theirs", codec)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, jax.eval_shape(codec.init, jax.random.key(0)))
    save_diffusers(tmp_path / "ours", codec, params)

    read_back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")
    stored, expected = read_back.state_dict(), original.state_dict()
    assert stored.keys() == expected.keys()
    assert all((stored[name] == expected[name]).all() for name in expected)
    for name in ("scaling_factor", "shift_factor", "use_quant_conv", "norm_num_groups", "in_channels"):
        assert read_back.config[name] == original.config[name], name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_keep_their_dtype(dtype, codec, folder, tmp_path):
    """A silent cast to float32 on the way in or out."""
    import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)

    edit(folder, lambda tensors: tensors.update({k: v.astype(dtype) for k, v in tensors.items()}))
    params = load_diffusers(folder, codec)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {dtype}
    save_diffusers(tmp_path / "again.safetensors", codec, params)
    again, first = load_file(tmp_path / "again.safetensors"), load_file(folder / WEIGHTS_NAME)
    assert again.keys() == first.keys() and all(again[k].tobytes() == first[k].tobytes() for k in first)


def test_old_attention_names_are_read(codec, folder):
    """The published sd-vae-ft-mse and -ema, which store query, key, value and proj_attn, refused or mixed up."""
    params = load_diffusers(folder, codec)

    def age(tensors):
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            for name in [n for n in tensors if f".{new}." in n]:
                tensors[name.replace(f".{new}.", f".{old}.")] = tensors.pop(name)

    edit(folder, age)
    assert any(".proj_attn." in name for name in load_file(folder / WEIGHTS_NAME))
    jax.tree.map(np.testing.assert_array_equal, load_diffusers(folder, codec), params)


def test_every_tensor_is_accounted_for(codec, folder):
    """A missing, extra, misshapen or integer tensor that is skipped, or hidden behind the first one reported."""

    def spoil(tensors):
        del tensors["decoder.conv_in.bias"]
        tensors["loss.logvar"] = np.zeros(3, np.float32)
        tensors["quant_conv.weight"] = tensors["quant_conv.weight"][:, :, 0, 0].copy()
        tensors["encoder.conv_in.bias"] = np.zeros(8, np.int32)

    edit(folder, spoil)
    with pytest.raises(UserError) as error:
        load_diffusers(folder / WEIGHTS_NAME, codec)
    for part in ("missing decoder.conv_in.bias", "extra loss.logvar", "misshapen quant_conv.weight", "dtype int32"):
        assert part in str(error.value)
    assert "4 differences" in str(error.value)


def test_both_names_of_one_tensor_are_refused(codec, folder):
    """One of two conflicting tensors taken at random."""
    name = "encoder.mid_block.attentions.0.to_q.weight"
    edit(folder, lambda tensors: tensors.update({name.replace("to_q", "query"): tensors[name]}))
    with pytest.raises(UserError, match="old name and its new one"):
        load_diffusers(folder, codec)


@pytest.mark.parametrize(
    "field, value",
    [("scale", 0.13025), ("shift", 0.1), ("norm_groups", 8), ("use_quant_conv", False), ("layers_per_block", 2)],
)
def test_a_config_that_disagrees_is_refused(field, value, folder):
    """Weights decoded with another model's scale or group count: plausible shapes, wrong colours."""
    other = KLVAE(**{**TINY, field: value})
    with pytest.raises(UserError, match=r"config.json disagrees with the codec.*\n.* in the file, .* in the codec"):
        load_diffusers(folder, other)


def test_a_config_without_the_newer_fields_means_their_defaults(codec, folder):
    """The configs of 2022, which lack scaling_factor and the quant convolutions, refused; or their absence ignored."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("scaling_factor", "shift_factor", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
        del config[name]
    path.write_text(json.dumps(config))
    load_diffusers(folder, codec)
    with pytest.raises(UserError, match=r"scaling_factor: 0\.18215 in the file, 1\.5 in the codec"):
        load_diffusers(folder, dataclasses.replace(codec, scale=1.5))


def test_wrong_files_are_named(codec, folder, tmp_path):
    """A stack trace from deep inside instead of the path and the remedy."""
    with pytest.raises(UserError, match=r"nowhere.*give a .safetensors file"):
        load_diffusers(tmp_path / "nowhere", codec)
    weights = folder / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        load_diffusers(weights, codec)
    weights.unlink()
    with pytest.raises(UserError, match=WEIGHTS_NAME):
        load_diffusers(folder, codec)
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(UserError, match="AutoencoderKL"):
        load_diffusers(folder, codec)


def test_params_of_another_codec_are_not_saved(codec, folder, tmp_path):
    """A file that no codec can read back."""
    params = load_diffusers(folder, codec)
    with pytest.raises(UserError, match="extra encoder/quant_conv/kernel"):
        save_diffusers(tmp_path / "out", dataclasses.replace(codec, use_quant_conv=False), params)
    assert not (tmp_path / "out").exists()
