"""DINOv2's vision transformer in all its sizes, with or without register tokens; it gives the features of FD-DINOv2.

Letters: N images; T tokens; D width; H heads; E width of a head; M side of the trained position grid; L depth.
Source: Oquab et al. 2023 (DINOv2); Darcet et al. 2023 (registers); Stein et al. 2023 for its use as a metric.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.metrics.resize import bicubic_pillow, cubic, cubic_antialiased, to_rgb

INPUT_SIZE = 224
PATCH_SIZE = 14
HEAD_WIDTH = 64
NORM_EPSILON = 1e-6
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels


class Block(nn.Module):
    """Pre-norm transformer block with layer scale: [N, T, D] -> ([N, T, D], None), the signature that `nn.scan` requires.

    Fields:
        gated: the MLP is a SwiGLU (the giant size); a GELU otherwise.
        hidden_width: of the MLP; with `gated`, of each of its two halves.
    """

    heads: int
    hidden_width: int
    gated: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        width = x.shape[-1]

        def scaled(y, name):
            return y * self.param(name, nn.initializers.ones_init(), (width,))

        y = nn.LayerNorm(NORM_EPSILON, name="norm1")(x)
        qkv = nn.DenseGeneral((3, self.heads, width // self.heads), name="qkv")(y)  # [N, T, 3, H, E]
        y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], implementation="xla")
        x = x + scaled(nn.DenseGeneral(width, axis=(-2, -1), name="proj")(y), "ls1")
        y = nn.LayerNorm(NORM_EPSILON, name="norm2")(x)
        y = nn.Dense(self.hidden_width * (2 if self.gated else 1), name="in")(y)
        gate, value = y[..., : self.hidden_width], y[..., self.hidden_width :]  # `value` is empty unless gated
        y = nn.silu(gate) * value if self.gated else nn.gelu(gate, approximate=False)
        return x + scaled(nn.Dense(width, name="out")(y), "ls2"), None


class VisionTransformer(nn.Module):
    """Normalised images float32 [N, height, width, 3] -> float32 [N, D], the class token after the last norm.

    Height and width are multiples of 14.

    Fields:
        registers: number of register tokens.
        grid: M.
    """

    width: int
    depth: int
    heads: int
    hidden_width: int
    gated: bool
    registers: int
    grid: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        count, height, width, _ = x.shape
        rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
        x = x.reshape(count, rows, PATCH_SIZE, columns, PATCH_SIZE, 3).transpose(0, 1, 3, 2, 4, 5)
        x = nn.Dense(self.width, name="patch_embed")(x.reshape(count, rows * columns, PATCH_SIZE * PATCH_SIZE * 3))
        normal = nn.initializers.normal(0.02)
        position = self.param("pos_embed", normal, (self.grid, self.grid, self.width))
        if (rows, columns) != (self.grid, self.grid):
            across, along = (position_weights(self.grid, side, self.registers > 0) for side in (rows, columns))
            position = jnp.einsum("im,jn,mnd->ijd", across, along, position)
        x = x + position.reshape(rows * columns, self.width)
        first = self.param("tokens", normal, (1 + self.registers, self.width))
        x = jnp.concatenate([jnp.broadcast_to(first, (count, *first.shape)), x], axis=1)  # [N, T, D]
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        x, _ = blocks(self.heads, self.hidden_width, self.gated, name="blocks")(x)
        return nn.LayerNorm(NORM_EPSILON, name="norm")(x[:, 0])


def position_weights(grid: int, side: int, registers: bool) -> np.ndarray:
    """Weights float32 [side, grid] that interpolate trained position embeddings to another grid size, along one axis.

    Without registers: bicubic (a = -3/4), with the new grid taken to be 0.1 longer than it is. With registers: bicubic
    (a = -1/2) with antialiasing and without the 0.1.  Source: `interpolate_pos_encoding` of DINOv2's code, and its hub's
    settings.
    """
    if registers:
        return cubic_antialiased(grid, side).astype(np.float32)
    place = (np.arange(side) + 0.5) * grid / (side + 0.1) - 0.5
    low = np.floor(place).astype(int)
    weights = np.zeros((side, grid))
    for tap in range(-1, 3):
        np.add.at(weights, (np.arange(side), np.clip(low + tap, 0, grid - 1)), cubic(place - low - tap, -0.75))
    return weights.astype(np.float32)


def network(params: Any) -> VisionTransformer:
    """The `VisionTransformer` of given params; its sizes are read from their shapes."""
    depth, width, _, heads, _ = params["blocks"]["qkv"]["kernel"].shape
    hidden_width, double = params["blocks"]["out"]["kernel"].shape[1], params["blocks"]["in"]["kernel"].shape[2]
    return VisionTransformer(
        width, depth, heads, hidden_width, double == 2 * hidden_width, len(params["tokens"]) - 1, len(params["pos_embed"])
    )


@dataclass(frozen=True)
class DINOv2:
    """The feature extractor of FD-DINOv2: resizes and applies the transformer. Jit the call. Published numbers use ViT-L/14.

    Source: dgm-eval (Stein et al. 2023), which resizes Pillow images with torchvision.
    """

    name = "dinov2"

    def recipe(self) -> dict:
        """Describes how images become features, for the result file."""
        return {
            "network": "DINOv2, class token",
            "input_size": INPUT_SIZE,
            "resize": "bicubic of Pillow: antialiased, horizontally first, rounded to uint8",
            "range": f"(x / 255 - {list(MEAN)}) / {list(DEVIATION)}",
            "grey": "repeated to R, G, B",
            "precision": "float32",
        }

    def __call__(self, params: Any, images: jax.Array) -> dict[str, jax.Array]:
        """{"features": float32 [N, D]}.

        Args:
            params: of `dit_jax.interop.dinov2.load`, of any size.
            images: uint8 [N, H, W, 3], or [N, H, W, 1] for grey; sides below 14336 pixels.
        Raises:
            ValueError: images of another dtype, rank, channel count or size.
        """
        x = bicubic_pillow(to_rgb(images), INPUT_SIZE).astype(jnp.float32) / 255
        x = (x - jnp.array(MEAN)) / jnp.array(DEVIATION)
        with jax.default_matmul_precision("highest"):  # by default TPUs round float32 to bfloat16, and GPUs to TF32
            features: Any = network(params).apply({"params": params}, x)
        return {"features": features}
