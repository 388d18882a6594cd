"""Names, shapes and config of the causal autoencoder in diffusers' `AutoencoderKLWan`.

`interop.vae` reads and writes the files. A codec with norms of groups has no class in diffusers; its files have the same names,
with weight and bias in place of gamma, and the class name CausalVAE.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dit_jax.codecs.causal_vae import PRESETS, CausalVAE
from dit_jax.errors import UserError
from dit_jax.storage.bounded import check_form

WAN, OURS = "AutoencoderKLWan", "CausalVAE"
# Our module path, with "." for "/", to diffusers' path. Levels of the encoder are counted apart, because theirs are one list.
TO_DIFFUSERS = (
    (r"\bup_(\d+)_resnet_(\d+)\b", r"up_blocks.\1.resnets.\2"),
    (r"\bup_(\d+)_upsample\b", r"up_blocks.\1.upsamplers.0.resample.1"),
    (r"\bup_(\d+)_time\b", r"up_blocks.\1.upsamplers.0.time_conv"),
    (r"\bmid_resnet_(\d+)\b", r"mid_block.resnets.\1"),
    (r"\bmid_attention\.norm\b", "mid_block.attentions.0.norm"),
    (r"\bmid_attention\.qkv\b", "mid_block.attentions.0.to_qkv"),
    (r"\bmid_attention\.out\b", "mid_block.attentions.0.proj"),
    (r"^(encoder|decoder)\.(quant_conv|post_quant_conv)\b", r"\2"),
    (r"\.kernel$", ".weight"),
)
# diffusers' defaults for fields missing from config.json.
DEFAULTS: dict[str, Any] = {
    "base_dim": 96,
    "decoder_base_dim": None,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "latents_mean": list(PRESETS["wan"].shift),  # type: ignore[arg-type]
    "latents_std": [1 / x for x in PRESETS["wan"].scale],  # type: ignore[union-attr]
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "norm": "rms",
    "norm_groups": 32,
}
FORM = {
    "base_dim": int,
    "z_dim": int,
    "dim_mult": [int],
    "num_res_blocks": int,
    "temperal_downsample": [bool],
    "latents_mean": [float],
    "latents_std": [float],
    "in_channels": int,
    "out_channels": int,
    "norm": str,
    "norm_groups": int,
}
NORMALIZATION = ("latents_mean", "latents_std")
# Fields that follow from others, or that only matter in training.
UNCHECKED = (*NORMALIZATION, "dropout", "scale_factor_temporal", "scale_factor_spatial")


def class_name(codec: CausalVAE) -> str:
    return WAN if codec.norm == "rms" else OURS


def name_of(codec: CausalVAE, keys: tuple[str, ...]) -> str:
    """diffusers' name of a parameter."""
    level = codec.blocks + 1  # entries of theirs per level of the encoder

    def entry(match: re.Match[str]) -> str:
        number, kind, block = int(match[1]), match[2], match[3]
        return (
            f"down_blocks.{number * level + (int(block) if block else codec.blocks)}"
            + {
                "resnet": "",
                "downsample": ".resample.1",
                "time": ".time_conv",
            }[kind]
        )

    name = re.sub(r"\bdown_(\d+)_(resnet|downsample|time)(?:_(\d+))?\b", entry, ".".join(keys))
    for pattern, replacement in TO_DIFFUSERS:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"\.scale$", ".gamma" if codec.norm == "rms" else ".weight", name)


def to_theirs(keys: tuple[str, ...], array: np.ndarray, norm: str) -> np.ndarray:
    """[t, k, k, in, out] to [out, in, t, k, k], and so on; a scale of "rms" gets axes of size 1."""
    if keys[-1] == "scale" and norm == "rms":
        return array.reshape(-1, *(1,) * (2 if "mid_attention" in keys else 3))
    if array.ndim == 2:  # a linear layer, which is a 1 x 1 convolution there
        return array.T[:, :, None, None]
    return array.transpose({5: (4, 3, 0, 1, 2), 4: (3, 2, 0, 1), 1: (0,)}[array.ndim])


def to_ours(keys: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
    """The inverse of `to_theirs`."""
    if keys[-1] != "kernel":
        return np.ascontiguousarray(tensor.reshape(-1))
    if "mid_attention" in keys:
        return np.ascontiguousarray(tensor[:, :, 0, 0].T)
    return np.ascontiguousarray(tensor.transpose({5: (2, 3, 4, 1, 0), 4: (2, 3, 1, 0)}[tensor.ndim]))


def config(codec: CausalVAE) -> dict[str, Any]:
    """The fields of diffusers' config.json for this codec; "norm" and "norm_groups" only where they are not Wan's."""
    scale, shift = (np.broadcast_to(x, codec.z) for x in (codec.scale, codec.shift))
    fields = DEFAULTS | {
        "base_dim": codec.base,
        "z_dim": codec.z,
        "dim_mult": list(codec.mult),
        "num_res_blocks": codec.blocks,
        "temperal_downsample": list(codec.temporal),
        "latents_mean": shift.tolist(),
        "latents_std": (1 / scale).tolist(),
        "in_channels": codec.image_channels,
        "out_channels": codec.image_channels,
        "scale_factor_temporal": codec.time_factor,
        "scale_factor_spatial": codec.downsample,
        "norm": codec.norm,
        "norm_groups": codec.norm_groups,
    }
    if codec.norm == "rms":
        del fields["norm"], fields["norm_groups"]
    return fields


def checked(stored: Mapping[str, Any], path: Any) -> dict[str, Any]:
    """A complete config.json with numbers of the right kinds, and None for a decoder_base_dim that says nothing new.

    Raises:
        UserError: a field of another kind, or standard deviations that are not z_dim positive numbers.
    """
    numbers = {
        name: [float(x) if isinstance(x, int) else x for x in stored[name]]
        for name in NORMALIZATION
        if isinstance(stored[name], list)
    }
    stored = {**stored, **numbers}
    check_form(stored, FORM, str(path), "download it again")
    for name in NORMALIZATION:
        if len(stored[name]) != stored["z_dim"] or (name == "latents_std" and min(stored[name]) <= 0):
            raise UserError(
                f"{path} has {name} {stored[name]}: it must be z_dim = {stored['z_dim']} numbers, positive ones of latents_std"
            )
    if stored["decoder_base_dim"] == stored["base_dim"]:
        stored["decoder_base_dim"] = None
    return stored


def codec_of(stored: Mapping[str, Any], path: Any, dtype: Any) -> CausalVAE:
    """The codec that a config.json describes.

    Raises:
        UserError: it has layers that this codec has not, such as Wan 2.2's.
    """
    unsupported = ("attn_scales", "is_residual", "patch_size")
    problems = [f"{name}: {stored[name]}" for name in unsupported if stored[name]]
    if stored["decoder_base_dim"] not in (None, stored["base_dim"]):
        problems.append(f"decoder_base_dim: {stored['decoder_base_dim']}")
    if stored["in_channels"] != stored["out_channels"]:
        problems.append(f"out_channels: {stored['out_channels']}")
    if problems:
        raise UserError(
            f"{path} describes an autoencoder of another layout than Wan 2.1's ({', '.join(problems)}); take Wan 2.1's"
        )
    return CausalVAE(
        base=stored["base_dim"],
        mult=stored["dim_mult"],
        blocks=stored["num_res_blocks"],
        z=stored["z_dim"],
        temporal=stored["temperal_downsample"],
        norm=stored["norm"],
        norm_groups=stored["norm_groups"],
        scale=[1 / x for x in stored["latents_std"]],  # type: ignore[arg-type]
        shift=stored["latents_mean"],
        image_channels=stored["in_channels"],
        dtype=dtype,
    )
