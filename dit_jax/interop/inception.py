"""Converts the weights of FID's Inception-v3, from pytorch-fid's port or from the original TensorFlow graph.

    python -m dit_jax.convert --download=inception --out=inception.safetensors
    python -m dit_jax.convert --from=inception --weights=pt_inception-2015-12-05-6726825d.pth --out=inception.safetensors
    python -m dit_jax.convert --from=inception_tf --weights=classify_image_graph_def.pb --out=inception.safetensors

torch-fidelity's file has the same tensors under the same names. The written file keeps these names. The graph is in
http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz; ADM uses the same one.
"""

import os
from typing import Any

import numpy as np

from dit_jax.errors import UserError
from dit_jax.interop.graph_def import read_constants
from dit_jax.interop.tensors import Tensor, Tensors, check, common_dtype, open_converted
from dit_jax.metrics.inception import BLOCKS, CLASSES, FEATURES, STEM, Conv, names
from dit_jax.storage.paths import local_path

EPSILON = 1e-3  # of the batch norms, in the graph and in its ports
NORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def _convolutions() -> dict[str, tuple[str, Conv, int]]:
    """All convolutions, {name in the port: (name in the graph, convolution, channels of its input)}."""
    convolutions, channels, number = {}, 3, 0
    for name, conv in STEM.items():
        if conv is not None:
            convolutions[name] = _numbered("conv", number), conv, channels
            channels, number = conv.features, number + 1
    for index, (name, block) in enumerate(BLOCKS.items()):
        before, channels, towers = channels, 0, 0
        for branch, chain in block.branches.items():
            # In the graph a single convolution belongs to the block itself; longer or pooled branches are towers.
            place = _numbered("mixed", index)
            if len(chain) > 1 or branch == "branch_pool":
                place, towers = f"{place}/{_numbered('tower', towers)}", towers + 1
            width = before
            for link_number, (link, ports) in enumerate(zip(chain, names(branch, chain), strict=True)):
                for side, (conv, port) in enumerate(zip(link, ports, strict=True)):
                    graph = _numbered("conv", link_number) if len(link) == 1 else f"mixed/{_numbered('conv', side)}"
                    convolutions[f"{name}.{port}"] = f"{place}/{graph}", conv, width
                width = sum(conv.features for conv in link)
            channels += width
    return convolutions


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


CONVOLUTIONS = _convolutions()


def _layout() -> dict[str, tuple[int, ...]]:
    """All tensors of the port, {name: shape}."""
    layout: dict[str, tuple[int, ...]] = {}
    for name, (_, conv, channels) in CONVOLUTIONS.items():
        layout[f"{name}.conv.weight"] = conv.features, channels, conv.height, conv.width
        layout |= {f"{name}.bn.{part}": (conv.features,) for part in NORM}
    return layout | {"fc.weight": (CLASSES, FEATURES), "fc.bias": (CLASSES,)}


LAYOUT = _layout()


def from_port(tensors: Tensors, what: str) -> Tensors:
    """Checks all tensors of pytorch-fid's or torch-fidelity's state dict and returns them.

    `num_batches_tracked`, a training counter in newer files, is dropped.

    Args:
        what: the file, for error messages.
    Raises:
        UserError: tensors are missing, extra or misshapen (all are listed), have several dtypes, or hold impossible values.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".bn.num_batches_tracked")}
    if "fc.weight" in kept and kept["fc.weight"].shape == (1000, FEATURES):
        raise UserError(
            f"{what} is torchvision's Inception-v3, with 1000 classes. FID needs the network of 2015 with {CLASSES}; "
            "download it with python -m dit_jax.convert --download=inception"
        )
    _check(kept, what)
    return {name: kept[name] for name in LAYOUT}


def from_graph(path: str | os.PathLike) -> Tensors:
    """Reads the TensorFlow graph's constants with the port's names and layout; equal to the port's bit for bit.

    Raises:
        UserError: the file is not a frozen graph; or as `from_port`.
    """
    path = local_path(path)
    constants = read_constants(path)
    tensors: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {}  # and the axes of the port in those of the graph
    for name, (graph, *_) in CONVOLUTIONS.items():
        tensors[f"{name}.conv.weight"] = constants.pop(f"{graph}/conv2d_params", None), (3, 2, 0, 1)  # HWIO to OIHW
        for part, theirs in NORM.items():
            tensors[f"{name}.bn.{part}"] = constants.pop(f"{graph}/batchnorm/{theirs}", None), (0,)
    tensors["fc.weight"] = constants.pop("softmax/weights", None), (1, 0)
    tensors["fc.bias"] = constants.pop("softmax/biases", None), (0,)
    # Scalars (such as the input's range) are not weights.
    extra = {name: tensor for name, tensor in constants.items() if tensor.shape}
    kept = {
        name: _transposed(tensor, order)
        for name, (tensor, order) in tensors.items()
        if tensor is not None and len(tensor.shape) == len(order)
    }
    _check(kept | extra, str(path))
    return kept


def _transposed(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    shape = tuple(tensor.shape[axis] for axis in order)
    return Tensor(shape, tensor.dtype, lambda: tensor.load().transpose(order))


def load(path: str | os.PathLike) -> dict:
    """Reads the params of `dit_jax.metrics.inception.InceptionV3` as NumPy float32.

    Batch norms are folded into kernel and bias, in float64. The classifier's bias is dropped, because no metric uses it.

    Args:
        path: a .safetensors written by `python -m dit_jax.convert --from=inception`.
    Raises:
        UserError: the file does not exist or is not a complete safetensors file; or tensors are missing, extra or misshapen (all
            are listed), have several dtypes, or hold impossible values.
    """
    path, tensors = open_converted(path, "Inception-v3", "inception", "--download=inception")
    _check(tensors, str(path))
    params: dict[str, Any] = {"fc": np.ascontiguousarray(tensors["fc.weight"].load().T, np.float32)}
    for name in CONVOLUTIONS:
        node = params
        for key in name.split("."):
            node = node.setdefault(key, {})
        node |= _folded(
            *(tensors[f"{name}.{part}"].load().astype(np.float64) for part in ("conv.weight", *(f"bn.{part}" for part in NORM)))
        )
    return params


def _folded(kernel, gamma, beta, mean, variance) -> dict[str, np.ndarray]:
    scale = gamma / np.sqrt(variance + EPSILON)
    return {
        "kernel": np.ascontiguousarray((kernel * scale[:, None, None, None]).transpose(2, 3, 1, 0), np.float32),
        "bias": (beta - mean * scale).astype(np.float32),
    }


def _check(tensors: Tensors, what: str):
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
