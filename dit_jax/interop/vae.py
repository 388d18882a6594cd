"""Reads and writes the autoencoders' weights as diffusers stores them, without PyTorch.

The classes are `AutoencoderKL`, `VQModel` and, for clips, `AutoencoderKLWan` (see `causal_names`).

The names of the LDM code (CompVis) are read too: of an autoencoder's own checkpoint, or of a whole model's under
`first_stage_model.`, in .safetensors or in PyTorch's .ckpt.
"""

import dataclasses
import functools
import hashlib
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dit_jax.codecs.causal_vae import CausalVAE
from dit_jax.codecs.kl_vae import KLVAE, PRESETS, Autoencoder
from dit_jax.codecs.vq_vae import VQVAE
from dit_jax.errors import UserError
from dit_jax.interop import causal_names, download, pt_reader
from dit_jax.interop.tensors import Tensor, Tensors, open_safetensors
from dit_jax.runtime import console
from dit_jax.storage.atomic import remove_leftovers, replacing, write_json
from dit_jax.storage.bounded import read_json
from dit_jax.storage.claim import LOCK, claim
from dit_jax.storage.paths import local_path

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PUBLISHED = tuple(name for name, file in download.PUBLISHED.items() if file.layout == "vae")

# Our module path, with "." for "/", to diffusers' path. Every pattern is applied; no two overlap.
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
    (r"^codebook\.embedding$", "quantize.embedding.weight"),
    (r"\.(kernel|scale)$", ".weight"),
]
# Names of the attention layers in files written before diffusers 0.17, such as the published sd-vae-ft-*.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# Names in the LDM code, to diffusers' names.
LDM_PREFIX = "first_stage_model."
LDM_LOSS = "loss."  # discriminator and perceptual network, beside an autoencoder's own weights
SD3_TENSOR = "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"
FROM_LDM = [
    (r"\b(down|up)\.(\d+)\.block\.(\d+)\b", r"\1_blocks.\2.resnets.\3"),
    (r"\bdown\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0."),
    (r"\bup\.(\d+)\.upsample\.", r"up_blocks.\1.upsamplers.0."),
    (r"\bmid\.block_1\b", "mid_block.resnets.0"),
    (r"\bmid\.block_2\b", "mid_block.resnets.1"),
    (r"\bmid\.attn_1\.norm\b", "mid_block.attentions.0.group_norm"),
    (r"\bmid\.attn_1\.(q|k|v)\b", r"mid_block.attentions.0.to_\1"),
    (r"\bmid\.attn_1\.proj_out\b", "mid_block.attentions.0.to_out.0"),
    (r"\bnin_shortcut\b", "conv_shortcut"),
    (r"\bnorm_out\b", "conv_norm_out"),
]
# Normalisation of latents, which the diffusion model chooses.
NORMALIZATION = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
# diffusers' defaults for fields missing from config.json; older files lack several.
COMMON_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [64],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
}
CONFIG_DEFAULTS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        **COMMON_DEFAULTS,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    },
    # Deviation: without scaling_factor, diffusers' VQModel takes 0.18215. Files without it are older than the field; they are
    # those of latent diffusion, whose diffusion models are trained on unscaled latents.
    "VQModel": {
        **COMMON_DEFAULTS,
        "latent_channels": 3,
        "scaling_factor": 1.0,
        "num_vq_embeddings": 256,
        "vq_embed_dim": None,
        "norm_type": "group",
    },
    causal_names.WAN: causal_names.DEFAULTS,
    causal_names.OURS: causal_names.DEFAULTS,
}


def find(path: str | os.PathLike, fetch: bool = True) -> Path:
    """Path of an autoencoder's weights: `path` itself, or its folder `codec` if `path` is the --workdir of a run.

    A name in PUBLISHED is the folder of that download, unless a file or folder of this name exists.

    Args:
        fetch: download a published autoencoder that is not there, about 335 MB.

    Raises:
        UserError: the download fails, or is needed and `fetch` is False; `path` does not exist or has no weights; or it is a run
            without a codec of its own.
    """
    if str(path) in PUBLISHED and not Path(path).exists():
        folder = published_folder(str(path))
        if not fetch and not (folder / WEIGHTS_NAME).exists():
            raise UserError(f"the autoencoder {path} is not downloaded yet: python -m dit_jax.convert --download={path}")
        if fetch:
            try:
                fetch_published(str(path), folder)
            except UserError as error:
                raise UserError(
                    f"{error}. Or run python -m dit_jax.convert --download={path} --weights=<folder> where there is a "
                    "connection, and give that folder as codec.path"
                ) from None
        return folder
    path = local_path(path)
    own = path / "codec"
    if own.is_dir() and not (path / WEIGHTS_NAME).exists():
        return own
    _check_is_no_run(path)
    for file in (path / "config.json", path / WEIGHTS_NAME) if path.is_dir() else (path,):
        _find(file)
    return path


def published_folder(name: str) -> Path:
    """The folder that `find` downloads a published autoencoder to: ~/.cache/dit_jax/weights/<name>.

    Raises:
        UserError: the user has no home folder.
    """
    return local_path(download.CACHE) / name


def fetch_published(name: str, folder: Path) -> str:
    """Downloads a published autoencoder to a folder as diffusers stores it, and verifies it; returns the SHA-256 of the weights.

    Of several processes that call this at the same time one downloads, and the others wait for it.

    Raises:
        UserError: see `download`.
    """
    published, path = download.PUBLISHED[name], folder / WEIGHTS_NAME
    if path.exists() and (folder / "config.json").exists() and not (folder / LOCK).exists():
        return download.download(published, path)
    with claim(folder, "downloading", "folder", wait=True):
        if not path.exists():
            console.say(f"{name}: {published.url} -> {path}")
        digest = download.download(published, path, download.byte_progress(name))
        remove_leftovers(folder, "config.json")
        if not (folder / "config.json").exists():
            _write_config(folder, KLVAE())  # the sizes and the scale of Stable Diffusion's
    return digest


def _check_is_no_run(path: Path) -> None:
    """Raises a UserError if `path` is the folder of a run that has no codec."""
    try:
        task = read_json(path / "config.json", form={"task": {"name": str}})["task"]["name"]
    except (OSError, ValueError):
        return
    if task == "autoencoder":
        raise UserError(
            f"{path} is the run of an autoencoder that has not finished, which writes {path / 'codec'} at its end: start it again"
        )
    raise UserError(f"{path} is the run of a {task} model, not of an autoencoder; give the --workdir of one, or a VAE's folder")


def read_codec(path: str | os.PathLike, dtype: Any = jnp.float32) -> KLVAE | VQVAE | CausalVAE:
    """Builds the codec that a diffusers folder describes (sizes, scale and shift) without reading the weights.

    Args:
        path: a folder with config.json.
        dtype: of activations; the file does not record it.
    Raises:
        UserError: the folder or config.json does not exist, or describes an unsupported autoencoder; lists the fields.
    """
    path = local_path(path) / "config.json"
    if not path.is_file():
        problem = f"{path} does not exist"
        if path.parent.is_file():
            problem = f"{path.parent} is a single file, which does not record the codec's sizes, scale and shift"
        raise UserError(
            f"{problem}: give the folder that holds config.json and {WEIGHTS_NAME}, or the --workdir of a run that "
            "trained an autoencoder"
        )
    stored = _read_config(path)
    if stored["_class_name"] in (causal_names.WAN, causal_names.OURS):
        causal = causal_names.codec_of(stored, path, dtype)
        _check_config(path, causal)
        return causal
    sizes = {
        "block_out_channels": stored["block_out_channels"],
        "layers_per_block": stored["layers_per_block"],
        "latent_channels": stored["latent_channels"],
        "image_channels": stored["in_channels"],
        "norm_groups": stored["norm_num_groups"],
        "dtype": dtype,
        **_scaling(stored),
    }
    codec: KLVAE | VQVAE
    if stored["_class_name"] == "VQModel":
        codec = VQVAE(codebook_size=stored["num_vq_embeddings"], **sizes)
    else:
        codec = KLVAE(use_quant_conv=stored["use_quant_conv"], **sizes)
    _check_config(path, codec)
    return codec


def scaling_of_file(path: Path) -> dict[str, Any]:
    """{"scale", "shift"} of the latents of the autoencoder in a file of weights, where its other tensors tell; else {}.

    A file of Stable Diffusion 3 or 3.5 with all parts has an MM-DiT beside the autoencoder.
    """
    if pt_reader.is_pt(path):
        return {}
    names = open_safetensors(path)[0]
    if f"{LDM_PREFIX}decoder.conv_in.weight" not in names or SD3_TENSOR not in names:
        return {}
    return {"scale": PRESETS["sd3"].scale, "shift": PRESETS["sd3"].shift}  # the file does not have them


def weights_sha256(params: Any) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes in sorted order; it does not depend on the file's layout."""
    digest = hashlib.sha256()
    leaves = {"/".join(_keys(path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    for name in sorted(leaves):
        array = np.ascontiguousarray(leaves[name])
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def load_diffusers(path: str | os.PathLike, codec: Autoencoder) -> dict:
    """Loads parameters for `codec` from an autoencoder of diffusers, as NumPy arrays in the file's dtypes.

    Every tensor of the file must be used and every parameter must be present; otherwise nothing is loaded. Of a checkpoint of the
    LDM code, the autoencoder is taken.

    Args:
        path: a .safetensors file or a PyTorch checkpoint, or a folder with config.json and diffusion_pytorch_model.safetensors.
            The folder's config is checked against the codec. A single file does not record scale, shift or group count; the
            codec's are used.
        codec: of the weights; its sizes determine names and shapes.
    Raises:
        UserError: path, or a file of the folder, does not exist.
        UserError: config.json disagrees with the codec; the file is neither safetensors nor PyTorch's; or tensors are missing,
            extra, misshapen or of a dtype other than float32, float16 and bfloat16 (all are listed).
    """
    path = Path(path)
    if path.is_dir():
        _check_config(_find(path / "config.json"), codec)
        path = path / WEIGHTS_NAME
    tensors = _rename_old_attention(_from_ldm(_open(_find(path)), str(path), len(codec.block_out_channels)), path)

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
            f"{path} does not fit {codec}: set the codec's sizes to those of these weights. {len(problems)} differences:\n  "
            + "\n  ".join(sorted(problems))
        )
    params: dict[str, Any] = {}
    for name, (keys, _) in expected.items():
        node = params
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        array = tensors[name].load()
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; download the file again")
        node[keys[-1]] = causal_names.to_ours(keys, array) if isinstance(codec, CausalVAE) else _to_ours(keys, array)
    return params


def _open(path: Path) -> Tensors:
    """The tensors of a .safetensors file or of a PyTorch checkpoint, whose weights are its `state_dict` if it has one."""
    if not pt_reader.is_pt(path):
        return open_safetensors(path)[0]
    stored = pt_reader.read(path)
    stored = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    tensors = {name: tensor for name, tensor in stored.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name: give a checkpoint that is a state_dict or has one")
    return tensors


def save_diffusers(path: str | os.PathLike, codec: Autoencoder, params: Any) -> None:
    """Writes params as an autoencoder of diffusers, with their dtypes; loading them gives the same bits.

    Args:
        path: a name ending in .safetensors for the weights alone. Any other path is a folder, created if needed, which also gets
            config.json and is readable by diffusers' `from_pretrained`. Existing files are replaced.
        codec: that the params belong to.
        params: pytree of `codec.init` or `load_diffusers`.
    Raises:
        UserError: the params are not those of the codec; lists the names that differ.
    """
    arrays = {_keys(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    expected = {keys: (name, shape) for name, (keys, shape) in _expected(codec).items()}
    problems = [f"missing {'/'.join(keys)}" for keys in expected.keys() - arrays.keys()]
    problems += [f"extra {'/'.join(keys)}" for keys in arrays.keys() - expected.keys()]
    tensors = {}
    for keys in expected.keys() & arrays.keys():
        name, shape = expected[keys]
        tensors[name] = np.ascontiguousarray(_stored(codec, keys, np.asarray(arrays[keys])))
        if tensors[name].shape != shape:
            problems.append(f"misshapen {'/'.join(keys)}: {tensors[name].shape} instead of {shape} as {name}")
    if problems:
        raise UserError(f"params are not those of {codec}:\n  " + "\n  ".join(sorted(problems)))

    path = Path(path)
    if path.suffix != ".safetensors":
        _write_config(path, codec)
        path = path / WEIGHTS_NAME
    with replacing(path) as partial:
        save_file(dict(sorted(tensors.items())), partial, metadata={"format": "pt"})  # diffusers requires a format


def _expected(codec) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """{diffusers name: (our keys, shape of the stored tensor)} for every parameter of the codec."""
    chunks = {"chunk_frames": 0} if isinstance(codec, CausalVAE) else {}
    return _names_and_shapes(dataclasses.replace(codec, scale=1.0, shift=0.0, **chunks))


@functools.lru_cache(maxsize=8)
def _names_and_shapes(codec):
    # Traces the codec's init, which takes most of a second.
    shapes = jax.eval_shape(codec.init, jax.random.key(0))
    expected = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        keys = _keys(path)
        expected[_name_of(codec, keys)] = (keys, _stored(codec, keys, np.broadcast_to(np.float32(0), leaf.shape)).shape)
    return expected


def _name_of(codec, keys) -> str:
    if isinstance(codec, CausalVAE):
        return causal_names.name_of(codec, keys)
    name = ".".join(keys)
    for pattern, replacement in TO_DIFFUSERS:
        name = re.sub(pattern, replacement, name)
    return name


def _stored(codec, keys, array):
    """A parameter as the file has it."""
    return causal_names.to_theirs(keys, array, codec.norm) if isinstance(codec, CausalVAE) else _to_theirs(keys, array)


def _keys(path):
    return tuple(entry.key for entry in path)


def _to_ours(keys, tensor):
    """OIHW to HWIO, [out, in] to [in, out]; vectors and the codebook [K, C] are unchanged."""
    if keys[-1] == "embedding":
        return np.ascontiguousarray(tensor)
    return np.ascontiguousarray(tensor.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[tensor.ndim]))


def _to_theirs(keys, array):
    """HWIO to OIHW, [in, out] to [out, in]; vectors and the codebook [K, C] are unchanged."""
    if keys[-1] == "embedding":
        return array
    return array.transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim])


def _find(path):
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: give a .safetensors file, a .ckpt of the LDM code, or a folder with config.json and "
            f"{WEIGHTS_NAME} (a folder's pickled .bin is not read), or {' or '.join(PUBLISHED)}, which is downloaded"
        )
    return path


def _from_ldm(tensors: Tensors, what: str, levels: int) -> dict[str, Tensor]:
    """Renames the tensors of the LDM code (CompVis), which counts the decoder's levels from the other end; others are kept.

    Of a whole model's checkpoint, such as Stable Diffusion's, only the autoencoder under `first_stage_model.` is taken; of an
    autoencoder's own checkpoint, all but its loss.

    Args:
        levels: of the codec.
    """
    prefix = LDM_PREFIX if any(name.startswith(LDM_PREFIX) for name in tensors) else ""
    if f"{prefix}encoder.mid.block_1.conv1.weight" not in tensors:
        return dict(tensors)
    console.say(f"{what} has the names of the LDM code, which are read as diffusers' names")
    renamed = {}
    for name, tensor in tensors.items():
        if not name.startswith(prefix) or name.removeprefix(prefix).startswith(LDM_LOSS):
            continue
        new = name.removeprefix(prefix)
        for pattern, replacement in FROM_LDM:
            new = re.sub(pattern, replacement, new)
        new = re.sub(r"\bup_blocks\.(\d{1,3})\.", lambda match: f"up_blocks.{levels - 1 - int(match[1])}.", new)
        if re.search(r"attentions\.0\.to_.*weight$", new) and tensor.shape[2:] == (1, 1):  # a convolution there
            tensor = _without_kernel_axes(tensor)
        renamed[new] = tensor
    return renamed


def _without_kernel_axes(tensor: Tensor) -> Tensor:
    """[out, in, 1, 1] -> [out, in]."""
    return Tensor(tensor.shape[:2], tensor.dtype, lambda: tensor.load()[:, :, 0, 0])


def _rename_old_attention(tensors: Tensors, path: Path) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        new = re.sub(r"(mid_block\.attentions\.0\.)(query|key|value|proj_attn)\b", lambda m: m[1] + OLD_ATTENTION[m[2]], name)
        if new in renamed:
            raise UserError(f"{path} holds {new} under both its old and its new name: remove one of them from the file")
        renamed[new] = tensor
    return renamed


def _write_config(folder: Path, codec: Autoencoder) -> None:
    fields = _config(codec)
    if isinstance(codec, VQVAE):  # diffusers' VQModel has only the scaling factor
        fields = {name: value for name, value in fields.items() if name not in NORMALIZATION or value is not None}
    write_json(folder / "config.json", {"_class_name": _class_name(codec), **fields}, indent=2)


def _class_name(codec: Autoencoder) -> str:
    if isinstance(codec, CausalVAE):
        return causal_names.class_name(codec)
    return "VQModel" if isinstance(codec, VQVAE) else "AutoencoderKL"


def _config(codec: Autoencoder) -> dict[str, Any]:
    """The fields of diffusers' config.json for this codec."""
    if isinstance(codec, CausalVAE):
        return causal_names.config(codec)
    levels = len(codec.block_out_channels)
    fields = CONFIG_DEFAULTS[_class_name(codec)] | {
        "in_channels": codec.image_channels,
        "out_channels": codec.image_channels,
        "block_out_channels": list(codec.block_out_channels),
        "layers_per_block": codec.layers_per_block,
        "latent_channels": codec.latent_channels,
        "norm_num_groups": codec.norm_groups,
        **_scaling_fields(codec),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    if isinstance(codec, VQVAE):
        return fields | {"num_vq_embeddings": codec.codebook_size, "vq_embed_dim": codec.latent_channels}
    return fields | {"use_quant_conv": codec.use_quant_conv, "use_post_quant_conv": codec.use_quant_conv}


def _scaling_fields(codec):
    """Scale and shift as diffusers' fields: z = latents * std / scaling_factor + mean with lists, or factors without."""
    if not isinstance(codec.scale, tuple) and not isinstance(codec.shift, tuple):
        return {"scaling_factor": codec.scale, "shift_factor": codec.shift or None, "latents_mean": None, "latents_std": None}
    scale, shift = (np.broadcast_to(x, codec.latent_channels) for x in (codec.scale, codec.shift))
    std, mean = (1 / scale).tolist(), shift.tolist()
    return {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": mean, "latents_std": std}


def _scaling(stored):
    """{"scale", "shift"} from a config's fields."""
    factor, shift, mean, std = (stored[k] for k in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"))
    if mean is None and std is None:
        return {"scale": factor, "shift": shift or 0.0}
    return {"scale": [factor / x for x in std], "shift": mean}


def _read_config(path):
    """Reads config.json and normalises it.

    Missing fields get diffusers' defaults, a shift of 0 becomes None, and with lists the scaling factor becomes 1.
    """
    stored = read_json(path, "download it again")
    name = stored.get("_class_name", "AutoencoderKL")
    if not isinstance(name, str) or name not in CONFIG_DEFAULTS:
        raise UserError(
            f"{path} does not describe an AutoencoderKL, a VQModel or an AutoencoderKLWan: give the autoencoder's folder (often named "
            "vae or vqvae)"
        )
    stored = CONFIG_DEFAULTS[name] | stored | {"_class_name": name}
    if name == "VQModel":
        stored["vq_embed_dim"] = stored["vq_embed_dim"] or stored["latent_channels"]
    if name in (causal_names.WAN, causal_names.OURS):
        return causal_names.checked(stored, path)
    shift = stored["shift_factor"] = stored["shift_factor"] or None
    mean, std = stored["latents_mean"], stored["latents_std"]
    if mean is not None or std is not None:
        if mean is None or std is None or shift is not None:
            raise UserError(
                f"{path} has latents_mean {mean}, latents_std {std} and shift_factor {shift}: give both lists without "
                "shift_factor, or neither list"
            )
        if not all(x > 0 for x in std):
            raise UserError(f"{path} has latents_std {std}: every number must be positive")
        stored |= {"latents_std": [x / stored["scaling_factor"] for x in std], "scaling_factor": 1.0}
    return stored


def _check_config(path, codec):
    """Raises UserError if sizes differ; scale and shift may differ, because they do not change the weights."""
    stored = _read_config(path)
    if stored["_class_name"] != _class_name(codec):
        raise UserError(f"{path} describes a {stored['_class_name']}, and the codec is a {type(codec).__name__}; set codec.name")
    problems = [
        f"{name}: {stored[name]} in the file, {value} in the codec"
        for name, value in _config(codec).items()
        if name not in (*NORMALIZATION, *causal_names.UNCHECKED) and not _same(stored[name], value)
    ]
    if problems:
        raise UserError(f"{path} disagrees with the codec, change the codec to match:\n  " + "\n  ".join(problems))


def _same(stored, value):
    """Whether two values are equal; lists of floats may differ by the rounding of 1 / (1 / x)."""
    if isinstance(stored, list) and isinstance(value, list) and any(isinstance(x, float) for x in value):
        return len(stored) == len(value) and all(map(lambda a, b: math.isclose(a, b, rel_tol=1e-12), stored, value))
    return stored == value
