"""The KL autoencoder's weights as diffusers' `AutoencoderKL` stores them: safetensors in and out, without PyTorch."""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.errors import UserError
from dit_jax.storage.atomic import replacing, write_json

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

# Our module path, "/" read as ".", to theirs: every pattern is tried, none overlaps another.
TO_DIFFUSERS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"\b(down|up)_(\d+)_resnet_(\d+)\b", r"\1_blocks.\2.resnets.\3"),
    (r"\bdown_(\d+)_downsample\b", r"down_blocks.\1.downsamplers.0.conv"),
    (r"\bup_(\d+)_upsample\b", r"up_blocks.\1.upsamplers.0.conv"),
    (r"\bmid_resnet_(\d+)\b", r"mid_block.resnets.\1"),
    (r"\bmid_attention\.norm\b", "mid_block.attentions.0.group_norm"),
    (r"\bmid_attention\.(query|key|value)\b", lambda match: f"mid_block.attentions.0.to_{match[1][0]}"),
    (r"\bmid_attention\.out\b", "mid_block.attentions.0.to_out.0"),
    (r"\bnorm_out\b", "conv_norm_out"),
    (r"^(encoder|decoder)\.(quant_conv|post_quant_conv)\b", r"\2"),
    (r"\.(kernel|scale)$", ".weight"),
]
# Names of the attention layers in files written before diffusers 0.17, the published sd-vae-ft-* among them.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# How latents are scaled, which is a choice of whoever diffuses in them.
NORMALIZATION = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
# What diffusers assumes for a field that config.json lacks; older files lack several.
CONFIG_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
}


def find(path) -> Path:
    """Where an autoencoder's weights lie: `path` itself, or its folder `codec` if `path` is the --workdir of a run."""
    path = Path(path).expanduser()
    own = path / "codec"
    return own if own.is_dir() and not (path / WEIGHTS_NAME).exists() else path


def read_codec(path, dtype=jnp.float32) -> KLVAE:
    """The codec that a diffusers folder describes: sizes, scale and shift; the weights are not read.

    Args:
        path: a folder with config.json.
        dtype: of activations; the file does not say.
    Raises:
        UserError: no such folder or config.json; an autoencoder of another kind, with the fields that say so.
    """
    path = Path(path).expanduser() / "config.json"
    if not path.is_file():
        problem = f"{path} does not exist"
        if path.parent.is_file():
            problem = f"{path.parent} is a lone file, which does not tell the codec's sizes, scale and shift"
        raise UserError(
            f"{problem}: give the folder that holds config.json and {WEIGHTS_NAME}, or the --workdir of a run that "
            "trained an autoencoder"
        )
    stored = _read_config(path)
    codec = KLVAE(
        block_out_channels=stored["block_out_channels"],
        layers_per_block=stored["layers_per_block"],
        latent_channels=stored["latent_channels"],
        use_quant_conv=stored["use_quant_conv"],
        image_channels=stored["in_channels"],
        norm_groups=stored["norm_num_groups"],
        dtype=dtype,
        **_scaling(stored),
    )
    _check_config(path, codec)
    return codec


def weights_sha256(params) -> str:
    """SHA-256 of names, dtypes, shapes and bytes in sorted order: the same for the same numbers in any file."""
    found = hashlib.sha256()
    leaves = {"/".join(_keys(path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    for name in sorted(leaves):
        array = np.ascontiguousarray(leaves[name])
        found.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def load_diffusers(path, codec):
    """Parameters for `codec`, NumPy arrays in the file's own dtypes, from a diffusers `AutoencoderKL`.

    Every tensor of the file is used and every parameter is found, or nothing is loaded.

    Args:
        path: a .safetensors file, or a folder with config.json and diffusion_pytorch_model.safetensors. The folder's
            config is checked against the codec; a lone file does not tell scale, shift or group count: the codec does.
        codec: the `KLVAE` the weights are meant for; its sizes give the names and shapes.
    Raises:
        UserError: path, or a file of the folder, does not exist.
        UserError: config.json disagrees with the codec; the file is not safetensors; or tensors are missing, extra,
            misshapen or of a dtype other than float32, float16 and bfloat16: all of them are listed.
    """
    path = Path(path)
    if path.is_dir():
        _check_config(_find(path / "config.json"), codec)
        path = path / WEIGHTS_NAME
    try:
        tensors = load_file(_find(path))
    except SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}): download or convert it again") from error
    tensors = _rename_old_attention(tensors, path)

    expected = _expected(codec)
    problems = [f"missing {name} {shape}" for name, (_, shape) in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"extra {name} {tensor.shape}")
        elif tensor.shape != expected[name][1]:
            problems.append(f"misshapen {name}: {tensor.shape} in the file, {expected[name][1]} in the codec")
        elif tensor.dtype.name not in ("float32", "float16", "bfloat16"):
            problems.append(f"{name} has dtype {tensor.dtype}, not float32, float16 or bfloat16")
    if problems:
        raise UserError(
            f"{path} does not fit {codec}: choose the codec sizes of these weights. {len(problems)} differences:\n  "
            + "\n  ".join(sorted(problems))
        )
    params = {}
    for name, (keys, _) in expected.items():
        node = params
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = _to_ours(tensors[name])
    return params


def save_diffusers(path, codec, params):
    """Write params as diffusers' `AutoencoderKL`, dtypes kept; loading them again gives the same bits.

    Args:
        path: a name ending in .safetensors for the weights alone; any other is a folder, made if need be, that gets
            config.json too and is what `AutoencoderKL.from_pretrained` reads. Files that exist are replaced.
        codec: the `KLVAE` the params belong to.
        params: pytree of `codec.init` or `load_diffusers`.
    Raises:
        UserError: params that are not those of the codec, with the differing names.
    """
    arrays = {_keys(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    expected = {keys: (name, shape) for name, (keys, shape) in _expected(codec).items()}
    problems = [f"missing {'/'.join(keys)}" for keys in expected.keys() - arrays.keys()]
    problems += [f"extra {'/'.join(keys)}" for keys in arrays.keys() - expected.keys()]
    tensors = {}
    for keys in expected.keys() & arrays.keys():
        name, shape = expected[keys]
        tensors[name] = np.ascontiguousarray(_to_theirs(np.asarray(arrays[keys])))
        if tensors[name].shape != shape:
            problems.append(f"misshapen {'/'.join(keys)}: {tensors[name].shape} instead of {shape} as {name}")
    if problems:
        raise UserError(f"params are not those of {codec}:\n  " + "\n  ".join(sorted(problems)))

    path = Path(path)
    if path.suffix != ".safetensors":
        write_json(path / "config.json", {"_class_name": "AutoencoderKL", **_config(codec)}, indent=2)
        path = path / WEIGHTS_NAME
    with replacing(path) as partial:
        save_file(dict(sorted(tensors.items())), partial, metadata={"format": "pt"})  # diffusers asks for a format


def _expected(codec) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """{diffusers name: (our keys, shape of the stored tensor)} for every parameter of the codec."""
    return _names_and_shapes(dataclasses.replace(codec, scale=1.0, shift=0.0))


@functools.lru_cache(maxsize=8)
def _names_and_shapes(codec):
    # Traces the codec's init, which takes most of a second.
    shapes = jax.eval_shape(codec.init, jax.random.key(0))
    expected = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        keys = _keys(path)
        name = ".".join(keys)
        for pattern, replacement in TO_DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        expected[name] = (keys, _to_theirs(np.broadcast_to(np.float32(0), leaf.shape)).shape)
    return expected


def _keys(path):
    return tuple(entry.key for entry in path)


def _to_ours(tensor):
    """OIHW to HWIO, [out, in] to [in, out], vectors as they are."""
    return np.ascontiguousarray(tensor.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[tensor.ndim]))


def _to_theirs(array):
    """HWIO to OIHW, [in, out] to [out, in], vectors as they are."""
    return array.transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim])


def _find(path):
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: give a .safetensors file, or a folder with config.json and {WEIGHTS_NAME} "
            "(pickled .bin and .ckpt files are not read)"
        )
    return path


def _rename_old_attention(tensors, path):
    renamed = {}
    for name, tensor in tensors.items():
        new = re.sub(r"(mid_block\.attentions\.0\.)(query|key|value|proj_attn)\b", lambda m: m[1] + OLD_ATTENTION[m[2]], name)
        if new in renamed:
            raise UserError(f"{path} holds {new} under its old name and its new one: remove one of them from the file")
        renamed[new] = tensor
    return renamed


def _config(codec):
    """The diffusers fields that this codec stands for."""
    levels = len(codec.block_out_channels)
    return CONFIG_DEFAULTS | {
        "in_channels": codec.image_channels,
        "out_channels": codec.image_channels,
        "block_out_channels": list(codec.block_out_channels),
        "layers_per_block": codec.layers_per_block,
        "latent_channels": codec.latent_channels,
        "norm_num_groups": codec.norm_groups,
        **_scaling_fields(codec),
        "use_quant_conv": codec.use_quant_conv,
        "use_post_quant_conv": codec.use_quant_conv,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _scaling_fields(codec):
    """Scale and shift as diffusers has them: z = latents * std / scaling_factor + mean with lists, or factors without."""
    if not isinstance(codec.scale, tuple) and not isinstance(codec.shift, tuple):
        return {"scaling_factor": codec.scale, "shift_factor": codec.shift or None, "latents_mean": None, "latents_std": None}
    scale, shift = (np.broadcast_to(x, codec.latent_channels) for x in (codec.scale, codec.shift))
    std, mean = (1 / scale).tolist(), shift.tolist()
    return {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": mean, "latents_std": std}


def _scaling(stored):
    """{"scale", "shift"} of a config's fields."""
    factor, shift, mean, std = (stored[k] for k in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"))
    if mean is None and std is None:
        return {"scale": factor, "shift": shift or 0.0}
    return {"scale": [factor / x for x in std], "shift": mean}


def _read_config(path):
    """config.json with diffusers' defaults for what it lacks, None for a shift of 0, and 1 for a factor beside lists."""
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(stored, dict) or stored.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise UserError(f"{path} does not describe an AutoencoderKL: give the autoencoder's folder (often named vae)")
    stored = CONFIG_DEFAULTS | stored
    shift = stored["shift_factor"] = stored["shift_factor"] or None
    mean, std = stored["latents_mean"], stored["latents_std"]
    if mean is not None or std is not None:
        if mean is None or std is None or shift is not None:
            raise UserError(
                f"{path} has latents_mean {mean}, latents_std {std} and shift_factor {shift}: both lists are needed, "
                "or shift_factor and none of them"
            )
        if not all(x > 0 for x in std):
            raise UserError(f"{path} has latents_std {std}: every number must be positive")
        stored |= {"latents_std": [x / stored["scaling_factor"] for x in std], "scaling_factor": 1.0}
    return stored


def _check_config(path, codec):
    """Raises a UserError for sizes that differ; scale and shift do not change what the weights mean, so they may."""
    stored = _read_config(path)
    problems = [
        f"{name}: {stored[name]} in the file, {value} in the codec"
        for name, value in _config(codec).items()
        if name not in NORMALIZATION and not _same(stored[name], value)
    ]
    if problems:
        raise UserError(f"{path} disagrees with the codec, change the codec to match:\n  " + "\n  ".join(problems))


def _same(stored, value):
    """Equal, or lists of numbers equal but for the rounding of 1 / (1 / x)."""
    if isinstance(stored, list) and isinstance(value, list) and any(isinstance(x, float) for x in value):
        return len(stored) == len(value) and all(map(lambda a, b: math.isclose(a, b, rel_tol=1e-12), stored, value))
    return stored == value
