"""The protocol of sampling jobs; its methods are those of the job "generate"."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from dit_jax.diffusion.process import Denoise, Process
from dit_jax.diffusion.samplers.late import start_time
from dit_jax.encoders.conditioner import Requests
from dit_jax.sample.labels import chosen_labels
from dit_jax.tasks.low_resolution import LowResolution

Arrays = Mapping[str, jax.Array]
Labels = Sequence[int] | np.ndarray | str | None


class Scene(NamedTuple):
    """What a job may ask of the pipeline.

    Fields:
        image_shape, latent_shape: of one image, without N.
        network: the network, which says what it can do.
        encode: uint8 [N, H, W, C] -> latents f32[N, h, w, c].
        noise: seed -> f32[1, h, w, c], from which image 0 of that seed is drawn.
        low_resolution: what a super-resolution stage is given; None of another network.
    """

    image_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    network: Any
    encode: Callable[[np.ndarray], np.ndarray]
    noise: Callable[[int], np.ndarray]
    low_resolution: LowResolution | None = None


class Inputs(NamedTuple):
    """What a job reads.

    Fields:
        arrays: host arrays [N, ...] by name, one row for each image, or [1, ...] for all.
        settings: JSON values that the images depend on, such as hashes; recorded with the samples and compared when a folder is
            continued.
    """

    arrays: Mapping[str, np.ndarray]
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Job:
    """Draws images from noise.

    A job is a frozen dataclass whose fields are the flags of `sample` with these names. `labels` to `inputs` run on the host, in
    this order, before anything is drawn. `sampler` to `finish` are traced, get rows [B, ...] of the arrays of `inputs`, and
    depend on no other fields than numbers.
    """

    name: ClassVar[str] = "generate"

    @property
    def numbers(self) -> dict[str, Any]:
        """The fields that are numbers. With the job's name they identify its compiled program."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, (bool, int, float))}

    def seed(self, seed: int) -> int:
        """The seed of the images' keys."""
        return seed

    def settled(self, image_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> "Job":
        """The job with what its program depends on, such as the length of a given clip; called before all other methods.

        image_shape, latent_shape: of the network.

        Raises:
            UserError: a file cannot be read, or does not fit the network.
        """
        return self

    @property
    def windows(self) -> int:
        """How often the sampler runs for one result; each time `next_given` says what is given."""
        return 1

    def output_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a result, of that of the network's images."""
        return image_shape

    def requests(self, labels: Labels, num_samples: int | None, num_classes: int, seed: int) -> tuple[Requests, str]:
        """({"label": int32[N]} and others, what the choice of labels is called in the description of samples).

        Raises:
            UserError: as `labels.chosen_labels`.
        """
        chosen, mode = chosen_labels(labels, num_samples, num_classes, seed)
        return {"label": chosen}, mode

    def inputs(self, scene: Scene, requests: Requests, num_images: int) -> Inputs:
        """Reads the files of the job. The settings are empty for "generate", and by default the name and the numbers.

        Raises:
            UserError: a file cannot be read or does not fit.
        """
        return Inputs({}, {} if self.name == Job.name else {"name": self.name, **self.numbers})

    def sampler(self, sampler: Any, process: Process) -> Any:
        """The sampler, or a part of its steps.

        Raises:
            UserError: the sampler does not support the job.
        """
        return sampler

    def key_indices(self, indices: jax.Array) -> jax.Array:
        """int32[B]: the numbers that the keys of the images with these indices are made of."""
        return indices

    def conditions(self, given: Arrays) -> Arrays:
        """Entries of the network's requests beside those of the labels or prompts."""
        return {}

    def begin(self, sampler: Any, process: Process, noise: jax.Array, given: Arrays) -> jax.Array:
        """x_t [B, h, w, c] that the sampler starts from.

        noise: f32[B, h, w, c], of the images' keys, standard normal.
        """
        return process.start(noise, start_time(sampler, process))

    def around(self, denoise: Denoise, process: Process, noise: jax.Array, given: Arrays) -> Denoise:
        """The denoiser that the sampler calls."""
        return denoise

    def known(self, given: Arrays) -> Mapping[str, jax.Array]:
        """Entries of the condition for what is given, {"known", "known_mask"}; {} for none.

        Only a network with `known_frames` is told them.
        """
        return {}

    def next_given(self, latents: jax.Array, given: Arrays) -> Mapping[str, jax.Array]:
        """The entries of `given` that change for the next window, of the latents of the last one."""
        return {}

    def joined(self, windows: jax.Array) -> jax.Array:
        """The latents of a result, of those of all windows [windows, B, ...]."""
        return windows[0]

    def finish_latents(self, latents: jax.Array, given: Arrays) -> jax.Array:
        """Latents f32[B, h, w, c] for the codec, from the sampler's."""
        return latents

    def finish(self, images: jax.Array, given: Arrays) -> jax.Array:
        """uint8 [B, H, W, C], from the decoded images."""
        return images
