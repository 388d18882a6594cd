"""Converts LPIPS's weights from the state dict of the `lpips` package.

Write the state dict once, on a machine with PyTorch:

    import lpips, torch  # pip install lpips; it downloads torchvision's VGG16, 528 MB
    torch.save(lpips.LPIPS(net="vgg").state_dict(), "lpips_vgg.pt")

Convert it to a .safetensors of 59 MB; this does not need PyTorch:

    python -m dit_jax.convert --from=lpips --to=dit_jax --weights=lpips_vgg.pt --out=lpips.safetensors

The written file keeps the names of the package.
"""

import os
from typing import Any

import numpy as np

from dit_jax.codecs.perceptual import STAGES
from dit_jax.errors import UserError
from dit_jax.interop.tensors import Tensors, check, common_dtype, open_converted

REMEDY = 'save LPIPS(net="vgg").state_dict() of the lpips package again'
ALEXNET_FIRST = (64, 3, 11, 11)


def _layout() -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """{name in the package: (keys in our params, shape in the package)}.

    A convolution's number is its index in torchvision's vgg16().features.
    """
    layout: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    layout |= {f"scaling_layer.{name}": (("scaling", name), (1, 3, 1, 1)) for name in ("shift", "scale")}
    place, before = 0, 3
    for stage, widths in enumerate(STAGES, 1):
        for layer, width in enumerate(widths, 1):
            theirs, ours = f"net.slice{stage}.{place}", f"conv{stage}_{layer}"
            layout[f"{theirs}.weight"] = (ours, "kernel"), (width, before, 3, 3)
            layout[f"{theirs}.bias"] = (ours, "bias"), (width,)
            place, before = place + 2, width  # skips the ReLU
        place += 1  # skips the pooling
        layout[f"lin{stage - 1}.model.1.weight"] = (f"lin{stage}",), (1, before, 1, 1)
    return layout


LAYOUT = _layout()


def from_package(tensors: Tensors, what: str) -> Tensors:
    """Checks all tensors of the package's state dict and drops its second copy of the linear layers (`lins.`).

    Args:
        what: the file, for error messages.
    Raises:
        UserError: tensors are missing, extra or misshapen (all are listed), have several dtypes, or hold impossible values.
    """
    first = tensors.get("net.slice1.0.weight")
    if first is not None and first.shape == ALEXNET_FIRST:
        raise UserError(f"{what} is LPIPS with AlexNet, the package's default, but VGG is needed; {REMEDY}")
    kept = {}
    for name, tensor in tensors.items():
        original = tensors.get(name.replace("lins.", "lin", 1))
        if not name.startswith("lins.") or original is None:
            kept[name] = tensor
        elif not np.array_equal(tensor.load(), original.load()):
            raise UserError(f"{what}: {name} differs from {name.replace('lins.', 'lin', 1)}, of which it is a copy; {REMEDY}")
    _check(kept, what)
    return {name: kept[name] for name in LAYOUT}


def load(path: str | os.PathLike) -> dict:
    """Reads the params of `dit_jax.codecs.perceptual.lpips` as NumPy arrays in the file's dtype.

    Args:
        path: a .safetensors with the names of the lpips package, written by `python -m dit_jax.convert --from=lpips`.
    Raises:
        UserError: the file does not exist or is not a complete safetensors file; or tensors are missing, extra or misshapen (all
            are listed), have several dtypes, or hold impossible values.
    """
    path, tensors = open_converted(path, "LPIPS", "lpips", "--from=lpips --weights=lpips_vgg.pt")
    _check(tensors, str(path))
    params: dict[str, Any] = {}
    for name, (keys, shape) in LAYOUT.items():
        array = tensors[name].load()
        # OIHW to HWIO; [1, C, 1, 1] to [C].
        array = array.transpose(2, 3, 1, 0) if keys[-1] == "kernel" else array.reshape(max(shape))
        node = params
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = np.ascontiguousarray(array)
    return params


def _check(tensors: Tensors, what: str):
    check(tensors, {name: shape for name, (_, shape) in LAYOUT.items()}, what)
    common_dtype(tensors, what)
    for name, tensor in tensors.items():
        array = tensor.load().astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{what}: {name} holds NaN or infinity; {REMEDY}")
        if name.startswith("lin") and array.min() < 0:
            raise UserError(f"{what}: {name} holds {array.min()}, but LPIPS's weights cannot be negative; {REMEDY}")
        if name == "scaling_layer.scale" and array.min() <= 0:
            raise UserError(f"{what}: {name} holds {array.min()}, but the scale is a divisor and must be positive; {REMEDY}")
