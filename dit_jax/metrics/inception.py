"""The Inception-v3 of FID: the TensorFlow graph of 2015-12-05, without its JPEG decoder.

It differs from torchvision's network in three places: average pooling excludes the padding, the last block uses max pooling,
and there are 1008 classes. Names are those of pytorch-fid's port, in which the weights are commonly published.

Letters: N images; H, W image; C channels.
Source: Szegedy et al. 2016 (Rethinking the Inception Architecture), table 1; Heusel et al. 2017 for its use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dit_jax.metrics.resize import bilinear_tensorflow, to_rgb

INPUT_SIZE = 299
FEATURES = 2048
CLASSES = 1008
SPATIAL_CHANNELS = 7
SPATIAL = 17 * 17 * SPATIAL_CHANNELS


class Conv(NamedTuple):
    """A convolution with its bias (batch normalisation, folded) and ReLU."""

    features: int
    height: int
    width: int
    stride: int = 1
    padding: str = "SAME"


class Block(NamedTuple):
    """Branches over one input, concatenated.

    Fields:
        branches: name -> links in sequence; a link is one convolution, or two in parallel. "branch_pool" pools first; without
            links it only pools.
        pool: "average" or "max", 3 x 3 around each position, or "reduce": max pooling with stride 2, without padding.
    """

    branches: dict[str, tuple[tuple[Conv, ...], ...]]
    pool: str


def _chain(*sizes) -> tuple[tuple[Conv, ...], ...]:
    """Links of one convolution each."""
    return tuple((Conv(*size),) for size in sizes)


def _block_35(pool_features: int) -> Block:
    return Block(
        {
            "branch1x1": _chain((64, 1, 1)),
            "branch5x5": _chain((48, 1, 1), (64, 5, 5)),
            "branch3x3dbl": _chain((64, 1, 1), (96, 3, 3), (96, 3, 3)),
            "branch_pool": _chain((pool_features, 1, 1)),
        },
        "average",
    )


def _block_17(width: int) -> Block:
    row, column = (width, 1, 7), (width, 7, 1)
    return Block(
        {
            "branch1x1": _chain((192, 1, 1)),
            "branch7x7": _chain((width, 1, 1), row, (192, 7, 1)),
            "branch7x7dbl": _chain((width, 1, 1), column, row, column, (192, 1, 7)),
            "branch_pool": _chain((192, 1, 1)),
        },
        "average",
    )


def _block_8(pool: str) -> Block:
    row_and_column = Conv(384, 1, 3), Conv(384, 3, 1)
    return Block(
        {
            "branch1x1": _chain((320, 1, 1)),
            "branch3x3": (*_chain((384, 1, 1)), row_and_column),
            "branch3x3dbl": (*_chain((448, 1, 1), (384, 3, 3)), row_and_column),
            "branch_pool": _chain((192, 1, 1)),
        },
        pool,
    )


STEM: dict[str, Conv | None] = {  # None: 3 x 3 max pooling with stride 2
    "Conv2d_1a_3x3": Conv(32, 3, 3, 2, "VALID"),
    "Conv2d_2a_3x3": Conv(32, 3, 3, 1, "VALID"),
    "Conv2d_2b_3x3": Conv(64, 3, 3),
    "MaxPool_1": None,
    "Conv2d_3b_1x1": Conv(80, 1, 1),
    "Conv2d_4a_3x3": Conv(192, 3, 3, 1, "VALID"),
    "MaxPool_2": None,
}
BLOCKS = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": Block(
        {
            "branch3x3": _chain((384, 3, 3, 2, "VALID")),
            "branch3x3dbl": _chain((64, 1, 1), (96, 3, 3), (96, 3, 3, 2, "VALID")),
            "branch_pool": (),
        },
        "reduce",
    ),
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": Block(
        {
            "branch3x3": _chain((192, 1, 1), (320, 3, 3, 2, "VALID")),
            "branch7x7x3": _chain((192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2, "VALID")),
            "branch_pool": (),
        },
        "reduce",
    ),
    "Mixed_7b": _block_8("average"),
    "Mixed_7c": _block_8("max"),
}


def names(branch: str, chain: Sequence) -> list[list[str]]:
    """Names of each link in pytorch-fid's port.

    A single link has the branch's name ("branch1x1"). Several are numbered ("branch5x5_1"). Parallel ones get letters ("_2a").
    """
    if len(chain) == 1:
        return [[branch]]
    return [
        [f"{branch}_{number}{letter}" for letter in ("ab" if len(link) == 2 else ("",))] for number, link in enumerate(chain, 1)
    ]


class Convolution(nn.Module):
    """relu(conv(x) + bias): [N, H, W, C] -> [N, H', W', features].

    Fields:
        pooled: the graph takes a 3 x 3 mean before this convolution. A 1 x 1 convolution and a mean commute, so the mean is taken
            after it, over fewer channels.
    """

    conv: Conv
    pooled: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = self.conv
        kernel = self.param("kernel", nn.initializers.he_normal(), (conv.height, conv.width, x.shape[-1], conv.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (conv.features,))
        # By default TPUs round float32 to bfloat16, and GPUs to TF32, which changes the distances.
        y = lax.conv_general_dilated(
            x,
            kernel,
            (conv.stride, conv.stride),
            conv.padding,
            precision=lax.Precision.HIGHEST,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return nn.relu((_mean_3x3(y) if self.pooled else y) + bias)


class Mixed(nn.Module):
    """One block of BLOCKS: [N, H, W, C] -> [N, H', W', C'].  Parameters: {link name: {kernel, bias}}."""

    block: Block

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        outputs = []
        for branch, chain in self.block.branches.items():
            pool = self.block.pool if branch == "branch_pool" else ""
            parts = [_max_3x3(x, same=pool == "max") if pool in ("max", "reduce") else x]
            for link, link_names in zip(chain, names(branch, chain), strict=True):
                before = parts[0]
                parts = [
                    Convolution(conv, pool == "average", name=name)(before) for conv, name in zip(link, link_names, strict=True)
                ]
            outputs += parts
        return jnp.concatenate(outputs, axis=-1)


class InceptionV3(nn.Module):
    """Images float32 [N, 299, 299, 3] in [-1, 1) -> the activations that the metrics read, each float32.

    Returns a dict. Under jit, entries that are not used cost nothing:
        "features": [N, 2048], the mean over positions of the last block: `pool_3:0` of the graph.
        "spatial": [N, 2023], the first 7 channels at 17 x 17 of the first branch of the block that the graph calls mixed_6 and
            the port Mixed_6d, in row-major order: `mixed_6/conv:0`, which ADM's evaluator uses for sFID.
        "logits": [N, 1008] without the classifier's bias, as ADM, TTUR and torch-fidelity ("logits_unbiased") use them for the
            Inception score.
        "64", "192", "768": [N, 64], [N, 192], [N, 768], means over positions of earlier layers, with torch-fidelity's names.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        activations = {}
        for name, conv in STEM.items():
            x = Convolution(conv, name=name)(x) if conv else _max_3x3(x)
            if conv is None:
                activations[str(x.shape[-1])] = x.mean((1, 2))
        for name, block in BLOCKS.items():
            x = Mixed(block, name=name)(x)
            if name == "Mixed_6d":
                activations["spatial"] = x[..., :SPATIAL_CHANNELS].reshape(len(x), SPATIAL)
            if name == "Mixed_6e":
                activations["768"] = x.mean((1, 2))
        activations["features"] = x.mean((1, 2))
        kernel = self.param("fc", nn.initializers.lecun_normal(), (FEATURES, CLASSES))
        activations["logits"] = jnp.dot(activations["features"], kernel, precision=lax.Precision.HIGHEST)
        return activations


@dataclass(frozen=True)
class Inception:
    """The extractor of FID, sFID and the Inception score: resize, network and softmax in float32. Jit the call.

    Source: `_create_feature_graph` and `_create_softmax_graph` of ADM's evaluator; torch-fidelity's inception-v3-compat.
    """

    name = "inception"

    def recipe(self) -> dict:
        """Describes how images become features, for the result file."""
        return {
            "network": "inception-v3, TensorFlow graph of 2015-12-05",
            "input_size": INPUT_SIZE,
            "resize": "bilinear of TensorFlow 1: corners not aligned, half pixels not centred, no antialiasing, not rounded",
            "range": "(x - 128) / 128",
            "grey": "repeated to R, G, B",
            "precision": "float32",
            "logits": "without the classifier's bias",
        }

    def __call__(self, params: Any, images: jax.Array) -> dict[str, jax.Array]:
        """{"features": [N, 2048], "spatial": [N, 2023], "probabilities": [N, 1008]}, each float32.

        Args:
            params: of `dit_jax.interop.inception.load`.
            images: uint8 [N, H, W, 3], or [N, H, W, 1] for grey, of any size.
        Raises:
            ValueError: images of another dtype, rank or channel count.
        """
        x = bilinear_tensorflow(to_rgb(images), INPUT_SIZE)
        activations: Any = InceptionV3().apply({"params": params}, (x - 128) / 128)
        return {
            "features": activations["features"],
            "spatial": activations["spatial"],
            "probabilities": jax.nn.softmax(activations["logits"]),
        }


def _max_3x3(x, same: bool = False):
    """3 x 3 max pooling: stride 1 with padding if `same`, otherwise stride 2 without padding.

    Computed as the maximum of slices along one axis, then along the other. The result equals nn.max_pool bit for bit, with which
    the network takes 7 % longer on a CPU.
    """
    step = 1 if same else 2
    if same:
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    for axis in (1, 2):
        last = x.shape[axis] - 3
        first, second, third = (lax.slice_in_dim(x, i, i + last + 1, step, axis) for i in range(3))
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x


def _mean_3x3(x):
    """3 x 3 average pooling with stride 1 that excludes the padding."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
