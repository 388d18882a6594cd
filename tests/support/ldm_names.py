"""An autoencoder in the names of the LDM code, which Stability's files have."""

import re

from dit_jax.interop import vae
from dit_jax.interop.tensors import open_safetensors


def ldm_names(codec, params, folder):
    """The tensors of an autoencoder with one level, in the names of the LDM code."""
    vae.save_diffusers(folder / "vae.safetensors", codec, params)
    names = [(theirs, ours) for ours, theirs in (
        (r"down.\2.block.\3", r"(down)_blocks\.(\d)\.resnets\.(\d)"), (r"up.\2.block.\3", r"(up)_blocks\.(\d)\.resnets\.(\d)"),
        ("mid.block_1", r"mid_block\.resnets\.0"), ("mid.block_2", r"mid_block\.resnets\.1"),
        ("mid.attn_1.norm", r"mid_block\.attentions\.0\.group_norm"),
        (r"mid.attn_1.\1", r"mid_block\.attentions\.0\.to_([qkv])\b"),
        ("mid.attn_1.proj_out", r"mid_block\.attentions\.0\.to_out\.0"), ("nin_shortcut", "conv_shortcut"),
        ("norm_out", "conv_norm_out"),
    )]  # fmt: skip
    found = {}
    for name, tensor in open_safetensors(folder / "vae.safetensors")[0].items():
        for pattern, new in names:
            name = re.sub(pattern, new, name)
        found[name] = tensor
    return found
