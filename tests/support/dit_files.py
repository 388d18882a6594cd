"""Small random DiTs in our layout, and PyTorch's output for the same weights in the paper's layout."""

import math

import jax
import numpy as np

from dit_jax import recipes
from dit_jax.build import Run
from dit_jax.convert import formats
from dit_jax.interop import weights
from dit_jax.interop.tensors import Tensor
from dit_jax.interop.weights import Weights
from dit_jax.parallel.rules import path_name

TINY = {"depth": 3, "width": 32, "heads": 4, "num_classes": 10, "dtype": "float32"}


def held(array) -> Tensor:
    return Tensor(array.shape, array.dtype, lambda: array)


def tiny_weights(recipe=recipes.dit, dtype=np.float32, seed=0, **model) -> Weights:
    """Random non-zero parameters for an input of 8 x 8 x 4."""
    config = recipe("XL/2", 64)
    config.model.update({**TINY, **model, "param_dtype": np.dtype(dtype).name})
    sections = weights.sections_of(config.to_dict())
    rng = np.random.default_rng(seed)
    leaves = jax.tree_util.tree_flatten_with_path(formats.network_params(formats.config_of(sections)))[0]
    return Weights(
        {path_name(keys): held((0.2 * rng.normal(size=leaf.shape)).astype(dtype)) for keys, leaf in leaves},
        sections,
        {"from": "a test"},
    )


def arrays(found: Weights) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor.load()) for name, tensor in found.tensors.items()}


def same_bits(a: Weights, b: Weights) -> bool:
    a, b = arrays(a), arrays(b)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


def our_forward(found: Weights, x, t, labels):
    """Output of our network: x [B, H, W, C] -> [B, H, W, out]."""
    net = Run(formats.config_of(found.sections)).network
    params = {}
    for name, array in arrays(found).items():
        *parents, leaf = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return np.asarray(jax.jit(net.apply)({"params": params}, x, t, {"label": labels}))


def official_forward(state, x, t, labels, heads: int):
    """The paper's network in PyTorch from its state_dict (Peebles & Xie 2023, section 3.2): x [B, C, H, W] -> [B, out, H, W]."""
    import torch
    import torch.nn.functional as F

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def modulated(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = t[:, None] * frequencies
    time = linear(F.silu(linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = F.silu(time + state["y_embedder.embedding_table.weight"][labels])

    patch = state["x_embedder.proj.weight"].shape[-1]
    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    h = h.flatten(2).transpose(1, 2) + state["pos_embed"]
    b, n, d = h.shape
    depth = sum(name.endswith("attn.qkv.bias") for name in state)
    for i in range(depth):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = linear(c, f"blocks.{i}.adaLN_modulation.1").chunk(6, 1)
        qkv = linear(modulated(h, shift_1, scale_1), f"blocks.{i}.attn.qkv").reshape(b, n, 3, heads, d // heads)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(b, n, d)
        h = h + gate_1[:, None] * linear(attended, f"blocks.{i}.attn.proj")
        inner = F.gelu(linear(modulated(h, shift_2, scale_2), f"blocks.{i}.mlp.fc1"), approximate="tanh")
        h = h + gate_2[:, None] * linear(inner, f"blocks.{i}.mlp.fc2")
    h = linear(modulated(h, *linear(c, "final_layer.adaLN_modulation.1").chunk(2, 1)), "final_layer.linear")
    side = math.isqrt(n)
    h = h.reshape(b, side, side, patch, patch, -1)
    return torch.einsum("bhwpqc->bchpwq", h).reshape(b, -1, side * patch, side * patch)
