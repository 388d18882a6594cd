"""The patch discriminator for training autoencoders, and the adversarial losses.

Letters: B batch; H, W image; h', w' map of logits.
Source: Esser et al. 2021 (Taming Transformers), section 3.1, as latent diffusion uses it; the network is PatchGAN of Isola et
al. 2017 (Image-to-Image Translation with Conditional Adversarial Networks), appendix 6.1.2.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dit_jax.errors import UserError

WIDEST = 8  # largest width, as a multiple of base_features
DELTA = 1e-4  # of the paper's code; the paper's text has 1e-6


class PatchDiscriminator(nn.Module):
    """Images [B, H, W, 1 or 3] in [-1, 1] -> float32 logits [B, h', w', 1], one per patch; positive means "real".

    It has `num_layers` 4x4 convolutions of stride 2 and one of stride 1 before the last, with leaky ReLU of slope 0.2. The
    receptive field of a logit is 70 x 70 pixels with 3 layers, 34 with 2, 16 with 1. h' = floor(H / 2^num_layers) - 2.

    Deviation: group norm per image instead of the original's batch norm. Batch norm needs running statistics or couples the
    images of a batch, so that its result depends on the composition of the batch (real and fake together or apart), and on a
    mesh it needs a reduction per layer. Without any norm, the original's small initial weights learn several times slower.

    Fields:
        base_features: width of the first layer; doubles with every layer, up to 8 times.
        num_layers: of stride 2; the smaller side of the images must be at least 3 * 2^num_layers (8 px: 1; 32 px: 3).
        norm_groups: groups of the norms, which all layers but the first and the last have; 0 for no norms.
        dtype: of activations and products; norms' statistics and the logits are float32.
        param_dtype: of the parameters.
    Raises:
        UserError: at construction for invalid sizes, at the call for images that are too small.
    """

    base_features: int = 64
    num_layers: int = 3
    norm_groups: int = 32
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        for name, least in (("base_features", 1), ("num_layers", 1), ("norm_groups", 0)):
            if getattr(self, name) < least:
                raise UserError(f"discriminator.{name} is {getattr(self, name)}; it must be at least {least}")
        for width in self._widths()[1:]:
            if self.norm_groups and width % self.norm_groups:
                raise UserError(
                    f"discriminator.norm_groups {self.norm_groups} does not divide the width {width}: choose one "
                    f"that divides 2 * base_features = {2 * self.base_features}, or 0 for no norms"
                )
        super().__post_init__()

    def _widths(self):
        """Widths of all layers but the last."""
        return [self.base_features * min(2**layer, WIDEST) for layer in range(self.num_layers + 1)]

    @property
    def smallest_side(self) -> int:
        """The smallest height and width of an image, which gives one logit."""
        return 3 * 2**self.num_layers

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        self._check(images)
        x = images.astype(self.dtype)
        for layer, width in enumerate(self._widths()):
            x = self._conv(width, 2 if layer < self.num_layers else 1, f"conv_{layer}")(x)
            if layer and self.norm_groups:
                # Two-pass variance: E[x^2] - E[x]^2 in float32 loses digits if the mean is much larger than the deviation.
                x = nn.GroupNorm(
                    self.norm_groups,
                    epsilon=1e-6,
                    use_fast_variance=False,
                    dtype=self.dtype,
                    param_dtype=self.param_dtype,
                    name=f"norm_{layer}",
                )(x)
            x = nn.leaky_relu(x, 0.2)
        return self._conv(1, 1, "conv_out")(x).astype(jnp.float32)

    def _conv(self, features, stride, name):
        return nn.Conv(
            features,
            (4, 4),
            (stride, stride),
            padding=((1, 1), (1, 1)),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(0.02),
            name=name,
        )

    def _check(self, images):
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images have dtype {images.dtype}: convert to float32 in [-1, 1], uint8 as x / 127.5 - 1")
        if images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise ValueError(f"images have shape {images.shape}, not [B, H, W, 3] or [B, H, W, 1]")
        side = min(images.shape[1:3])
        if side < self.smallest_side:
            fitting = max((n for n in range(1, self.num_layers) if 3 * 2**n <= side), default=None)
            remedy = f"set num_layers to at most {fitting}" if fitting else "even one layer needs 6 pixels: enlarge the images"
            raise UserError(
                f"images of {images.shape[1]} x {images.shape[2]} are too small for a discriminator with num_layers "
                f"{self.num_layers}, which needs {self.smallest_side} pixels: {remedy}"
            )


def hinge_discriminator_loss(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
    """The discriminator's hinge loss, a float32 scalar >= 0: (mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2.

    It is 1 if all logits are 0. The caller stops the gradient with respect to the images when it computes the logits.
    Source: Lim & Ye 2017; the factor 1/2 is Esser et al.'s code.
    """
    real, fake = (logits.astype(jnp.float32) for logits in (real_logits, fake_logits))
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def generator_loss(fake_logits: jax.Array) -> jax.Array:
    """The autoencoder's adversarial loss, a float32 scalar: minus the mean logit of its reconstructions."""
    return -fake_logits.astype(jnp.float32).mean()


def adaptive_weight(nll_grad: Any, gan_grad: Any, max_weight: float = 1e4) -> jax.Array:
    """The weight of the generator loss, a float32 scalar in [0, max_weight]: |nll_grad| / (|gan_grad| + 1e-4), no gradient.

    With it, both losses have gradients of equal norm at the decoder's last layer. It is multiplied by a constant factor (Esser et
    al.: 0.8, latent diffusion: 0.5).

    Args:
        nll_grad: gradient of the reconstruction loss (L1 + perceptual) with respect to the kernel of the decoder's last layer; an
            array or a pytree, whose norm is taken over all leaves.
        gan_grad: the same gradient of `generator_loss`.
    Source: Esser et al. 2021, equation 7.
    """
    nll_norm, gan_norm = (
        jnp.sqrt(sum(jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(grad)))
        for grad in (nll_grad, gan_grad)
    )
    return lax.stop_gradient(jnp.clip(nll_norm / (gan_norm + DELTA), 0.0, max_weight))
