"""What is learned: one training step and one draw of samples, as pure functions of arrays.

B batch, H x W x C images, h x w x c latents.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dit_jax.codecs.codec import Codec
from dit_jax.diffusion import guidance as guiding
from dit_jax.diffusion.process import Process, noise_like
from dit_jax.pixels import to_float, to_uint8
from dit_jax.training.state import TrainState, new_state

TIME_BUCKETS = 4


def named_key(key, name: str):
    """A key that depends on the name alone, not on the order of calls."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


@dataclass(frozen=True)
class DiffusionTask:
    """Trains a network to undo a diffusion process on a codec's latents.

    `constants` is the codec's frozen parameters; they travel as an argument so that they can live sharded on the mesh.

    Fields:
        latent_shape: (h, w, c).
        num_classes: also the null label; 0 for unconditional.
        label_dropout: rate at which labels become the null label.
        microbatches: gradients are averaged over so many parts of the batch, one after another.
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

    def init(self, key) -> TrainState:
        x, t = jnp.zeros((1, *self.latent_shape)), jnp.zeros((1,))
        params = self.network.init(key, x, t, self.condition(jnp.zeros((1,), jnp.int32)))["params"]
        return new_state(params, self.optimizer)

    def condition(self, labels):
        return {"label": labels} if self.num_classes else {}

    def draw_inputs(self, constants, batch, key) -> dict[str, Any]:
        """All that is random in a step, for the whole batch at once: latents, noise, times, dropped labels.

        Args:
            batch: {"image": uint8[B, H, W, C], "label": int32[B]}.
        """
        moments = self.codec.encode(constants, to_float(batch["image"]))
        x0 = self.codec.sample_latent(named_key(key, "posterior"), moments)
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
        if self.microbatches == 1:
            return gradient(params, inputs)
        # Strided parts: a batch split over devices stays where it is.
        parts = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(-1, self.microbatches, *x.shape[1:]), 0, 1), inputs)

        def accumulate(total, part):
            grads, losses = gradient(params, part)
            return jax.tree.map(lambda a, b: a + b / self.microbatches, total, grads), losses

        grads, losses = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), parts)
        return grads, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1), losses)

    def step(self, state: TrainState, constants, batch, key) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step; a step whose loss or gradient is not finite changes nothing but the step count.

        Returns:
            The new state, and sums for averaging: {name: f32[2] (sum, count)}.
        """
        inputs = self.draw_inputs(constants, batch, key)
        grads, losses = self.gradients(state.params, inputs)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(losses["loss"].mean()) & jnp.isfinite(grad_norm)

        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = jax.tree.map(lambda e, p: e + (1 - self.ema_decay) * (p.astype(jnp.float32) - e),
                                  state.ema_params, params)
        new = TrainState(state.step + 1, params, ema_params, opt_state)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state.replace(step=state.step + 1))
        return kept, self.summaries(losses, inputs["t"], grad_norm, finite)

    def summaries(self, losses, t, grad_norm, finite):
        def mean_of(values, where):
            return jnp.stack([jnp.where(where, values, 0).sum(), where.sum().astype(jnp.float32)])

        usable = jnp.broadcast_to(finite, t.shape)
        sums = {name: mean_of(values, usable) for name, values in losses.items()}
        bucket = jnp.minimum((t * TIME_BUCKETS).astype(jnp.int32), TIME_BUCKETS - 1)
        for b in range(TIME_BUCKETS):
            sums[f"loss_t{b / TIME_BUCKETS:.2f}"] = mean_of(losses["loss"], usable & (bucket == b))
        sums["grad_norm"] = mean_of(grad_norm[None], finite[None])
        sums["skipped"] = jnp.stack([1 - finite.astype(jnp.float32), jnp.float32(1)])
        return sums

    def sample(self, params, constants, keys, labels, sampler, guidance, weak=None):
        """Images from the network.

        Args:
            params: of the network, usually the moving average.
            keys: [B] one key per image: an image depends on its key and label alone.
            labels: int32[B]; the null label `num_classes` asks for an unconditional image.
            weak: a second network for autoguidance, called as a `Network`, its parameters bound.

        Returns:
            uint8[B, H, W, C].
        """
        def network(x, t, cond):
            return self.network.apply({"params": params}, x, t, cond)

        null = self.condition(jnp.full_like(labels, self.num_classes))
        guided = guidance(network, self.condition(labels), null, weak)

        def denoise(x, t):
            return self.process.predict(guided(x, t, self.process.network_time(t)), x, t)

        noise = noise_like(jax.vmap(named_key, (0, None))(keys, "noise"), self.latent_shape)
        step_keys = jax.vmap(named_key, (0, None))(keys, "steps")
        latents = sampler(self.process, denoise, noise, step_keys)
        return to_uint8(self.codec.decode(constants, latents))
