"""A network that shares nothing with DiT: it has no patches, depth, width or heads, and no field `remat`."""

import math
from typing import ClassVar

import flax.linen as nn

import dit_jax
from dit_jax.models.layers import TimeEmbedding
from dit_jax.models.network import check_entries


class Pixelwise(nn.Module):
    """Linear layers that see one pixel each; two of them, of `features` squared, are one stack."""

    features: int
    num_classes: int
    out_channels: int

    rules = ((r"kernel", (None, None)), (r"embedding", (None, None)), (r"bias", ()))
    matrices: ClassVar = {"layers/stack/kernel": "io", "(enter|leave)/kernel": "io"}
    label_table = "labels/embedding"

    @nn.compact
    def __call__(self, x_t, t, cond, control=None):
        check_entries("control", control, (), "Pixelwise")
        label = nn.Embed(self.num_classes + 1, self.features, name="labels")(cond["label"])
        c = TimeEmbedding(self.features, name="time")(t) + label
        x = nn.Dense(self.features, name="enter")(x_t) + c[:, None, None]
        for kernel in Stack(self.features, name="layers")():
            x = x + nn.gelu(x @ kernel)
        return nn.Dense(self.out_channels, name="leave")(x)

    def check(self, latent_shape):
        pass

    def macs(self, latent_shape, cond_shapes):
        return math.prod(latent_shape[:-1]) * self.features * (latent_shape[-1] + 2 * self.features + self.out_channels)

    def num_tokens(self, latent_shape):
        return math.prod(latent_shape[:-1])

    def describe(self):
        return f"Pixelwise, {self.features} features"


class Stack(nn.Module):
    features: int

    @nn.compact
    def __call__(self):
        layer = nn.vmap(Kernel, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2)
        return layer(self.features, name="stack")()


class Kernel(nn.Module):
    features: int

    @nn.compact
    def __call__(self):
        return self.param("kernel", nn.initializers.lecun_normal(), (self.features, self.features))


class AnySize(Pixelwise):
    """The same, which says that it takes images of other sizes than that of its training: multiples of 2."""

    size_unit = 2


dit_jax.register("model", "pixelwise", Pixelwise)
dit_jax.register("model", "any_size", AnySize)
