"""Diffusion: one training step and one draw of samples, as pure functions of arrays.

B batch, H x W x C images, h x w x c latents.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dit_jax.codecs.codec import Codec
from dit_jax.diffusion import guidance as guiding
from dit_jax.diffusion.forecast import Forecast, ForecastingDenoise
from dit_jax.diffusion.process import Process, noise_like
from dit_jax.errors import UserError
from dit_jax.models.macs import dit_macs
from dit_jax.parallel.rules import TRANSFORMER_RULES
from dit_jax.pixels import to_float, to_uint8
from dit_jax.tasks.state import TrainState, check_offload, count_parameters, new_state
from dit_jax.tasks.task import accumulate, mean_of, moving_average, named_key, only_if, step_sums

TIME_BUCKETS = 4


@dataclass(frozen=True)
class DiffusionTask:
    """Trains a network to undo a diffusion process on a codec's latents.

    constants: {"codec": the codec's frozen parameters}, and {"moments": [N, h, w, 2c]} where the data set lives on the devices.
    batch: {"label": int32[B]} and one of {"image": uint8[B, H, W, C]}, {"moments": [B, h, w, 2c]} of a latent cache, and
        {"row": int32[B]}, rows of constants["moments"].

    Fields:
        latent_shape: (h, w, c).
        num_classes: also the null label; 0 for unconditional.
        label_dropout: rate at which labels become the null label.
        microbatches: gradients are averaged over so many parts of the batch, one after another.
        zero1, offload: see `state.abstract_state`.

    Raises:
        UserError: a rate or number out of range.
    """

    network: nn.Module
    process: Process
    codec: Codec
    optimizer: optax.GradientTransformation
    latent_shape: tuple[int, int, int]
    num_classes: int
    label_dropout: float = 0.1
    ema_decay: float = 0.9999
    microbatches: int = 1
    zero1: bool = False
    offload: str = "none"

    rules = TRANSFORMER_RULES

    def __post_init__(self):
        if self.num_classes < 0:
            raise UserError(f"model.num_classes is {self.num_classes}; it must be at least 0 (0 is unconditional)")
        if not 0 <= self.label_dropout < 1:
            raise UserError(f"task.label_dropout is {self.label_dropout}; it must lie in [0, 1)")
        check_offload(self.offload)

    def init(self, key) -> TrainState:
        x, t = jnp.zeros((1, *self.latent_shape)), jnp.zeros((1,))
        params = self.network.init(key, x, t, self.condition(jnp.zeros((1,), jnp.int32)))["params"]
        return new_state(params, self.optimizer)

    def condition(self, labels):
        return {"label": labels} if self.num_classes else {}

    def moments(self, constants, batch):
        """The codec's moments of a batch: from the cache on the devices, from the cache on disk, or of the images."""
        if "row" in batch:
            return constants["moments"][batch["row"]]
        if "moments" in batch:
            return batch["moments"]
        return self.codec.encode(constants["codec"], to_float(batch["image"]))

    def draw_inputs(self, constants, batch, key) -> dict[str, Any]:
        """All that is random in a step, for the whole batch at once: latents, noise, times, dropped labels."""
        x0 = self.codec.sample_latent(named_key(key, "posterior"), self.moments(constants, batch))
        labels = batch["label"]
        if self.num_classes and self.label_dropout:
            labels = guiding.drop_labels(named_key(key, "label_dropout"), labels, self.num_classes, self.label_dropout)
        return {
            "x0": x0,
            "noise": jax.random.normal(named_key(key, "noise"), x0.shape, jnp.float32),
            "t": self.process.sample_time(named_key(key, "time"), x0.shape[0]),
            "cond": self.condition(labels),
        }

    def loss(self, params, x0, noise, t, cond):
        """Mean loss, and per example the loss and its named parts."""
        x_t = self.process.perturb(x0, noise, t)
        output = self.network.apply({"params": params}, x_t, self.process.network_time(t), cond)
        loss, parts = self.process.loss(output, x0, noise, t)
        return loss.mean(), {"loss": loss, **parts}

    def gradients(self, params, inputs):
        """(gradients of the mean loss, per-example losses [B])."""
        gradient = jax.grad(lambda params, part: self.loss(params, **part), has_aux=True)
        return accumulate(lambda part: gradient(params, part), inputs, self.microbatches)

    def step(self, state: TrainState, constants, batch, key) -> tuple[TrainState, dict[str, jax.Array]]:
        inputs = self.draw_inputs(constants, batch, key)
        grads, losses = self.gradients(state.params, inputs)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(losses["loss"].mean()) & jnp.isfinite(grad_norm)

        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(state.step + 1, params, moving_average(state.ema_params, params, self.ema_decay), opt_state)
        sums = step_sums(losses, {"grad_norm": grad_norm}, finite) | self.loss_by_time(losses["loss"], inputs["t"], finite)
        return only_if(finite, new, state), sums

    def loss_by_time(self, loss, t, finite):
        """Sums of the loss over quarters of the time axis."""
        bucket = jnp.minimum((t * TIME_BUCKETS).astype(jnp.int32), TIME_BUCKETS - 1)
        return {f"loss_t{b / TIME_BUCKETS:.2f}": mean_of(loss, finite & (bucket == b)) for b in range(TIME_BUCKETS)}

    def description(self) -> list[str]:
        net = self.network
        params = count_parameters(jax.eval_shape(self.init, jax.random.key(0)).params)
        return [
            f"model      {type(net).__name__} depth {net.depth} width {net.width} heads {net.heads} patch {net.patch_size} "
            f"({net.conditioning}, {jnp.dtype(net.dtype).name}): {params / 1e6:.2f} M parameters, "
            f"{dit_macs(net, self.latent_shape) / 1e9:.3f} GMACs per image",
            f"latents    {' x '.join(map(str, self.latent_shape))} of {type(self.codec).__name__}",
        ]

    def draw_latents(self, params, keys, labels, sampler, guidance, weak=None, forecast: Forecast | None = None):
        """Latents from the network, for `decode`.

        Args:
            params: of the network, usually the moving average.
            keys: [B] one key per image: an image depends on its key and label alone.
            labels: int32[B]; the null label `num_classes` asks for an unconditional image.
            weak: a second network for autoguidance, called as a `Network`, its parameters bound.
            forecast: at which steps the network's blocks run; None for all.

        Returns:
            float32[B, h, w, c].
        """
        variables, null = {"params": params}, self.condition(jnp.full_like(labels, self.num_classes))

        def network(*args):
            return self.network.apply(variables, *args)

        def run(*args):
            output, found = self.network.apply(variables, *args, mutable=["blocks"])
            return output, found["blocks"]["residual"]

        def denoise_with(network):
            guided = guidance(network, self.condition(labels), null, weak)
            return lambda x, t: self.process.predict(guided(x, t, self.process.network_time(t)), x, t)

        denoise = denoise_with(network)
        if forecast and forecast.active:
            denoise = ForecastingDenoise(forecast, run, network, denoise_with)  # `network` can also be given what its blocks add
        noise = noise_like(jax.vmap(named_key, (0, None))(keys, "noise"), self.latent_shape)
        step_keys = jax.vmap(named_key, (0, None))(keys, "steps")
        return sampler(self.process, denoise, noise, step_keys)

    def decode(self, constants, latents):
        """uint8[B, H, W, C] images of latents [B, h, w, c]."""
        return to_uint8(self.codec.decode(constants["codec"], latents))
