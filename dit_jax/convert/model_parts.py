"""Autoencoders and text encoders, each written to a folder of its own: parts of Stable Diffusion 3, and inflated autoencoders."""

import dataclasses
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from dit_jax.codecs.kl_vae import KLVAE, PRESETS
from dit_jax.convert.source import Source, open_weights
from dit_jax.encoders import t5 as t5_network
from dit_jax.encoders.clip_text import END, START, CLIPText
from dit_jax.errors import UserError
from dit_jax.interop import clip_text, codec_folder, network_folder, t5, vae
from dit_jax.interop.inflation import inflated
from dit_jax.interop.mmdit import PREFIX
from dit_jax.interop.tensors import Tensor, Tensors, count
from dit_jax.storage.paths import local_path
from dit_jax.storage.sealed import sha256_of

PARTS = {  # beside the transformer: the beginning of its names
    "vae": vae.LDM_PREFIX,
    **{name: f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")},
}
WEIGHTS_NAME = "model.safetensors"


def found(names: Collection[str]) -> list[str]:
    """The parts that a file with these tensors has beside the transformer of Stable Diffusion 3; [] without that."""
    if not any(name.startswith(f"{PREFIX}joint_blocks.") for name in names):
        return []
    return [part for part, prefix in PARTS.items() if any(name.startswith(prefix) for name in names)]


def write(source: Source, part: str, out: str | os.PathLike) -> dict:
    """Writes a part as a folder: the autoencoder as diffusers', which `codec.path` takes, a text encoder as transformers'.

    Returns:
        {"out", "tensors", "parameters", "sha256"}.

    Raises:
        UserError: the file has no such part, or another one than Stable Diffusion 3; the folder holds other files.
    """
    opened, _, _ = open_weights(source.path, source.key)
    prefix, what = PARTS[part], f"{part} of {source.path}"
    tensors = {name.removeprefix(prefix): tensor for name, tensor in opened.items() if name.startswith(prefix)}
    if not tensors:
        have = ", ".join(found(opened)) or "none of them"
        raise UserError(f"--part={part}: {source.path} has no tensors {prefix}*; of {', '.join(PARTS)} it has {have}")
    if part == "vae":
        return _write_vae(source, tensors, what, out)
    if part == "t5xxl":
        network, ours = t5.to_ours(tensors, what)
        theirs, config = t5.to_theirs(ours), t5_config(network)
    else:
        clip, ours = clip_text.to_ours(tensors, what)
        theirs, config = clip_text.to_theirs(ours), clip_config(clip)
    file = network_folder.write(out, theirs, config, WEIGHTS_NAME)
    return _written(out, theirs, sha256_of(file))


def _written(out: str | os.PathLike, tensors: Mapping[str, Tensor], sha256: str) -> dict:
    return {"out": str(out), "tensors": len(tensors), "parameters": count(tensors), "sha256": sha256}


def _write_vae(source: Source, tensors: Tensors, what: str, out: str | os.PathLike) -> dict:
    folder = local_path(out)
    if folder.exists():
        raise UserError(f"--out={out} exists; give a folder that does not")
    first = "encoder.down.{}.block.0.conv1.weight"
    levels = [tensors[name] for i in range(16) if (name := first.format(i)) in tensors]
    latent = tensors.get("decoder.conv_in.weight")
    if not levels or latent is None or latent.shape[1] != 16:
        raise UserError(f"{what} is not the autoencoder of Stable Diffusion 3, whose latents have 16 channels")
    layers = sum(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name) is not None for name in tensors)
    widths = tuple(tensor.shape[0] for tensor in levels)
    codec = dataclasses.replace(PRESETS["sd3"], block_out_channels=widths, layers_per_block=layers)
    codec_folder.replace(folder, codec, vae.load_diffusers(source.path, codec))
    return _written(out, tensors, sha256_of(folder / vae.WEIGHTS_NAME))


def clip_config(net: CLIPText) -> dict[str, Any]:
    """config.json of transformers' `CLIPTextModelWithProjection`."""
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "hidden_size": net.width,
        "intermediate_size": 4 * net.width,
        "num_hidden_layers": net.depth,
        "num_attention_heads": net.heads,
        "projection_dim": net.projection_width,
        "hidden_act": net.activation,
        "vocab_size": net.vocabulary,
        "max_position_embeddings": net.max_tokens,
        "bos_token_id": START,
        "eos_token_id": END,
    }


def t5_config(net: t5_network.T5Encoder) -> dict[str, Any]:
    """config.json of transformers' `T5EncoderModel`."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": net.width,
        "d_kv": t5_network.HEAD_WIDTH,
        "d_ff": net.hidden_width,
        "num_layers": net.depth,
        "num_heads": net.heads,
        "vocab_size": net.vocabulary,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": t5_network.BUCKETS,
        "relative_attention_max_distance": t5_network.MAX_DISTANCE,
        "layer_norm_epsilon": t5_network.EPSILON,
        "tie_word_embeddings": False,
    }


def inflate(path: str | os.PathLike, temporal: Sequence[bool], out: str | os.PathLike) -> dict:
    """Writes the causal autoencoder of clips that an autoencoder of images becomes; see `interop.inflation`.

    Args:
        path: folder of diffusers' AutoencoderKL, or --workdir of a run that trained one.
        temporal: for each downsampling, finest first: whether it halves the frames too.

    Returns:
        {"out", "tensors", "parameters", "sha256"}.

    Raises:
        UserError: it is another autoencoder; `out` exists.
    """
    folder, found = local_path(out), vae.find(path)
    if folder.exists():
        raise UserError(f"--out={out} exists; give a folder that does not")
    flat = vae.read_codec(found)
    if not isinstance(flat, KLVAE):
        raise UserError(f"{found} is a {type(flat).__name__}, and an AutoencoderKL of images is inflated; give one")
    codec, params = inflated(flat, vae.load_diffusers(found, flat), temporal)
    codec_folder.replace(folder, codec, params)
    leaves = jax.tree.leaves(params)
    parameters, sha256 = sum(x.size for x in leaves), sha256_of(folder / vae.WEIGHTS_NAME)
    return {"out": str(out), "tensors": len(leaves), "parameters": parameters, "sha256": sha256}
