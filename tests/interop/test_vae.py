"""Weights of diffusers' AutoencoderKL in and out."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from vae_oracle import LAYOUTS, TINY, diffusers_vae, diffusers_vq

from dit_jax.build import Run
from dit_jax.codecs.kl_vae import KLVAE, PRESETS
from dit_jax.codecs.vq_vae import VQVAE
from dit_jax.errors import UserError
from dit_jax.interop import pt_writer
from dit_jax.interop.tensors import Tensor
from dit_jax.interop.vae import WEIGHTS_NAME, find, load_diffusers, read_codec, save_diffusers, weights_sha256


@functools.cache
def shapes(codec):
    return jax.eval_shape(codec.init, jax.random.key(0))


@pytest.fixture(scope="module")
def codec():
    return KLVAE(**TINY)


@pytest.fixture(scope="module")
def written(codec, tmp_path_factory):
    """A folder as diffusers would write it, from random parameters of the codec."""
    folder = tmp_path_factory.mktemp("written")
    save_diffusers(
        folder,
        codec,
        jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), shapes(codec)),
    )
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(written, tmp_path / "vae")


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
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes(codec))
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


def ldm_name(name, levels):
    """diffusers' name to that of the LDM code (ldm/modules/diffusionmodules/model.py)."""
    parts = name.split(".")
    if parts[0] not in ("encoder", "decoder"):
        return name
    side, part, *rest = parts
    if part in ("down_blocks", "up_blocks"):
        level = int(rest[0]) if part == "down_blocks" else levels - 1 - int(rest[0])
        kind = {"resnets": f"block.{rest[2]}", "downsamplers": "downsample", "upsamplers": "upsample"}[rest[1]]
        return ".".join([side, part.split("_")[0], str(level), kind, *rest[3:]]).replace("conv_shortcut", "nin_shortcut")
    if part == "mid_block":
        if rest[0] == "resnets":
            return ".".join([side, "mid", f"block_{int(rest[1]) + 1}", *rest[2:]])
        where = ".".join(rest[2:]).replace("to_out.0", "proj_out").replace("to_", "").replace("group_norm", "norm")
        return f"{side}.mid.attn_1.{where}"
    return name.replace("conv_norm_out", "norm_out")


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_the_names_of_the_ldm_code_are_read(prefix, codec, folder, capsys):
    """173 lines of missing and extra tensors for the names that the paper's autoencoder was published under."""
    expected = load_diffusers(folder, codec)
    tensors = load_file(folder / WEIGHTS_NAME)
    levels = len(codec.block_out_channels)
    theirs = {prefix + ldm_name(name, levels): tensor for name, tensor in tensors.items()}
    assert f"{prefix}encoder.mid.attn_1.q.weight" in theirs
    assert f"{prefix}decoder.up.0.block.0.conv1.weight" in theirs
    for name, tensor in theirs.items():
        if ".attn_1." in name and tensor.ndim == 2:
            theirs[name] = tensor[:, :, None, None]  # convolutions there
    save_file(theirs | ({"model.diffusion_model.x": np.ones(1, np.float32)} if prefix else {}), folder / WEIGHTS_NAME)
    found = load_diffusers(folder, codec)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert "names of the LDM code" in capsys.readouterr().err


SD3_CONFIG = {  # vae/config.json of stabilityai/stable-diffusion-3-medium-diffusers
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.29.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


def test_the_vae_of_sd3_is_read(tmp_path):
    """Catches a folder of Stable Diffusion 3 whose shift, channels or missing convolutions are not those of the preset."""
    (tmp_path / "config.json").write_text(json.dumps(SD3_CONFIG))
    assert read_codec(tmp_path) == PRESETS["sd3"]


SD3_FIELDS = {**TINY, "latent_channels": 16, "use_quant_conv": False, "image_channels": 1}


@pytest.mark.parametrize("given", [{}, {"scale": 1.0}, {"scale": 2.0, "shift": 0.5}])
def test_the_vae_in_a_file_of_sd3_is_read(given, tmp_path):
    """Catches latents without Stable Diffusion 3's shift, which its file does not have: washed-out images without an error."""
    codec = KLVAE(**SD3_FIELDS)
    params = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), shapes(codec))
    save_diffusers(tmp_path / "vae.safetensors", codec, params)
    own = load_file(tmp_path / "vae.safetensors")
    assert not any("quant_conv" in name for name in own)
    theirs = {f"first_stage_model.{ldm_name(name, 4)}": tensor for name, tensor in own.items()}
    theirs = {name: x[:, :, None, None] if ".attn_1." in name and x.ndim == 2 else x for name, x in theirs.items()}
    others = ("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight", "text_encoders.clip_l.transformer.x")
    save_file(theirs | {name: np.ones(1, np.float32) for name in others}, tmp_path / "sd3.safetensors")
    section = {"name": "kl_vae", "path": str(tmp_path / "sd3.safetensors"), "sha256": "", **SD3_FIELDS}
    run = Run(tiny.config(codec=section | given)).with_codec_weights()
    assert (run.codec.scale, run.codec.shift) == (given.get("scale", 1.5305), given.get("shift", 0.0609))
    jax.tree.map(np.testing.assert_array_equal, run.codec_params, params)
    save_file(theirs, tmp_path / "sd3.safetensors")  # of nobody knows what
    if not given:
        with pytest.raises(UserError, match=r"does not contain the scale of the latents; give codec\.scale"):
            Run(tiny.config(codec=section)).with_codec_weights()


def test_a_vae_with_nan_is_named(codec, folder):
    """Images of NaN, drawn black."""
    edit(folder, lambda tensors: tensors["decoder.conv_out.bias"].fill(np.nan))
    with pytest.raises(UserError, match=r"decoder\.conv_out\.bias holds NaN"):
        load_diffusers(folder, codec)


def test_both_names_of_one_tensor_are_refused(codec, folder):
    """One of two conflicting tensors taken at random."""
    name = "encoder.mid_block.attentions.0.to_q.weight"
    edit(folder, lambda tensors: tensors.update({name.replace("to_q", "query"): tensors[name]}))
    with pytest.raises(UserError, match="old and its new name"):
        load_diffusers(folder, codec)


@pytest.mark.parametrize(
    "field, value",
    [("norm_groups", 8), ("use_quant_conv", False), ("layers_per_block", 2)],
)
def test_a_config_that_disagrees_is_refused(field, value, folder):
    """Weights decoded with another model's group count: plausible shapes, wrong colours."""
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
    assert read_codec(folder).scale == 0.18215
    load_diffusers(folder, dataclasses.replace(codec, scale=1.5))  # how latents are scaled is the user's choice


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


PER_CHANNEL = {"scale": (3.0, 0.7, 1.1, 0.2), "shift": (0.1, -0.3, 0.0, 7.0)}


@pytest.mark.parametrize(
    "fields",
    [{}, {"scale": 0.3}, {"scale": 0.3, "shift": 0.2}, PER_CHANNEL, {**PER_CHANNEL, "shift": 0.5}, {"use_quant_conv": False}],
)
def test_a_folder_tells_the_codec(fields, tmp_path):
    """A size, scale or shift that is not written, or read back as another; a config of ours that ours refuses."""
    codec = KLVAE(**{**TINY, **fields})
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes(dataclasses.replace(codec, scale=1.0, shift=0.0)))
    save_diffusers(tmp_path, codec, params)
    found = read_codec(tmp_path)
    for name in ("scale", "shift"):
        np.testing.assert_allclose(
            *(np.broadcast_to(getattr(c, name), codec.latent_channels) for c in (found, codec)), rtol=1e-12
        )
    assert dataclasses.replace(found, scale=1.0, shift=0.0) == dataclasses.replace(codec, scale=1.0, shift=0.0)
    load_diffusers(tmp_path, codec)
    load_diffusers(tmp_path, found)
    assert read_codec(tmp_path, "bfloat16").dtype == "bfloat16"


def test_statistics_per_channel_mean_what_diffusers_means(codec, folder):
    """The inverse of a scale, or a factor beside the lists that is forgotten: z = latents * std / factor + mean."""
    path = folder / "config.json"
    lists = {"latents_mean": [0.5, 1.0, -1.0, 0.0], "latents_std": [2.0, 4.0, 0.5, 1.0]}
    path.write_text(json.dumps(json.loads(path.read_text()) | lists | {"scaling_factor": 0.5}))
    found = read_codec(folder)
    assert found.scale == (0.25, 0.125, 1.0, 0.5) and found.shift == (0.5, 1.0, -1.0, 0.0)
    load_diffusers(folder, found)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latents_mean": None}))
    with pytest.raises(UserError, match="give both lists"):
        read_codec(folder)


def test_a_codec_of_another_kind_is_refused(folder, tmp_path):
    """A KLVAE made of a config that describes something it is not; a lone file whose sizes are guessed."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"act_fn": "relu"}))
    with pytest.raises(UserError, match="act_fn: relu in the file"):
        read_codec(folder)
    with pytest.raises(UserError, match="single file"):
        read_codec(folder / WEIGHTS_NAME)
    with pytest.raises(UserError, match=r"nowhere/config.json does not exist"):
        read_codec(tmp_path / "nowhere")


def test_find(folder, tmp_path):
    """The config.json of a run, which lies beside its codec, taken for the codec's; a run that has none, in seven lines."""
    assert find(folder) == folder and find(folder / WEIGHTS_NAME) == folder / WEIGHTS_NAME
    run = tmp_path / "run"
    run.mkdir()
    messages = {"diffusion": "is the run of a diffusion model, not of an autoencoder", "autoencoder": "has not finished"}
    for task, message in messages.items():
        (run / "config.json").write_text(json.dumps({"task": {"name": task}}))
        with pytest.raises(UserError, match=message):
            find(run)
    (run / "codec").mkdir()
    assert find(run) == run / "codec"
    for missing in (folder / WEIGHTS_NAME, folder / "config.json"):
        missing.unlink()
        with pytest.raises(UserError, match=rf"{missing.name} does not exist"):
            find(folder)
    with pytest.raises(UserError, match=r"nowhere does not exist.*sd-vae-ft-mse, which is downloaded"):
        find(tmp_path / "nowhere")


def test_weights_sha256(codec, folder, tmp_path):
    """A hash of the file's layout rather than of the weights, or one that some change of the weights leaves as it was."""
    params = load_diffusers(folder, codec)
    expected = weights_sha256(params)
    edit(folder, lambda tensors: [tensors.update({k: tensors.pop(k)}) for k in list(tensors)[:5]])
    assert weights_sha256(jax.tree.map(jax.numpy.asarray, load_diffusers(folder, codec))) == expected
    changed = [
        {**params, "decoder": params["encoder"], "encoder": params["decoder"]},
        jax.tree.map(lambda x: x.astype(np.float16), params),
        jax.tree.map(lambda x: x.reshape(1, *x.shape), params),
        jax.tree.map(lambda x: x if x.ndim == 4 else x * np.float32(1.0001), params),
    ]
    assert len({expected, *map(weights_sha256, changed)}) == 5


VQ = VQVAE((8, 16, 16), layers_per_block=1, norm_groups=4, codebook_size=40)


@pytest.fixture(scope="module")
def written_vq(tmp_path_factory):
    """A folder as diffusers would write a VQModel, and its parameters."""
    folder = tmp_path_factory.mktemp("vq")
    params = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), shapes(VQ))
    save_diffusers(folder, VQ, params)
    return folder, params


def test_a_vq_model_survives_the_round_trip_through_diffusers(tmp_path):
    """A codebook transposed or left out, a name diffusers does not know, or a config that it reads otherwise."""
    diffusers = pytest.importorskip("diffusers")
    codec = dataclasses.replace(VQ, scale=0.5)
    original = diffusers_vq(codec)
    original.save_pretrained(tmp_path / "theirs")
    assert read_codec(tmp_path / "theirs") == codec
    save_diffusers(tmp_path / "ours", codec, load_diffusers(tmp_path / "theirs", codec))

    read_back = diffusers.VQModel.from_pretrained(tmp_path / "ours")
    stored, expected = read_back.state_dict(), original.state_dict()
    assert stored.keys() == expected.keys()
    assert all((stored[name] == expected[name]).all() for name in expected)
    for name in ("scaling_factor", "num_vq_embeddings", "norm_num_groups", "latent_channels", "layers_per_block"):
        assert read_back.config[name] == original.config[name], name
    assert read_back.config["vq_embed_dim"] == 3


@pytest.mark.parametrize("prefix, name", [("", "vq-f4.ckpt"), ("first_stage_model.", "model.ckpt"), ("", "vq.safetensors")])
def test_the_checkpoints_of_the_ldm_code_are_read(prefix, name, written_vq, tmp_path, capsys):
    """A discriminator beside the weights that is "extra"; a .ckpt that has to be converted first; lost tensors."""
    folder, params = written_vq
    theirs = {prefix + ldm_name(key, 3): x for key, x in load_file(folder / WEIGHTS_NAME).items()}
    assert f"{prefix}quantize.embedding.weight" in theirs and f"{prefix}decoder.up.0.block.0.conv1.weight" in theirs
    theirs = {key: x[:, :, None, None] if ".attn_1." in key and x.ndim == 2 else x for key, x in theirs.items()}
    theirs |= {"loss.discriminator.main.0.weight": np.ones(2, np.float32)}
    theirs |= {"model.diffusion_model.x": np.ones(1, np.float32)} if prefix else {}
    if name.endswith(".ckpt"):
        pt_writer.write(tmp_path / name, {key: Tensor(x.shape, x.dtype, lambda x=x: x) for key, x in theirs.items()})
    else:
        save_file(theirs, tmp_path / name)
    jax.tree.map(np.testing.assert_array_equal, load_diffusers(tmp_path / name, VQ), params)
    assert "names of the LDM code" in capsys.readouterr().err


def test_an_old_vq_config_means_unscaled_latents(written_vq, tmp_path):
    """The scale of Stable Diffusion for a file that is older than the field: latents of LDM-4 five times too small."""
    folder = shutil.copytree(written_vq[0], tmp_path / "vq")
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == "VQModel" and "latents_mean" not in config
    for name in ("scaling_factor", "vq_embed_dim", "norm_type", "mid_block_add_attention"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    assert read_codec(folder) == VQ
    load_diffusers(folder, VQ)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"norm_type": "spatial"}, "norm_type: spatial in the file"),
        ({"vq_embed_dim": 8}, "vq_embed_dim: 8 in the file, 3 in the codec"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 2 + ["AttnDownEncoderBlock2D"]}, "down_block_types"),
        ({"_class_name": "AutoencoderKL"}, "describes a AutoencoderKL, and the codec is a VQVAE; set codec.name"),
    ],
)
def test_another_vq_model_is_refused(fields, message, written_vq, tmp_path):
    """Layers that are left out, a KL autoencoder's config read as that of a VQ model."""
    folder = shutil.copytree(written_vq[0], tmp_path / "vq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UserError, match=message):
        load_diffusers(folder, VQ)


def test_a_checkpoint_without_tensors_is_named(tmp_path):
    """A list of 121 missing tensors for a file that holds something else."""
    pt_writer.write(tmp_path / "empty.ckpt", {})
    with pytest.raises(UserError, match="holds no tensors by name"):
        load_diffusers(tmp_path / "empty.ckpt", VQ)
