"""Converts the weights of I3D, the network of the Frechet video distance, from the two published files.

    python -m dit_jax.convert --from=i3d --weights=i3d_pretrained_400.pt --out=i3d.safetensors
    python -m dit_jax.convert --from=i3d --weights=i3d_torchscript.pt --out=i3d.safetensors

The first is a state dict, of TATS and VideoGPT. The second is a TorchScript archive, of StyleGAN-V; its tensors are read, and none of
its code. They are different weights. The written file has the names of the state dict.
"""

import os
from typing import Any

import numpy as np

from dit_jax.errors import UserError
from dit_jax.interop.tensors import Tensors, check, common_dtype, open_converted
from dit_jax.metrics.i3d import CLASSES, units

EPSILON = 1e-5  # of the batch norms
NORM = ("weight", "bias", "running_mean", "running_var")


def _layout() -> dict[str, tuple[int, ...]]:
    """All tensors of the state dict, {name: shape}."""
    layout: dict[str, tuple[int, ...]] = {}
    for name, (inputs, outputs, size) in units().items():
        layout[f"{name}.conv3d.weight"] = outputs, inputs, size, size, size
        layout |= {f"{name}.bn.{part}": (outputs,) for part in NORM}
    return layout | {"logits.conv3d.weight": (CLASSES, 1024, 1, 1, 1), "logits.conv3d.bias": (CLASSES,)}


LAYOUT = _layout()


def from_published(tensors: Tensors, what: str) -> Tensors:
    """Checks all tensors of a published file and returns them; `num_batches_tracked`, a counter of training, is dropped.

    A prefix that all names have, as of a module inside of another, is removed.

    Args:
        what: the file, for error messages.
    Raises:
        UserError: tensors are missing, extra or misshapen (all are listed), have several dtypes, or hold impossible values.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    last = "logits.conv3d.bias"
    prefixes = [name.removesuffix(last) for name in kept if name.endswith(f".{last}")]
    if len(prefixes) == 1 and all(name.startswith(prefixes[0]) for name in kept):
        kept = {name.removeprefix(prefixes[0]): tensor for name, tensor in kept.items()}
    _check(kept, what)
    return {name: kept[name] for name in LAYOUT}


def load(path: str | os.PathLike) -> dict:
    """Reads the params of `dit_jax.metrics.i3d.I3DNetwork` as NumPy float32; batch norms are folded in float64.

    Args:
        path: a .safetensors written by `python -m dit_jax.convert --from=i3d`.
    Raises:
        UserError: the file does not exist or is not a complete safetensors file; or as `from_published`.
    """
    path, tensors = open_converted(path, "I3D", "i3d", "--from=i3d --weights=i3d_pretrained_400.pt")
    _check(tensors, str(path))

    def get(name):
        return tensors[name].load().astype(np.float64)

    params: dict[str, Any] = {
        "logits": np.ascontiguousarray(get("logits.conv3d.weight")[:, :, 0, 0, 0].T, np.float32),
        "logits_bias": get("logits.conv3d.bias").astype(np.float32),
    }
    for name in units():
        gamma, beta, mean, variance = (get(f"{name}.bn.{part}") for part in NORM)
        scale = gamma / np.sqrt(variance + EPSILON)
        kernel = get(f"{name}.conv3d.weight").transpose(2, 3, 4, 1, 0) * scale
        node = params
        for key in name.split("."):
            node = node.setdefault(key, {})
        node |= {"kernel": np.ascontiguousarray(kernel, np.float32), "bias": (beta - mean * scale).astype(np.float32)}
    return params


def _check(tensors: Tensors, what: str) -> None:
    check(tensors, LAYOUT, what)
    common_dtype(tensors, what)
    for name, tensor in tensors.items():
        array = tensor.load().astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{what}: {name} holds NaN or infinity; download or write the file again")
        if name.endswith("running_var") and array.min() < 0:
            raise UserError(
                f"{what}: {name} holds {array.min()}, but a variance cannot be negative; download or write the file again"
            )
