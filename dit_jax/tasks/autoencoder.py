"""The training step of an autoencoder: L1, KL, perceptual distance and a patch discriminator, as pure functions of arrays.

B batch, H x W x C images, h x w x c latents, n = H W C. Of clips, F x H x W x C, n = F H W C, and LPIPS and the discriminator judge
each frame as an image.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dit_jax.codecs import perceptual
from dit_jax.codecs.codec import AUTOENCODER_RULES
from dit_jax.codecs.discriminator import PatchDiscriminator, adaptive_weight, generator_loss, hinge_discriminator_loss
from dit_jax.codecs.kl_vae import KLAutoencoder, split_moments
from dit_jax.codecs.perceptual import SMALLEST_SIDE, lpips
from dit_jax.errors import UserError
from dit_jax.parallel.rules import Rules
from dit_jax.pixels import to_float
from dit_jax.tasks.averages import Exponential, moving_average
from dit_jax.tasks.state import TrainState, check_offload, count_parameters
from dit_jax.tasks.task import accumulate, is_finite_update, named_key, only_if, step_sums


def frames(images: jax.Array) -> jax.Array:
    """Images [B, H, W, C], or the frames of clips [B, F, H, W, C] as images [B F, H, W, C]."""
    return images if images.ndim == 4 else images.reshape(-1, *images.shape[2:])


@dataclass(frozen=True)
class AutoencoderTask:
    """Trains a KL autoencoder, with or without a patch discriminator.

    The loss of an image is  mean |x - y| + perceptual_weight LPIPS(x, y) + kl_weight KL / n + lambda discriminator_weight g(y),
    with y decoded from one posterior sample, g the generator's loss, and lambda the ratio of the gradient norms of the first
    two terms and of g at the decoder's last layer. The weights are those of latent diffusion's code: its loss is this one
    times n. The discriminator is trained with the hinge loss on the same images and y, in the same step. Its loss and g are
    computed from discriminator_start_step on.

    constants: {"perceptual": weights of LPIPS} if perceptual_weight is not zero.
    batch: {"image": uint8[B, H, W, C]}, or uint8[B, F, H, W, C] of clips.
    State: params {"codec": ..., "discriminator": ...}, the moving average of the codec only, opt_state with the keys of params.

    Source: Rombach et al. 2022, appendix G; Esser et al. 2021 (VQGAN), equations 6 and 7.

    Fields:
        image_shape: (H, W, C), or (F, H, W, C) of clips.
        kl_weight: of the KL divergence from a standard normal, which keeps latents small.
        perceptual_weight: of LPIPS; 0 turns it off, above 0 needs its weights.
        discriminator_weight: of the generator's loss; 0 turns the discriminator off.
        discriminator_start_step: first step with the discriminator's losses.

    Raises:
        UserError: a weight or step out of range; images that do not suit the codec or a loss.
    """

    codec: KLAutoencoder
    optimizer: optax.GradientTransformation
    image_shape: tuple[int, ...]
    kl_weight: float = 1e-6
    perceptual_weight: float = 0.0
    discriminator: PatchDiscriminator | None = None
    discriminator_weight: float = 0.0
    discriminator_start_step: int = 0
    ema_decay: float = 0.999
    ema_warmup: bool = False
    microbatches: int = 1
    zero1: bool = False
    offload: str = "none"

    name = "autoencoder"
    draws_samples = False
    remat = None
    averages = ()
    rules = AUTOENCODER_RULES

    def __post_init__(self):
        for name in ("kl_weight", "perceptual_weight", "discriminator_weight", "discriminator_start_step"):
            if not getattr(self, name) >= 0:
                raise UserError(f"task.{name} is {getattr(self, name)}; it must be at least 0 (0 turns it off)")
        check_offload(self.offload)
        self.codec.latent_shape(self.image_shape)
        side = min(self.image_shape[-3:-1])
        if self.perceptual_weight and side < SMALLEST_SIDE:
            raise UserError(
                f"task.perceptual_weight is {self.perceptual_weight} and LPIPS needs images of at least "
                f"{SMALLEST_SIDE} pixels, not {side}; set it to 0"
            )
        if self.discriminator is not None and side < self.discriminator.smallest_side:
            raise UserError(
                f"task.discriminator.num_layers is {self.discriminator.num_layers}, which needs images of at least "
                f"{self.discriminator.smallest_side} pixels, not {side}; lower it, or set "
                "task.discriminator_weight to 0"
            )

    @property
    def average(self) -> Exponential:
        """The moving average that the codec of the run is."""
        return Exponential(self.ema_decay, self.ema_warmup)

    def init(self, key: jax.Array) -> TrainState:
        params = {"codec": self.codec.init(named_key(key, "codec"))}
        if self.discriminator is not None:
            images = jnp.zeros((1, *self.image_shape[-3:]))
            params["discriminator"] = self.discriminator.init(named_key(key, "discriminator"), images)["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params={"codec": jax.tree.map(lambda x: x.astype(jnp.float32), params["codec"])},
            opt_state=self.init_optimizer(params),
        )

    def init_optimizer(self, params: Any) -> Any:
        return {name: self.optimizer.init(part) for name, part in params.items()}

    def encode(self, codec_params: Any, images: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(posterior sample for this noise, as latents; KL [B] of the posterior to N(0, 1), summed over the latent)."""
        mean, log_variance = split_moments(self.codec.encode(codec_params, images))
        sample = mean + jnp.exp(0.5 * log_variance) * noise
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).sum(range(1, mean.ndim))
        return (sample - jnp.asarray(self.codec.shift)) * jnp.asarray(self.codec.scale), kl

    def fidelity(
        self, constants: Mapping[str, Any], images: jax.Array, decoded: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(batch mean of L1 plus the weighted perceptual distance, {name: per-image distance [B]})."""
        parts = {"l1": jnp.abs(images - decoded).mean(range(1, images.ndim))}
        total = parts["l1"]
        if self.perceptual_weight:
            of_frames = lpips(constants["perceptual"], frames(images), frames(decoded), self.codec.dtype)
            parts["perceptual"] = of_frames.reshape(len(images), -1).mean(1)
            total = total + self.perceptual_weight * parts["perceptual"]
        return total.mean(), parts

    def adversarial(
        self,
        params: Any,
        images: jax.Array,
        decoded: jax.Array,
        fidelity_gradient: jax.Array,
        to_last_layer: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        """The adversarial losses: (gradient by the decoded images, gradient by the discriminator's parameters, metrics).

        fidelity_gradient: of the shape of the images; to_last_layer maps such a gradient to the gradient of the decoder's last kernel.
        """
        discriminator = self.discriminator
        assert discriminator is not None  # called only where there is one

        def discriminate(discriminator_params, x):
            return discriminator.apply({"params": discriminator_params}, frames(x))

        def discriminator_loss(discriminator_params):
            real, fake = discriminate(discriminator_params, images), discriminate(discriminator_params, decoded)
            return hinge_discriminator_loss(real, fake), (real.mean(), fake.mean())

        (loss, (real, fake)), grads = jax.value_and_grad(discriminator_loss, has_aux=True)(params)
        generator, gradient = jax.value_and_grad(lambda x: generator_loss(discriminate(params, x)))(decoded)
        weight = self.discriminator_weight * adaptive_weight(to_last_layer(fidelity_gradient), to_last_layer(gradient))
        return (
            weight * gradient,
            grads,
            {"generator": generator, "discriminator": loss, "adversarial_weight": weight, "logit_real": real, "logit_fake": fake},
        )

    def gradients(
        self, params: Any, constants: Mapping[str, Any], images: jax.Array, noise: jax.Array, adversarial: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """(gradients of params, values [B]); adversarial: whether the discriminator has started, bool scalar."""
        (latents, kl), to_encoder = jax.vjp(lambda p: self.encode(p, images, noise), params["codec"])
        decoded, to_decoder = jax.vjp(self.codec.decode, params["codec"], latents)
        (_, parts), gradient = jax.value_and_grad(lambda y: self.fidelity(constants, images, y), has_aux=True)(decoded)
        grads, kl_weight = {}, self.kl_weight / images[0].size
        values = {"loss": parts["l1"] + self.perceptual_weight * parts.get("perceptual", 0.0) + kl_weight * kl, **parts, "kl": kl}
        if self.discriminator is not None:

            def with_last(kernel):
                decoder = params["codec"]["decoder"]
                decoder = decoder | {"conv_out": decoder["conv_out"] | {"kernel": kernel}}
                return self.codec.decode({"decoder": decoder}, latents)

            _, to_last_layer = jax.vjp(with_last, params["codec"]["decoder"]["conv_out"]["kernel"])

            def losses():
                return self.adversarial(params["discriminator"], images, decoded, gradient, lambda g: to_last_layer(g)[0])

            def zeros():
                return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(losses))

            added, grads["discriminator"], numbers = jax.lax.cond(adversarial, losses, zeros)
            gradient = gradient + added
            values |= {name: jnp.broadcast_to(x, kl.shape) for name, x in numbers.items()}
        decoder_grads, latent_gradient = to_decoder(gradient)
        (encoder_grads,) = to_encoder((latent_gradient, jnp.full_like(kl, kl_weight / len(kl))))
        grads["codec"] = jax.tree.map(jnp.add, decoder_grads, encoder_grads)
        return grads, values

    def step(
        self, state: TrainState, constants: Mapping[str, Any], batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        images = to_float(batch["image"])
        latent_shape = self.codec.latent_shape(self.image_shape)
        inputs = {"images": images, "noise": jax.random.normal(named_key(key, "posterior"), (len(images), *latent_shape))}
        adversarial = state.step >= self.discriminator_start_step
        grads, values = accumulate(
            lambda part: self.gradients(state.params, constants, **part, adversarial=adversarial), inputs, self.microbatches
        )
        grad_norm = optax.tree.norm(grads["codec"])
        finite = jnp.isfinite(sum(x.mean() for x in values.values())) & jnp.isfinite(optax.tree.norm(grads))
        params, opt_state = {}, {}
        for name, part in state.params.items():
            updates, opt_state[name] = self.optimizer.update(grads[name], state.opt_state[name], part)
            params[name] = optax.apply_updates(part, updates)
        ema_params = {"codec": moving_average(state.ema_params["codec"], params["codec"], self.average.gain(state.step + 1))}
        finite &= is_finite_update(self.optimizer, params, ema_params)
        new = TrainState(state.step + 1, params, ema_params, opt_state)
        return only_if(finite, new, state), step_sums(values, {"grad_norm": grad_norm}, finite)

    def batch_spec(self, entry: str = "image") -> dict[str, jax.ShapeDtypeStruct]:
        if entry != "image":
            raise UserError("data.name is 'latents', but an autoencoder is trained on images; choose a data set of images")
        return {"label": jax.ShapeDtypeStruct((), jnp.int32), "image": jax.ShapeDtypeStruct(self.image_shape, jnp.uint8)}

    def constants(self) -> dict[str, Any]:
        return {"perceptual": perceptual.shapes()} if self.perceptual_weight else {}

    def constant_rules(self) -> dict[str, Rules]:
        return {}

    @property
    def has_auxiliary_networks(self) -> bool:
        return self.discriminator is not None or bool(self.perceptual_weight)

    def activation_bytes(self, rows: int, mesh_shape: Mapping[str, int]) -> int:
        return 0

    def savings(self, rows: int, mesh_shape: Mapping[str, int], activations: int) -> dict[str, int]:
        return {}

    def macs(self) -> int:
        return sum(self.codec.macs(self.image_shape))

    def description(self) -> list[str]:
        params = jax.eval_shape(self.init, jax.random.key(0)).params
        sizes = ", ".join(f"{name} {count_parameters(part) / 1e6:.2f} M" for name, part in params.items())
        encode, decode = (macs / 1e9 for macs in self.codec.macs(self.image_shape))
        latent = " x ".join(map(str, self.codec.latent_shape(self.image_shape)))
        what = "an image" if len(self.image_shape) == 3 else f"a clip of {self.image_shape[0]} frames"
        return [
            f"model      autoencoder to {latent} latents, {jnp.dtype(self.codec.dtype).name}: {sizes} parameters; "
            f"{encode:.3f} GMACs to encode {what}, {decode:.3f} to decode"
        ]
