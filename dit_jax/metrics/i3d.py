"""I3D, the network of clips behind the Frechet video distance (FVD), and the protocols in which its features are taken.

Letters: N clips; F frames; H, W pixels; C channels.
Source: Carreira & Zisserman 2017 (Quo Vadis, Action Recognition?), table 1, trained on Kinetics-400; Unterthiner et al. 2018 (Towards
Accurate Generative Models of Video) for its use. Names are those of the PyTorch ports, in which the weights are published.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dit_jax.errors import UserError
from dit_jax.metrics.resize import bilinear_centred, bilinear_tensorflow, to_rgb
from dit_jax.models.layers import convolve_clips

INPUT_SIZE = 224
CLASSES = 400
SMALLEST_FRAMES = 9  # of which the average pooling, over an eighth of them, sees 2
USUAL_FRAMES, USUAL_CLIPS = 16, 2_048


class Conv(NamedTuple):
    """A convolution of cubes with its batch norm (folded) and ReLU."""

    features: int
    size: int
    stride: int = 1


class Pool(NamedTuple):
    """Max pooling over (time, side)."""

    window: tuple[int, int]
    strides: tuple[int, int]


class Mixed(NamedTuple):
    """Widths of a block: a 1-cube; a 1-cube and a 3-cube, twice; a 3-cube of max pooling and a 1-cube."""

    b0: int
    b1a: int
    b1b: int
    b2a: int
    b2b: int
    b3b: int


LAYERS: dict[str, Conv | Pool | Mixed] = {
    "Conv3d_1a_7x7": Conv(64, 7, 2),
    "MaxPool3d_2a_3x3": Pool((1, 3), (1, 2)),
    "Conv3d_2b_1x1": Conv(64, 1),
    "Conv3d_2c_3x3": Conv(192, 3),
    "MaxPool3d_3a_3x3": Pool((1, 3), (1, 2)),
    "Mixed_3b": Mixed(64, 96, 128, 16, 32, 32),
    "Mixed_3c": Mixed(128, 128, 192, 32, 96, 64),
    "MaxPool3d_4a_3x3": Pool((3, 3), (2, 2)),
    "Mixed_4b": Mixed(192, 96, 208, 16, 48, 64),
    "Mixed_4c": Mixed(160, 112, 224, 24, 64, 64),
    "Mixed_4d": Mixed(128, 128, 256, 24, 64, 64),
    "Mixed_4e": Mixed(112, 144, 288, 32, 64, 64),
    "Mixed_4f": Mixed(256, 160, 320, 32, 128, 128),
    "MaxPool3d_5a_2x2": Pool((2, 2), (2, 2)),
    "Mixed_5b": Mixed(256, 160, 320, 32, 128, 128),
    "Mixed_5c": Mixed(384, 192, 384, 48, 128, 128),
}


def units() -> dict[str, tuple[int, int, int]]:
    """{name: (input channels, output channels, size)} of all convolutions with a batch norm, in the order of the network."""
    found, width = {}, 3
    for name, layer in LAYERS.items():
        if isinstance(layer, Conv):
            found[name] = width, layer.features, layer.size
            width = layer.features
        elif isinstance(layer, Mixed):
            for unit, before, size in (
                ("b0", width, 1),
                ("b1a", width, 1),
                ("b1b", layer.b1a, 3),
                ("b2a", width, 1),
                ("b2b", layer.b2a, 3),
                ("b3b", width, 1),
            ):
                found[f"{name}.{unit}"] = before, getattr(layer, unit), size
            width = layer.b0 + layer.b1b + layer.b2b + layer.b3b
    return found


class Unit(nn.Module):
    """relu(conv(x) + bias), padded as TensorFlow's SAME: [N, F, H, W, C] -> [N, F', H', W', features]."""

    conv: Conv

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = self.conv.size
        kernel = self.param("kernel", nn.initializers.he_normal(), (size, size, size, x.shape[-1], self.conv.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.conv.features,))
        # By default TPUs round float32 to bfloat16, and GPUs to TF32, which changes the distances.
        y = convolve_clips(x, kernel, (self.conv.stride,) * 2, "same", lax.Precision.HIGHEST)
        return nn.relu(y + bias)


class Block(nn.Module):
    """One `Mixed`: four branches over one input, concatenated."""

    widths: Mixed

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def unit(name, size=1):
            return Unit(Conv(getattr(self.widths, name), size), name=name)

        parts = [
            unit("b0")(x),
            unit("b1b", 3)(unit("b1a")(x)),
            unit("b2b", 3)(unit("b2a")(x)),
            unit("b3b")(_pooled(x, Pool((3, 3), (1, 1)))),
        ]
        return jnp.concatenate(parts, axis=-1)


def _pooled(x, pool: Pool):
    """Max pooling, padded as TensorFlow's SAME. The ports pad with zeros, which are no larger than what a ReLU gives."""
    (time, side), (along, across) = pool
    return nn.max_pool(x, (time, side, side), (along, across, across), "SAME")


class I3DNetwork(nn.Module):
    """Clips float32 [N, F, 224, 224, 3] in [-1, 1], F at least 9 -> logits float32 [N, 400], the mean over time."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for name, layer in LAYERS.items():
            if isinstance(layer, Conv):
                x = Unit(layer, name=name)(x)
            elif isinstance(layer, Mixed):
                x = Block(layer, name=name)(x)
            else:
                x = _pooled(x, layer)
        x = nn.avg_pool(x, (2, *x.shape[2:4]), (1, 1, 1), "VALID")[:, :, 0, 0]  # the plane is 7 x 7
        kernel = self.param("logits", nn.initializers.lecun_normal(), (x.shape[-1], CLASSES))
        bias = self.param("logits_bias", nn.initializers.zeros_init(), (CLASSES,))
        return (jnp.einsum("nfc,ck->nfk", x, kernel, precision=lax.Precision.HIGHEST) + bias).mean(1)


def _covering(frames: jax.Array) -> jax.Array:
    """Shorter side to 224, then the centre: VideoGPT's preprocessing."""
    height, width = frames.shape[1:3]
    shorter = min(height, width)
    size = tuple(math.ceil(side * INPUT_SIZE / shorter) for side in (height, width))
    x = bilinear_centred(frames, size)  # type: ignore[arg-type]
    top, left = ((side - INPUT_SIZE) // 2 for side in size)
    return x[:, top : top + INPUT_SIZE, left : left + INPUT_SIZE]


def _centred(frames: jax.Array) -> jax.Array:
    return bilinear_centred(frames, (INPUT_SIZE, INPUT_SIZE))


class Protocol(NamedTuple):
    """How clips become the network's input.

    Fields:
        resize: uint8 frames [M, H, W, 3] -> float32 [M, 224, 224, 3] in [0, 255].
        describes: the same in words.
        weights: which of the published weights its numbers are made with.
    """

    resize: Any
    describes: str
    weights: str


SQUARE = "to 224 x 224, aspect ignored, no antialiasing"
PROTOCOLS = {
    "styleganv": Protocol(_centred, f"bilinear {SQUARE}, half pixels centred", "i3d_torchscript.pt of StyleGAN-V"),
    "videogpt": Protocol(
        _covering,
        "bilinear, shorter side to 224, half pixels centred, no antialiasing, centre crop",
        "i3d_pretrained_400.pt of VideoGPT",
    ),
    "tf": Protocol(
        lambda frames: bilinear_tensorflow(frames, INPUT_SIZE),
        f"bilinear of TensorFlow 1 {SQUARE}: corners not aligned, half pixels not centred",
        "i3d-kinetics-400 of TensorFlow Hub",
    ),
    "cd_fvd": Protocol(_centred, f"bilinear {SQUARE}, half pixels centred", "i3d_pretrained_400.pt"),
}


@dataclass(frozen=True)
class I3D:
    """The extractor of FVD: resize and network in float32. Jit the call.

    Fields:
        protocol: one of PROTOCOLS, recorded in the result. FVD of different protocols, weights, numbers of frames or numbers of
            clips cannot be compared.

    Raises:
        UserError: an unknown protocol.
    """

    protocol: str = "styleganv"

    name = "i3d"
    takes_clips = True
    clips_at_once = 4  # on each device: the first layer of a clip of 16 frames has 100 MB of activations

    def __post_init__(self):
        if self.protocol not in PROTOCOLS:
            raise UserError(f"protocol {self.protocol!r} must be one of {', '.join(PROTOCOLS)}")

    def recipe(self) -> dict:
        """Describes how clips become features, for the result file."""
        chosen = PROTOCOLS[self.protocol]
        return {
            "network": "I3D of RGB, Kinetics-400",
            "protocol": self.protocol,
            "input_size": INPUT_SIZE,
            "resize": chosen.describes,
            "weights_of_protocol": chosen.weights,
            "range": "x / 127.5 - 1",
            "grey": "repeated to R, G, B",
            "outputs": "logits, mean over time",
            "square_root": "eigenvalues in float64",
            "precision": "float32",
        }

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises UserError if examples of this shape are not clips of at least 9 frames."""
        if len(shape) != 4:
            raise UserError(
                f"features 'i3d' are of clips, and the samples are images of {' x '.join(map(str, shape))}; give clips"
            )
        if shape[0] < SMALLEST_FRAMES:
            raise UserError(f"features 'i3d' need clips of at least {SMALLEST_FRAMES} frames, and the samples have {shape[0]}")

    def remarks(self, count: int, shape: tuple[int, ...]) -> list[str]:
        """What makes the number another one than that of papers."""
        if count >= USUAL_CLIPS and shape[0] == USUAL_FRAMES:
            return []
        return [
            f"fvd: {count} clips of {shape[0]} frames; papers have {USUAL_CLIPS} or more of {USUAL_FRAMES}, and fewer clips give a "
            "larger number"
        ]

    def __call__(self, params: Any, clips: jax.Array) -> dict[str, jax.Array]:
        """{"features": float32 [N, 400]}.

        Args:
            params: of `dit_jax.interop.i3d.load`.
            clips: uint8 [N, F, H, W, 3], or [N, F, H, W, 1] for grey, of any size.
        Raises:
            ValueError: clips of another dtype, rank or channel count.
        """
        if clips.ndim != 5:
            raise ValueError(f"clips are {clips.dtype}{list(clips.shape)}, not uint8 [N, F, H, W, 1 or 3]")
        frames = PROTOCOLS[self.protocol].resize(to_rgb(clips.reshape(-1, *clips.shape[2:])))
        x = frames.reshape(*clips.shape[:2], *frames.shape[1:]) / 127.5 - 1
        features: Any = I3DNetwork().apply({"params": params}, x)
        return {"features": features}
