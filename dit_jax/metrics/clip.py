"""CLIP's vision transformer: its embeddings of images, whose cosine with those of captions is CLIPScore.

N images; T tokens; D width; H heads; P width of the shared space.
Source: Radford et al. 2021 (CLIP); Hessel et al. 2021 (CLIPScore).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.metrics.resize import bicubic_pillow, to_rgb

NORM_EPSILON = 1e-5
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ACTIVATIONS = {"quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x), "gelu": lambda x: jax.nn.gelu(x, approximate=False)}
FORMULAS = {  # of the cosine of an image with its caption, each a mean over the images
    "clip_score": "2.5 max(cos, 0)",  # Hessel et al. 2021
    "clip_score_100": "100 max(cos, 0)",  # torchmetrics
    "clip_cosine_100": "100 cos",  # most papers' "CLIP score"
}


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): [N, T, D] -> ([N, T, D], None), as `nn.scan` requires."""

    heads: int
    hidden_width: int
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        width = x.shape[-1]
        y = nn.LayerNorm(NORM_EPSILON, name="norm_attention")(x)
        qkv = nn.DenseGeneral((3, self.heads, width // self.heads), name="qkv")(y)  # [N, T, 3, H, E]
        y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], implementation="xla")
        x = x + nn.DenseGeneral(width, axis=(-2, -1), name="out")(y)
        y = nn.Dense(self.hidden_width, name="mlp_in")(nn.LayerNorm(NORM_EPSILON, name="norm_mlp")(x))
        return x + nn.Dense(width, name="mlp_out")(ACTIVATIONS[self.activation](y)), None


class VisionTransformer(nn.Module):
    """Normalised images float32 [N, S, S, 3] -> float32 [N, P]: the projected class token.

    Fields:
        image_size: S.
        patch_size: divides S.
        activation: one of ACTIVATIONS; OpenAI's weights have "quick_gelu".
    """

    depth: int
    width: int
    heads: int
    hidden_width: int
    projection_width: int
    image_size: int
    patch_size: int
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        count, p, side = len(x), self.patch_size, self.image_size // self.patch_size
        x = x.reshape(count, side, p, side, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(count, side * side, p * p * 3)
        x = nn.Dense(self.width, use_bias=False, name="patch_embedding")(x)
        normal = nn.initializers.normal(0.02)
        first = self.param("class_embedding", normal, (self.width,))
        x = jnp.concatenate([jnp.broadcast_to(first, (count, 1, self.width)), x], axis=1)  # [N, T, D]
        x = x + self.param("position_embedding", normal, (1 + side * side, self.width))
        x = nn.LayerNorm(NORM_EPSILON, name="norm_in")(x)
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        x, _ = blocks(self.heads, self.hidden_width, self.activation, name="blocks")(x)
        x = nn.LayerNorm(NORM_EPSILON, name="norm_out")(x[:, 0])
        return nn.Dense(self.projection_width, use_bias=False, name="projection")(x)


def preprocessed(images: jax.Array, size: int) -> jax.Array:
    """Resizes the shorter side to `size` as Pillow does, and cuts at the centre: uint8 [N, H, W, 1 or 3] -> [N, size, size, 3].

    Raises:
        ValueError: images of another dtype, rank or channel count, or too large for an exact resize.

    Source: the image processor of CLIP in transformers.
    """
    height, width = images.shape[1:3]
    shorter = min(height, width)
    height, width = size * height // shorter, size * width // shorter
    x = bicubic_pillow(to_rgb(images), (height, width))
    top, left = (height - size) // 2, (width - size) // 2
    x = x[:, top : top + size, left : left + size].astype(jnp.float32) / 255
    return (x - jnp.array(MEAN)) / jnp.array(DEVIATION)


@dataclass(frozen=True)
class CLIP:
    """The feature extractor: CLIP's embeddings of images, not normalised. Jit the call.

    Fields:
        network: of the images.
        text: of the captions; (params, texts) -> (float32 [N, P] embeddings, number of texts that were cut).
    """

    network: VisionTransformer
    text: Callable[[Any, Sequence[str]], tuple[np.ndarray, int]]

    name = "clip"

    def recipe(self) -> dict:
        """Describes how images become features, for the result file."""
        net = self.network
        return {
            "network": f"CLIP ViT of {net.depth} blocks of width {net.width}, patch {net.patch_size}, {net.activation}",
            "input_size": net.image_size,
            "resize": "shorter side, bicubic of Pillow: antialiased, horizontally first, rounded to uint8; centre crop",
            "range": f"(x / 255 - {list(MEAN)}) / {list(DEVIATION)}",
            "grey": "repeated to R, G, B",
            "precision": "float32",
        }

    def __call__(self, params: Any, images: jax.Array) -> dict[str, jax.Array]:
        """{"features": float32 [N, P]}.

        Args:
            params: {"vision": of `network`, "text": of the text encoder}, as `dit_jax.interop.clip_vision.load` returns them.
            images: uint8 [N, H, W, 3], or [N, H, W, 1] for grey.
        """
        x = preprocessed(images, self.network.image_size)
        with jax.default_matmul_precision("highest"):  # by default TPUs round float32 to bfloat16, and GPUs to TF32
            features: Any = self.network.apply({"params": params["vision"]}, x)
        return {"features": features}


def clip_scores(images: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """The means of FORMULAS, of embeddings float32 [N, P] of images and of their captions.

    Source: Hessel et al. 2021, section 3, for "clip_score".
    """
    images, texts = images.astype(np.float64), texts.astype(np.float64)
    cosine = (images * texts).sum(1) / (np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1))
    positive = np.maximum(cosine, 0).mean()
    values = {"clip_score": 2.5 * positive, "clip_score_100": 100 * positive, "clip_cosine_100": 100 * cosine.mean()}
    return {name: float(value) for name, value in values.items()}
