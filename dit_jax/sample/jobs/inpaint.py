"""Draws the white part of a mask anew and keeps the rest of a given image."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from dit_jax.diffusion.known import KnownRegion
from dit_jax.diffusion.process import Denoise, Process
from dit_jax.diffusion.samplers.late import start_time
from dit_jax.encoders.conditioner import Requests
from dit_jax.errors import UserError
from dit_jax.sample.jobs.edit import Edit, sha256
from dit_jax.sample.jobs.given import Given, cells, for_each, read_masks, read_samples
from dit_jax.sample.jobs.job import Arrays, Inputs, Scene


@dataclass(frozen=True, eq=False)
class Inpaint(Edit):
    """Draws the white part of a mask; the rest is the given image, to the bit.

    A latent is drawn anew if any of its pixels is white. The other latents are held to the given ones at every step
    (`diffusion.known.KnownRegion`). The black pixels of the result are those of the given image: a codec would change them by its
    reconstruction error, which nobody asks for. At strength 1 what the mask hides has no influence; below, the white part starts
    from the given image with noise, as in the job edit.

    Fields:
        given: an image or clip, a file, .npy, .npz or array: one for all, or one for each.
        mask: of the image's size, white (a level of at least 128) where it is to be drawn; one for all, or one for each. Of a
            clip, an image is the mask of all frames, and a clip that of each.
        strength: in (0, 1].
        resize: scales a given image and mask of another size and crops their centres; False refuses them.

    Source: Lugmayr et al. 2022 (RePaint), equation 8, without its resampling.
    """

    strength: float = 1.0
    mask: Given = None

    name: ClassVar[str] = "inpaint"

    def inputs(self, scene: Scene, requests: Requests, num_images: int) -> Inputs:
        if self.mask is None:
            raise UserError("give what is to be drawn: --mask=<image of the same size, white where it is to be drawn>")
        arrays, settings = super().inputs(scene, requests, num_images)
        images = read_samples(self.given, scene.image_shape, self.resize)
        masks = for_each(read_masks(self.mask, scene.image_shape, self.resize), num_images, "masks")
        drawn = cells(masks, scene.latent_shape)
        return Inputs({**arrays, "images": images, "mask": masks, "drawn": drawn}, {**settings, "mask_sha256": sha256(masks)})

    def begin(self, sampler, process: Process, noise: jax.Array, given: Arrays) -> jax.Array:
        x = super().begin(sampler, process, noise, given)
        if self.strength < 1:
            return x
        return jnp.where(given["drawn"], process.start(noise, start_time(sampler, process)), x)

    def around(self, denoise: Denoise, process: Process, noise: jax.Array, given: Arrays) -> Denoise:
        return KnownRegion(denoise, process, given["x0"], noise, given["drawn"])

    def known(self, given: Arrays) -> Mapping[str, jax.Array]:
        mask = 1.0 - given["drawn"].astype(jnp.float32)
        return {"known": given["x0"] * mask, "known_mask": mask}

    def finish_latents(self, latents: jax.Array, given: Arrays) -> jax.Array:
        return jnp.where(given["drawn"], latents, given["x0"])

    def finish(self, images: jax.Array, given: Arrays) -> jax.Array:
        return jnp.where(given["mask"], images, given["images"])
