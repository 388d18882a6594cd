"""Converts DiT weights between the official layout and that of diffusers' `DiTTransformer2DModel`.

Besides the names, two things differ: query, key and value are separate, and every block has its own copy of the time and label
embeddings, all of which must be equal. The order of (shift, scale, gate) is the official one. There is no position table.

The published weights were made by renaming the official ones, and so are the ones written here. diffusers' module itself
deviates from the paper's code in ways that its config cannot fix: it spaces the 256 time frequencies by 1/127 instead of 1/128,
and the default norm_eps of the MLP's norm is 1e-5. dit_jax computes what the paper's code does.
"""

import os
import re
from collections.abc import Mapping

import numpy as np

from dit_jax.errors import UserError
from dit_jax.interop import network_folder
from dit_jax.interop.official import POSITION, Architecture
from dit_jax.interop.tensors import Tensor, Tensors

BLOCK = re.compile(r"blocks\.(\d+)\.")
NAMES = {  # official name: diffusers' name
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
COPIED_NAMES = {  # official name, stored once: diffusers' name, in every block under transformer_blocks.i.norm1.emb.
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
BLOCK_NAMES = {  # official name under blocks.i.: diffusers' name under transformer_blocks.i.
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
CONFIG_DEFAULTS = {  # of DiTTransformer2DModel, for fields missing from config.json
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the published DiT-XL-2 has the second


def names(official: str, depth: int) -> list[str]:
    """Names in diffusers of an official tensor.

    One name; three for query, key and value; one per block for copied embeddings; none for the position table.
    """
    if official == POSITION:
        return []
    stem, kind = official.rsplit(".", 1)
    if stem in COPIED_NAMES:
        return [f"transformer_blocks.{i}.norm1.emb.{COPIED_NAMES[stem]}.{kind}" for i in range(depth)]
    if block := BLOCK.match(official):
        return [f"transformer_blocks.{block[1]}.{name}.{kind}" for name in BLOCK_NAMES[stem.removeprefix(block[0])]]
    return [f"{NAMES[stem]}.{kind}"]


def expected(official: Mapping[str, tuple[int, ...]], depth: int) -> dict[str, tuple[int, ...]]:
    """Maps official names and shapes to those of diffusers."""
    nothing = np.zeros(0)
    blank = {name: Tensor(shape, np.dtype(np.float32), lambda: nothing) for name, shape in official.items()}
    return {name: tensor.shape for name, tensor in from_official(blank, depth).items()}


def to_official(tensors: Tensors, depth: int) -> dict[str, Tensor]:
    """Converts diffusers' tensors, checked against `expected`, to official ones, except the position table.

    Raises:
        UserError: on reading an embedding whose copies differ.
    """
    stems = [*NAMES, *COPIED_NAMES, *(f"blocks.{i}.{name}" for i in range(depth) for name in BLOCK_NAMES)]
    official = {}
    for stem in stems:
        join = _same if stem in COPIED_NAMES else _stacked
        for kind in ("weight", "bias"):
            parts = names(f"{stem}.{kind}", depth)
            if parts[0] in tensors:  # a table has no bias
                official[f"{stem}.{kind}"] = join([(name, tensors[name]) for name in parts])
    return official


def from_official(tensors: Tensors, depth: int) -> dict[str, Tensor]:
    """Converts official tensors to diffusers'."""
    theirs = {}
    for official, tensor in tensors.items():
        parts = names(official, depth)
        thirds = ".attn.qkv." in official
        for i, name in enumerate(parts):
            theirs[name] = _third(tensor, i) if thirds else tensor
    return theirs


def describe(architecture: Architecture, heads: int, sample_size: int) -> dict:
    """config.json of `DiTTransformer2DModel`.

    Args:
        sample_size: side of the network's input.

    Raises:
        UserError: diffusers' module does not support the network.
    """
    if architecture.mlp_width != 4 * architecture.width:
        raise UserError(
            f"the MLP has width {architecture.mlp_width}, but diffusers' module supports only 4 x width = "
            f"{4 * architecture.width}; write --to=official instead"
        )
    # The paper's code uses 1e-6 in every norm.
    return {"_class_name": CLASSES[0]} | _config(architecture, heads, sample_size) | {"norm_eps": 1e-6}


def read_config(weights: str | os.PathLike) -> dict:
    """Reads config.json in the weights' folder; missing fields get diffusers' defaults.

    Raises:
        UserError: it is missing, damaged, or of another class of model.
    """
    config = network_folder.read_config(weights, CLASSES)
    return (CONFIG_DEFAULTS | config) if config["_class_name"] == CLASSES[0] else config


def check_config(config: Mapping, architecture: Architecture, what: str) -> None:
    """Raises unless the config describes these tensors and a network that dit_jax computes.

    Raises:
        UserError: lists all fields that differ.
    """
    sizes = {name: config.get(name) for name in ("num_attention_heads", "attention_head_dim", "sample_size")}
    whole = {name: size for name, size in sizes.items() if isinstance(size, int) and size > 0}
    if len(whole) < len(sizes):
        raise UserError(f"{what}: {', '.join(sizes)} are {list(sizes.values())}; whole numbers are needed")
    wanted = _config(architecture, whole["num_attention_heads"], whole["sample_size"])
    stored = {"out_channels": config.get("in_channels")} if config.get("out_channels") is None else {}
    stored = dict(config) | stored
    problems = [
        f"{name} is {stored.get(name)!r}, but the tensors need {value!r}"
        for name, value in wanted.items()
        if stored.get(name) != value
    ]
    if stored.get("norm_eps") not in (1e-5, 1e-6):
        problems.append(
            f"norm_eps is {stored.get('norm_eps')!r}; it must be 1e-5 (diffusers' default) or 1e-6 (the paper's code)"
        )
    if problems:
        raise UserError(f"{what} does not describe these weights or this network:\n  " + "\n  ".join(problems))


def _config(architecture: Architecture, heads: int, sample_size: int) -> dict:
    """The fields that affect the computation, except norm_eps."""
    a = architecture
    return {
        "num_attention_heads": heads,
        "attention_head_dim": a.width // heads,
        "in_channels": a.in_channels,
        "out_channels": a.out_channels,
        "num_layers": a.depth,
        "sample_size": sample_size,
        "patch_size": a.patch_size,
        "num_embeds_ada_norm": a.num_classes,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    }


def _third(tensor: Tensor, i: int) -> Tensor:
    rows = tensor.shape[0] // 3
    return Tensor((rows, *tensor.shape[1:]), tensor.dtype, lambda: tensor.load()[i * rows : (i + 1) * rows])


def _stacked(parts: list[tuple[str, Tensor]]) -> Tensor:
    """The parts, concatenated along the first axis."""
    tensors = [tensor for _, tensor in parts]
    rows, *rest = tensors[0].shape
    if len(tensors) == 1:
        return tensors[0]
    return Tensor((len(tensors) * rows, *rest), tensors[0].dtype, lambda: np.concatenate([tensor.load() for tensor in tensors]))


def _same(parts: list[tuple[str, Tensor]]) -> Tensor:
    """The tensor of which all parts are copies; reading it checks that they are equal bit by bit."""
    (first_name, first), *others = parts

    def load():
        array = first.load()
        for name, tensor in others:
            if tensor.load().tobytes() != array.tobytes():
                raise UserError(f"{name} differs from {first_name}; all blocks must share one embedding, as in the paper")
        return array

    return Tensor(first.shape, first.dtype, load)
